//! The target as the source hears it: one control connection, with deadlines, and the words of the hand-over on it.

use super::super::move_error::MoveError;
use super::steps::READY_PATIENCE;
use std::io::Write;
use std::time::{Duration, Instant};
use sterna_migration::Sections;
use sterna_migration::handover::{Move, Order};
use sterna_migration::stream::{Address, Socket, connect};
use sterna_migration::wire::frame::{FrameKind, read_contents, read_header, write_failure, write_summed};
use sterna_migration::wire::message::{FINAL_STATE, decode, send};
use sterna_migration::wire::{Preamble, Purpose, ToSource, ToTarget, WireError};

/// How long a message may take to come once it has begun.
const WORD_PATIENCE: Duration = Duration::from_secs(5);
/// How long one attempt to connect may take, after which it is looked whether the move was called off.
const ATTEMPT: Duration = Duration::from_millis(500);

const TARGET: &str = "the target";

/// A connection to the target.
pub struct Peer {
    socket: Socket,
}

impl Peer {
    /// Connects for `purpose`; a target that does not listen yet is waited for until `timeout` is over, or `off` says why not.
    pub fn connect(
        address: &Address,
        (purpose, connection): (Purpose, u16),
        this_move: Move,
        timeout: Duration,
        off: impl Fn() -> Option<MoveError>,
    ) -> Result<Self, MoveError> {
        let deadline = Instant::now() + timeout;
        let socket = loop {
            match connect(address, ATTEMPT) {
                Ok(socket) => break socket,
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                Err(_) => {}
            }
            if let Some(error) = off() {
                return Err(error);
            }
        };
        let preamble = Preamble::new(purpose, connection, this_move.id, this_move.epoch);
        (&socket).write_all(&preamble.encode()).map_err(MoveError::host("write to the target"))?;
        Ok(Self { socket })
    }

    /// The connection, for RAM.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Sends `message`.
    pub fn send(&self, message: &ToTarget) -> Result<(), MoveError> {
        send(&mut &self.socket, message).map_err(wire)
    }

    /// Sends an order of the hand-over.
    pub fn order(&self, order: Order) -> Result<(), MoveError> {
        self.send(&ToTarget::Order(order))
    }

    /// Sends states: what the machine goes on from, or a rehearsal.
    pub fn send_state(&self, sections: &Sections, last: bool) -> Result<(), MoveError> {
        let flags = if last { FINAL_STATE } else { 0 };
        write_summed(&mut &self.socket, FrameKind::State, flags, &sections.encode()).map_err(wire)
    }

    /// Sends a rehearsal and waits until the target has restored it.
    pub fn rehearse(&self, sections: &Sections, off: impl Fn() -> Option<MoveError>) -> Result<(), MoveError> {
        self.send_state(sections, false)?;
        match self.receive("the rehearsal of the state", READY_PATIENCE, off)? {
            ToSource::Rehearsed { .. } => Ok(()),
            _ => Err(MoveError::Unexpected { peer: TARGET, wanted: "that it has rehearsed" }),
        }
    }

    /// Tells the target why the source gives up. It hears it, or the connection's end.
    pub fn give_up(&self, reason: &str) {
        if let Err(error) = write_failure(&mut &self.socket, reason) {
            log::debug!("the target is not told that the move is off: {error}");
        }
        self.socket.shut();
    }

    /// Waits for the target's next word, at most `patience`; `off` ends the wait early.
    pub fn receive(
        &self,
        wanted: &'static str,
        patience: Duration,
        off: impl Fn() -> Option<MoveError>,
    ) -> Result<ToSource, MoveError> {
        let deadline = Instant::now() + patience;
        while !self.readable(deadline)? {
            if let Some(error) = off() {
                return Err(error);
            }
            if Instant::now() >= deadline {
                return Err(MoveError::NoAnswer { peer: TARGET, wanted, after: patience });
            }
        }
        let mut input = self.socket.until(deadline.max(Instant::now() + WORD_PATIENCE));
        let header = read_header(&mut input).map_err(wire)?;
        if header.kind == FrameKind::Ram {
            return Err(MoveError::Unexpected { peer: TARGET, wanted });
        }
        let frame = read_contents(&mut input, header).map_err(wire)?;
        if header.kind == FrameKind::Failure {
            return Err(MoveError::Peer { peer: TARGET, reason: printable(&frame.contents) });
        }
        decode(&frame).map_err(wire)
    }

    /// Waits for bytes for a while, but not past `deadline`.
    fn readable(&self, deadline: Instant) -> Result<bool, MoveError> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        const LOOK: Duration = Duration::from_millis(50);
        let wait = deadline.saturating_duration_since(Instant::now()).min(LOOK);
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(wait.subsec_nanos()) };
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(errno) => Err(MoveError::Host { attempt: "wait for the target", source: errno.into() }),
        }
    }
}

fn wire(source: WireError) -> MoveError {
    MoveError::Wire { peer: TARGET, source }
}

/// Longest text from elsewhere that is passed on, characters.
const MAX_TEXT_CHARS: usize = 2000;

/// Text from elsewhere, with nothing in it that a terminal obeys, and not more of it than a person reads.
pub fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_TEXT_CHARS).collect()
}
