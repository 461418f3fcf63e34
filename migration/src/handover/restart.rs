//! What outlives the processes in the model's world, and who is started again on the strength of it: the record on each host's disk.
//!
//! A machine whose process has ended may be started from its disks, on either host, and may end, any number of times. What the
//! program does about a record it does here: `sterna run` on the source's host refuses a machine that is on its way, and one that
//! has moved where no lock would keep it from its other copy; `resolve` without a process settles the record, on a person's true word.
//! On the target's host a person starts the machine again where it has arrived, once the source has given it up for good.

use super::Phase;
use super::model::{Broken, Copy, Disks, Out, Resolution, Side, Step, World};

impl World {
    /// Takes the disk locks, where there are any.
    pub(super) fn lock(&mut self, side: Side) -> bool {
        match (self.disks, self.locks) {
            (Disks::Lun, _) => true,
            (Disks::Locked, None) => {
                self.locks = Some(side);
                true
            }
            (Disks::Locked, Some(_)) => false,
        }
    }

    fn is_free(&self) -> bool {
        self.locks.is_none()
    }

    /// What may happen to machines without a process.
    pub(super) fn restarts(&self, out: Out, steps: &mut Vec<Step>) {
        if self.source.is_none() {
            let ends = self.source_copy == Copy::Running;
            steps.extend(ends.then_some(Step::End(Side::Source)));
            let starts = self.source_copy == Copy::Gone && self.is_free() && self.record_allows(out);
            steps.extend(starts.then_some(Step::Restart(Side::Source)));
            let weak = out.contains(&Broken::PersonSaysNotRunningNow) && self.target_copy != Copy::Running;
            let here = self.record.is_some() && (self.cannot_start_there() || weak);
            steps.extend(here.then_some(Step::Settle(Resolution::Here)));
            let there = self.record == Some(Phase::OnItsWay) && self.ran_there;
            steps.extend(there.then_some(Step::Settle(Resolution::There)));
        }
        if self.target.is_none() {
            let ends = self.target_copy == Copy::Running;
            steps.extend(ends.then_some(Step::End(Side::Target)));
            let given_up = self.source_copy == Copy::Gone && self.record == Some(Phase::Moved);
            let starts = self.target_copy == Copy::Gone && self.arrived && given_up && self.is_free();
            steps.extend(starts.then_some(Step::Restart(Side::Target)));
        }
    }

    /// Whether the source's record lets its machine be started.
    fn record_allows(&self, out: Out) -> bool {
        let heeded = match self.record {
            None => true,
            Some(Phase::OnItsWay) => false,
            Some(Phase::Moved | Phase::Arrived) => self.disks == Disks::Locked,
        };
        heeded || out.contains(&Broken::StartHeedsTheRecord)
    }

    /// The machine is started from its disks: from here on what the other side has in memory is older than these.
    pub(super) fn restart(&mut self, side: Side) {
        let locked = self.lock(side);
        assert!(locked, "they were free");
        match side {
            Side::Source => (self.source_copy, self.stays_here) = (Copy::Running, true),
            Side::Target => self.target_copy = Copy::Running,
        }
    }

    /// A guest without a process of the move ends.
    pub(super) fn end(&mut self, side: Side) {
        self.killed = true;
        self.locks.take_if(|holder| *holder == side);
        match side {
            Side::Source => self.source_copy = Copy::Gone,
            Side::Target => self.target_copy = Copy::Gone,
        }
    }

    pub(super) fn settle_record(&mut self, word: Resolution) {
        self.record = match word {
            Resolution::Here => None,
            Resolution::There => Some(Phase::Moved),
        };
    }

    /// Whether a person who looks at both hosts can say what became of a machine whose source ended on the way.
    pub(super) fn a_person_can_tell(&self) -> bool {
        self.source.is_some() || self.record.is_none() || self.cannot_start_there() || self.ran_there
    }
}
