//! Saving and restoring on KVM: what goes in comes out, in another VM, and time has passed there.

use super::*;
use crate::x86_64::{CpuModel, CpuidError, model_cpuid, supported_cpuid, vcpu_cpuid};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_regs, kvm_segment,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use std::time::Instant;

const SECOND_NS: u64 = 1_000_000_000;
const CSTAR: u32 = 0xc000_0083;
const STAR: u32 = 0xc000_0081;
const LVT_TIMER: usize = 0x320;
const TSC_DEADLINE_MODE: u32 = 2 << 17;

/// A VM as the program builds it, without RAM: KVM takes the addresses of what lives there all the same.
struct Machine {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    plan: MsrPlan,
}

fn machine(cpus: u32) -> Machine {
    machine_of(cpus, CpuModel::Host).unwrap()
}

fn machine_of(cpus: u32, model: CpuModel) -> Result<Machine, CpuidError> {
    let kvm = Kvm::new().expect("this test needs /dev/kvm");
    let cpuid = model_cpuid(&supported_cpuid(&kvm)?, model)?;
    let vm = kvm.create_vm().unwrap();
    prepare_vm(&vm).unwrap();
    vm.create_irq_chip().unwrap();
    let vcpus: Vec<_> = (0..cpus)
        .map(|index| {
            let vcpu = vm.create_vcpu(index.into()).unwrap();
            vcpu.set_cpuid2(&vcpu_cpuid(&cpuid, index, cpus)).unwrap();
            vcpu
        })
        .collect();
    let plan = MsrPlan::find(&kvm, &vcpus[0]).unwrap();
    Ok(Machine { vm, vcpus, plan })
}

fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) {
    msrs::restore(vcpu, &[Msr { index, value }]).unwrap();
}

/// A guest in 64-bit mode with something different in every register that there is.
fn fill(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().unwrap();
    let segment = |selector: u16, base| kvm_segment {
        selector,
        base,
        limit: 0xf_f000 + u32::from(selector),
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { type_: 11, l: 1, db: 0, ..segment(0x10, 0) };
    (sregs.ds, sregs.es, sregs.ss) = (segment(0x18, 0), segment(0x20, 0), segment(0x28, 0));
    (sregs.fs, sregs.gs) = (segment(0x30, 0x7f00_1234_5000), segment(0x38, 0xffff_8881_0000_0000));
    sregs.tr = kvm_segment { type_: 11, s: 0, ..segment(0x40, 0xffff_fe00_0000_3000) };
    (sregs.gdt.base, sregs.gdt.limit) = (0xffff_fe00_0000_1000, 0x7f);
    (sregs.idt.base, sregs.idt.limit) = (0xffff_fe00_0000_0000, 0xfff);
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4) = (0x8005_0033, 0x1234_5678, 0x5_a000, 0x6f0);
    (sregs.cr8, sregs.efer) = (5, 0xd01);
    vcpu.set_sregs(&sregs).unwrap();
    let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15] =
        std::array::from_fn(|number| 0x1111_0000_0000 + number as u64);
    let (rip, rflags) = (0xffff_ffff_8100_0000, 0x246);
    let regs = kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags };
    vcpu.set_regs(&regs).unwrap();
    let mut xsave: kvm_xsave = vcpu.get_xsave().unwrap();
    // x87 and SSE registers, MXCSR with another rounding, and both in XSTATE_BV.
    for (number, word) in xsave.region[8..40].iter_mut().enumerate() {
        *word = if number % 4 < 2 { 0x8000_0000 + number as u32 } else { 0 };
    }
    for (number, word) in xsave.region[40..104].iter_mut().enumerate() {
        *word = 0xabc0_0000 + number as u32;
    }
    (xsave.region[6], xsave.region[128]) = (0x3f80, xsave.region[128] | 3);
    sys::set_xsave(vcpu, &xsave).unwrap();
    let mut debug = vcpu.get_debug_regs().unwrap();
    (debug.db, debug.dr6, debug.dr7) = ([0x10, 0x20, 0x30, 0x40], 0xffff_4ff1, 0x455);
    vcpu.set_debug_regs(&debug).unwrap();
    let mut lapic = vcpu.get_lapic().unwrap();
    for (register, value) in [(LVT_TIMER, TSC_DEADLINE_MODE | 0xec), (0xf0, 0x1ff), (0x350, 0x700), (0x220, 1 << 4)] {
        lapic.regs[register..register + 4].copy_from_slice(&value.to_le_bytes().map(u8::cast_signed));
    }
    vcpu.set_lapic(&lapic).unwrap();
    for (index, value) in [
        (0x174, 0x10), // SYSENTER_CS
        (0x175, 0xffff_fe00_0000_5000),
        (0xc000_0081, 0x0023_0010_0000_0000), // STAR
        (0xc000_0082, 0xffff_ffff_8180_0000),
        (0xc000_0102, 0x7fff_0000), // KERNEL_GS_BASE
        (0x277, 0x0007_0106_0007_0106),
        (0x2ff, 0xc06), // MTRR_DEF_TYPE
        (0x200, 0x8000_0000),
        (0x4b56_4d00, 0x6000), // wall clock
        (0x4b56_4d01, 0x7001), // system time, on
    ] {
        set_msr(vcpu, index, value);
    }
    let mut events = vcpu.get_vcpu_events().unwrap();
    (events.interrupt.injected, events.interrupt.nr, events.nmi.masked) = (1, 0x31, 1);
    vcpu.set_vcpu_events(&events).unwrap();
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }).unwrap();
}

/// What is saved again, with the clock of `like`, which goes on.
fn resaved(machine: &Machine, index: usize, like: &VcpuState) -> VcpuState {
    VcpuState { tsc: like.tsc.clone(), ..save_vcpu(&machine.vcpus[index], &machine.plan).unwrap() }
}

fn restored(state: &VcpuState) -> Machine {
    let machine = machine(1);
    let clock = ClockState { clock_ns: SECOND_NS, realtime_ns: state.tsc.realtime_ns };
    let elapsed = restore_clock(&machine.vm, &clock).unwrap();
    restore_vcpu(&machine.vcpus[0], state, &elapsed).unwrap();
    machine
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn every_register_comes_out_in_another_vm() {
    let source = machine(1);
    fill(&source.vcpus[0]);
    let deadline = msrs::get(&source.vcpus[0], 0x10).unwrap().unwrap() + (1 << 50);
    set_msr(&source.vcpus[0], 0x6e0, deadline);
    let state = save_vcpu(&source.vcpus[0], &source.plan).unwrap();
    assert_eq!((state.regs.r15, state.sregs.cr3, state.xsave[104 - 1]), (0x1111_0000_000f, 0x5_a000, 0xabc0_003f));
    assert_eq!((state.debug_regs.dr7, state.events.interrupt.nr, state.mp_state), (0x455, 0x31, KVM_MP_STATE_HALTED));
    for (index, value) in
        [(0x6e0, deadline), (0x2ff, 0xc06), (0x4b56_4d01, 0x7001), (0xc000_0082, 0xffff_ffff_8180_0000)]
    {
        assert!(state.msrs.contains(&Msr { index, value }), "MSR {index:#x} is not {value:#x}");
    }
    let target = restored(&state);
    assert_eq!(resaved(&target, 0, &state), state);
    let view = state.view();
    assert_eq!((view.mode, view.mp_state, view.rip), ("64-bit", "halted", 0xffff_ffff_8100_0000));
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn every_model_is_refused_by_name_or_comes_out_in_another_vm() {
    for (model, xcr0, refused_xcr0) in [(CpuModel::V2, 1, 7), (CpuModel::V3, 7, 0x207)] {
        let source = match machine_of(1, model) {
            Ok(machine) => machine,
            Err(refusal) => {
                println!("{refusal}");
                assert!(
                    refusal.to_string().starts_with(&format!("this host cannot be {model}: it lacks ")),
                    "{refusal}"
                );
                continue;
            }
        };
        let vcpu = &source.vcpus[0];
        fill(vcpu);
        let mut xcrs = vcpu.get_xcrs().unwrap();
        if xcrs.nr_xcrs > 0 {
            xcrs.xcrs[0].value = refused_xcr0;
            assert!(vcpu.set_xcrs(&xcrs).is_err(), "{model} has more than its components");
            xcrs.xcrs[0].value = xcr0;
            vcpu.set_xcrs(&xcrs).unwrap();
        }
        let state = save_vcpu(vcpu, &source.plan).unwrap();
        let target = machine_of(1, model).unwrap();
        let elapsed = restore_clock(&target.vm, &save_clock(&source.vm).unwrap()).unwrap();
        restore_vcpu(&target.vcpus[0], &state, &elapsed).unwrap();
        assert_eq!(resaved(&target, 0, &state), state);
        println!("this host can be {model}");
    }
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn page_directory_pointers_are_kept() {
    let source = machine(1);
    let mut sregs = sys::get_sregs2(&source.vcpus[0]).expect("this test needs KVM_CAP_SREGS2");
    (sregs.cr0, sregs.cr3, sregs.cr4) = (0x8000_0011, 0x3000, 0x20);
    (sregs.flags, sregs.pdptrs) = (1, [0x1001, 0x2001, 0, 0x4001]);
    (sregs.cs.db, sregs.cs.base) = (1, 0);
    sys::set_sregs2(&source.vcpus[0], &sregs).unwrap();
    let state = save_vcpu(&source.vcpus[0], &source.plan).unwrap();
    let pages = state.sregs.cr0 >> 31 == 1;
    if !pages {
        println!("this KVM (kvm_pvm) does not page with PAE: seen without pointers only");
    }
    assert_eq!(state.pdptrs, pages.then_some([0x1001, 0x2001, 0, 0x4001]));
    assert_eq!(resaved(&restored(&state), 0, &state), state);
    assert_eq!(state.view().mode, "32-bit protected");
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn a_vcpu_that_was_never_started_is_as_it_was() {
    let source = machine(2);
    let fresh = save_vcpu(&source.vcpus[1], &source.plan).unwrap();
    assert_eq!(fresh.mp_state, KVM_MP_STATE_UNINITIALIZED);
    source.vcpus[1].set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_INIT_RECEIVED }).unwrap();
    let waiting = save_vcpu(&source.vcpus[1], &source.plan).unwrap();
    let target = machine(2);
    let clock = save_clock(&source.vm).unwrap();
    let elapsed = restore_clock(&target.vm, &clock).unwrap();
    restore_vcpu(&target.vcpus[1], &waiting, &elapsed).unwrap();
    assert_eq!(resaved(&target, 1, &waiting), waiting);
    assert_eq!((waiting.view().mode, waiting.view().mp_state), ("real", "waiting for a start-up IPI"));
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn a_pending_exception_keeps_its_payload() {
    let source = machine(1);
    let mut events = source.vcpus[0].get_vcpu_events().unwrap();
    // A page fault that has not been delivered: CR2 still has its old value.
    (events.exception.pending, events.exception.nr, events.exception.has_error_code) = (1, 14, 1);
    (events.exception_has_payload, events.exception_payload) = (1, 0xdead_b000);
    source.vcpus[0].set_vcpu_events(&events).unwrap();
    let state = save_vcpu(&source.vcpus[0], &source.plan).unwrap();
    assert_eq!((state.events.exception_payload, state.sregs.cr2), (0xdead_b000, 0));
    assert_eq!(resaved(&restored(&state), 0, &state), state);
}

/// What another host lacks counts only where the guest has put something into it.
#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn an_msr_that_another_host_lacks_is_used_only_if_it_holds_something() {
    const NONE: u32 = 0xdead_0000;
    let machine = machine(1);
    let vcpu = &machine.vcpus[0];
    let among = [CSTAR, STAR, NONE];
    assert_eq!(machine.plan.lacks(&among), [NONE]);
    assert_eq!(machine.plan.used(vcpu, &among).unwrap(), []);
    set_msr(vcpu, CSTAR, 7);
    assert_eq!(machine.plan.used(vcpu, &among).unwrap(), [Msr { index: CSTAR, value: 7 }]);
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn an_msr_is_refused_by_name_unless_it_has_its_value_anyway() {
    let machine = machine(1);
    let vcpu = &machine.vcpus[0];
    // MTRRcap is read-only, and 0x0bad is no MSR.
    let here = msrs::get(vcpu, 0xfe).unwrap().unwrap();
    let values = [(0xfe, here), (0xbad, 0), (0x277, 0x0007_0406_0007_0106)];
    msrs::restore(vcpu, &values.map(|(index, value)| Msr { index, value })).unwrap();
    assert_eq!(msrs::get(vcpu, 0x277).unwrap(), Some(0x0007_0406_0007_0106), "what follows a refusal is set");
    let message = |index, value| msrs::restore(vcpu, &[Msr { index, value }]).unwrap_err().to_string();
    assert_eq!(message(0xfe, 1), format!("this host refuses MSR 0xfe with 0x1, and it has {here:#x} here"));
    assert_eq!(message(0xbad, 7), "this host refuses MSR 0xbad with 0x7, and does not know it");
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn a_state_of_the_wrong_length_is_refused() {
    let machine = machine(1);
    let elapsed = restore_clock(&machine.vm, &save_clock(&machine.vm).unwrap()).unwrap();
    let mut state = save_vcpu(&machine.vcpus[0], &machine.plan).unwrap();
    state.xsave.pop();
    let message = restore_vcpu(&machine.vcpus[0], &state, &elapsed).unwrap_err().to_string();
    assert_eq!(message, "the FPU has 1023 words instead of 1024");
    let mut chips = save_irqchip(&machine.vm).unwrap();
    chips.ioapic[0] = 1;
    let message = restore_irqchip(&machine.vm, &chips).unwrap_err().to_string();
    assert_eq!(message, "the IOAPIC is not at 0xfec00000");
    chips.pic_slave.clear();
    let message = restore_irqchip(&machine.vm, &chips).unwrap_err().to_string();
    assert_eq!(message, "the second PIC has 0 bytes instead of 16");
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn interrupt_controllers_come_out_in_another_vm() {
    let source = machine(1);
    let mut state = save_irqchip(&source.vm).unwrap();
    // Pin 4 of the IOAPIC: vector 0x34, level, to APIC 1; pin 9 masked. A mask in each PIC.
    state.ioapic[24 + 4 * 8..][..8].copy_from_slice(&0x0100_0000_0000_8034u64.to_le_bytes());
    state.ioapic[24 + 9 * 8..][..8].copy_from_slice(&0x0001_0039u64.to_le_bytes());
    (state.pic_master[2], state.pic_slave[2]) = (0xfb, 0x7f);
    restore_irqchip(&source.vm, &state).unwrap();
    assert_eq!(save_irqchip(&source.vm).unwrap(), state);
    let target = machine(1);
    restore_irqchip(&target.vm, &state).unwrap();
    assert_eq!(save_irqchip(&target.vm).unwrap(), state);
}

/// Whether KVM moves this guest's TSC; kvm_pvm gives it the host's.
fn moves_tsc(vcpu: &VcpuFd) -> bool {
    let offset = sys::tsc_offset(vcpu).expect("this test needs KVM_VCPU_TSC_OFFSET");
    sys::set_tsc_offset(vcpu, offset ^ 1 << 50).unwrap();
    let moves = sys::tsc_offset(vcpu) != Some(offset);
    sys::set_tsc_offset(vcpu, offset).unwrap();
    if !moves {
        println!("this KVM (kvm_pvm) does not move a guest's TSC: seen is what is reported then");
    }
    moves
}

/// Saves two vCPUs, their TSCs 1000 cycles apart, `slept_ns` before now (or after, if negative), and restores them.
fn sleep(slept_ns: i64) -> Elapsed {
    let source = machine(2);
    let moves_tsc = moves_tsc(&source.vcpus[0]);
    let offset = sys::tsc_offset(&source.vcpus[0]).unwrap();
    sys::set_tsc_offset(&source.vcpus[1], offset.wrapping_add(1000)).unwrap();
    let began = Instant::now();
    let mut states = source.vcpus.iter().map(|vcpu| save_vcpu(vcpu, &source.plan).unwrap()).collect::<Vec<_>>();
    let mut clock = save_clock(&source.vm).unwrap();
    clock.realtime_ns = clock.realtime_ns.wrapping_add_signed(-slept_ns);
    for state in &mut states {
        state.tsc.realtime_ns = state.tsc.realtime_ns.wrapping_add_signed(-slept_ns);
    }
    let target = machine(2);
    let elapsed = restore_clock(&target.vm, &clock).unwrap();
    // In any order: the first to come decides for all.
    for index in [1, 0] {
        restore_vcpu(&target.vcpus[index], &states[index], &elapsed).unwrap();
    }
    let again = save_vcpu(&target.vcpus[0], &target.plan).unwrap();
    let kvmclock_ns = save_clock(&target.vm).unwrap().clock_ns - clock.clock_ns;
    let test_ns = began.elapsed().as_nanos() as u64;
    let slept_ns = slept_ns.max(0).cast_unsigned();
    // A clock went on by what the guest slept, and by no more on top than what the test itself has taken; 1 ms for clocks that
    // are not equally fast.
    let went_on = |clock: &str, ns: u64| {
        assert!(ns + 1000 >= slept_ns, "{clock} advanced by {ns} ns only, not {slept_ns}");
        assert!(ns <= slept_ns + test_ns + 1_000_000, "{clock} advanced by {ns} ns, not {slept_ns}");
    };
    went_on("kvmclock", kvmclock_ns);
    if moves_tsc {
        let tsc_ns = u128::from(again.tsc.value - states[0].tsc.value) * 1_000_000 / u128::from(again.tsc.khz);
        went_on("the TSC", tsc_ns as u64);
        let offsets = target.vcpus.iter().map(|vcpu| sys::tsc_offset(vcpu).unwrap()).collect::<Vec<_>>();
        assert_eq!(offsets[1].wrapping_sub(offsets[0]), 1000);
        assert!(elapsed.tsc_behind_cycles() < 1000, "{elapsed:?}");
    } else if slept_ns > 0 {
        let behind_ns = u128::from(elapsed.tsc_behind_cycles()) * 1_000_000 / u128::from(again.tsc.khz);
        let real_ns = u128::from(slept_ns);
        assert!((real_ns * 9 / 10..=real_ns * 11 / 10).contains(&behind_ns), "{elapsed:?}");
    }
    elapsed
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn clocks_show_the_time_that_has_passed() {
    for slept_s in [0, 60, 86_400] {
        let elapsed = sleep(slept_s * SECOND_NS.cast_signed());
        assert_eq!(elapsed.skew_clamped_ns, 0);
        let slept_ns = slept_s.cast_unsigned() * SECOND_NS;
        assert!((slept_ns..slept_ns + SECOND_NS).contains(&elapsed.advance_ns), "{elapsed:?}");
    }
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn clocks_do_not_go_back_where_the_hosts_clock_is_behind() {
    let elapsed = sleep(-3600 * SECOND_NS.cast_signed());
    assert!((3590 * SECOND_NS..=3600 * SECOND_NS).contains(&elapsed.skew_clamped_ns), "{elapsed:?}");
    assert!(elapsed.advance_ns < SECOND_NS, "{elapsed:?}");
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn without_offsets_the_tsc_is_written() {
    let source = machine(1);
    let moves_tsc = moves_tsc(&source.vcpus[0]);
    let mut state = save_vcpu(&source.vcpus[0], &source.plan).unwrap();
    (state.tsc.offset, state.tsc.value) = (None, 1 << 50);
    let target = machine(1);
    let clock = ClockState { clock_ns: SECOND_NS, realtime_ns: state.tsc.realtime_ns };
    let elapsed = restore_clock(&target.vm, &clock).unwrap();
    restore_vcpu(&target.vcpus[0], &state, &elapsed).unwrap();
    let value = save_vcpu(&target.vcpus[0], &target.plan).unwrap().tsc.value;
    let near = (1 << 50)..(1 << 50) + (1 << 36);
    assert_eq!(near.contains(&value), moves_tsc, "{value:#x}");
    assert_eq!(elapsed.tsc_behind_cycles() > 1 << 36, !moves_tsc, "{elapsed:?}");
}

/// Saving stands in the stopped window: `--nocapture` shows what it takes.
#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn saving_and_restoring_are_measured() {
    let source = machine(1);
    fill(&source.vcpus[0]);
    let mut saves = Vec::from_iter((0..101).map(|_| {
        let began = Instant::now();
        save_vcpu(&source.vcpus[0], &source.plan).unwrap();
        began.elapsed()
    }));
    saves.sort_unstable();
    let save = saves[50];
    let state = save_vcpu(&source.vcpus[0], &source.plan).unwrap();
    let target = machine(1);
    let began = Instant::now();
    let elapsed = restore_clock(&target.vm, &save_clock(&source.vm).unwrap()).unwrap();
    let clock = began.elapsed();
    restore_vcpu(&target.vcpus[0], &state, &elapsed).unwrap();
    let restore = began.elapsed() - clock;
    let began = Instant::now();
    save_irqchip(&source.vm).unwrap();
    let (chips, bytes) = (began.elapsed(), postcard::to_stdvec(&state).unwrap().len());
    println!("vCPU: saved in {save:?}, {bytes} bytes, restored in {restore:?}; clock {clock:?}, irqchip {chips:?}");
}
