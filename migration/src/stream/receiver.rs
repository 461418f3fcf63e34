//! The target's side: pages from every connection into RAM, pass by pass.
//!
//! Connection 0 belongs to the caller, who calls [`Receiver::next_event`] and gets what is not RAM. Each further connection has a
//! thread. None goes on to the next pass before all have ended this one: an older page must not land on a newer. The first pass of a
//! live move, nearly all of the work, can be taken in by threads of low priority: other guests run here.

use super::inbox::{Counters, Inbox, Landing, Opening};
use super::socket::Socket;
use super::{FIRST_PASS, REASON, StreamError, connections, spawn, step_back};
use crate::pages::PageSet;
use crate::ram::Ram;
use crate::wire::WireError;
use crate::wire::frame::{Frame, FrameKind, Header};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What came on connection 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A pass has ended on every connection.
    PassEnd(u32),
    /// A message or state.
    Frame(Frame),
}

/// See the module. When dropped, it ends its connections.
pub struct Receiver {
    shared: Arc<Shared>,
    control: Inbox,
    /// The first pass is taken in at low priority.
    low: bool,
    /// No frame on connection 0 has begun: what comes next there is a header.
    between: bool,
    threads: Vec<JoinHandle<()>>,
    control_stays: bool,
}

struct Shared {
    landing: Landing,
    sockets: Vec<Socket>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The pass under way.
    pass: u32,
    /// By connection: it has ended this pass.
    ended: Vec<bool>,
    /// By connection: no more will come.
    closed: Vec<bool>,
    /// Why a thread gave up.
    error: Option<StreamError>,
    closing: bool,
}

impl Receiver {
    /// Receives into `ram`, which is private anonymous memory that nobody has touched, from `sockets`, the first of which is the connection on which messages come too.
    ///
    /// # Errors
    /// Too few or many connections, no thread.
    pub fn new(ram: Ram, sockets: Vec<Socket>) -> Result<Self, StreamError> {
        Self::start(ram, sockets, false)
    }

    /// The same, with the first pass at low priority: the guest that it belongs to still runs elsewhere.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn low_at_first(ram: Ram, sockets: Vec<Socket>) -> Result<Self, StreamError> {
        Self::start(ram, sockets, true)
    }

    fn start(ram: Ram, sockets: Vec<Socket>, low: bool) -> Result<Self, StreamError> {
        connections(sockets.len())?;
        let number = sockets.len();
        let (ended, closed) = (vec![false; number], vec![false; number]);
        let state = Mutex::new(State { pass: FIRST_PASS, ended, closed, error: None, closing: false });
        let shared = Arc::new(Shared { landing: Landing::new(ram), sockets, state, changed: Condvar::new() });
        let control = Inbox::new(0, shared.sockets[0].clone());
        let mut receiver = Self { shared, control, low, between: true, threads: Vec::new(), control_stays: false };
        for number in 1..number {
            // One takes over from the other after the first pass: a thread does not get its priority back.
            let both = [(true, "first"), (false, "receive")];
            for (first, name) in both.into_iter().filter(|(first, _)| low || !first) {
                let shared = Arc::clone(&receiver.shared);
                let inbox = Inbox::new(number, shared.sockets[number].clone());
                let body = move || if first { shared.serve_first(inbox) } else { shared.serve(inbox, low) };
                receiver.threads.push(spawn(&format!("move-{name}-{number}"), body)?);
            }
        }
        Ok(receiver)
    }

    /// The first connection, for answers.
    pub fn control(&self) -> &Socket {
        &self.control.socket
    }

    /// Takes RAM in until something else comes.
    ///
    /// # Errors
    /// The first failure on any connection, or the peer's reason. An answer can still be sent on [`Self::control`].
    pub fn next_event(&mut self) -> Result<Event, StreamError> {
        let event = if self.low && self.shared.lock().pass == FIRST_PASS { self.wait_low() } else { self.wait() };
        event.map_err(|error| self.reason(error))
    }

    /// The first cause of `error`: what the peer says, what a thread met that then woke us, or `error` itself.
    fn reason(&self, error: StreamError) -> StreamError {
        if matches!(error, StreamError::Peer(_)) {
            return error;
        }
        let first = self.shared.error().err().unwrap_or(error);
        let ours = matches!(first, StreamError::Closed { number: 0, .. } | StreamError::Connection { number: 0, .. });
        // A peer that gives up lets go of the connections, and says why on the first.
        if ours || !first.is_broken() || !self.between || self.control().set_timeout(REASON).is_err() {
            return first;
        }
        match self.control.open() {
            Ok(Opening::Header(header)) if header.kind == FrameKind::Failure => {
                self.control.rest(header).err().unwrap_or(first)
            }
            _ => first,
        }
    }

    /// [`Self::wait`] at low priority.
    fn wait_low(&mut self) -> Result<Event, StreamError> {
        thread::scope(|scope| {
            let body = || {
                step_back();
                self.wait()
            };
            let waiter = thread::Builder::new().name("move-first-0".into()).spawn_scoped(scope, body);
            waiter.map_err(StreamError::Thread)?.join().unwrap_or(Err(StreamError::Failed))
        })
    }

    fn wait(&mut self) -> Result<Event, StreamError> {
        loop {
            self.between = true;
            let header = match self.control.open()? {
                Opening::Header(header) => header,
                Opening::Closed => return Err(StreamError::Closed { number: 0, pass: self.shared.lock().pass }),
                Opening::Silent(error) => return Err(self.control.error(WireError::io("waiting for a frame")(error))),
            };
            self.between = header.kind == FrameKind::PassEnd;
            match header.kind {
                FrameKind::Ram => self.control.land(header, &self.shared.landing)?,
                FrameKind::PassEnd => {
                    self.shared.end_pass(&self.control, header)?;
                    return Ok(Event::PassEnd(header.count));
                }
                _ => return self.control.rest(header).map(Event::Frame),
            }
        }
    }

    /// What came in so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.landing.counters
    }

    /// Pages that have contents now; all others are zeros.
    pub fn received(&self) -> PageSet {
        self.shared.landing.received().clone()
    }

    /// Ends all connections but the first, which goes back to the caller with the pages that have contents.
    ///
    /// # Errors
    /// What a thread met that was not told yet.
    pub fn finish(mut self) -> Result<(Socket, PageSet), StreamError> {
        self.control_stays = true;
        self.end();
        self.shared.error()?;
        Ok((self.control().clone(), self.received()))
    }

    fn end(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        self.shared.sockets.iter().skip(self.control_stays.into()).for_each(Socket::shut);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the move panicked");
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    /// A thread's life that takes in the first pass.
    fn serve_first(&self, mut inbox: Inbox) {
        step_back();
        match self.receive(&mut inbox, |pass| pass == FIRST_PASS) {
            Ok(()) if self.lock().pass != FIRST_PASS => {}
            result => self.ended(&inbox, result),
        }
    }

    /// A thread's life; `later`: another takes in the first pass.
    fn serve(&self, mut inbox: Inbox, later: bool) {
        if later {
            let waits = |state: &mut State| state.pass == FIRST_PASS && !state.closing && !state.closed[inbox.number];
            let waited = self.changed.wait_while(self.lock(), waits);
            if waited.unwrap_or_else(PoisonError::into_inner).pass == FIRST_PASS {
                return;
            }
        }
        let result = self.receive(&mut inbox, |_| true);
        self.ended(&inbox, result);
    }

    /// A connection's thread has come to its end.
    fn ended(&self, inbox: &Inbox, result: Result<(), StreamError>) {
        let mut state = self.lock();
        state.closed[inbox.number] = true;
        self.changed.notify_all();
        let Err(error) = result else { return };
        if state.closing || state.error.is_some() {
            return;
        }
        // The caller may be waiting for a frame and not for us. If the peer broke the connection, its reason may be that frame.
        let patience = if error.is_broken() { REASON } else { Duration::ZERO };
        state.error = Some(error);
        let waits = |state: &mut State| state.error.is_some() && !state.closing;
        let waited = self.changed.wait_timeout_while(state, patience, waits);
        if waited.unwrap_or_else(PoisonError::into_inner).0.error.is_some() {
            self.sockets[0].shut_read();
        }
    }

    /// Takes in what comes while the pass under way is one that `goes_on`, until the connection ends between two frames.
    fn receive(&self, inbox: &mut Inbox, goes_on: impl Fn(u32) -> bool) -> Result<(), StreamError> {
        while goes_on(self.lock().pass) {
            let header = match inbox.open()? {
                Opening::Header(header) => header,
                Opening::Closed => return Ok(()),
                // Between passes there may be nothing to say here for long.
                Opening::Silent(_) if !self.lock().ended.contains(&true) => continue,
                Opening::Silent(error) => return Err(inbox.error(WireError::io("waiting for a frame")(error))),
            };
            match header.kind {
                FrameKind::Ram => inbox.land(header, &self.landing)?,
                FrameKind::PassEnd => self.end_pass(inbox, header)?,
                _ => {
                    inbox.rest(header)?;
                    let found = header.encode()[0].into();
                    return Err(inbox.error(WireError::Unexpected { what: "frame", found }));
                }
            }
        }
        Ok(())
    }

    /// A connection ends the pass: waits until all have.
    fn end_pass(&self, inbox: &Inbox, header: Header) -> Result<(), StreamError> {
        let (number, found) = (inbox.number, header.count);
        if header.flags != 0 {
            let found = header.flags.into();
            return Err(inbox.error(WireError::Unexpected { what: "flags of the end of a pass", found }));
        }
        let mut state = self.lock();
        if found != state.pass {
            return Err(StreamError::Pass { number, found, expected: state.pass });
        }
        state.ended[number] = true;
        if state.ended.iter().all(|ended| *ended) {
            state.pass = state.pass.wrapping_add(1);
            state.ended.fill(false);
            self.landing.counters.passes.fetch_add(1, Ordering::Relaxed);
            self.changed.notify_all();
            return Ok(());
        }
        while state.pass == found {
            if state.closing || state.error.is_some() {
                return Err(StreamError::Failed);
            }
            let mut connections = state.closed.iter().zip(&state.ended);
            if let Some(number) = connections.position(|(closed, ended)| *closed && !*ended) {
                return Err(StreamError::Closed { number, pass: found });
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Why a thread gave up, told once.
    fn error(&self) -> Result<(), StreamError> {
        let error = self.lock().error.take();
        self.changed.notify_all();
        error.map_or(Ok(()), Err)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
