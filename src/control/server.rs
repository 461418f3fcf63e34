//! The VM's end of the control socket: one thread that accepts, one for each client.
//!
//! Everything a client can do is bounded: how many there are, how long a line is, how long it takes. Refuses to know
//! what a request does to the guest.

use super::lines::{Lines, Received};
use super::machine::{Machine, RunState};
use super::protocol::{Answer, AnswerLine, MAX_REQUEST_BYTES, Refusal, RefusalKind, Reply, Request, Show, VERSION};
use crate::config::VmConfig;
use crate::events::{EventBus, Next, Subscription};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, bind, listen, shutdown, socket_with,
};
use std::collections::HashMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Clients at one time.
pub const MAX_CLIENTS: usize = 16;
/// Longest time from one request to the end of the next, on one connection.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time a client may leave a write waiting.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it is checked that a listening client is still there.
const LISTENER_CHECK: Duration = Duration::from_secs(1);
/// Longest time that clients have to hear the last events when the VM ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// The machine behind a control socket.
pub struct Subject {
    /// What it was built from.
    pub config: VmConfig,
    /// The machine.
    pub machine: Arc<dyn Machine>,
    /// What happens to it.
    pub events: Arc<EventBus>,
}

/// A control socket in service. When dropped it takes no more requests, waits a second for clients to hear the last
/// events, and ends; the socket's file stays for its owner to remove.
pub struct Server {
    listener: Arc<UnixListener>,
    clients: Arc<Clients>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Clients {
    state: Mutex<ClientsState>,
    left: Condvar,
}

#[derive(Default)]
struct ClientsState {
    /// No client is taken any more.
    closing: bool,
    /// Number for the next client.
    next: u64,
    /// A handle on each client's connection, to end its reading.
    streams: HashMap<u64, UnixStream>,
}

impl Server {
    /// Serves `subject` on a new socket at `path`, which only its owner may use.
    pub fn start(path: &Path, subject: Subject) -> io::Result<Server> {
        let listener = Arc::new(listen_at(path)?);
        let clients = Arc::new(Clients::default());
        let acceptor = thread::Builder::new().name("control".into()).spawn({
            let (listener, clients, subject) = (Arc::clone(&listener), Arc::clone(&clients), Arc::new(subject));
            move || accept(&listener, &clients, &subject)
        })?;
        Ok(Server { listener, clients, acceptor: Some(acceptor) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        let mut state = self.clients.lock();
        state.closing = true;
        for stream in state.streams.values() {
            let _ = stream.shutdown(std::net::Shutdown::Read); // a client that has gone has nothing to read
        }
        while !state.streams.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                log::warn!("{} control clients have not taken what was sent to them", state.streams.len());
                break;
            }
            state = self.clients.left.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        // Wakes the acceptor: accept on a socket that is shut down fails.
        if shutdown(&self.listener, Shutdown::Both).is_ok() {
            let _ = self.acceptor.take().map(JoinHandle::join); // a panic there was reported by its thread
        }
    }
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, ClientsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a client, if there is room for it.
    fn enter(self: &Arc<Self>, stream: &UnixStream) -> io::Result<Option<Presence>> {
        let mut state = self.lock();
        if state.closing || state.streams.len() >= MAX_CLIENTS {
            return Ok(None);
        }
        let id = state.next;
        state.next += 1;
        state.streams.insert(id, stream.try_clone()?);
        Ok(Some(Presence { clients: Arc::clone(self), id }))
    }
}

/// A client's place among the [`Clients`] until dropped.
struct Presence {
    clients: Arc<Clients>,
    id: u64,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.clients.lock().streams.remove(&self.id);
        self.clients.left.notify_all();
    }
}

/// A listening socket with mode 0600 from the moment it has a name: Linux takes the mode of the unbound socket.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, 64)?;
    Ok(UnixListener::from(socket))
}

fn accept(listener: &UnixListener, clients: &Arc<Clients>, subject: &Arc<Subject>) {
    loop {
        let taken = listener.accept().and_then(|(stream, _)| admit(stream, clients, subject));
        if clients.lock().closing {
            return;
        }
        if let Err(error) = taken {
            log::warn!("cannot take a control client: {error}");
            thread::sleep(Duration::from_millis(100)); // out of descriptors or threads: others must end first
        }
    }
}

fn admit(stream: UnixStream, clients: &Arc<Clients>, subject: &Arc<Subject>) -> io::Result<()> {
    let presence = clients.enter(&stream)?;
    let mut connection = Lines::new(stream, MAX_REQUEST_BYTES, WRITE_TIMEOUT)?;
    let Some(presence) = presence else {
        let refusal = Refusal::new(RefusalKind::Busy, format!("there are {MAX_CLIENTS} clients already"));
        let _ = answer(&mut connection, Answer::Error(refusal)); // a new socket has room for a line
        return Ok(());
    };
    let subject = Arc::clone(subject);
    thread::Builder::new().name("control-client".into()).spawn(move || {
        if let Err(error) = serve(&mut connection, &subject) {
            log::debug!("a control client is gone: {error}");
        }
        drop(presence);
    })?;
    Ok(())
}

/// Answers one client until it leaves.
fn serve(connection: &mut Lines, subject: &Subject) -> io::Result<()> {
    loop {
        let line = match connection.receive(REQUEST_TIMEOUT)? {
            Received::Line(line) => line,
            Received::Closed => return Ok(()),
            Received::TimedOut => {
                let text = format!("no request within {} s", REQUEST_TIMEOUT.as_secs());
                return answer(connection, Answer::Error(Refusal::new(RefusalKind::BadRequest, text)));
            }
            Received::TooLong => {
                let text = format!("a request has at most {MAX_REQUEST_BYTES} bytes");
                return answer(connection, Answer::Error(Refusal::new(RefusalKind::BadRequest, text)));
            }
        };
        match Request::parse(&line) {
            Ok(Request::Events) => {
                let subscription = subject.events.subscribe();
                answer(connection, Answer::Reply(Reply::Listening))?;
                return stream_events(connection, &subscription);
            }
            Ok(request) => match carry_out(request, subject) {
                Ok(reply) => answer(connection, Answer::Reply(reply))?,
                Err(refusal) => answer(connection, Answer::Error(refusal))?,
            },
            Err(refusal) => answer(connection, Answer::Error(refusal))?,
        }
    }
}

fn carry_out(request: Request, subject: &Subject) -> Result<Reply, Refusal> {
    let machine = &subject.machine;
    let status = machine.status();
    let was = status.state;
    if was == RunState::Ended && request != Request::Show {
        return Err(Refusal::new(RefusalKind::Ended, "the guest has ended"));
    }
    if request != Request::Migration {
        log::info!("control request: {request:?}");
    }
    match request {
        Request::Show | Request::Events => {
            let config = subject.config.clone();
            let show = Show { name: config.name.clone(), pid: std::process::id(), status, config };
            return Ok(Reply::Show(Box::new(show)));
        }
        Request::Pause => machine.pause()?,
        Request::Resume => machine.resume()?,
        Request::PowerButton => machine.press_power_button()?,
        Request::Kill => machine.kill(),
        Request::Balloon { target_bytes } if target_bytes > status.memory_bytes => {
            let text = format!("a balloon of {target_bytes} bytes is larger than the guest's {}", status.memory_bytes);
            return Err(Refusal::new(RefusalKind::Refused, text));
        }
        Request::Balloon { target_bytes } => machine.set_balloon(target_bytes)?,
        Request::Save(order) => machine.save(order)?,
        Request::Migrate(order) => machine.migrate(*order)?,
        Request::MigrateCheck(order) => return Ok(Reply::Checked(Box::new(machine.check_move(*order)?))),
        Request::Migration => return Ok(Reply::Migration(machine.movement().map(Box::new))),
        Request::MigrationCancel => machine.cancel_move()?,
        Request::MigrationSet(limits) => machine.set_move(limits)?,
        Request::MigrationResolve(resolution) => machine.resolve_move(resolution)?,
    }
    Ok(Reply::Done { was })
}

/// Tells a client what happens until no more can or the client has gone.
fn stream_events(connection: &mut Lines, subscription: &Subscription) -> io::Result<()> {
    loop {
        match subscription.next(LISTENER_CHECK) {
            Next::Event(record) => answer(connection, Answer::Event(record))?,
            Next::Closed => return Ok(()),
            Next::Nothing if has_left(connection.stream())? => return Ok(()),
            Next::Nothing => {}
        }
    }
}

/// Whether the other side has closed its connection.
fn has_left(stream: &UnixStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(stream, PollFlags::HUP)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(fds.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR)))
}

fn answer(connection: &mut Lines, answer: Answer) -> io::Result<()> {
    connection.send(&AnswerLine { version: VERSION, answer })
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
