//! The target's host: its keeper, and the process that is to be the VM, in one thread. What the state machines say is done.

use super::THIS_MOVE;
use super::world::{Copy, Side, World, sections};
use std::io::Read;
use std::sync::mpsc::{Receiver as Arrivals, RecvTimeoutError};
use std::time::{Duration, Instant};
use sterna_migration::Sections;
use sterna_migration::handover::{
    Answer, Keeper, KeeperAction, KeeperEvent, Order, Target, TargetAction, TargetEvent, TargetState,
};
use sterna_migration::stream::{Event, Receiver, Socket};
use sterna_migration::wire::frame::{FrameKind, write_failure};
use sterna_migration::wire::message::{FINAL_STATE, Loaded, Ready, Started, decode, read_frame, send};
use sterna_migration::wire::{Preamble, Purpose, ToSource, ToTarget, preamble};

/// One who connected, and for what.
fn accept(mut socket: Socket) -> Option<(Preamble, Socket)> {
    let mut bytes = [0; preamble::BYTES];
    socket.read_exact(&mut bytes).ok()?;
    Some((Preamble::decode(&bytes).ok()?, socket))
}

/// Serves whoever comes until nobody does: the move, and then those who ask about it.
/// `patience` is how long a target waits for a source that has lost its connection.
pub fn serve(world: &World, arrivals: Arrivals<Socket>, patience: Duration) -> Option<TargetState> {
    let mut keeper = None;
    let mut end = None;
    while let Ok(socket) = arrivals.recv() {
        let Some((preamble, socket)) = accept(socket) else { continue };
        match (preamble.purpose, &mut keeper) {
            (Purpose::Move, None) => {
                let keeper = keeper.insert(Keeper::new(THIS_MOVE));
                let taker = Taker {
                    world,
                    arrivals: &arrivals,
                    keeper,
                    main: socket,
                    patience,
                    receiver: None,
                    state: None,
                    wait: None,
                };
                end = Some(taker.run());
            }
            (Purpose::Ask, Some(keeper)) => answer(keeper, &socket),
            _ => {}
        }
    }
    end
}

/// The process has ended: its keeper speaks for it.
fn answer(keeper: &mut Keeper, socket: &Socket) {
    let action = keeper.on(KeeperEvent::Order(THIS_MOVE, Order::Ask)).unwrap();
    let Some(KeeperAction::Send(answer)) = action else { panic!("{action:?} of a process that has ended") };
    if read_frame(&mut &*socket).is_ok() {
        let _not_heard = send(&mut &*socket, &ToSource::from(answer));
    }
}

struct Taker<'a> {
    world: &'a World,
    arrivals: &'a Arrivals<Socket>,
    keeper: &'a mut Keeper,
    main: Socket,
    patience: Duration,
    receiver: Option<Receiver>,
    state: Option<Sections>,
    wait: Option<Instant>,
}

impl Taker<'_> {
    fn run(mut self) -> TargetState {
        let mut target = Target::new(THIS_MOVE);
        let mut connections = 0;
        loop {
            let mut event = Some(match target.state() {
                TargetState::Building => self.build(&mut connections),
                TargetState::Ready => self.take_in(connections),
                TargetState::Loaded => self.await_go(),
                TargetState::Running => match self.next(None) {
                    Some(order) => TargetEvent::Order(THIS_MOVE, order),
                    None => return TargetState::Running,
                },
                TargetState::Discarded => {
                    self.keeper.on(KeeperEvent::Ended).unwrap();
                    self.world.decide();
                    return TargetState::Discarded;
                }
                state => panic!("{state} is left by what its actions tell"),
            });
            while let Some(happened) = event.take() {
                // Out of turn: as good as a broken connection.
                let actions = target.on(happened).unwrap_or_else(|_| {
                    self.main.shut();
                    vec![]
                });
                for action in actions {
                    event = self.perform(action).or(event);
                }
            }
        }
    }

    fn build(&self, connections: &mut u16) -> TargetEvent {
        match read_frame(&mut &self.main).and_then(|frame| decode(&frame)) {
            Ok(ToTarget::Machine(machine)) if machine.layout == self.world.there.layout() => {
                *connections = machine.connections;
                TargetEvent::Built
            }
            Ok(_) => TargetEvent::Failed("no machine of this kind".into()),
            Err(_) => TargetEvent::Lost,
        }
    }

    /// RAM and a rehearsal, and at last the state.
    fn take_in(&mut self, connections: u16) -> TargetEvent {
        let mut sockets = vec![Some(self.main.clone())];
        sockets.resize(connections.into(), None);
        while sockets.iter().any(Option::is_none) {
            let Ok(socket) = self.arrivals.recv_timeout(self.patience) else {
                return self.gives_up("a connection is missing");
            };
            let Some((preamble, socket)) = accept(socket) else { return self.gives_up("a connection broke") };
            if preamble.purpose != Purpose::Join {
                return self.gives_up("not a further connection");
            }
            sockets[usize::from(preamble.connection)] = Some(socket);
        }
        let sockets = sockets.into_iter().flatten().collect();
        let receiver = self.receiver.insert(Receiver::low_at_first(self.world.there.clone(), sockets).unwrap());
        loop {
            let frame = match receiver.next_event() {
                Ok(Event::PassEnd(_)) => continue,
                Ok(Event::Frame(frame)) => frame,
                Err(error) => return self.gives_up(&error.to_string()),
            };
            let decoded = Sections::decode(&frame.contents);
            match (frame.header.kind, decoded) {
                (FrameKind::State, Ok(state)) if frame.header.flags == FINAL_STATE => {
                    self.state = Some(state);
                    return TargetEvent::StateArrived;
                }
                (FrameKind::State, Ok(rehearsal)) => {
                    assert_eq!(rehearsal, sections(false));
                    if let Err(error) = send(&mut &self.main, &ToSource::Rehearsed { restore_ns: 1 }) {
                        return self.gives_up(&error.to_string());
                    }
                }
                _ => return self.gives_up("no memory and no state"),
            }
        }
    }

    fn gives_up(&mut self, why: &str) -> TargetEvent {
        let _not_heard = write_failure(&mut &self.main, why);
        TargetEvent::Lost
    }

    /// Loaded: Go comes over the connection there is, or over another until time is up.
    fn await_go(&mut self) -> TargetEvent {
        match self.next(self.wait) {
            Some(order) => TargetEvent::Order(THIS_MOVE, order),
            None => TargetEvent::TimedOut,
        }
    }

    /// The next order, over the connection there is or another; `None` when nobody comes any more.
    fn next(&mut self, until: Option<Instant>) -> Option<Order> {
        loop {
            let read = read_frame(&mut &self.main).and_then(|frame| match frame.header.kind {
                FrameKind::Failure => Ok(ToTarget::Order(Order::Cancel)),
                _ => decode(&frame),
            });
            if let Ok(ToTarget::Order(order)) = read {
                return Some(order);
            }
            let left = until.map_or(super::LONG, |until| until.saturating_duration_since(Instant::now()));
            match self.arrivals.recv_timeout(left) {
                Ok(socket) => {
                    // The keeper reads who comes, and passes on whoever asks.
                    if let Some((Preamble { purpose: Purpose::Ask, .. }, socket)) = accept(socket) {
                        let asks = self.keeper.on(KeeperEvent::Order(THIS_MOVE, Order::Ask)).unwrap();
                        assert_eq!(asks, Some(KeeperAction::PassOn(Order::Ask)));
                        self.main = socket;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn perform(&mut self, action: TargetAction) -> Option<TargetEvent> {
        match action {
            TargetAction::Send(answer) => self.say(answer),
            TargetAction::Load => {
                self.world.lock().state_came = self.state == Some(sections(true));
                return Some(TargetEvent::StateLoaded);
            }
            TargetAction::ArmWait => self.wait = Some(Instant::now() + self.patience),
            TargetAction::TakeLocks => {
                let taken = self.world.take_locks(Side::Target);
                return Some(if taken {
                    TargetEvent::LocksTaken
                } else {
                    TargetEvent::LocksRefused("the source holds them".into())
                });
            }
            TargetAction::TellKeeper => assert_eq!(self.keeper.on(KeeperEvent::Starting), Ok(None)),
            TargetAction::Start => {
                self.world.set_copy(Side::Target, Copy::Running);
                self.world.decide();
            }
            TargetAction::Discard => drop(self.receiver.take().map(Receiver::finish)),
            TargetAction::Announce | TargetAction::WriteRecord => {}
        }
        None
    }

    fn say(&self, answer: Answer) {
        let message = match answer {
            Answer::Ready => ToSource::Ready(Ready { build_ns: 1, warnings: vec![], unknown_msrs: vec![] }),
            Answer::Loaded => ToSource::Loaded(Loaded { restore_ns: 1, ram_hash: None }),
            Answer::Running => ToSource::Running(Started { locks_ns: 1, start_ns: 1, answered_ns: 1 }),
            Answer::Fail(reason) => return drop(write_failure(&mut &self.main, &reason)),
            answer => ToSource::from(answer),
        };
        let _not_heard = send(&mut &self.main, &message);
    }
}
