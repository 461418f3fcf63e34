//! A machine that stands still for a move, and one that was given away: what each may become, as types, so that nothing resumes a
//! guest that may run elsewhere.

use super::machine::Machine;
use super::vm::Vm;
use crate::control::machine::{Ended, RunState};
use std::sync::Arc;

/// A machine that stands still for a move. Dropped, it goes on.
pub struct Stopped {
    vm: Arc<Vm>,
    machine: Arc<Machine>,
    /// What it was doing.
    was: RunState,
    resumes: bool,
}

impl Stopped {
    /// The machine of `vm`, which has come to a stand.
    pub(super) fn new(vm: Arc<Vm>, machine: Arc<Machine>, was: RunState) -> Self {
        Self { vm, machine, was, resumes: true }
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Whether it stood still before, on a person's wish.
    pub fn was_paused(&self) -> bool {
        matches!(self.was, RunState::Paused | RunState::Created)
    }

    /// From here on it does not go on by itself.
    pub fn commit(mut self) -> Committed {
        self.resumes = false;
        Committed { vm: Arc::clone(&self.vm), machine: Arc::clone(&self.machine), was: self.was }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if !self.resumes {
            return;
        }
        self.vm.go_on(&self.machine, self.was);
    }
}

/// A machine that was given away: nothing on it resumes.
pub struct Committed {
    vm: Arc<Vm>,
    machine: Arc<Machine>,
    was: RunState,
}

impl Committed {
    /// It may run at its destination, or not.
    pub fn doubt(&self) {
        self.vm.set_state(RunState::InDoubt);
    }

    /// It comes back, on its destination's word or a person's.
    pub fn come_back(self) -> Stopped {
        self.vm.set_state(RunState::Moving);
        Stopped::new(self.vm, self.machine, self.was)
    }

    /// It is gone from here.
    pub fn end(self, ended: Ended) {
        let Self { vm, machine, .. } = self;
        // First: what its devices have in the file system goes with the last who holds it, and who hears of the end exits.
        drop(machine);
        vm.end(ended);
    }
}
