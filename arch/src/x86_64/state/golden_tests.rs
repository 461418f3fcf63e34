//! The layout of version 1 of each state, for ever; and hostile bytes.
//!
//! A golden file is hexadecimal, with a run of one byte written `bb*count`. A file never changes: a new layout is a new version,
//! with a file of its own.

use super::*;
use kvm_bindings::{kvm_debugregs, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs};
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

fn bytes_of(golden: &str) -> Vec<u8> {
    let byte = |hex| u8::from_str_radix(hex, 16).unwrap();
    golden
        .split_ascii_whitespace()
        .flat_map(|word| match word.split_once('*') {
            Some((hex, count)) => vec![byte(hex); count.parse().unwrap()],
            None => (0..word.len()).step_by(2).map(|at| byte(&word[at..at + 2])).collect(),
        })
        .collect()
}

/// The other direction, for the message of a test that fails.
fn golden_of(bytes: &[u8]) -> String {
    let mut text = String::new();
    for run in bytes.chunk_by(|a, b| a == b) {
        if run.len() > 4 {
            text += &format!("\n{:02x}*{}\n", run[0], run.len());
        } else {
            run.iter().for_each(|byte| text += &format!("{byte:02x}"));
        }
    }
    text
}

#[track_caller]
fn assert_golden<T: Serialize + DeserializeOwned + PartialEq + Debug>(golden: &str, state: &T) {
    let bytes = bytes_of(golden);
    let encoded = postcard::to_stdvec(state).unwrap();
    assert!(encoded == bytes, "this version's layout has changed to:\n{}", golden_of(&encoded));
    assert_eq!(&postcard::from_bytes::<T>(&bytes).unwrap(), state);
    for shorter in 0..bytes.len() {
        assert!(postcard::from_bytes::<T>(&bytes[..shorter]).is_err(), "{shorter} bytes are enough");
    }
}

fn vcpu() -> VcpuState {
    let mut lapic = kvm_lapic_state { regs: [0; 1024] };
    lapic.regs[0x20..0x24].copy_from_slice(&[1, 2, 3, -4]);
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { value: 7, ..Default::default() };
    let mut xsave = vec![0; 1024];
    (xsave[0], xsave[6], xsave[128]) = (0x37f, 0x1f80, 3);
    let mut events = kvm_vcpu_events { flags: 0x1d, exception_payload: 0x5000, ..Default::default() };
    events.nmi.masked = 1;
    VcpuState {
        mp_state: 3,
        regs: kvm_regs { rax: 1, r15: 0x1516, rip: 0xffff_ffff_8100_0000, rflags: 0x246, ..Default::default() },
        sregs: kvm_sregs { cr0: 0x8005_0033, efer: 0xd01, apic_base: 0xfee0_0900, ..Default::default() },
        pdptrs: Some([0x1001, 0, 0, 0x4001]),
        xsave,
        xcrs,
        debug_regs: kvm_debugregs { db: [1, 2, 3, 4], dr6: 0xffff_0ff0, dr7: 0x400, ..Default::default() },
        lapic,
        events,
        tsc: TscState {
            value: 1 << 40,
            realtime_ns: 1_764_000_000_000_000_000,
            khz: 2_596_142,
            offset: Some(u64::MAX),
        },
        msrs: vec![Msr { index: 0x277, value: 0x0007_0406_0007_0406 }, Msr { index: 0xc000_0082, value: 1 }],
    }
}

#[test]
fn version_1_of_a_vcpu_is_read_for_ever() {
    assert_eq!(VcpuState::VERSION, 1);
    assert_golden(include_str!("golden/vcpu-1.hex"), &vcpu());
}

#[test]
fn version_1_of_the_interrupt_controllers_is_read_for_ever() {
    assert_eq!(IrqchipState::VERSION, 1);
    let count = |length: u8| (0..length).collect::<Vec<_>>();
    let state = IrqchipState { pic_master: count(16), pic_slave: count(16), ioapic: count(216) };
    assert_golden(include_str!("golden/irqchip-1.hex"), &state);
}

#[test]
fn version_1_of_the_clock_is_read_for_ever() {
    assert_eq!(ClockState::VERSION, 1);
    let state = ClockState { clock_ns: 123_456_789, realtime_ns: 1_764_000_000_000_000_000 };
    assert_golden(include_str!("golden/clock-1.hex"), &state);
}

#[test]
fn a_structure_has_exactly_its_bytes() {
    let mut bytes = postcard::to_stdvec(&vcpu()).unwrap();
    // The length of the general registers follows the run state; kvm-bindings itself would take one byte less.
    assert_eq!(bytes[1..3], [0x90, 0x01]);
    bytes[1] = 0x8f;
    bytes.remove(3);
    assert!(postcard::from_bytes::<VcpuState>(&bytes).is_err());
}

#[test]
fn lists_are_bounded() {
    let state = VcpuState { xsave: vec![0; 1025], ..vcpu() };
    assert!(postcard::from_bytes::<VcpuState>(&postcard::to_stdvec(&state).unwrap()).is_err());
    let state = VcpuState { msrs: vec![Msr { index: 0, value: 0 }; 4097], ..vcpu() };
    assert!(postcard::from_bytes::<VcpuState>(&postcard::to_stdvec(&state).unwrap()).is_err());
    let state = IrqchipState { pic_master: vec![0; 17], pic_slave: vec![], ioapic: vec![] };
    assert!(postcard::from_bytes::<IrqchipState>(&postcard::to_stdvec(&state).unwrap()).is_err());
}

#[test]
fn every_mode_has_its_name() {
    let mut state = vcpu();
    let mut mode = |cr0, efer, l, db, rflags| {
        (state.sregs.cr0, state.sregs.efer, state.regs.rflags) = (cr0, efer, rflags);
        (state.sregs.cs.l, state.sregs.cs.db) = (l, db);
        state.view().mode
    };
    assert_eq!(mode(0x10, 0, 0, 0, 2), "real");
    assert_eq!(mode(0x11, 0, 0, 0, 2), "16-bit protected");
    assert_eq!(mode(0x11, 0, 0, 1, 2), "32-bit protected");
    assert_eq!(mode(0x11, 0, 0, 1, 1 << 17 | 2), "virtual 8086");
    assert_eq!(mode(0x8000_0011, 0x500, 0, 1, 2), "compatibility");
    assert_eq!(mode(0x8000_0011, 0x500, 1, 0, 2), "64-bit");
}

proptest! {
    #[test]
    fn random_bytes_are_refused_or_read_within_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        if let Ok(state) = postcard::from_bytes::<VcpuState>(&bytes) {
            prop_assert!(state.xsave.len() <= 1024 && state.msrs.len() <= 4096);
        }
        if let Ok(state) = postcard::from_bytes::<IrqchipState>(&bytes) {
            prop_assert!(state.ioapic.len() <= 216);
        }
        let _clock = postcard::from_bytes::<ClockState>(&bytes);
    }

    #[test]
    fn a_damaged_state_is_refused_or_read(at in 0usize..4096, value: u8) {
        let mut bytes = postcard::to_stdvec(&vcpu()).unwrap();
        let at = at % bytes.len();
        bytes[at] = value;
        if let Ok(state) = postcard::from_bytes::<VcpuState>(&bytes) {
            prop_assert!(state.xsave.len() <= 1024 && state.msrs.len() <= 4096);
            let _view = state.view();
        }
    }
}
