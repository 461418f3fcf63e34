//! Model-specific registers that firmware would have set. KVM's reset values stand for all others, PAT among them.

use super::VcpuSetupError;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

struct BootMsr {
    name: &'static str,
    index: u32,
    value: u64,
}

/// A host that refuses one of them gives a guest that is slower, not one that is wrong.
const BOOT_MSRS: [BootMsr; 2] = [
    // Fast string operations.
    BootMsr { name: "IA32_MISC_ENABLE", index: 0x1a0, value: 1 },
    // MTRRs on, RAM is write-back: with MTRRs off Linux would give up PAT too.
    BootMsr { name: "IA32_MTRR_DEF_TYPE", index: 0x2ff, value: 1 << 11 | 6 },
];

/// Sets the boot MSRs; names each that KVM refuses and goes on.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), VcpuSetupError> {
    for msr in &BOOT_MSRS {
        let entry = kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| VcpuSetupError::MsrList)?;
        let written = vcpu.set_msrs(&msrs).map_err(VcpuSetupError::Msrs)?;
        if written == 0 {
            log::warn!("KVM refuses {} (MSR {:#x}); the guest runs without it", msr.name, msr.index);
        }
    }
    Ok(())
}
