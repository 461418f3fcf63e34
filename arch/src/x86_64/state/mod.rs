//! The processor side of a machine as it is saved and restored: vCPUs, interrupt controllers, clocks.
//!
//! It refuses to know streams and devices: states are plain structs with serde, each with its `VERSION`, and whoever moves them
//! chooses the codec. A state comes from a file or a peer and is hostile: lengths are bounded while they are decoded, and what
//! KVM does not take is an error that names it.
//!
//! Order, for whoever owns the machine. **Saving**: vCPUs stand still, devices are quiescent, then [`save_irqchip`],
//! [`save_vcpu`] for each vCPU, [`save_clock`]. **Restoring**, on a machine that has never run: RAM is mapped, CPUID is set,
//! then [`restore_irqchip`], [`restore_clock`], and with what that returns [`restore_vcpu`] for each vCPU. The clock comes before
//! the vCPUs because setting a vCPU's wall-clock MSR makes KVM write the machine's boot time, worked out from the clock of
//! then, into guest RAM.

mod abi;
mod clock;
mod irqchip;
mod msrs;
mod sys;
mod tsc;
mod vcpu;

#[cfg(test)]
mod golden_tests;
#[cfg(test)]
mod kvm_tests;

pub(crate) use abi::at_most;
pub use clock::{ClockState, Elapsed, restore_clock, save_clock};
pub use irqchip::{IrqchipState, restore_irqchip, save_irqchip};
pub(crate) use msrs::get as msr;
pub use msrs::{Msr, MsrPlan};
pub use tsc::TscState;
pub use vcpu::{VcpuState, VcpuView, restore_vcpu, save_vcpu};

use kvm_bindings::{KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_TRIPLE_FAULT_EVENT};
use kvm_bindings::{KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::VmFd;

/// Why a state was not saved or not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// KVM does not give a part of the state.
    #[error("cannot read {what}")]
    Read {
        /// Which part.
        what: &'static str,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM does not take a part of the state.
    #[error("cannot set {what}")]
    Set {
        /// Which part.
        what: &'static str,
        /// KVM's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM does not take an MSR, and it has another value here.
    #[error("this host refuses MSR {index:#x} with {saved:#x}, and {}", .here.map_or("does not know it".to_owned(), |value| format!("it has {value:#x} here")))]
    Msr {
        /// Which.
        index: u32,
        /// The value in the state.
        saved: u64,
        /// The value that it has on this host, if it has one.
        here: Option<u64>,
    },
    /// The guest is a hypervisor itself.
    #[error("the guest uses nested virtualisation, which does not move")]
    Nested,
    /// A value that cannot be; the text names it.
    #[error("{0}")]
    Value(String),
}

fn read(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Read { what, source }
}

fn set(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> StateError {
    move |source| StateError::Set { what, source }
}

/// Makes a new VM one whose vCPUs can be saved whole. Before its first vCPU.
///
/// Where KVM offers it, a pending exception is saved with its payload instead of half delivered, and a pending triple fault is
/// saved too; and the PMU is off, as CPUID says: AMD's basic counters have no bit there, and guests find them by family.
///
/// # Errors
/// When KVM refuses what it offers.
pub fn prepare_vm(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    // Each has one bit, by which it is offered and with which it is asked for.
    let wanted = [
        (KVM_CAP_EXCEPTION_PAYLOAD, 1),
        (KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1),
        (KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE),
    ];
    for (cap, bit) in wanted {
        if vm.check_extension_raw(cap.into()) & bit.cast_signed() != 0 {
            vm.enable_cap(&kvm_enable_cap { cap, args: [bit.into(), 0, 0, 0], ..Default::default() })?;
        }
    }
    Ok(())
}
