//! The local interrupt pins of the in-kernel local APIC (Intel SDM 3A, 12.5.1).

use super::VcpuSetupError;
use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 0b100 << 8;
const DELIVERY_EXTINT: u32 = 0b111 << 8;
const MASKED: u32 = 1 << 16;

/// LINT0 takes external interrupts but is masked, LINT1 takes NMIs.
///
/// The in-kernel interrupt controller contains an 8259 that no table describes and so no guest sets up: with LINT0
/// open, an edge on a line below 16 that reaches it would arrive as an exception vector.
pub fn set_local_pins(vcpu: &VcpuFd) -> Result<(), VcpuSetupError> {
    let mut state = vcpu.get_lapic().map_err(VcpuSetupError::Lapic)?;
    set_register(&mut state, LVT_LINT0, DELIVERY_EXTINT | MASKED);
    set_register(&mut state, LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&state).map_err(VcpuSetupError::Lapic)
}

fn set_register(state: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (byte, new) in state.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *byte = new as i8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_register_is_four_bytes_in_place() {
        let mut state = kvm_lapic_state::default();
        set_register(&mut state, LVT_LINT0, DELIVERY_EXTINT | MASKED);
        assert_eq!(state.regs[0x34f..0x355], [0, 0, 7, 1, 0, 0]);
    }
}
