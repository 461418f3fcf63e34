//! States of vCPUs, interrupt controllers and clocks from elsewhere: they are refused or read the same again, and where /dev/kvm
//! opens, KVM is given what was read. No vCPU ever runs.
#![no_main]

use arbitrary::Arbitrary;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use sterna_arch::state::{
    ClockState, IrqchipState, Msr, MsrPlan, VcpuState, prepare_vm, restore_clock, restore_irqchip, restore_vcpu,
    save_clock, save_irqchip, save_vcpu,
};
use sterna_arch::{CpuProfile, HostProfile, incompatibilities, supported_cpuid, vcpu_cpuid};
use sterna_fuzz::format_logs;
use sterna_fuzz::patch::{Patch, spoil};

#[derive(Arbitrary, Debug)]
enum Input {
    Bytes(Kind, Vec<u8>),
    /// The state of a vCPU that has never run, or a golden one, changed.
    Vcpu {
        golden: bool,
        patches: Vec<Patch>,
        msrs: Vec<(u32, u64)>,
        own_msrs: bool,
        mp_state: Option<u8>,
        cut: Option<u16>,
    },
    Irqchip(Vec<Patch>),
    Clock(u64, u64),
    Profile(Vec<Patch>),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Vcpu,
    Irqchip,
    Clock,
    Profile,
}

/// A machine that takes states again and again.
struct Machine {
    vm: VmFd,
    vcpu: VcpuFd,
    host: HostProfile,
    states: (VcpuState, IrqchipState, ClockState),
    /// Inputs that it has taken.
    taken: u32,
}

/// After so many a new machine is made.
const MOST_TAKEN: u32 = 2000;

fn machine() -> Option<Machine> {
    let kvm = Kvm::new().ok()?;
    let cpuid = supported_cpuid(&kvm).expect("what KVM supports");
    let vm = kvm.create_vm().expect("a VM");
    prepare_vm(&vm).expect("a VM as the program makes it");
    vm.create_irq_chip().expect("interrupt controllers");
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    let host = HostProfile::of(&kvm, &vcpu).expect("what this host is");
    vcpu.set_cpuid2(&vcpu_cpuid(&cpuid, 0, 1)).expect("its CPUID");
    let plan = MsrPlan::find(&kvm, &vcpu).expect("its MSRs");
    let states = (
        save_vcpu(&vcpu, &plan).expect("a vCPU's state"),
        save_irqchip(&vm).expect("the interrupt controllers' state"),
        save_clock(&vm).expect("the clock's state"),
    );
    Some(Machine { vm, vcpu, host, states, taken: 0 })
}

/// The bytes of a golden file: hexadecimal, runs written `bb*count`.
fn golden() -> Vec<u8> {
    let byte = |hex: &str| u8::from_str_radix(hex, 16).expect("hexadecimal");
    let words = include_str!("../../arch/src/x86_64/state/golden/vcpu-1.hex").split_ascii_whitespace();
    let bytes = words.flat_map(|word| match word.split_once('*') {
        Some((hex, count)) => vec![byte(hex); count.parse().expect("a number")],
        None => (0..word.len()).step_by(2).map(|at| byte(&word[at..at + 2])).collect(),
    });
    bytes.collect()
}

fn encode(state: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(state).expect("a state can be written")
}

/// Reads a state; what was read can be written and is read the same.
fn decode<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<T> {
    let state = postcard::from_bytes::<T>(bytes).ok()?;
    assert_eq!(postcard::from_bytes::<T>(&encode(&state)).as_ref(), Ok(&state));
    Some(state)
}

fn words(result: Result<(), impl std::error::Error>) {
    if let Err(error) = result {
        assert!(!error.to_string().is_empty());
    }
}

fn take(kind: Kind, bytes: &[u8], machine: Option<&Machine>) {
    match kind {
        Kind::Vcpu => {
            let Some(state) = decode::<VcpuState>(bytes) else { return };
            assert!(state.msrs.len() <= 4096 && state.xsave.len() <= 1024);
            let _view = state.view();
            let Some(Machine { vm, vcpu, states, .. }) = machine else { return };
            let elapsed = restore_clock(vm, &states.2).expect("the clock of this host");
            words(restore_vcpu(vcpu, &state, &elapsed));
            let _behind = elapsed.tsc_behind_cycles();
        }
        Kind::Irqchip => {
            let (Some(state), Some(machine)) = (decode::<IrqchipState>(bytes), machine) else { return };
            words(restore_irqchip(&machine.vm, &state));
        }
        Kind::Clock => {
            let (Some(state), Some(machine)) = (decode::<ClockState>(bytes), machine) else { return };
            words(restore_clock(&machine.vm, &state).map(drop));
        }
        Kind::Profile => {
            let (Some(guest), Some(machine)) = (decode::<CpuProfile>(bytes), machine) else { return };
            let _problems = incompatibilities(&guest, &machine.host);
            let Ok(cpuid) = guest.cpuid() else { return };
            // Refused by KVM, for all that is asked here.
            let _refused = machine.vcpu.set_cpuid2(&vcpu_cpuid(&cpuid, 0, 1));
        }
    }
}

/// What kind of state an input is, and its bytes.
fn bytes(input: Input, machine: Option<&Machine>) -> (Kind, Vec<u8>) {
    match input {
        Input::Bytes(kind, bytes) => (kind, bytes),
        Input::Vcpu { golden: is_golden, patches, msrs, own_msrs, mp_state, cut } => {
            let own = machine.filter(|_| !is_golden).map(|machine| machine.states.0.clone());
            let mut state = own.unwrap_or_else(|| decode(&golden()).expect("a golden state"));
            if !own_msrs {
                state.msrs.clear();
            }
            state.msrs.extend(msrs.into_iter().map(|(index, value)| Msr { index, value }));
            state.mp_state = mp_state.map_or(state.mp_state, u32::from);
            let mut bytes = encode(&state);
            spoil(&mut bytes, &patches);
            bytes.truncate(cut.map_or(usize::MAX, usize::from));
            (Kind::Vcpu, bytes)
        }
        Input::Irqchip(patches) => {
            let default = IrqchipState { pic_master: vec![0; 16], pic_slave: vec![0; 16], ioapic: vec![0; 216] };
            let mut bytes = encode(&machine.map_or(default, |machine| machine.states.1.clone()));
            spoil(&mut bytes, &patches);
            (Kind::Irqchip, bytes)
        }
        Input::Clock(clock_ns, realtime_ns) => (Kind::Clock, encode(&ClockState { clock_ns, realtime_ns })),
        Input::Profile(patches) => {
            let none = CpuProfile { leaves: Vec::new(), msrs: Vec::new(), xsave_bytes: 4096, tsc_khz: 0 };
            let mut bytes = encode(&machine.map_or(none, |machine| machine.host.cpu.clone()));
            spoil(&mut bytes, &patches);
            (Kind::Profile, bytes)
        }
    }
}

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
}

fuzz_target!(|input: Input| {
    format_logs();
    MACHINE.with_borrow_mut(|kept| {
        if kept.as_ref().is_none_or(|machine| machine.taken >= MOST_TAKEN) {
            *kept = machine();
        }
        let (kind, bytes) = bytes(input, kept.as_ref());
        take(kind, &bytes, kept.as_ref());
        if let Some(machine) = kept {
            machine.taken += 1;
        }
    });
});
