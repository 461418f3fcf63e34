//! What the guest is told about its address space, in the order of addresses: the source of both e820 and the PVH
//! memory map. The types are the same numbers in both (ACPI 6.5, 15.1; Xen start_info.h).

use super::layout::*;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Usable RAM.
pub const RAM: u32 = 1;
/// Not for allocation.
pub const RESERVED: u32 = 2;

/// A piece of the address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest physical address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// `RAM` or `RESERVED`.
    pub kind: u32,
}

/// First address past the RAM below the hole; 0 without any.
pub fn low_ram_end<M: GuestMemoryBackend>(ram: &M) -> u64 {
    ends(ram).filter(|&end| end <= MMIO_GAP_START).max().unwrap_or(0)
}

fn ends<M: GuestMemoryBackend>(ram: &M) -> impl Iterator<Item = u64> {
    // A region ends inside the address space: vm-memory checks it when the region is made.
    ram.iter().map(|region| region.start_addr().0.saturating_add(region.len()))
}

/// The memory map of a machine with this RAM.
pub fn memory_map<M: GuestMemoryBackend>(ram: &M) -> Vec<MapEntry> {
    let low_end = low_ram_end(ram);
    let high_end = ends(ram).max().unwrap_or(0);
    let entry = |start: u64, end: u64, kind| MapEntry { start, size: end.saturating_sub(start), kind };
    let mut map = vec![
        entry(0, low_end.min(LOW_RAM_END), RAM),
        entry(ACPI_TABLES, KERNEL_START, RESERVED),
        entry(KERNEL_START, low_end, RAM),
        // Linux uses ECAM only where the memory map or ACPI reserves it; early code looks here.
        entry(ECAM_START, ECAM_START + ECAM_SIZE, RESERVED),
        entry(HIGH_RAM_START, high_end, RAM),
    ];
    map.retain(|entry| entry.size > 0);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryMmap;

    fn map_of(bytes: u64) -> Vec<(u64, u64, u32)> {
        let ram = GuestMemoryMmap::<()>::from_ranges(&ram_ranges(bytes)).unwrap();
        memory_map(&ram).into_iter().map(|entry| (entry.start, entry.size, entry.kind)).collect()
    }

    const LOW: (u64, u64, u32) = (0, 0xA_0000, RAM);
    const BIOS: (u64, u64, u32) = (0xE_0000, 0x2_0000, RESERVED);
    const ECAM: (u64, u64, u32) = (0xE800_0000, 0x10_0000, RESERVED);
    const FULL: (u64, u64, u32) = (0x10_0000, 0xBFF0_0000, RAM);

    #[test]
    fn map_at_256_mib() {
        assert_eq!(map_of(256 << 20), [LOW, BIOS, (0x10_0000, 0xFF0_0000, RAM), ECAM]);
    }

    #[test]
    fn map_at_3_gib_and_a_page_more() {
        assert_eq!(map_of(3 << 30), [LOW, BIOS, FULL, ECAM]);
        assert_eq!(map_of((3 << 30) + 4096), [LOW, BIOS, FULL, ECAM, (1 << 32, 4096, RAM)]);
    }

    #[test]
    fn map_at_5_gib() {
        assert_eq!(map_of(5 << 30), [LOW, BIOS, FULL, ECAM, (1 << 32, 2 << 30, RAM)]);
    }
}
