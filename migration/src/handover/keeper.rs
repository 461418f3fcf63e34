//! The receiver's memory of one move: it outlives the target's process and speaks for it once that has ended.
//!
//! It lives in `sterna receive`, and in memory only: a restarted receiver knows nothing and says so ([`Answer::Unknown`]), which
//! decides nothing. So its caller may also forget the oldest ended moves to bound what it keeps.

use super::{Answer, Move, Order, Refusal, check_move};
use serde::{Deserialize, Serialize};
use std::fmt;

/// What is known of a target's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeeperState {
    /// It lives and has not said that it starts the guest.
    Waiting,
    /// It lives and has said so.
    Started,
    /// It has ended and never said so.
    Discarded,
    /// It has said so and has ended.
    Gone,
}

impl fmt::Display for KeeperState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "The guest is at the source; a process here is receiving it.",
            Self::Started => "The guest has started here.",
            Self::Discarded => "The guest is at the source; it never started here and cannot any more.",
            Self::Gone => "The guest ran here and its process has ended.",
        })
    }
}

/// What happens to a keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeeperEvent {
    /// The target's process wrote "starting" into its pipe.
    Starting,
    /// The target's process has ended **and** its pipe has been read to the end. One without the other is not enough.
    Ended,
    /// A source says this about that move, over a connection of its own.
    Order(Move, Order),
}

/// What the caller of a keeper does.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum KeeperAction {
    /// Give order and connection to the target's process, which answers; if that cannot be done, close the connection.
    PassOn(Order),
    /// Say this over the connection the order came by.
    Send(Answer),
}

/// The keeper of one move.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Keeper {
    /// The only move it speaks for.
    this_move: Move,
    /// What it knows.
    state: KeeperState,
}

impl Keeper {
    /// A keeper whose target's process is about to be started. If it cannot be, that is `Ended`.
    pub fn new(this_move: Move) -> Self {
        Self { this_move, state: KeeperState::Waiting }
    }

    /// What it knows.
    pub fn state(&self) -> KeeperState {
        self.state
    }

    /// Takes one event; what is returned is to be done before the next event.
    ///
    /// # Errors
    /// What has no place in this state. Nothing has changed.
    pub fn on(&mut self, event: KeeperEvent) -> Result<Option<KeeperAction>, Refusal> {
        use KeeperAction::*;
        use KeeperEvent::*;
        use KeeperState::*;
        if let Order(got, _) = &event {
            check_move(self.this_move, *got)?;
        }
        let (next, action) = match (self.state, event) {
            (Waiting, Starting) => (Started, None),
            (Waiting, Ended) => (Discarded, None),
            (Started, Ended) => (Gone, None),
            (Waiting | Started, Order(_, order)) => (self.state, Some(PassOn(order))),
            (Discarded | Gone, Order(_, super::Order::Cancel)) => (self.state, None),
            (Discarded, Order(..)) => (Discarded, Some(Send(Answer::Discarded))),
            (Gone, Order(..)) => (Gone, Some(Send(Answer::Ended))),
            (state, event) => return Err(Refusal::out_of_turn(state, event)),
        };
        self.state = next;
        Ok(action)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Order::{Ask, Cancel, Go};
    use super::super::tests::this_move;
    use super::KeeperAction::*;
    use super::KeeperEvent::*;
    use super::KeeperState::*;
    use super::*;

    /// State, event, next state, action; an event that is missing for a state is refused.
    const TABLE: [(KeeperState, KeeperEvent, KeeperState, Option<KeeperAction>); 15] = [
        (Waiting, Starting, Started, None),
        (Waiting, Ended, Discarded, None),
        (Started, Ended, Gone, None),
        (Waiting, order(Go), Waiting, Some(PassOn(Go))),
        (Waiting, order(Ask), Waiting, Some(PassOn(Ask))),
        (Waiting, order(Cancel), Waiting, Some(PassOn(Cancel))),
        (Started, order(Go), Started, Some(PassOn(Go))),
        (Started, order(Ask), Started, Some(PassOn(Ask))),
        (Started, order(Cancel), Started, Some(PassOn(Cancel))),
        (Discarded, order(Go), Discarded, Some(Send(Answer::Discarded))),
        (Discarded, order(Ask), Discarded, Some(Send(Answer::Discarded))),
        (Discarded, order(Cancel), Discarded, None),
        (Gone, order(Go), Gone, Some(Send(Answer::Ended))),
        (Gone, order(Ask), Gone, Some(Send(Answer::Ended))),
        (Gone, order(Cancel), Gone, None),
    ];

    const fn order(order: super::super::Order) -> KeeperEvent {
        Order(Move { id: uuid::Uuid::from_u128(7), epoch: 3 }, order)
    }

    #[test]
    fn each_event_does_in_each_state_what_the_table_says() {
        for state in [Waiting, Started, Discarded, Gone] {
            for event in [Starting, Ended, order(Go), order(Ask), order(Cancel)] {
                let mut keeper = Keeper { this_move: this_move(), state };
                let result = keeper.on(event);
                let row = TABLE.iter().find(|row| (row.0, row.1) == (state, event));
                let refused = Err(Refusal::out_of_turn(state, event));
                assert_eq!(result, row.map_or(refused, |row| Ok(row.3.clone())), "{state:?} {event:?}");
                assert_eq!(keeper.state(), row.map_or(state, |row| row.2), "{state:?} {event:?}");
            }
        }
    }
}
