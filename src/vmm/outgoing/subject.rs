//! What is asked of a machine before it leaves, for another host or for a file.

use super::super::description::{Description, DiskMark, has_own_console, host_name, unix_ns};
use super::super::move_error::MoveError;
use super::super::vm::{Identity, Vm};
use sterna_arch::state::Msr;

/// Everything that another host or a later day needs to build the machine of `vm`.
pub fn describe(vm: &Vm, epoch: u64) -> Result<Description, MoveError> {
    let marks = vm
        .host
        .images
        .iter()
        .map(|image| DiskMark::of(image).map_err(|source| MoveError::Disk { attempt: "read", source }));
    let existing = vm.host.memory.existing().map_err(MoveError::host("ask which memory exists"))?;
    let processor = vm.host.processor()?;
    Ok(Description {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        host: host_name(),
        written_unix_ns: unix_ns(),
        config: vm.config.clone(),
        own_console: has_own_console(&vm.config),
        identity: Identity { epoch, ..vm.identity },
        cpu: processor.profile.clone(),
        state_msrs: processor.msrs.indexes().collect(),
        present_bytes: existing.count() * sterna_migration::PAGE_BYTES,
        disks: marks.collect::<Result<_, _>>()?,
    })
}

/// Refuses a machine whose last writes may stay behind.
pub fn check_caches(vm: &Vm, allowed: bool) -> Result<(), MoveError> {
    let unsafe_disk = vm.config.disks.iter().find(|disk| !disk.readonly && !disk.direct);
    match unsafe_disk.filter(|_| !allowed) {
        Some(disk) => Err(MoveError::UnsafeCache { id: disk.id.clone() }),
        None => Ok(()),
    }
}

/// Refuses a machine that uses what its target has said that it lacks: MSRs that its KVM does not have.
///
/// The guest stands still while its registers are read, for some ten microseconds a vCPU, where there is such an MSR at all.
pub fn check_msrs(vm: &Vm, unknown: &[u32]) -> Result<(), MoveError> {
    let used = if unknown.is_empty() { Vec::new() } else { vm.used_msrs(unknown)? };
    let problem = |(vcpu, msr): &(usize, Msr)| {
        let Msr { index, value } = msr;
        format!("vcpu{vcpu} has {value:#x} in MSR {index:#x}, which the target's KVM does not have")
    };
    if used.is_empty() { Ok(()) } else { Err(MoveError::Refused(used.iter().map(problem).collect())) }
}

/// Brings what the disks of `vm` were given to where it outlasts this host.
pub fn flush_disks(vm: &Vm) -> Result<(), MoveError> {
    for image in vm.host.images.iter().filter(|image| !image.readonly()) {
        image.flush().map_err(|source| MoveError::Disk { attempt: "flush", source })?;
    }
    Ok(())
}
