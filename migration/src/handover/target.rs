//! The side that receives the guest: one process, built for one move, that may start the guest once or discard it for ever.

use super::{Answer, Move, Order, Refusal, check_move};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a move stands at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetState {
    /// The machine is being built from the configuration that came.
    Building,
    /// A machine that has never run takes pages.
    Ready,
    /// The last pages and the state are being loaded.
    Loading,
    /// The guest is complete and waits for Go, `TARGET_WAIT` at most.
    Loaded,
    /// Go is here; the disk locks are being taken.
    Locking,
    /// The end: it runs, or ran, here.
    Running,
    /// The end: it never started here and never will.
    Discarded,
}

impl fmt::Display for TargetState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Building => "The guest is at the source; a machine is being built for it here.",
            Self::Ready => "The guest is at the source; its memory is arriving here.",
            Self::Loading => "The guest stands still at the source; its state is being loaded here.",
            Self::Loaded => {
                "The guest stands still at the source and is complete here; it starts when the source says so."
            }
            Self::Locking => {
                "The guest stands still at the source and starts here as soon as its disk locks are taken."
            }
            Self::Running => "The guest has started here.",
            Self::Discarded => "The guest is at the source; it never started here and cannot any more.",
        })
    }
}

/// What happens to a target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetEvent {
    /// The source says this about that move, over any connection.
    Order(Move, Order),
    /// The machine is built and parked, everything it needs but the disks' locks is taken.
    Built,
    /// The last pages and the state are here.
    StateArrived,
    /// `Load` is done: the guest is complete.
    StateLoaded,
    /// `TakeLocks` is done: all of them are held.
    LocksTaken,
    /// `TakeLocks` failed, for this reason: none is held.
    LocksRefused(String),
    /// The connection to the source is gone.
    Lost,
    /// The caller's patience with this state is at an end; in `Loaded` that is `TARGET_WAIT`.
    TimedOut,
    /// Something failed here, for this reason.
    Failed(String),
}

/// What the caller of a target does. What can fail comes last in its list and says what event tells how it went.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetAction {
    /// Say this over the newest connection, if there is one. That it could not be said is no event.
    Send(Answer),
    /// Apply the state to the machine. Then `StateLoaded` or `Failed`.
    Load,
    /// `TimedOut` is to come after `TARGET_WAIT`, whatever happens to connections.
    ArmWait,
    /// Take all disk locks, or none. Then `LocksTaken` or `LocksRefused`.
    TakeLocks,
    /// Write "starting" into the keeper's pipe. That the keeper is gone is no failure: then nobody speaks for this process.
    TellKeeper,
    /// Put the guest into the run state in which the source stopped it. If that fails, this process ends.
    Start,
    /// Tell the network where the guest is now.
    Announce,
    /// Write the record, durably: the guest arrived here. A failure changes nothing.
    WriteRecord,
    /// Destroy the machine, which has never run.
    Discard,
}

/// The target of one move.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// The only move it listens to.
    this_move: Move,
    /// Where it stands.
    state: TargetState,
}

impl Target {
    /// A target that is about to build its machine.
    pub fn new(this_move: Move) -> Self {
        Self { this_move, state: TargetState::Building }
    }

    /// One that stands in `state`, however it got there.
    #[cfg(test)]
    pub(super) fn at(this_move: Move, state: TargetState) -> Self {
        Self { this_move, state }
    }

    /// Where it stands.
    pub fn state(&self) -> TargetState {
        self.state
    }

    /// Takes one event; the actions are to be performed in order, before the next event.
    ///
    /// # Errors
    /// What has no place in this state. Nothing has changed.
    pub fn on(&mut self, event: TargetEvent) -> Result<Vec<TargetAction>, Refusal> {
        use TargetAction::*;
        use TargetEvent::*;
        use TargetState::*;
        if let Order(got, _) = &event {
            check_move(self.this_move, *got)?;
        }
        let (next, actions) = match (self.state, event) {
            (Building, Built) => (Ready, vec![Send(Answer::Ready)]),
            (Ready, StateArrived) => (Loading, vec![Load]),
            (Loading, StateLoaded) => (Loaded, vec![ArmWait, Send(Answer::Loaded)]),
            (Loaded, Order(_, super::Order::Go)) => (Locking, vec![TakeLocks]),
            (Locking, LocksTaken) => (Running, vec![TellKeeper, Start, Announce, WriteRecord, Send(Answer::Running)]),
            (Locking, LocksRefused(reason)) => (Discarded, vec![Discard, Send(Answer::NotStarted(reason))]),

            // A source that has lost its connection comes back over another one, and may repeat itself.
            (Loaded, Lost) => (Loaded, vec![]),
            (Loaded, Order(_, super::Order::Ask)) => (Loaded, vec![Send(Answer::Pending)]),
            (Locking, Order(_, super::Order::Go | super::Order::Ask)) => (Locking, vec![]),
            (Running, Order(_, super::Order::Go | super::Order::Ask)) => (Running, vec![Send(Answer::Running)]),
            (Discarded, Order(_, super::Order::Go | super::Order::Ask)) => (Discarded, vec![Send(Answer::Discarded)]),

            // Without Go, whatever goes wrong leaves nothing here.
            (Building | Ready | Loading, Lost) => (Discarded, vec![Discard]),
            (Building | Ready | Loading | Loaded, TimedOut | Order(_, super::Order::Cancel)) => {
                (Discarded, vec![Discard])
            }
            (Building | Ready | Loading | Loaded, Failed(reason)) => {
                (Discarded, vec![Discard, Send(Answer::Fail(reason))])
            }

            // With Go, no connection, no clock and no failure takes it back; and what is discarded stays so.
            (Locking | Running | Discarded, Lost | TimedOut | Failed(_)) => (self.state, vec![]),
            (Discarded, Order(_, super::Order::Cancel)) => (Discarded, vec![]),
            (state, event) => return Err(Refusal::out_of_turn(state, event)),
        };
        self.state = next;
        Ok(actions)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Order::{Ask, Cancel, Go};
    use super::super::tests::this_move;
    use super::TargetAction::*;
    use super::TargetEvent::*;
    use super::TargetState::*;
    use super::*;

    const STATES: [TargetState; 7] = [Building, Ready, Loading, Loaded, Locking, Running, Discarded];

    fn order(order: super::super::Order) -> TargetEvent {
        Order(this_move(), order)
    }

    fn failed() -> TargetEvent {
        Failed("no memory".into())
    }

    fn refused() -> TargetEvent {
        LocksRefused("disk0 is locked".into())
    }

    fn events() -> Vec<TargetEvent> {
        let others = [Built, StateArrived, StateLoaded, LocksTaken, refused(), Lost, TimedOut, failed()];
        others.into_iter().chain([Go, Ask, Cancel].map(order)).collect()
    }

    /// In which states which events lead where, by which actions. Whatever is not in here is refused.
    type Row = (Vec<TargetState>, Vec<TargetEvent>, Option<TargetState>, Vec<TargetAction>);

    fn table() -> Vec<Row> {
        let asked = || vec![order(Go), order(Ask)];
        let start = vec![TellKeeper, Start, Announce, WriteRecord, Send(Answer::Running)];
        let not_started = Send(Answer::NotStarted("disk0 is locked".into()));
        let fail = Send(Answer::Fail("no memory".into()));
        let before_go = || vec![Building, Ready, Loading, Loaded];
        vec![
            (vec![Building], vec![Built], Some(Ready), vec![Send(Answer::Ready)]),
            (vec![Ready], vec![StateArrived], Some(Loading), vec![Load]),
            (vec![Loading], vec![StateLoaded], Some(Loaded), vec![ArmWait, Send(Answer::Loaded)]),
            (vec![Loaded], vec![order(Go)], Some(Locking), vec![TakeLocks]),
            (vec![Locking], vec![LocksTaken], Some(Running), start),
            (vec![Locking], vec![refused()], Some(Discarded), vec![Discard, not_started]),
            (vec![Loaded], vec![Lost], None, vec![]),
            (vec![Loaded], vec![order(Ask)], None, vec![Send(Answer::Pending)]),
            (vec![Locking], asked(), None, vec![]),
            (vec![Running], asked(), None, vec![Send(Answer::Running)]),
            (vec![Discarded], asked(), None, vec![Send(Answer::Discarded)]),
            (vec![Building, Ready, Loading], vec![Lost], Some(Discarded), vec![Discard]),
            (before_go(), vec![TimedOut, order(Cancel)], Some(Discarded), vec![Discard]),
            (before_go(), vec![failed()], Some(Discarded), vec![Discard, fail]),
            (vec![Locking, Running, Discarded], vec![Lost, TimedOut, failed()], None, vec![]),
            (vec![Discarded], vec![order(Cancel)], None, vec![]),
        ]
    }

    #[test]
    fn each_event_does_in_each_state_what_the_table_says() {
        let table = table();
        for (state, event) in STATES.into_iter().flat_map(|state| events().into_iter().map(move |event| (state, event)))
        {
            let mut target = Target::at(this_move(), state);
            let result = target.on(event.clone());
            match table.iter().find(|row| row.0.contains(&state) && row.1.contains(&event)) {
                Some((_, _, next, actions)) => {
                    assert_eq!(result.as_ref(), Ok(actions), "{state:?} {event:?}");
                    assert_eq!(target.state(), next.unwrap_or(state), "{state:?} {event:?}");
                }
                None => {
                    assert_eq!(result, Err(Refusal::out_of_turn(state, &event)), "{state:?} {event:?}");
                    assert_eq!(target.state(), state);
                }
            }
        }
    }
}
