//! A VM as its controllers see it: one [`Vm`] for the life of the process, whatever machine is inside it.
//!
//! A guest's reboot replaces the machine; name, disks, network and console stay.

use super::machine::{Machine, lock};
use super::vcpu::Outcome;
use crate::control::machine::{self as control, BalloonStatus, Ended, GuestMemory, MachineError, RunState, Status};
use crate::events::{Event, EventBus};
use crate::units::format_size;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// See the module.
pub struct Vm {
    /// What the configuration says and nothing changes.
    cpus: u32,
    memory_bytes: u64,
    events: Arc<EventBus>,
    /// Ends the run from outside.
    outcomes: Sender<Outcome>,
    inner: Mutex<Inner>,
}

struct Inner {
    state: RunState,
    /// When vCPUs first ran.
    started: Option<Instant>,
    /// None before the first build, between two machines, and at the end.
    machine: Option<Machine>,
}

impl Vm {
    /// A VM with no machine in it yet.
    pub fn new(cpus: u32, memory_bytes: u64, events: Arc<EventBus>, outcomes: Sender<Outcome>) -> Self {
        let inner = Inner { state: RunState::Created, started: None, machine: None };
        Self { cpus, memory_bytes, events, outcomes, inner: Mutex::new(inner) }
    }

    /// Puts a machine in, which stands still, and lets it run unless it is to wait for `resume`.
    pub fn insert(&self, machine: Machine, paused: bool) {
        let mut inner = lock(&self.inner);
        if !paused {
            machine.resume();
            let first = inner.started.is_none();
            inner.started.get_or_insert_with(Instant::now);
            inner.state = RunState::Running;
            if first {
                self.events.publish(Event::Started);
            }
        }
        inner.machine = Some(machine);
    }

    /// Takes the machine out and ends it; says whether it stood still.
    pub fn remove(&self, reason: &Outcome) -> bool {
        let mut inner = lock(&self.inner);
        let was_paused = inner.state == RunState::Paused;
        let machine = inner.machine.take();
        if let Outcome::Ended(_) = reason {
            inner.state = RunState::Ended;
        }
        // Ended outside the lock: its event loop may be about to take it, to press the power button.
        drop(inner);
        drop(machine);
        was_paused
    }

    fn publish(&self, event: Event) {
        self.events.publish(event);
    }
}

impl control::Machine for Vm {
    fn status(&self) -> Status {
        let inner = lock(&self.inner);
        let mut devices = Vec::new();
        let mut balloon = BalloonStatus::default();
        if let Some(machine) = &inner.machine {
            devices = machine.device_status();
            balloon = balloon_status(machine);
        }
        Status {
            state: inner.state,
            uptime_ms: inner.started.map_or(0, |at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)),
            vcpus: self.cpus,
            memory_bytes: self.memory_bytes,
            resident_bytes: resident_bytes(),
            balloon,
            devices,
        }
    }

    fn pause(&self) -> Result<(), MachineError> {
        let mut inner = lock(&self.inner);
        let machine = inner.machine.as_ref().ok_or(MachineError::Ended)?;
        if matches!(inner.state, RunState::Paused | RunState::Created) {
            return Ok(());
        }
        machine.pause()?;
        inner.state = RunState::Paused;
        self.publish(Event::Paused);
        Ok(())
    }

    fn resume(&self) -> Result<(), MachineError> {
        let mut inner = lock(&self.inner);
        let machine = inner.machine.as_ref().ok_or(MachineError::Ended)?;
        let event = match inner.state {
            RunState::Created => Event::Started,
            RunState::Paused => Event::Resumed,
            _ => return Ok(()),
        };
        machine.resume();
        inner.started.get_or_insert_with(Instant::now);
        inner.state = RunState::Running;
        self.publish(event);
        Ok(())
    }

    fn press_power_button(&self) -> Result<(), MachineError> {
        let mut inner = lock(&self.inner);
        let machine = inner.machine.as_ref().ok_or(MachineError::Ended)?;
        if matches!(inner.state, RunState::Paused | RunState::Created) {
            return Err(MachineError::Paused);
        }
        machine.press_power_button().map_err(|source| MachineError::Failed {
            attempted: "pressing the power button".into(),
            source: source.into(),
        })?;
        inner.state = RunState::Stopping;
        self.publish(Event::PowerButton);
        Ok(())
    }

    fn kill(&self) {
        // The receiver goes only when the VM has ended anyway.
        let _told = self.outcomes.send(Outcome::Ended(Ended::Killed));
    }

    fn set_balloon(&self, target_bytes: u64) -> Result<(), MachineError> {
        let inner = lock(&self.inner);
        let machine = inner.machine.as_ref().ok_or(MachineError::Ended)?;
        if target_bytes >= self.memory_bytes {
            let memory = format_size(self.memory_bytes);
            let text = format!("the balloon must be smaller than the guest's memory of {memory}");
            return Err(MachineError::Refused(text));
        }
        machine.balloon().set_target(target_bytes);
        Ok(())
    }
}

fn balloon_status(machine: &Machine) -> BalloonStatus {
    let snapshot = machine.balloon().snapshot();
    machine.balloon().request_stats();
    let stat = |name: &str| snapshot.stats.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
    BalloonStatus {
        target_bytes: snapshot.target_bytes,
        actual_bytes: snapshot.actual_bytes,
        guest: GuestMemory {
            swap_in_bytes: stat("swap-in"),
            swap_out_bytes: stat("swap-out"),
            major_faults: stat("major-faults"),
            minor_faults: stat("minor-faults"),
            free_bytes: stat("free-memory"),
            total_bytes: stat("total-memory"),
            available_bytes: stat("available-memory"),
            disk_caches_bytes: stat("disk-caches"),
        },
    }
}

/// Host memory that this process occupies, from `/proc/self/statm`; 0 where there is no /proc.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
