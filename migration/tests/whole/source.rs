//! The source, as the program's mover is: what the state machine says is done, and what comes of it is told.

use super::THIS_MOVE;
use super::network::Network;
use super::world::{Copy, FIRST, LAST, Side, World, sections, set};
use std::io::{self, Write};
use std::sync::Arc;
use sterna_migration::Run;
use sterna_migration::handover::{Answer, Order, Source, SourceAction, SourceEvent, SourceState};
use sterna_migration::stream::{Hooks, Pace, Sender, Socket, StreamError, Throttle};
use sterna_migration::wire::frame::{FrameKind, write_failure, write_summed};
use sterna_migration::wire::message::{FINAL_STATE, Machine, Mode, decode, read_frame, send};
use sterna_migration::wire::{Preamble, Purpose, ToSource, ToTarget, WireError};

/// Attempts to hear what became of a move: more than fail.
const MOST_ASKED: usize = 20;

/// Why the source cannot go on.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("memory")]
    Stream(#[from] StreamError),
    #[error("a message")]
    Wire(#[from] WireError),
    #[error("a connection")]
    Connection(#[from] io::Error),
    #[error("the target gave up: {0}")]
    Peer(String),
    #[error("the target said {0:?} out of turn")]
    Unexpected(ToSource),
    #[error("the target cannot be reached")]
    Unreachable,
}

struct NoLog;

impl Hooks for NoLog {
    fn before(&self, _chunk: Run, _words: &[u64]) -> io::Result<()> {
        Ok(())
    }
    fn sent(&self, _pages: u64, _bytes: u64) {}
    fn cancelled(&self) -> bool {
        false
    }
}

/// See the module.
pub struct SourceSide<'a> {
    world: &'a World,
    network: &'a Network<'a>,
    connections: u16,
    socket: Option<Socket>,
    sender: Option<Sender>,
    asked: usize,
    error: Option<Broken>,
}

impl<'a> SourceSide<'a> {
    pub fn new(world: &'a World, network: &'a Network<'a>, connections: u16) -> Self {
        Self { world, network, connections, socket: None, sender: None, asked: 0, error: None }
    }

    /// The move to its end, and what was met first on the way.
    pub fn run(mut self) -> (SourceState, Option<String>) {
        let mut source = Source::new(THIS_MOVE);
        while !source.state().is_end() && self.asked <= MOST_ASKED {
            let mut event = Some(self.step(source.state()));
            while let Some(happened) = event.take() {
                let actions = source.on(happened).unwrap_or_else(|refusal| {
                    self.error.get_or_insert(Broken::Peer(refusal.to_string()));
                    self.socket = None;
                    vec![]
                });
                for action in actions {
                    event = self.perform(action).or(event);
                }
            }
        }
        let words = self.error.map(|error| {
            let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
            causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
        });
        (source.state(), words)
    }

    fn step(&mut self, state: SourceState) -> SourceEvent {
        let result = match state {
            SourceState::Preparing => self.prepare(),
            SourceState::Copying => self.pass(FIRST, Pace::Limited).map(|()| SourceEvent::Converged),
            SourceState::Loading | SourceState::Committing => self.hear(),
            SourceState::InDoubt if self.socket.is_some() => self.hear(),
            SourceState::InDoubt => return SourceEvent::TimedOut,
            state => panic!("{state} is left by what its actions tell"),
        };
        result.unwrap_or_else(|error| self.failed(error))
    }

    fn failed(&mut self, error: Broken) -> SourceEvent {
        self.error.get_or_insert(error);
        self.socket = None;
        SourceEvent::Lost
    }

    fn connect(&self, purpose: Purpose, number: u16) -> Result<Socket, Broken> {
        let socket = self.network.connect().ok_or(Broken::Unreachable)?;
        (&socket).write_all(&Preamble::new(purpose, number, THIS_MOVE.id, THIS_MOVE.epoch).encode())?;
        Ok(socket)
    }

    fn prepare(&mut self) -> Result<SourceEvent, Broken> {
        let main = self.connect(Purpose::Move, 0)?;
        self.socket = Some(main.clone());
        let machine = Machine {
            description: b"{}".to_vec(),
            layout: self.world.here.layout(),
            mode: Mode::Live,
            connections: self.connections,
            verify: false,
        };
        send(&mut &main, &ToTarget::Machine(machine))?;
        let ready = self.hear()?;
        let mut sockets = vec![main.clone()];
        for number in 1..self.connections {
            sockets.push(self.connect(Purpose::Join, number)?);
        }
        let throttle = Arc::new(Throttle::new(None));
        self.sender = Some(Sender::new(self.world.here.clone(), sockets, throttle, Arc::new(NoLog))?);
        write_summed(&mut &main, FrameKind::State, 0, &sections(false).encode())?;
        match self.word()? {
            ToSource::Rehearsed { .. } => Ok(ready),
            other => Err(Broken::Unexpected(other)),
        }
    }

    fn pass(&mut self, page: u64, pace: Pace) -> Result<(), Broken> {
        let sender = self.sender.as_mut().ok_or(Broken::Unreachable)?;
        sender.send_pass(&set(&[page]), pace)?;
        Ok(())
    }

    /// The target's next word.
    fn word(&self) -> Result<ToSource, Broken> {
        let frame = read_frame(&mut self.socket.as_ref().ok_or(Broken::Unreachable)?)?;
        match frame.header.kind {
            FrameKind::Failure => Err(Broken::Peer(String::from_utf8_lossy(&frame.contents).into_owned())),
            _ => Ok(decode(&frame)?),
        }
    }

    fn hear(&self) -> Result<SourceEvent, Broken> {
        let said = self.word()?;
        let answer = said.answer().ok_or(Broken::Unexpected(said))?;
        Ok(SourceEvent::Answer(THIS_MOVE, answer))
    }

    fn perform(&mut self, action: SourceAction) -> Option<SourceEvent> {
        match action {
            SourceAction::WriteRecord => return Some(SourceEvent::Recorded),
            SourceAction::Stop => {
                self.world.write(LAST, 0x22);
                self.world.set_copy(Side::Source, Copy::Standing);
                return Some(self.send_all().unwrap_or_else(|error| self.failed(error)));
            }
            SourceAction::ReleaseLocks => self.world.lock().locks = None,
            SourceAction::Send(order) => self.say(order),
            SourceAction::Ask => return Some(self.ask().unwrap_or_else(|error| self.failed(error))),
            SourceAction::TakeLocks => {
                let taken = self.world.take_locks(Side::Source);
                return Some(if taken { SourceEvent::LocksTaken } else { SourceEvent::LocksRefused });
            }
            SourceAction::Resume => self.world.set_copy(Side::Source, Copy::Running),
            SourceAction::Destroy => self.world.set_copy(Side::Source, Copy::Gone),
            SourceAction::RemoveRecord | SourceAction::RecordMoved => {}
        }
        None
    }

    fn send_all(&mut self) -> Result<SourceEvent, Broken> {
        self.pass(LAST, Pace::Full)?;
        let socket = self.socket.as_ref().ok_or(Broken::Unreachable)?;
        write_summed(&mut &*socket, FrameKind::State, FINAL_STATE, &sections(true).encode())?;
        Ok(SourceEvent::Sent)
    }

    /// That it could not be said is no event.
    fn say(&mut self, order: Order) {
        let Some(socket) = &self.socket else { return };
        let said = match order {
            Order::Cancel => write_failure(&mut &*socket, "the move is off"),
            order => send(&mut &*socket, &ToTarget::Order(order)),
        };
        if let Err(error) = said {
            self.error.get_or_insert(error.into());
        }
        if order == Order::Cancel {
            self.socket.take().iter().for_each(Socket::shut);
        }
    }

    fn ask(&mut self) -> Result<SourceEvent, Broken> {
        self.asked += 1;
        self.socket = None;
        let socket = self.connect(Purpose::Ask, 0)?;
        send(&mut &socket, &ToTarget::Order(Order::Ask))?;
        self.socket = Some(socket);
        let heard = self.hear()?;
        if matches!(heard, SourceEvent::Answer(_, Answer::Unknown)) {
            self.socket = None;
        }
        Ok(heard)
    }
}
