//! The probe guest: runs each program in a VM of its own and judges what came of it. Knows no other part of the check.

use super::programs::{LOOP, LOOP_INSTRUCTIONS, PROGRAMS, Program};
use super::sys::ProbeVm;
use super::{Check, Need, StockKernel};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use libc::{c_int, c_void, siginfo_t};
use rustix::time::{ClockId, clock_gettime};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

const GROUP: &str = "stock kernel";
/// Longest a program may take; they need microseconds natively.
const LIMIT: Duration = Duration::from_millis(200);
/// Between two attempts to get the vCPU out of the guest.
const KICK_EVERY: Duration = Duration::from_millis(5);
/// Slower than this, ring 0 is interpreted: 2 to 3 million were seen so, 114 million on a software CPU.
const MIN_INSTRUCTIONS_PER_S: u64 = 10_000_000;

const MEMORY_BYTES: usize = 2 << 20;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const CODE: u64 = 0x5000;
const SCRATCH: u64 = 0x6000;
const STACK_TOP: u64 = 0x9000;
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// What came of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// It ended, after this much processor time since its start or its last port write.
    Ended(Duration),
    /// KVM has to emulate an instruction and cannot.
    NotEmulated,
    /// The processor raised an exception.
    Exception,
    /// It did not end in time.
    TimedOut,
    /// The processor does not offer the instruction, so no kernel uses it.
    NotOffered,
    /// Something else.
    Failed(String),
}

/// Runs all programs.
pub fn check(kvm: &Kvm) -> (StockKernel, Vec<Check>) {
    let outcomes = PROGRAMS.iter().map(|program| (program.name, run(kvm, program))).collect::<Vec<_>>();
    judge(&outcomes, &fastest(kvm))
}

/// The best of three timings: what else a host does can only make it look slower.
fn fastest(kvm: &Kvm) -> Outcome {
    let mut best = run(kvm, &LOOP);
    for _ in 0..2 {
        let Outcome::Ended(time) = best else { break };
        if let Outcome::Ended(again) = run(kvm, &LOOP) {
            best = Outcome::Ended(time.min(again));
        }
    }
    best
}

fn judge(outcomes: &[(&'static str, Outcome)], speed: &Outcome) -> (StockKernel, Vec<Check>) {
    const REMEDY: &str = "use a host with SVM or VMX (hardware or nested), or the testbed: `make testbed`";
    let (mut checks, mut why) = (Vec::new(), Vec::new());
    let mut note = |name: &'static str, found: Result<String, String>| {
        if let Err(reason) = &found {
            why.push(format!("{name}: {reason}"));
        }
        checks.push(Check::new(GROUP, name, Need::Optional, found, REMEDY));
    };
    for (name, outcome) in outcomes {
        note(name, describe(outcome));
    }
    note(
        LOOP.name,
        match speed {
            Outcome::Ended(time) => {
                let per_s = LOOP_INSTRUCTIONS * 1_000_000_000 / (time.as_nanos() as u64).max(1);
                let text = format!("{}.{} million instructions/s", per_s / 1_000_000, per_s / 100_000 % 10);
                if per_s < MIN_INSTRUCTIONS_PER_S { Err(format!("{text}: it is interpreted")) } else { Ok(text) }
            }
            other => describe(other),
        },
    );
    let overall = if why.is_empty() { StockKernel::Runs } else { StockKernel::Cannot { why: why.join("; ") } };
    (overall, checks)
}

fn describe(outcome: &Outcome) -> Result<String, String> {
    match outcome {
        Outcome::Ended(_) => Ok("runs".to_owned()),
        Outcome::NotOffered => Ok("not offered, so not needed".to_owned()),
        Outcome::NotEmulated => Err("KVM emulates ring 0 and cannot emulate this".to_owned()),
        Outcome::Exception => Err("raises an exception".to_owned()),
        Outcome::TimedOut => Err(format!("not done after {} ms", LIMIT.as_millis())),
        Outcome::Failed(reason) => Err(reason.clone()),
    }
}

fn run(kvm: &Kvm, program: &Program) -> Outcome {
    let ready = match prepare(kvm, program) {
        Ok(Some(ready)) => ready,
        Ok(None) => return Outcome::NotOffered,
        Err(error) => return Outcome::Failed(format!("cannot set up the probe: {error}")),
    };
    watch(ready).unwrap_or_else(|error| Outcome::Failed(format!("cannot run the probe: {error}")))
}

/// A VM and its vCPU at the program's first instruction; `None` if the processor does not offer what the program needs.
fn prepare(kvm: &Kvm, program: &Program) -> io::Result<Option<(VcpuFd, ProbeVm)>> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    if program.needs & !features(&cpuid) != 0 {
        return Ok(None);
    }
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).map_err(io::Error::other)?;
    let words = [
        (PML4, PDPT | 3),
        (PDPT, DIRECTORY | 3),
        (DIRECTORY, 0x83),
        (GDT + 8, CODE_DESCRIPTOR),
        (GDT + 16, DATA_DESCRIPTOR),
    ];
    for (address, word) in words {
        memory.write_obj(word, GuestAddress(address)).map_err(io::Error::other)?;
    }
    memory.write_slice(program.code, GuestAddress(CODE)).map_err(io::Error::other)?;
    let vm = kvm.create_vm()?;
    vm.set_tss_address(0xfffb_d000)?;
    let probe = ProbeVm::new(vm, memory)?;
    let vcpu = probe.vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&cpuid)?;
    let mut sregs = vcpu.get_sregs()?;
    enter_long_mode(&mut sregs, features(&cpuid) & super::programs::XSAVE != 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs { rip: CODE, rsi: SCRATCH, rsp: STACK_TOP, rflags: 2, ..Default::default() })?;
    Ok(Some((vcpu, probe)))
}

/// ECX of CPUID leaf 1.
fn features(cpuid: &CpuId) -> u32 {
    cpuid.as_slice().iter().find(|leaf| leaf.function == 1).map_or(0, |leaf| leaf.ecx)
}

fn enter_long_mode(sregs: &mut kvm_sregs, xsave: bool) {
    let data =
        kvm_segment { limit: u32::MAX, selector: 0x10, type_: 3, present: 1, db: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 0x08, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = 0x8000_0033; // PG, NE, ET, MP, PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x620 | if xsave { 1 << 18 } else { 0 }; // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE
    sregs.efer = 0x500; // LMA, LME
}

/// Runs the vCPU on a thread, and gets it out of the guest when its time is up.
fn watch((mut vcpu, probe): (VcpuFd, ProbeVm)) -> io::Result<Outcome> {
    // The default for the signal is to end the process; a handler that does nothing makes KVM_RUN return instead.
    extern "C" fn nothing(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}
    let signal = SIGRTMIN() + 1;
    register_signal_handler(signal, nothing)?;
    let expired = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = channel();
    let thread = Builder::new().name("probe".to_owned()).spawn({
        let expired = Arc::clone(&expired);
        move || {
            let outcome = step(&mut vcpu, &expired);
            drop(vcpu);
            drop(probe);
            // The receiver waits until this thread is done.
            let _sent = sender.send(outcome);
        }
    })?;
    let mut patience = LIMIT;
    loop {
        match receiver.recv_timeout(patience) {
            Ok(outcome) => return Ok(outcome),
            Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("the probe's thread died")),
            Err(RecvTimeoutError::Timeout) => {
                expired.store(true, Ordering::Release);
                thread.kill(signal)?;
                patience = KICK_EVERY;
            }
        }
    }
}

fn step(vcpu: &mut VcpuFd, expired: &AtomicBool) -> Outcome {
    let mut began = thread_time();
    loop {
        if expired.load(Ordering::Acquire) {
            return Outcome::TimedOut;
        }
        return match vcpu.run() {
            Ok(VcpuExit::Hlt) => Outcome::Ended(thread_time().saturating_sub(began)),
            Ok(VcpuExit::IoOut(..)) => {
                began = thread_time();
                continue;
            }
            Ok(VcpuExit::InternalError) => Outcome::NotEmulated,
            Ok(VcpuExit::Shutdown) => Outcome::Exception,
            Ok(VcpuExit::Intr) => continue,
            Ok(exit) => Outcome::Failed(format!("unexpected exit {exit:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
            Err(error) => Outcome::Failed(format!("KVM_RUN: {error}")),
        };
    }
}

/// Processor time of this thread, in the guest and out of it: a busy host does not make the guest look slow.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn fast() -> Outcome {
        Outcome::Ended(Duration::from_micros(100))
    }

    #[test]
    fn runs_only_if_everything_does_and_fast() {
        assert_eq!(judge(&[("XRSTOR", fast())], &fast()).0, StockKernel::Runs);
        assert_eq!(judge(&[("CX16", Outcome::NotOffered)], &fast()).0, StockKernel::Runs);
        let (slow, _) = judge(&[("XRSTOR", fast())], &Outcome::Ended(Duration::from_millis(24)));
        let why = "speed of ring 0: 1.6 million instructions/s: it is interpreted".to_owned();
        assert_eq!(slow, StockKernel::Cannot { why });
    }

    #[test]
    fn every_failure_is_named_in_the_reason() {
        let outcomes = [("A", Outcome::NotEmulated), ("B", Outcome::Exception), ("C", Outcome::TimedOut)];
        let (overall, checks) = judge(&outcomes, &Outcome::Failed("KVM_RUN: no".to_owned()));
        let StockKernel::Cannot { why } = overall else { panic!("must not run") };
        for part in ["A: KVM emulates", "B: raises", "C: not done after 200 ms", "speed of ring 0: KVM_RUN: no"] {
            assert!(why.contains(part), "{part} is not in {why}");
        }
        assert!(checks.iter().all(|check| !check.present && check.remedy.is_some()));
    }

    #[test]
    #[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
    fn endless_program_is_stopped() {
        let kvm = Kvm::new().expect("this test needs /dev/kvm");
        let began = Instant::now();
        let endless = Program { name: "endless", needs: 0, code: &[0xeb, 0xfe] };
        assert_eq!(run(&kvm, &endless), Outcome::TimedOut);
        assert!(began.elapsed() < Duration::from_secs(1), "took {:?}", began.elapsed());
    }

    #[test]
    #[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
    fn exception_and_missing_feature_are_told_apart() {
        let kvm = Kvm::new().expect("this test needs /dev/kvm");
        let undefined = Program { name: "ud2", needs: 0, code: &[0x0f, 0x0b] };
        assert_eq!(run(&kvm, &undefined), Outcome::Exception);
        // Bit 31 tells that there is a hypervisor, bit 16 is reserved.
        assert_eq!(run(&kvm, &Program { name: "none", needs: 1 << 16, code: &[0xf4] }), Outcome::NotOffered);
    }
}
