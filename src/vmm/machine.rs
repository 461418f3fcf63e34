//! A machine with threads: it runs, stands still, goes on, and ends. Built by [`super::build`].

use super::event_loop::EventLoop;
use super::gate::{Gate, Wanted};
use super::parts::Parts;
use super::vcpu::VcpuThread;
use crate::control::machine::{DeviceStatus, MachineError};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use sterna_devices::virtio::balloon::BalloonHandle;
use sterna_devices::virtio::net::{NetHandle, announce_delays};
use sterna_devices::virtio::pci::VirtioPci;

/// Longest time that a kicked vCPU may take to leave the guest: only a host in deep trouble needs more than
/// microseconds.
const PARK_TIMEOUT: Duration = Duration::from_secs(10);

/// A PCI function, shared by vCPU threads, the event loop and whoever controls the machine.
pub type Function = Arc<Mutex<VirtioPci>>;

/// A machine whose vCPU threads exist, running or standing still. Dropping it ends it.
pub struct Machine {
    pub(super) gate: Arc<Gate>,
    pub(super) vcpus: Mutex<Vec<VcpuThread>>,
    pub(super) parts: Parts,
    pub(super) balloon: BalloonHandle,
    /// By interface.
    pub(super) nets: Vec<NetHandle>,
    /// The dirty log can be cleared chunk by chunk.
    pub(super) manual_protect: bool,
    /// Dropped after the vCPUs' end, before the functions.
    pub(super) event_loop: Mutex<Option<EventLoop>>,
}

impl Machine {
    /// Brings vCPUs and devices to a stand: after it nothing of the guest runs and nothing is in flight.
    ///
    /// # Errors
    /// When a vCPU does not leave the guest; then the machine runs on.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.gate.set(Wanted::Pause);
        let stopped = self.kick_all().and_then(|()| {
            let count = u32::try_from(self.parts.vcpus.len()).unwrap_or(u32::MAX);
            let parked = self.gate.wait_parked(count, PARK_TIMEOUT);
            parked.then_some(()).ok_or_else(|| io::Error::other("a vCPU did not leave the guest within 10 s"))
        });
        if let Err(source) = stopped {
            self.gate.set(Wanted::Run);
            return Err(MachineError::Failed { attempted: "stopping the vCPUs".into(), source: source.into() });
        }
        for function in &self.parts.board.functions {
            let mut function = lock(function);
            if let Err(fault) = function.pause() {
                // The function waits for a reset by its driver and is as still as the others.
                log::warn!("{}: {fault}", function.name());
            }
        }
        Ok(())
    }

    /// Lets devices, then vCPUs go on.
    pub fn resume(&self) {
        for function in &self.parts.board.functions {
            lock(function).resume();
        }
        self.gate.set(Wanted::Run);
    }

    /// As [`Self::resume`], of a machine that goes on elsewhere, or here after a move that came to nothing: its devices are
    /// told, so that the guest announces itself and ends connections that have stayed behind.
    pub fn resume_moved(self: &Arc<Self>) {
        for function in &self.parts.board.functions {
            let mut function = lock(function);
            function.resume();
            function.moved();
        }
        self.gate.set(Wanted::Run);
        self.announce();
    }

    /// Whether a vCPU has reset or powered off the machine, or cannot go on.
    pub fn has_ended(&self) -> bool {
        self.gate.has_ended()
    }

    /// Every part that has state.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Tells the network where the machine is: several times, on a thread of its own, since frames get lost.
    fn announce(self: &Arc<Self>) {
        if self.nets.is_empty() {
            return;
        }
        let machine = Arc::downgrade(self);
        let repeat = move || {
            for delay in announce_delays() {
                thread::sleep(delay);
                let Some(machine) = machine.upgrade() else { return };
                for net in &machine.nets {
                    if let Err(error) = net.announce_once() {
                        log::warn!("the network is not told of the move: {error}");
                    }
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("announce".into()).spawn(repeat) {
            log::warn!("the network is not told of the move: {error}");
        }
    }

    /// Tells the guest that its generation id has changed.
    pub fn notify_generation(&self) {
        if let Err(error) = lock(&self.parts.board.power).notify_generation() {
            log::warn!("the guest is not told that it is a copy: {error}");
        }
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) -> io::Result<()> {
        lock(&self.parts.board.power).press_power_button()
    }

    /// The balloon's remote control.
    pub fn balloon(&self) -> &BalloonHandle {
        &self.balloon
    }

    /// Every PCI function, in slot order.
    pub fn device_status(&self) -> Vec<DeviceStatus> {
        let status = |function: &Function| {
            let function = lock(function);
            DeviceStatus { id: function.name().to_owned(), fault: function.fault().map(str::to_owned) }
        };
        self.parts.board.functions.iter().map(status).collect()
    }

    fn kick_all(&self) -> io::Result<()> {
        lock(&self.vcpus).iter().try_for_each(VcpuThread::kick)
    }
}

impl Machine {
    /// Ends its threads and brings its devices to a stand, for good. May be repeated: whoever still holds the machine then holds
    /// nothing that runs.
    pub fn end(&self) {
        self.gate.set(Wanted::Exit);
        if let Err(error) = self.kick_all() {
            log::error!("cannot kick a vCPU: {error}");
        }
        for vcpu in lock(&self.vcpus).drain(..) {
            vcpu.join();
        }
        drop(lock(&self.event_loop).take());
        for function in &self.parts.board.functions {
            let mut function = lock(function);
            if let Err(fault) = function.pause() {
                log::warn!("{}: {fault}", function.name());
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// A panic under a lock has already ended the process.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
