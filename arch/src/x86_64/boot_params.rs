//! The zero page of the Linux boot protocol (Linux Documentation/arch/x86/zero-page.rst).

use super::BootError;
use super::kernel::Initrd;
use super::layout::{CMDLINE, ZERO_PAGE};
use super::memory_map::MapEntry;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// A boot loader without an assigned number (boot.rst, type_of_loader).
const LOADER_OTHER: u8 = 0xff;

/// Writes the zero page. The kernel's own `header` goes into it, completed with what a boot loader has to say.
pub fn write<M: GuestMemoryBackend>(
    ram: &M,
    header: setup_header,
    initrd: Option<Initrd>,
    map: &[MapEntry],
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: rsdp.0, ..Default::default() };
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    if let Some(initrd) = initrd {
        // Below the hole: both are less than 4 GiB.
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    for (slot, entry) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind };
        params.e820_entries += 1;
    }
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(ZERO_PAGE)), ram)
        .map_err(BootError::WriteParams)
}
