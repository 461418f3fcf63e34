//! bzImage by the 64-bit boot protocol (Linux Documentation/arch/x86/boot.rst). Every field that sizes or places
//! something is checked here; linux-loader copies.

use super::BootError;
use super::kernel::{Entry, Image, Protocol, page_up};
use super::layout::KERNEL_START;
use super::memory_map::low_ram_end;
use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{KernelLoader, bootparam};
use std::fs::File;
use std::mem::size_of;
use std::os::unix::fs::FileExt;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

/// Offset of the setup header in the file and in the zero page.
const HEADER_OFFSET: u64 = 0x1f1;
/// The setup header ends this far after the jump's operand says 0.
const HEADER_END_BASE: u64 = 0x202;
/// First protocol with `xloadflags`, and so with a known 64-bit entry point.
const PROTOCOL_2_12: u16 = 0x020c;
/// The 64-bit entry point lies this far into the protected-mode part.
const ENTRY64_OFFSET: u64 = 0x200;
const SECTOR_BYTES: u64 = 512;

/// Loads the protected-mode part at 1 MiB.
pub fn load<M: GuestMemoryBackend>(ram: &M, kernel: &mut File) -> Result<Image, BootError> {
    let file_bytes = kernel.metadata().map_err(BootError::ReadKernel)?.len();
    let header = read_header(kernel, file_bytes)?;
    check_kind(&header)?;
    let end = check_size(&header, file_bytes, low_ram_end(ram))?;

    BzImage::load(ram, Some(GuestAddress(KERNEL_START)), kernel, None).map_err(BootError::LoadKernel)?;
    Ok(Image {
        entry: Entry { protocol: Protocol::Linux64, rip: KERNEL_START + ENTRY64_OFFSET },
        end,
        initrd_max: header.initrd_addr_max.into(),
        cmdline_max: header.cmdline_size as usize,
        header: setup_header { code32_start: KERNEL_START as u32, ..header },
    })
}

/// Reads the setup header as long as it says it is; the rest of the structure stays zero.
fn read_header(kernel: &File, file_bytes: u64) -> Result<setup_header, BootError> {
    let mut header = setup_header::default();
    let truncated = |needed_bytes| BootError::KernelTruncated { needed_bytes, file_bytes };
    let end = HEADER_OFFSET + size_of::<setup_header>() as u64;
    if file_bytes < end {
        return Err(truncated(end));
    }
    kernel.read_exact_at(header.as_mut_slice(), HEADER_OFFSET).map_err(BootError::ReadKernel)?;
    // The second byte of the short jump over the header.
    let [_, jump] = header.jump.to_le_bytes();
    let known = (HEADER_END_BASE + u64::from(jump) - HEADER_OFFSET) as usize;
    header.as_mut_slice().iter_mut().skip(known).for_each(|byte| *byte = 0);
    Ok(header)
}

fn check_kind(header: &setup_header) -> Result<(), BootError> {
    let [minor, major] = header.version.to_le_bytes();
    if header.version < PROTOCOL_2_12 {
        return Err(BootError::OldProtocol { major, minor });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::OtherArchitecture("32-bit x86".into()));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::KernelMalformed("it is a zImage, to be loaded below 1 MiB"));
    }
    if header.relocatable_kernel != 0 && !header.kernel_alignment.is_power_of_two() {
        return Err(BootError::KernelMalformed("kernel_alignment is not a power of two"));
    }
    Ok(())
}

/// Compares the file with its header and with RAM. Returns the first address past what the kernel uses.
fn check_size(header: &setup_header, file_bytes: u64, ram_end: u64) -> Result<u64, BootError> {
    // 0 stands for 4 (boot.rst, setup_sects).
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let setup_bytes = (setup_sectors + 1) * SECTOR_BYTES;
    let needed_bytes = setup_bytes + u64::from(header.syssize) * 16;
    if file_bytes < needed_bytes {
        return Err(BootError::KernelTruncated { needed_bytes, file_bytes });
    }
    if u64::from(header.syssize) * 16 <= ENTRY64_OFFSET {
        return Err(BootError::KernelMalformed("syssize leaves no 64-bit entry point"));
    }

    // The kernel unpacks itself to runtime_start, and works within init_size from there (boot.rst, init_size).
    let preferred = header.pref_address;
    let runtime_start = if header.relocatable_kernel == 0 {
        preferred
    } else {
        // 32-bit values: no overflow.
        KERNEL_START.next_multiple_of(header.kernel_alignment.into()).max(preferred)
    };
    let unpacked_end = runtime_start.saturating_add(header.init_size.into());
    let end = page_up(unpacked_end.max(KERNEL_START.saturating_add(file_bytes - setup_bytes)));
    if end > ram_end {
        return Err(BootError::KernelTooLarge { end, ram_end });
    }
    Ok(end)
}

/// The header that a boot loader makes up for a kernel without one.
pub fn made_up_header() -> bootparam::setup_header {
    setup_header { boot_flag: 0xAA55, header: 0x5372_6448, version: PROTOCOL_2_12, ..Default::default() }
}
