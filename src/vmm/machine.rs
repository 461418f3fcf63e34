//! A machine with threads: it runs, stands still, goes on, and ends. Built by [`super::build`].

use super::event_loop::EventLoop;
use super::gate::{Gate, Wanted};
use super::vcpu::VcpuThread;
use crate::control::machine::{DeviceStatus, MachineError};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use sterna_devices::legacy::Power;
use sterna_devices::virtio::balloon::BalloonHandle;
use sterna_devices::virtio::pci::VirtioPci;

/// Longest time that a kicked vCPU may take to leave the guest: only a host in deep trouble needs more than
/// microseconds.
const PARK_TIMEOUT: Duration = Duration::from_secs(10);

/// A PCI function, shared by vCPU threads, the event loop and whoever controls the machine.
pub type Function = Arc<Mutex<VirtioPci>>;

/// A machine whose vCPU threads exist, running or standing still. Dropping it ends it.
pub struct Machine {
    pub(super) gate: Arc<Gate>,
    pub(super) vcpus: Vec<VcpuThread>,
    pub(super) functions: Vec<Function>,
    pub(super) power: Arc<Mutex<Power>>,
    pub(super) balloon: BalloonHandle,
    /// Dropped after the vCPUs' end, before the functions.
    pub(super) event_loop: Option<EventLoop>,
}

impl Machine {
    /// Brings vCPUs and devices to a stand: after it nothing of the guest runs and nothing is in flight.
    ///
    /// # Errors
    /// When a vCPU does not leave the guest; then the machine runs on.
    pub fn pause(&self) -> Result<(), MachineError> {
        self.gate.set(Wanted::Pause);
        let stopped = self.kick_all().and_then(|()| {
            let count = u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX);
            let parked = self.gate.wait_parked(count, PARK_TIMEOUT);
            parked.then_some(()).ok_or_else(|| io::Error::other("a vCPU did not leave the guest within 10 s"))
        });
        if let Err(source) = stopped {
            self.gate.set(Wanted::Run);
            return Err(MachineError::Failed { attempted: "stopping the vCPUs".into(), source: source.into() });
        }
        for function in &self.functions {
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
        for function in &self.functions {
            lock(function).resume();
        }
        self.gate.set(Wanted::Run);
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&self) -> io::Result<()> {
        lock(&self.power).press_power_button()
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
        self.functions.iter().map(status).collect()
    }

    fn kick_all(&self) -> io::Result<()> {
        self.vcpus.iter().try_for_each(VcpuThread::kick)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.set(Wanted::Exit);
        if let Err(error) = self.kick_all() {
            log::error!("cannot kick a vCPU: {error}");
        }
        for vcpu in self.vcpus.drain(..) {
            vcpu.join();
        }
        self.event_loop = None;
        for function in &self.functions {
            let mut function = lock(function);
            if let Err(fault) = function.pause() {
                log::warn!("{}: {fault}", function.name());
            }
        }
    }
}

/// A panic under a lock has already ended the process.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
