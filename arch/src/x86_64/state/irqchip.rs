//! The interrupt controllers that the VM has beside its vCPUs' local APICs: two PICs and the IOAPIC. There is no PIT.
//!
//! An interrupt must not be between two places when they are saved. A device hands an MSI to KVM through an irqfd; one to a
//! single vCPU is in that vCPU's local APIC before the device's write returns, and the local APIC is saved with the vCPU. But KVM
//! hands a pin's interrupt, and an MSI to several vCPUs, to a worker of the kernel, which no call waits for except taking the irqfd
//! away. So the order is: devices are quiescent, so that nothing new is on its way; then this; then the vCPUs, whose local APICs
//! receive what passes the IOAPIC. What the worker still holds is gone, and the target makes up for it: on resume each device
//! signals every vector in use once more (drivers look at their queues and find nothing new at worst), and whoever drives a pin
//! drives its level again, which KVM does not save either. Refuses to know which device is behind a pin.

use super::sys::{self, CHIP_BYTES};
use super::{StateError, at_most, read, set};
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// `struct kvm_pic_state`.
const PIC_BYTES: usize = 16;
/// `struct kvm_ioapic_state`: a header, and 24 pins.
const IOAPIC_BYTES: usize = 24 + 24 * 8;
/// Where it is; no guest can move it.
const IOAPIC_BASE: u64 = 0xfec0_0000;

const NAMES: [(u32, &str); 3] = [
    (KVM_IRQCHIP_PIC_MASTER, "the first PIC"),
    (KVM_IRQCHIP_PIC_SLAVE, "the second PIC"),
    (KVM_IRQCHIP_IOAPIC, "the IOAPIC"),
];

/// The interrupt controllers, as KVM's ABI lays them out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqchipState {
    /// `struct kvm_pic_state` of the first.
    #[serde(deserialize_with = "at_most::<PIC_BYTES, _, _>")]
    pub pic_master: Vec<u8>,
    /// `struct kvm_pic_state` of the second.
    #[serde(deserialize_with = "at_most::<PIC_BYTES, _, _>")]
    pub pic_slave: Vec<u8>,
    /// `struct kvm_ioapic_state`.
    #[serde(deserialize_with = "at_most::<IOAPIC_BYTES, _, _>")]
    pub ioapic: Vec<u8>,
}

impl IrqchipState {
    /// Of the layout above.
    pub const VERSION: u16 = 1;
}

/// Saves the interrupt controllers of a machine that stands still.
///
/// # Errors
/// What KVM refuses.
pub fn save_irqchip(vm: &VmFd) -> Result<IrqchipState, StateError> {
    let chip = |(id, what), bytes| Ok(sys::irqchip(vm, id).map_err(read(what))?[..bytes].to_vec());
    let [master, slave, ioapic] = NAMES;
    Ok(IrqchipState {
        pic_master: chip(master, PIC_BYTES)?,
        pic_slave: chip(slave, PIC_BYTES)?,
        ioapic: chip(ioapic, IOAPIC_BYTES)?,
    })
}

/// Sets the interrupt controllers of a machine that has never run.
///
/// # Errors
/// A state of another length or place, before anything is set; what KVM refuses.
pub fn restore_irqchip(vm: &VmFd, state: &IrqchipState) -> Result<(), StateError> {
    let IrqchipState { pic_master, pic_slave, ioapic } = state;
    let lengths = [(pic_master, PIC_BYTES), (pic_slave, PIC_BYTES), (ioapic, IOAPIC_BYTES)];
    for ((_, name), (bytes, wanted)) in NAMES.iter().zip(lengths) {
        if bytes.len() != wanted {
            return Err(StateError::Value(format!("{name} has {} bytes instead of {wanted}", bytes.len())));
        }
    }
    if !ioapic.starts_with(&IOAPIC_BASE.to_le_bytes()) {
        return Err(StateError::Value(format!("the IOAPIC is not at {IOAPIC_BASE:#x}")));
    }
    for ((id, name), bytes) in NAMES.into_iter().zip([pic_master, pic_slave, ioapic]) {
        let mut chip = [0; CHIP_BYTES];
        chip[..bytes.len()].copy_from_slice(bytes);
        sys::set_irqchip(vm, id, &chip).map_err(set(name))?;
    }
    Ok(())
}
