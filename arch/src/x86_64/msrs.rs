//! Model-specific registers that firmware would have set. KVM's reset values stand for all others, PAT among them.

use super::VcpuSetupError;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

struct BootMsr {
    name: &'static str,
    index: u32,
    /// Set beside what KVM's reset value has: it says, among others, that branch trace store is unavailable.
    bits: u64,
}

/// A host that refuses one of them gives a guest that is slower, not one that is wrong.
const BOOT_MSRS: [BootMsr; 2] = [
    // Fast string operations.
    BootMsr { name: "IA32_MISC_ENABLE", index: 0x1a0, bits: 1 },
    // MTRRs on, RAM is write-back: with MTRRs off Linux would give up PAT too.
    BootMsr { name: "IA32_MTRR_DEF_TYPE", index: 0x2ff, bits: 1 << 11 | 6 },
];

/// Sets the boot MSRs; names each that KVM refuses and goes on.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), VcpuSetupError> {
    for msr in &BOOT_MSRS {
        if !set_bits(vcpu, msr)? {
            log::warn!("KVM refuses {} (MSR {:#x}); the guest runs without it", msr.name, msr.index);
        }
    }
    Ok(())
}

/// False if KVM refuses the MSR: it then counts 0 MSRs read or written.
fn set_bits(vcpu: &VcpuFd, msr: &BootMsr) -> Result<bool, VcpuSetupError> {
    let entry = kvm_msr_entry { index: msr.index, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| VcpuSetupError::MsrList)?;
    if vcpu.get_msrs(&mut msrs).map_err(VcpuSetupError::Msrs)? == 0 {
        return Ok(false);
    }
    for entry in msrs.as_mut_slice() {
        entry.data |= msr.bits;
    }
    Ok(vcpu.set_msrs(&msrs).map_err(VcpuSetupError::Msrs)? == 1)
}
