//! The state a vCPU has before it first runs. Needs the in-kernel interrupt controller; refuses to run anything.

use super::kernel::Entry;
use super::{lapic, msrs, regs};
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;

/// Why a vCPU could not be set up: what was set, and KVM's answer.
#[derive(Debug, thiserror::Error)]
pub enum VcpuSetupError {
    /// `KVM_SET_CPUID2`.
    #[error("cannot set the vCPU's CPUID")]
    Cpuid(#[source] kvm_ioctls::Error),
    /// `KVM_GET_MSRS` or `KVM_SET_MSRS`.
    #[error("cannot set the vCPU's boot MSRs")]
    Msrs(#[source] kvm_ioctls::Error),
    /// The list of MSRs could not be made.
    #[error("the list of boot MSRs is too long")]
    MsrList,
    /// `KVM_GET_SREGS`, `KVM_SET_SREGS` or `KVM_SET_REGS`.
    #[error("cannot set the vCPU's registers")]
    Registers(#[source] kvm_ioctls::Error),
    /// `KVM_SET_FPU`.
    #[error("cannot set the vCPU's FPU")]
    Fpu(#[source] kvm_ioctls::Error),
    /// `KVM_GET_LAPIC` or `KVM_SET_LAPIC`.
    #[error("cannot set the vCPU's local APIC")]
    Lapic(#[source] kvm_ioctls::Error),
}

/// Sets up a vCPU: the first with `boot`, the others without; those wait for a start-up IPI in the local APIC.
pub fn setup_vcpu(vcpu: &VcpuFd, cpuid: &CpuId, boot: Option<&Entry>) -> Result<(), VcpuSetupError> {
    // CPUID first: KVM checks MSRs and control registers against it.
    vcpu.set_cpuid2(cpuid).map_err(VcpuSetupError::Cpuid)?;
    msrs::set_boot_msrs(vcpu)?;
    regs::set_fpu(vcpu)?;
    lapic::set_local_pins(vcpu)?;
    boot.map_or(Ok(()), |entry| regs::set_entry(vcpu, entry))
}
