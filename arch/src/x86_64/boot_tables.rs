//! The GDT and page tables a kernel is entered with: the least that the boot protocols want, since each page
//! written here is a page of the guest resident before it runs.

use super::BootError;
use super::kernel::Protocol;
use super::layout::{BOOT_GDT, BOOT_PAGE_TABLES, PAGE_SIZE};
use super::memory_map::low_ram_end;
use kvm_bindings::kvm_segment;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Selector of the code segment (boot.rst: `__BOOT_CS`).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segment (boot.rst: `__BOOT_DS`).
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment, whose descriptor takes two entries in long mode.
pub const TSS_SELECTOR: u16 = 0x20;
/// Last byte of the GDT: two null entries, code, data, and two for the TSS.
pub const GDT_LIMIT: u16 = 6 * 8 - 1;

/// Flat code segment: 64-bit for Linux, 32-bit for PVH.
pub fn code_segment(protocol: Protocol) -> kvm_segment {
    let long = u8::from(protocol == Protocol::Linux64);
    // Execute, read, accessed.
    kvm_segment { type_: 0xb, l: long, db: 1 - long, ..flat(CODE_SELECTOR) }
}

/// Flat data segment.
pub fn data_segment() -> kvm_segment {
    // Read, write, accessed.
    kvm_segment { type_: 3, db: 1, ..flat(DATA_SELECTOR) }
}

/// A busy task state segment at 0, which must be loaded but is never used.
pub fn task_segment() -> kvm_segment {
    kvm_segment { limit: 0x67, selector: TSS_SELECTOR, type_: 0xb, present: 1, ..Default::default() }
}

fn flat(selector: u16) -> kvm_segment {
    kvm_segment { limit: u32::MAX, selector, present: 1, s: 1, g: 1, ..Default::default() }
}

/// Writes the GDT that belongs to the segments above.
pub fn write_gdt<M: GuestMemoryBackend>(ram: &M, protocol: Protocol) -> Result<(), BootError> {
    let entries = [
        0,
        0,
        descriptor(&code_segment(protocol)),
        descriptor(&data_segment()),
        descriptor(&task_segment()),
        0, // Upper half of the TSS base.
    ];
    let bytes: Vec<u8> = entries.iter().flat_map(|entry: &u64| entry.to_le_bytes()).collect();
    ram.write_slice(&bytes, GuestAddress(BOOT_GDT)).map_err(BootError::WriteTables)
}

/// A segment as the processor reads it from memory (Intel SDM 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7;
    let flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | u64::from(access) << 40
        | (limit >> 16 & 0xf) << 48
        | u64::from(flags) << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Maps each GiB that has RAM below the hole onto itself with 2 MiB pages, from the PML4 at `BOOT_PAGE_TABLES`.
///
/// The 64-bit protocol wants the kernel's working range, the zero page and the command line mapped, all of which lie
/// there. 1 GiB pages would save a page a GiB, but not every processor has them.
pub fn write_identity_map<M: GuestMemoryBackend>(ram: &M) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 1 << 7;
    const ENTRIES: u64 = 512;

    let directories = low_ram_end(ram).div_ceil(1 << 30);
    let pdpt = BOOT_PAGE_TABLES + PAGE_SIZE;
    let directory = |gib: u64| pdpt + (1 + gib) * PAGE_SIZE;
    let write = |entries: Vec<u64>, address: u64| {
        let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_le_bytes).collect();
        ram.write_slice(&bytes, GuestAddress(address)).map_err(BootError::WriteTables)
    };
    write(vec![pdpt | PRESENT_WRITABLE], BOOT_PAGE_TABLES)?;
    write((0..directories).map(|gib| directory(gib) | PRESENT_WRITABLE).collect(), pdpt)?;
    for gib in 0..directories {
        let pages = gib * ENTRIES..(gib + 1) * ENTRIES;
        write(pages.map(|page| page << 21 | PRESENT_WRITABLE | LARGE_PAGE).collect(), directory(gib))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_known_ones() {
        assert_eq!(descriptor(&code_segment(Protocol::Linux64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code_segment(Protocol::Pvh)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task_segment()), 0x0000_8b00_0000_0067);
    }

    /// Walks the tables as a processor does.
    fn translate(ram: &vm_memory::GuestMemoryMmap, address: u64) -> Option<u64> {
        let entry = |table: u64, shift: u64| {
            let entry: u64 = ram.read_obj(GuestAddress((table & !0xfff) + (address >> shift & 0x1ff) * 8)).unwrap();
            (entry & 1 == 1).then_some(entry)
        };
        let page = entry(entry(entry(BOOT_PAGE_TABLES, 39)?, 30)?, 21)?;
        assert_eq!(page & 0x80, 0x80, "a 2 MiB page");
        Some((page & !0x1f_ffff) | (address & 0x1f_ffff))
    }

    #[test]
    fn identity_map_covers_ram_below_the_hole() {
        for bytes in [1 << 20, 1 << 30, (1 << 30) + 4096, 3 << 30, 5 << 30] {
            let ram = vm_memory::GuestMemoryMmap::from_ranges(&super::super::ram_ranges(bytes)).unwrap();
            write_identity_map(&ram).unwrap();
            let end = bytes.min(3 << 30);
            for address in [0, 0x7000, 0x10_0200, end / 2 + 0x1234, end - 1] {
                assert_eq!(translate(&ram, address), Some(address), "{address:#x} of {bytes:#x}");
            }
            assert_eq!(translate(&ram, 4 << 30), None);
        }
    }
}
