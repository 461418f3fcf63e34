//! The hand-over: from which moment the guest is the target's, and what each side may do when the other falls silent.
//!
//! Three pure state machines, [`Source`], [`Target`] and [`Keeper`]. Each takes one event and returns the actions its caller
//! performs, in order. There is no input, output, clock or thread in here, so the running program and the model checker
//! (`model.rs` and `restart.rs` are the world around them, `check.rs` the invariants) execute the same code. It visits all of the
//! 30760 states that can be reached while messages are lost, delayed, repeated and reordered, processes killed, machines started
//! again from what the disk says, and time-outs fired at any point, on disks with locks between hosts and without.
//!
//! ```text
//!  SOURCE (the guest's process)                      TARGET (a process built for the move)     KEEPER (`sterna receive`)
//!  preparing   guest runs      ── connection ──>     building                                  waiting
//!  copying     guest runs      <── Ready ───────     ready        parked, no disk opened
//!     │  passes over memory    ══ pages ═══════>       │
//!  arming      guest runs; durable record: "epoch E is on its way to TARGET"
//!  stopping    guest stands; disks flushed
//!              ══ last pages, state ═══════════>     loading
//!  loading     guest stands    <── Loaded ──────     loaded       waits TARGET_WAIT at most
//!  ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ up to here every failure ends with the guest running at the source ─ ─ ─ ─ ─ ─ ─ ─
//!  committing  releases the disk locks
//!              ── Go(E) ───────────────────────>     locking      takes the disk locks, or
//!              <── NotStarted(E) ───────────────     discarded    for ever
//!                                                    running      ── starting E ─────────────> started
//!                                                    first instruction, announcement, record
//!  moved       copy destroyed  <── Running(E) ──
//!
//!  in-doubt    no answer to Go: the guest stands, and the source asks until it hears, on a new connection
//!              ── Ask(E) ─────────────────────────────── the target's process lives ────────> passes it on
//!              <── Running(E) ──     it runs there: moved
//!              <── Pending(E) ──     loaded, waits for Go: the source sends Go(E) again
//!              <── Discarded(E) ──   never started, never will: retaking, then here
//!              ── Ask(E) ─────────────────────────────── it has ended, "starting" unsaid ───> discarded: Discarded(E)
//!              ── Ask(E) ─────────────────────────────── it has ended, "starting" said ─────> gone: Ended(E): lost-there
//!              ── Ask(E) ─────────────────────────────── the keeper was restarted ──────────> Unknown(E), no answer
//! ```
//!
//! The rules, each of which the model checker misses when it is taken out:
//! 1. **Any attempt to send Go counts as sent.** No event says that Go was not sent, so the source cannot be told so.
//! 2. Whoever cannot take the disk locks does not run.
//! 3. The keeper hears "starting E" before the guest's first instruction, over a pipe whose end it hears after all that was said.
//! 4. What is discarded is discarded for ever, and only the target's side can say so. A time-out says nothing.
//! 5. A person may decide for the source, by asserting what is true: that the guest cannot start at the target any more
//!    (`resolve --here`), or that it did (`resolve --there`). *That it does not run there right now* is not enough: Go may
//!    still be under way.
//! 6. What outlives the source's process is its [`Record`]: on disk before the guest stops, removed when the guest stays, "moved" when
//!    it does not. A machine that is "on its way" is not started again before a person has said what became of it, and one that
//!    has moved is not where no lock would keep it from its other copy.
//! 7. A receiver that was started again knows nothing, and says that.
//!
//! An event that has no place in a state is a [`Refusal`]: nothing has changed, nothing is to be done. The caller logs it and
//! drops the connection it came over, if it came over one.

#[cfg(test)]
mod check;
mod keeper;
#[cfg(test)]
mod model;
mod record;
#[cfg(test)]
mod restart;
#[cfg(test)]
mod settle;
mod source;
mod target;

pub use keeper::{Keeper, KeeperAction, KeeperEvent, KeeperState};
pub use record::{Found, Phase, Record};
pub use source::{Source, SourceAction, SourceEvent, SourceState};
pub use target::{Target, TargetAction, TargetEvent, TargetState};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;
use uuid::Uuid;

/// How long a loaded target waits for Go. Then it discards for ever, and the source, once it hears of it, goes on.
pub const TARGET_WAIT: Duration = Duration::from_secs(20);

/// Which move of which machine. Everything that decides something carries it, and a word about another move decides nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Move {
    /// Different for each attempt.
    pub id: Uuid,
    /// The machine's epoch at the target; each attempt raises it.
    pub epoch: u64,
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "move {} (epoch {})", self.id, self.epoch)
    }
}

/// What a source says to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Order {
    /// The guest is yours.
    Go,
    /// What became of it? Opens a connection of its own.
    Ask,
    /// There will be no Go.
    Cancel,
}

/// What the target's side says to a source. Text is for people and decides nothing; whoever decodes it bounds it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Answer {
    /// A machine stands ready to take pages and state.
    Ready,
    /// The guest is complete here and waits for Go.
    Loaded,
    /// The guest runs here.
    Running,
    /// Go was heard and the disk locks could not be taken, for this reason. Otherwise as `Discarded`.
    NotStarted(String),
    /// The guest never started here, and from now on never will.
    Discarded,
    /// The guest is complete here and still waits for Go.
    Pending,
    /// The guest ran here, and its process has ended. From the keeper.
    Ended,
    /// Nothing is known of this move, which proves nothing. From a keeper that was restarted or has forgotten.
    Unknown,
    /// The move cannot go on, for this reason.
    Fail(String),
}

/// Why an event changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is about another move.
    #[error("this is about {got}; what is under way here is {expected}")]
    OtherMove {
        /// The one under way here.
        expected: Move,
        /// The one it is about.
        got: Move,
    },
    /// It has no place in this state.
    #[error("{event} is out of turn here. {state}")]
    OutOfTurn {
        /// What happened.
        event: String,
        /// Where the guest is, as a sentence.
        state: String,
    },
}

impl Refusal {
    fn out_of_turn(state: impl fmt::Display, event: impl fmt::Debug) -> Self {
        Self::OutOfTurn { event: format!("{event:?}"), state: state.to_string() }
    }
}

/// `Ok` where `got` is the move under way.
fn check_move(expected: Move, got: Move) -> Result<(), Refusal> {
    if got == expected { Ok(()) } else { Err(Refusal::OtherMove { expected, got }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn this_move() -> Move {
        Move { id: Uuid::from_u128(7), epoch: 3 }
    }

    /// The attempt before: same machine, everything else different.
    pub(super) fn earlier_move() -> Move {
        Move { id: Uuid::from_u128(6), epoch: 2 }
    }

    /// A variant's name as status output has it: `fmt::Formatter` is a serializer of such names.
    struct Name<T>(T);

    impl<T: Serialize> fmt::Display for Name<T> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.0.serialize(f)
        }
    }

    #[test]
    fn states_have_the_names_that_scripts_know() {
        assert_eq!(Name(SourceState::InDoubt).to_string(), "in-doubt");
        assert_eq!(Name(SourceState::LostThere).to_string(), "lost-there");
        assert_eq!(Name(TargetState::Loaded).to_string(), "loaded");
        assert_eq!(Name(KeeperState::Gone).to_string(), "gone");
        assert_eq!(Name(Phase::OnItsWay).to_string(), "on-its-way");
    }

    #[test]
    fn a_word_about_another_move_changes_nothing() {
        let stray = Err(Refusal::OtherMove { expected: this_move(), got: earlier_move() });
        let mut source = Source::at(this_move(), SourceState::Committing);
        assert_eq!(source.on(SourceEvent::Answer(earlier_move(), Answer::Discarded)), stray.clone().map(|()| vec![]));
        assert_eq!(source.state(), SourceState::Committing);
        let mut target = Target::at(this_move(), TargetState::Loaded);
        let same_move_older_epoch = Move { epoch: 2, ..this_move() };
        let older = Err(Refusal::OtherMove { expected: this_move(), got: same_move_older_epoch });
        assert_eq!(target.on(TargetEvent::Order(same_move_older_epoch, Order::Go)), older);
        assert_eq!(target.state(), TargetState::Loaded);
        let mut keeper = Keeper::new(this_move());
        assert_eq!(keeper.on(KeeperEvent::Order(earlier_move(), Order::Ask)), stray.map(|()| None));
    }

    #[test]
    fn a_refusal_says_where_the_guest_is() {
        let mut source = Source::new(this_move());
        assert_eq!(
            source.on(SourceEvent::ResolveHere).unwrap_err().to_string(),
            "ResolveHere is out of turn here. The guest runs here; the target is preparing."
        );
        assert_eq!(
            source.on(SourceEvent::Answer(earlier_move(), Answer::Running)).unwrap_err().to_string(),
            "this is about move 00000000-0000-0000-0000-000000000006 (epoch 2); \
             what is under way here is move 00000000-0000-0000-0000-000000000007 (epoch 3)"
        );
    }
}
