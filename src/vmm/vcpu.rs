//! The whole life of a vCPU: its thread, its exits, its standing still and its end.
//!
//! A vCPU knows the buses and the gate; it refuses to know devices and what its machine does about an [`Outcome`].
#![expect(unsafe_code, reason = "port exits of string instructions carry their width only in kvm_run")]

use super::bus::Bus;
use super::gate::{Gate, Wanted};
use super::kick::{Armed, SharedVcpu, kick};
use super::machine::lock;
use crate::control::machine::Ended;
use kvm_bindings::KVM_EXIT_IO_OUT;
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::{Builder, JoinHandle};
use sterna_devices::Effect;

/// What ends a run of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest wants to start again from its kernel.
    Reset,
    /// The guest is gone for good.
    Ended(Ended),
}

/// What a vCPU shares with the others.
#[derive(Clone)]
pub struct Shared {
    /// Port space.
    pub ports: Arc<Bus>,
    /// Memory space outside RAM.
    pub mmio: Arc<Bus>,
    /// Where it stands still.
    pub gate: Arc<Gate>,
    /// Where it tells what ends the run.
    pub outcomes: Sender<Outcome>,
}

/// A vCPU's thread, as its machine holds it.
pub struct VcpuThread(JoinHandle<()>);

impl VcpuThread {
    /// Starts the thread; what it does is up to the gate. It holds the lock of `vcpu` while it does not stand still.
    pub fn spawn(index: u32, vcpu: SharedVcpu, shared: Shared) -> io::Result<Self> {
        let run = move || {
            let _armed = Armed::new(Arc::clone(&vcpu));
            Life { index, shared }.live(&vcpu);
        };
        Builder::new().name(format!("vcpu{index}")).spawn(run).map(Self)
    }

    /// Makes the thread look at the gate.
    pub fn kick(&self) -> io::Result<()> {
        kick(&self.0)
    }

    /// Waits for the end of the thread, which the gate must have been told to want.
    pub fn join(self) {
        // A panic in it has already ended the process.
        let _ended = self.0.join();
    }
}

/// A vCPU's thread from the inside.
struct Life {
    index: u32,
    shared: Shared,
}

/// What to do after an exit.
enum Next {
    /// Go on with the guest.
    Run,
    /// See what is wanted.
    Look,
    /// Tell, and stand still for good.
    Stop(Outcome),
}

impl Life {
    fn live(&self, vcpu: &SharedVcpu) {
        while self.shared.gate.pass() != Wanted::Exit {
            let outcome = self.run(&mut lock(vcpu));
            if let Some(outcome) = outcome {
                // The receiver goes only with the machine, which then wants this thread to exit.
                let _told = self.shared.outcomes.send(outcome);
                self.shared.gate.park_for_good();
                return;
            }
        }
    }

    /// Runs the guest until it is to be seen what is wanted, or until it cannot go on.
    fn run(&self, vcpu: &mut VcpuFd) -> Option<Outcome> {
        loop {
            match self.run_once(vcpu) {
                Next::Run => {}
                Next::Look => return None,
                Next::Stop(outcome) => return Some(outcome),
            }
        }
    }

    fn run_once(&self, vcpu: &mut VcpuFd) -> Next {
        let exit = match vcpu.run() {
            Ok(exit) => exit,
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => return self.interrupted(vcpu),
            Err(error) => {
                let what = format!("KVM_RUN: {}", io::Error::from_raw_os_error(error.errno()));
                return self.internal_error(vcpu, &what);
            }
        };
        match exit {
            VcpuExit::MmioRead(address, data) => self.shared.mmio.read(address, data),
            VcpuExit::MmioWrite(address, data) => return after(self.shared.mmio.write(address, data)),
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => return self.port_access(vcpu),
            VcpuExit::Shutdown => return Next::Stop(Outcome::Ended(Ended::TripleFault)),
            VcpuExit::Intr => return self.interrupted(vcpu),
            VcpuExit::InternalError => return self.kvm_internal_error(vcpu),
            VcpuExit::FailEntry(reason, _) => {
                return self.internal_error(vcpu, &format!("entry failed, reason {reason:#x}"));
            }
            other => {
                let what = format!("unexpected exit {other:?}");
                return self.internal_error(vcpu, &what);
            }
        }
        Next::Run
    }

    /// Out of the guest because somebody kicked. The access that was under way is complete.
    fn interrupted(&self, vcpu: &mut VcpuFd) -> Next {
        vcpu.set_kvm_immediate_exit(0);
        if self.shared.gate.wanted() == Wanted::Pause {
            // Tells the guest that it stood still, so that its watchdogs do not report a lock-up (KVM API, 4.65).
            // Refused while the guest does not use kvmclock, and then there is nothing to tell.
            let _refused = vcpu.kvmclock_ctrl();
        }
        Next::Look
    }

    /// A port access, element by element: `rep outsb` of two bytes is not `outw`.
    fn port_access(&self, vcpu: &mut VcpuFd) -> Next {
        let run = vcpu.get_kvm_run();
        // SAFETY: only called right after an exit for which KVM fills in `io`; plain integers, so any bits are valid.
        let access = unsafe { run.__bindgen_anon_1.io };
        let (size, bytes) = (usize::from(access.size.max(1)), usize::from(access.size) * access.count as usize);
        let start = (&raw mut *run).cast::<u8>().wrapping_add(access.data_offset as usize);
        // SAFETY: KVM puts `count` elements of `size` bytes at `data_offset` inside the mapping of `kvm_run`, which
        // this thread alone uses until the next KVM_RUN.
        let data = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
        let is_write = u32::from(access.direction) == KVM_EXIT_IO_OUT;
        for element in data.chunks_mut(size) {
            if !is_write {
                self.shared.ports.read(u64::from(access.port), element);
                continue;
            }
            match after(self.shared.ports.write(u64::from(access.port), element)) {
                Next::Run => {}
                next => return next,
            }
        }
        Next::Run
    }

    fn kvm_internal_error(&self, vcpu: &mut VcpuFd) -> Next {
        // SAFETY: only called right after KVM_EXIT_INTERNAL_ERROR, for which KVM fills in `internal`; plain integers.
        let suberror = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let why = match suberror {
            kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction of the guest",
            kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM cannot deliver an event to the guest",
            _ => "KVM reports an internal error",
        };
        self.internal_error(
            vcpu,
            &format!("{why} (suberror {suberror}); `sterna host check` tells what this host can run"),
        )
    }

    fn internal_error(&self, vcpu: &VcpuFd, what: &str) -> Next {
        let place = match vcpu.get_regs() {
            Ok(regs) => format!(" at {:#x}", regs.rip),
            Err(_) => String::new(),
        };
        Next::Stop(Outcome::Ended(Ended::InternalError(format!("vCPU {}{place}: {what}", self.index))))
    }
}

fn after(effect: Effect) -> Next {
    match effect {
        Effect::None => Next::Run,
        Effect::Reset => Next::Stop(Outcome::Reset),
        Effect::PowerOff => Next::Stop(Outcome::Ended(Ended::PoweredOff)),
        Effect::GuestPanic => Next::Stop(Outcome::Ended(Ended::GuestPanic)),
    }
}
