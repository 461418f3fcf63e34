//! The PVH start info: what EBX points at when a PVH kernel is entered (Xen start_info.h, version 1).

use super::BootError;
use super::kernel::Initrd;
use super::layout::{CMDLINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use super::memory_map::MapEntry;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Writes start info, memory map and, with an initrd, the list of one module.
pub fn write<M: GuestMemoryBackend>(
    ram: &M,
    initrd: Option<Initrd>,
    map: &[MapEntry],
    rsdp: GuestAddress,
) -> Result<(), BootError> {
    let memory_map: Vec<_> = map
        .iter()
        .map(|entry| hvm_memmap_table_entry { addr: entry.start, size: entry.size, type_: entry.kind, reserved: 0 })
        .collect();
    let start_info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { PVH_MODULES } else { 0 },
        cmdline_paddr: CMDLINE,
        rsdp_paddr: rsdp.0,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: memory_map.len() as u32,
        ..Default::default()
    };

    let mut params = BootParams::new(&start_info, GuestAddress(PVH_START_INFO));
    params.set_sections(&memory_map, GuestAddress(PVH_MEMORY_MAP));
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.size, ..Default::default() };
        params.set_modules(&[module], GuestAddress(PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, ram).map_err(BootError::WriteParams)
}
