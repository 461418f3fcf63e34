//! What a target waits for, always with an end: further connections, Go, and a source that has lost its connection.

use super::super::keeper_link::KeeperLink;
use super::super::move_error::MoveError;
use super::super::outgoing::printable;
use super::Taker;
use super::arrival::{SOURCE, wire};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use sterna_migration::handover::TargetEvent;
use sterna_migration::wire::frame::{FrameKind, Header};
use sterna_migration::wire::message::read_frame;

/// How often it is looked whether the move was called off here.
const LOOK: Duration = Duration::from_millis(200);

/// How long the further connections may take to come.
pub(super) const JOIN_PATIENCE: Duration = Duration::from_secs(20);

impl Taker<'_> {
    /// Waits for a further connection.
    ///
    /// # Errors
    /// None comes, or the source gives up.
    pub(super) fn await_connection(&self, deadline: Instant) -> Result<(), MoveError> {
        loop {
            let mut fds = [PollFd::new(&self.keeper, PollFlags::IN), PollFd::new(&self.main, PollFlags::IN)];
            let wanted = "the move's further connections";
            if !poll_until(&mut fds, deadline)? {
                return Err(MoveError::NoAnswer { peer: SOURCE, wanted, after: JOIN_PATIENCE });
            }
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
            self.look_for_end()?;
            // The source is ahead: what it has connected is on its way through the receiver.
            if readable(&self.keeper, deadline)? {
                return Ok(());
            }
        }
    }

    /// What can be read on the first connection is its end, a failure, or what follows when all connections are made.
    fn look_for_end(&self) -> Result<(), MoveError> {
        let failure = Header { kind: FrameKind::Failure, flags: 0, count: 0, length: 0 }.encode()[0];
        let mut kind = [0];
        match recv(&self.main, &mut kind, RecvFlags::PEEK) {
            Ok((_, 1)) if kind != [failure] => Ok(()),
            _ => {
                let reason = printable(&read_frame(&mut &self.main).map_err(wire)?.contents);
                Err(MoveError::Peer { peer: SOURCE, reason })
            }
        }
    }

    /// Loaded: the source says Go, on its connection or on a new one, or time runs out.
    pub(super) fn await_go(&mut self) -> Result<TargetEvent, MoveError> {
        let deadline = self.deadline.unwrap_or_else(Instant::now);
        // Without its keeper nobody can come back; what is under way can still end well.
        let mut is_kept = true;
        loop {
            let mut fds = [PollFd::new(&self.main, PollFlags::IN), PollFd::new(&self.keeper, PollFlags::IN)];
            let watched = if is_kept { &mut fds[..] } else { &mut fds[..1] };
            if !poll_until(watched, deadline)? {
                return Ok(TargetEvent::TimedOut);
            }
            let [main, keeper] = [fds[0].revents(), fds[1].revents()].map(|revents| !revents.is_empty());
            if keeper {
                match self.keeper.take().map_err(MoveError::host("take a connection"))? {
                    Some((preamble, socket)) if KeeperLink::belongs(&preamble, self.this_move) => {
                        self.main.shut();
                        self.main = socket;
                        continue;
                    }
                    Some(_) => {}
                    None => is_kept = false,
                }
            }
            if main {
                return match read_frame(&mut &self.main).map_err(wire).and_then(|frame| self.message(&frame)) {
                    Ok(Some(event)) => Ok(event),
                    Ok(None) => continue,
                    Err(error) => {
                        log::warn!("the source is gone before it said to start: {}", error.line());
                        self.main.shut();
                        self.await_return(deadline)
                    }
                };
            }
        }
    }

    /// The connection is lost after everything has come: the source may come back over another.
    fn await_return(&mut self, deadline: Instant) -> Result<TargetEvent, MoveError> {
        while Instant::now() < deadline && self.movement.off().is_none() {
            if !readable(&self.keeper, deadline.min(Instant::now() + LOOK))? {
                continue;
            }
            match self.keeper.take().map_err(MoveError::host("take a connection"))? {
                Some((preamble, socket)) if KeeperLink::belongs(&preamble, self.this_move) => {
                    self.main = socket;
                    return Ok(TargetEvent::Lost);
                }
                Some(_) => {}
                None => break,
            }
        }
        Ok(TargetEvent::TimedOut)
    }
}

/// Waits until `one` or `other` can be read, or `deadline` is over; says whether it was `one`.
pub(super) fn first_readable(one: &impl AsFd, other: &impl AsFd, deadline: Instant) -> bool {
    let mut fds = [PollFd::new(one, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
    matches!(poll_until(&mut fds, deadline), Ok(true)) && !fds[0].revents().is_empty()
}

/// Waits until `source` can be read; says whether it can before `deadline`.
pub(super) fn readable(source: &impl AsFd, deadline: Instant) -> Result<bool, MoveError> {
    poll_until(&mut [PollFd::new(source, PollFlags::IN)], deadline)
}

/// Waits until one of `fds` is ready; says whether one is before `deadline`.
fn poll_until(fds: &mut [PollFd<'_>], deadline: Instant) -> Result<bool, MoveError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX), tv_nsec: left.subsec_nanos().into() };
        match poll(fds, Some(&timeout)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(MoveError::Host { attempt: "wait for the source", source: errno.into() }),
        }
    }
}
