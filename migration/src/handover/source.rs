//! The side that has the guest: when it stops it, when it gives it away, and when it may have it back.
//!
//! Knows neither sockets nor files nor how a guest is stopped: its caller does what it says and tells what came of it.

use super::{Answer, Move, Order, Refusal, check_move};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a move stands at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// Connected; the target builds its machine.
    Preparing,
    /// Passes over memory.
    Copying,
    /// The record is being written.
    Arming,
    /// The guest is being stopped, its last pages and state sent.
    Stopping,
    /// All is sent; the target loads it.
    Loading,
    /// Go was attempted; its answer is awaited.
    Committing,
    /// Go was attempted and no answer came.
    InDoubt,
    /// The guest may go on here as soon as its disk locks are back.
    Retaking,
    /// It ran at the target and has ended there. Only a person can say what that means.
    LostThere,
    /// The end: it runs, or ran, at the target.
    Moved,
    /// The end: it runs here.
    Here,
    /// The end: a person said that it started at the target.
    GivenUp,
}

impl SourceState {
    /// Whether the move is over.
    pub fn is_end(self) -> bool {
        matches!(self, Self::Moved | Self::Here | Self::GivenUp)
    }
}

impl fmt::Display for SourceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Preparing => "The guest runs here; the target is preparing.",
            Self::Copying => "The guest runs here; its memory is being copied.",
            Self::Arming => "The guest runs here; the record of its move is being written.",
            Self::Stopping => "The guest stands still here; its last pages and its state are being sent.",
            Self::Loading => "The guest stands still here; the target is loading its state.",
            Self::Committing => "The guest stands still here and may have started at the target, whose answer is awaited.",
            Self::InDoubt => "The guest stands still here and may run at the target, which is being asked and has not answered.",
            Self::Retaking => "The guest stands still here and cannot start at the target; its disk locks are being taken back.",
            Self::LostThere => {
                "The guest ran at the target and its process there has ended; the copy that stands still here is older than its disks."
            }
            Self::Moved => "The guest has started at the target; the copy here is destroyed.",
            Self::Here => "The guest runs here; it cannot start at the target any more.",
            Self::GivenUp => "The guest has started at the target, as a person said; the copy here is destroyed.",
        })
    }
}

/// What happens to a source. There is none that says "Go was not sent".
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The target's side says this about that move.
    Answer(Move, Answer),
    /// The passes have done what they can: stop the guest now.
    Converged,
    /// `WriteRecord` is done: the record survives a power cut.
    Recorded,
    /// `Stop` is done: the guest stands, its disks are flushed, its last pages and state are sent. Told before the target's answer
    /// to them, however fast that comes.
    Sent,
    /// `TakeLocks` is done: all of them are held.
    LocksTaken,
    /// `TakeLocks` failed: none is held.
    LocksRefused,
    /// The connection is gone, or `Ask` could not make one.
    Lost,
    /// The caller's patience with this state is at an end.
    TimedOut,
    /// Something failed here: an action, or what the caller does in this state.
    Failed,
    /// A person or the policy does not want the move any more.
    Cancel,
    /// A person asserts: the guest is not running at the target and cannot start there any more. Out of `LostThere`, the
    /// person also accepts that the disks hold what the guest wrote there.
    ResolveHere,
    /// A person asserts: the guest started at the target.
    ResolveThere,
}

/// What the caller of a source does. What can fail comes last in its list and says what event tells how it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Write the record, durably: this epoch is on its way. Then `Recorded` or `Failed`.
    WriteRecord,
    /// Stop the guest, flush its disks, send last pages and state. Then `Sent`, or `Failed` or `Lost`.
    Stop,
    /// Release all disk locks.
    ReleaseLocks,
    /// Say this, if there is a connection. That it could not be said is no event; a lost connection is.
    Send(Order),
    /// Wait a growing, bounded while after the last one, connect anew, say `Order::Ask`. Then an answer, `Lost` or `TimedOut`.
    Ask,
    /// Take all disk locks, or none. Then `LocksTaken` or `LocksRefused`.
    TakeLocks,
    /// Put back the run state in which `Stop` found the guest, if `Stop` got that far.
    Resume,
    /// Remove the record, if there is one.
    RemoveRecord,
    /// Write the record, durably: the guest has moved. A failure changes nothing.
    RecordMoved,
    /// Destroy the copy here.
    Destroy,
}

/// The source of one move.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// The only move it listens to.
    this_move: Move,
    /// Where it stands.
    state: SourceState,
}

impl Source {
    /// A source that has connected and asked the target to prepare.
    pub fn new(this_move: Move) -> Self {
        Self { this_move, state: SourceState::Preparing }
    }

    /// One that stands in `state`, however it got there.
    #[cfg(test)]
    pub(super) fn at(this_move: Move, state: SourceState) -> Self {
        Self { this_move, state }
    }

    /// Where it stands.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Takes one event; the actions are to be performed in order, before the next event.
    ///
    /// # Errors
    /// What has no place in this state. Nothing has changed.
    pub fn on(&mut self, event: SourceEvent) -> Result<Vec<SourceAction>, Refusal> {
        use SourceAction::*;
        use SourceEvent::*;
        use SourceState::*;
        if let Answer(got, _) = &event {
            check_move(self.this_move, *got)?;
        }
        let (next, actions) = match (self.state, &event) {
            (Preparing, Answer(_, super::Answer::Ready)) => (Copying, vec![]),
            (Copying, Converged) => (Arming, vec![WriteRecord]),
            (Arming, Recorded) => (Stopping, vec![Stop]),
            (Stopping, Sent) => (Loading, vec![]),
            (Loading, Answer(_, super::Answer::Loaded)) => (Committing, vec![ReleaseLocks, Send(Order::Go)]),

            // Before Go, whatever goes wrong and whatever else the target says leaves the guest here, with its locks.
            (Preparing | Copying, Lost | TimedOut | Failed | Cancel | Answer(..)) => (Here, vec![Send(Order::Cancel)]),
            (Arming, Lost | TimedOut | Failed | Cancel | Answer(..)) => (Here, vec![Send(Order::Cancel), RemoveRecord]),
            (Stopping | Loading, Lost | TimedOut | Failed | Cancel | Answer(..)) => {
                (Here, vec![Resume, Send(Order::Cancel), RemoveRecord])
            }

            // After Go only the target's word counts, or a person's.
            (Committing | InDoubt, Answer(_, answer)) => match answer {
                super::Answer::Running => (Moved, vec![RecordMoved, Destroy]),
                super::Answer::NotStarted(_) | super::Answer::Discarded => (Retaking, vec![TakeLocks]),
                super::Answer::Pending => (self.state, vec![Send(Order::Go)]),
                super::Answer::Ended => (LostThere, vec![]),
                super::Answer::Unknown | super::Answer::Fail(_) => (InDoubt, vec![]),
                super::Answer::Ready | super::Answer::Loaded => return Err(Refusal::out_of_turn(self.state, event)),
            },
            (Committing | InDoubt, Lost | TimedOut | Failed) => (InDoubt, vec![Ask]),
            (InDoubt | LostThere, ResolveHere) => (Retaking, vec![TakeLocks]),
            (InDoubt | LostThere, ResolveThere) => (GivenUp, vec![RecordMoved, Destroy]),
            (Retaking, LocksTaken) => (Here, vec![Resume, RemoveRecord]),
            (Retaking, LocksRefused) => (InDoubt, vec![Ask]),

            // Nobody waits for anything here.
            (Retaking | LostThere | Moved | Here | GivenUp, Lost | TimedOut) => (self.state, vec![]),
            (state, event) => return Err(Refusal::out_of_turn(state, event)),
        };
        self.state = next;
        Ok(actions)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::this_move;
    use super::SourceAction::*;
    use super::SourceEvent::*;
    use super::SourceState::*;
    use super::*;
    use crate::handover::Answer as A;

    const STATES: [SourceState; 12] =
        [Preparing, Copying, Arming, Stopping, Loading, Committing, InDoubt, Retaking, LostThere, Moved, Here, GivenUp];

    fn says(answer: A) -> SourceEvent {
        Answer(this_move(), answer)
    }

    fn answers() -> Vec<SourceEvent> {
        let text = String::new;
        let all = [A::Ready, A::Loaded, A::Running, A::NotStarted(text()), A::Discarded, A::Pending, A::Ended];
        all.into_iter().chain([A::Unknown, A::Fail(text())]).map(says).collect()
    }

    fn events() -> Vec<SourceEvent> {
        let others = [Converged, Recorded, Sent, LocksTaken, LocksRefused, Lost, TimedOut, Failed, Cancel];
        others.into_iter().chain([ResolveHere, ResolveThere]).chain(answers()).collect()
    }

    /// In which states (the first row that fits counts) which events lead where, by which actions. Whatever is not in here is refused.
    type Row = (Vec<SourceState>, Vec<SourceEvent>, Option<SourceState>, Vec<SourceAction>);

    fn table() -> Vec<Row> {
        let go = || Send(Order::Go);
        let cancel = || Send(Order::Cancel);
        let wrong = || [vec![Lost, TimedOut, Failed, Cancel], answers()].concat();
        let after_go = || vec![Committing, InDoubt];
        let not_started = vec![says(A::Discarded), says(A::NotStarted(String::new()))];
        vec![
            (vec![Preparing], vec![says(A::Ready)], Some(Copying), vec![]),
            (vec![Copying], vec![Converged], Some(Arming), vec![WriteRecord]),
            (vec![Arming], vec![Recorded], Some(Stopping), vec![Stop]),
            (vec![Stopping], vec![Sent], Some(Loading), vec![]),
            (vec![Loading], vec![says(A::Loaded)], Some(Committing), vec![ReleaseLocks, go()]),
            (vec![Preparing, Copying], wrong(), Some(Here), vec![cancel()]),
            (vec![Arming], wrong(), Some(Here), vec![cancel(), RemoveRecord]),
            (vec![Stopping, Loading], wrong(), Some(Here), vec![Resume, cancel(), RemoveRecord]),
            (after_go(), vec![says(A::Running)], Some(Moved), vec![RecordMoved, Destroy]),
            (after_go(), not_started, Some(Retaking), vec![TakeLocks]),
            (after_go(), vec![says(A::Pending)], None, vec![go()]),
            (after_go(), vec![says(A::Ended)], Some(LostThere), vec![]),
            (after_go(), vec![says(A::Unknown), says(A::Fail(String::new()))], Some(InDoubt), vec![]),
            (after_go(), vec![Lost, TimedOut, Failed], Some(InDoubt), vec![Ask]),
            (vec![Retaking], vec![LocksTaken], Some(Here), vec![Resume, RemoveRecord]),
            (vec![Retaking], vec![LocksRefused], Some(InDoubt), vec![Ask]),
            (vec![InDoubt, LostThere], vec![ResolveHere], Some(Retaking), vec![TakeLocks]),
            (vec![InDoubt, LostThere], vec![ResolveThere], Some(GivenUp), vec![RecordMoved, Destroy]),
            (vec![Retaking, LostThere, Moved, Here, GivenUp], vec![Lost, TimedOut], None, vec![]),
        ]
    }

    #[test]
    fn each_event_does_in_each_state_what_the_table_says() {
        let table = table();
        for (state, event) in STATES.into_iter().flat_map(|state| events().into_iter().map(move |event| (state, event)))
        {
            let mut source = Source::at(this_move(), state);
            let result = source.on(event.clone());
            match table.iter().find(|row| row.0.contains(&state) && row.1.contains(&event)) {
                Some((_, _, next, actions)) => {
                    assert_eq!(result.as_ref(), Ok(actions), "{state:?} {event:?}");
                    assert_eq!(source.state(), next.unwrap_or(state), "{state:?} {event:?}");
                }
                None => {
                    assert_eq!(result, Err(Refusal::out_of_turn(state, &event)), "{state:?} {event:?}");
                    assert_eq!(source.state(), state);
                }
            }
        }
    }

    #[test]
    fn only_the_end_is_an_end() {
        let ends: Vec<_> = STATES.into_iter().filter(|state| state.is_end()).collect();
        assert_eq!(ends, [Moved, Here, GivenUp]);
    }
}
