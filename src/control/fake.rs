//! A machine for tests: keeps a state, notes what was asked of it.

#![expect(missing_docs, reason = "the names say it all")]

use super::machine::{BalloonStatus, DeviceStatus, Machine, MachineError, RunState, Status};
use super::movement::{CheckReport, Limits, MigrateOrder, MoveStatus, Resolution, SaveOrder};
use std::sync::{Mutex, MutexGuard};

/// What a [`Fake`] holds.
pub struct FakeState {
    pub state: RunState,
    pub balloon_bytes: u64,
    pub asked: Vec<&'static str>,
}

/// A machine without a guest.
pub struct Fake(Mutex<FakeState>);

impl Fake {
    pub fn new(state: RunState) -> Self {
        Fake(Mutex::new(FakeState { state, balloon_bytes: 0, asked: Vec::new() }))
    }

    pub fn lock(&self) -> MutexGuard<'_, FakeState> {
        self.0.lock().unwrap()
    }

    fn note(&self, what: &'static str, state: RunState) {
        let mut fake = self.lock();
        fake.asked.push(what);
        fake.state = state;
    }
}

impl Machine for Fake {
    fn status(&self) -> Status {
        let fake = self.lock();
        Status {
            state: fake.state,
            uptime_ms: 1500,
            vcpus: 2,
            memory_bytes: 64 << 20,
            resident_bytes: 5 << 20,
            balloon: BalloonStatus { target_bytes: fake.balloon_bytes, ..BalloonStatus::default() },
            devices: vec![DeviceStatus { id: "disk0".into(), fault: Some("a loop".into()) }],
        }
    }

    fn pause(&self) -> Result<(), MachineError> {
        self.note("pause", RunState::Paused);
        Ok(())
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.note("resume", RunState::Running);
        Ok(())
    }

    fn press_power_button(&self) -> Result<(), MachineError> {
        if self.lock().state == RunState::Paused {
            return Err(MachineError::Paused);
        }
        self.note("power button", RunState::Stopping);
        Ok(())
    }

    fn kill(&self) {
        self.note("kill", RunState::Ended);
    }

    fn set_balloon(&self, target_bytes: u64) -> Result<(), MachineError> {
        self.lock().balloon_bytes = target_bytes;
        Ok(())
    }

    fn save(&self, _: SaveOrder) -> Result<(), MachineError> {
        self.note("save", RunState::Moving);
        Ok(())
    }

    fn migrate(&self, _: MigrateOrder) -> Result<(), MachineError> {
        self.note("migrate", RunState::Moving);
        Ok(())
    }

    fn check_move(&self, _: MigrateOrder) -> Result<CheckReport, MachineError> {
        Ok(CheckReport::default())
    }

    fn movement(&self) -> Option<MoveStatus> {
        None
    }

    fn cancel_move(&self) -> Result<(), MachineError> {
        Err(MachineError::Refused("it is not moving".into()))
    }

    fn set_move(&self, _: Limits) -> Result<(), MachineError> {
        self.cancel_move()
    }

    fn resolve_move(&self, _: Resolution) -> Result<(), MachineError> {
        self.cancel_move()
    }
}
