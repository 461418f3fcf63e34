//! The other end of a control socket: finds a VM by name, asks, and waits no longer than it was told to.

use super::lines::{Lines, Received};
use super::protocol::{Answer, AnswerLine, MAX_ANSWER_BYTES, Refusal, Reply, Request, RequestLine, Show, VERSION};
use crate::control::machine::RunState;
use crate::control::movement::{CheckReport, MigrateOrder, MoveStatus};
use crate::events::Record;
use crate::registry::{Registry, name_problem};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Longest time that a request is waited for, where nothing else is said.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Why a VM could not be asked, or what it answered instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No VM can have this name.
    #[error("{0}")]
    BadName(String),
    /// Nothing of that name is here.
    #[error("there is no VM '{name}' in {}", dir.display())]
    NoSuchVm {
        /// Name that was looked for.
        name: String,
        /// Where.
        dir: PathBuf,
    },
    /// A socket is there, a VM is not.
    #[error("the VM '{name}' has gone without a farewell: its process has crashed or was killed")]
    Gone {
        /// Name of the VM.
        name: String,
    },
    /// Belongs to another user.
    #[error("you may not control the VM '{name}': {} belongs to another user", socket.display())]
    Denied {
        /// Name of the VM.
        name: String,
        /// Its socket.
        socket: PathBuf,
    },
    /// The process is there and says nothing.
    #[error("the VM '{name}' (process {}) has not answered within {} s", pid.map_or("unknown".to_owned(), |pid| pid.to_string()), after.as_secs_f32())]
    NotAnswering {
        /// Name of the VM.
        name: String,
        /// Its process.
        pid: Option<u32>,
        /// How long it was waited for.
        after: Duration,
    },
    /// The connection broke or what came over it is not this protocol.
    #[error("the connection to the VM '{name}' broke")]
    Broken {
        /// Name of the VM.
        name: String,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The VM answered that it will not.
    #[error("the VM '{name}' has refused")]
    Refused {
        /// Name of the VM.
        name: String,
        /// In its words.
        #[source]
        source: Refusal,
    },
}

/// A connection to one VM.
#[derive(Debug)]
pub struct Client {
    name: String,
    lines: Lines,
    /// The process at the other end, as the kernel tells.
    pid: Option<u32>,
}

impl Client {
    /// Connects to the VM `name`, waiting at most `patience`.
    pub fn connect(registry: &Registry, name: &str, patience: Duration) -> Result<Client, Error> {
        if let Some(problem) = name_problem(name) {
            return Err(Error::BadName(problem));
        }
        let socket = registry.socket(name);
        let name = name.to_owned();
        let stream = match connect_within(&socket, patience) {
            Ok(stream) => stream,
            Err(Errno::NOENT | Errno::NAMETOOLONG) => {
                return Err(Error::NoSuchVm { name, dir: registry.dir().to_owned() });
            }
            Err(Errno::CONNREFUSED) => return Err(Error::Gone { name }),
            Err(Errno::ACCESS | Errno::PERM) => return Err(Error::Denied { name, socket }),
            Err(Errno::AGAIN) => return Err(Error::NotAnswering { name, pid: None, after: patience }),
            Err(errno) => return Err(Error::Broken { name, source: errno.into() }),
        };
        let pid = socket_peercred(&stream).ok().and_then(|peer| u32::try_from(peer.pid.as_raw_nonzero().get()).ok());
        match Lines::new(stream, MAX_ANSWER_BYTES, patience) {
            Ok(lines) => Ok(Client { name, lines, pid }),
            Err(source) => Err(Error::Broken { name, source }),
        }
    }

    /// The VM's process.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Sends `request` and waits for what comes of it, at most `patience`.
    pub fn call(&mut self, request: Request, patience: Duration) -> Result<Reply, Error> {
        let sent = self.lines.send(&RequestLine { version: VERSION, request });
        // A VM that takes no more clients says so and closes: read that rather than report the failed write.
        match (self.receive(patience), sent) {
            (Ok(Some(Answer::Reply(reply))), Ok(())) => Ok(reply),
            (Ok(Some(Answer::Error(source))), _) => Err(Error::Refused { name: self.name.clone(), source }),
            (Ok(Some(Answer::Event(_) | Answer::Reply(_))), _) => Err(self.broken("an answer nobody asked for")),
            (Ok(None), _) => Err(Error::NotAnswering { name: self.name.clone(), pid: self.pid, after: patience }),
            (Err(error), _) => Err(error),
        }
    }

    /// What the VM is and does.
    pub fn show(&mut self, patience: Duration) -> Result<Show, Error> {
        match self.call(Request::Show, patience)? {
            Reply::Show(show) => Ok(*show),
            _ => Err(self.broken("an answer to another question")),
        }
    }

    /// Carries out a `request` that changes something; the state before it.
    pub fn change(&mut self, request: Request) -> Result<RunState, Error> {
        match self.call(request, PATIENCE)? {
            Reply::Done { was } => Ok(was),
            _ => Err(self.broken("an answer to another question")),
        }
    }

    /// The move under way, or the last one.
    pub fn movement(&mut self) -> Result<Option<MoveStatus>, Error> {
        match self.call(Request::Migration, PATIENCE)? {
            Reply::Migration(status) => Ok(status.map(|status| *status)),
            _ => Err(self.broken("an answer to another question")),
        }
    }

    /// What a trial of a move finds, within `patience`.
    pub fn check_move(&mut self, order: MigrateOrder, patience: Duration) -> Result<CheckReport, Error> {
        match self.call(Request::MigrateCheck(Box::new(order)), patience)? {
            Reply::Checked(report) => Ok(*report),
            _ => Err(self.broken("an answer to another question")),
        }
    }

    /// Turns the connection into a stream of events, complete from here on.
    pub fn listen(mut self) -> Result<EventStream, Error> {
        match self.call(Request::Events, PATIENCE)? {
            Reply::Listening => Ok(self.into_events()),
            _ => Err(self.broken("an answer to another question")),
        }
    }

    /// What comes over the connection from here on, whether `events` was answered or is still waited for.
    pub fn into_events(self) -> EventStream {
        EventStream { client: self }
    }

    /// The next line's content; `None` if none has come in time.
    fn receive(&mut self, patience: Duration) -> Result<Option<Answer>, Error> {
        let broken = |source| Error::Broken { name: self.name.clone(), source };
        match self.lines.receive(patience).map_err(broken)? {
            Received::TimedOut => Ok(None),
            Received::Closed => Err(Error::Gone { name: self.name.clone() }),
            Received::TooLong => Err(self.broken("a line that is too long")),
            Received::Line(line) => match serde_json::from_slice::<AnswerLine>(&line) {
                Ok(AnswerLine { version: VERSION, answer }) => Ok(Some(answer)),
                Ok(AnswerLine { version, .. }) => {
                    Err(self.broken(&format!("it speaks version {version}, not {VERSION}")))
                }
                Err(error) => Err(broken(io::Error::new(io::ErrorKind::InvalidData, error))),
            },
        }
    }

    fn broken(&self, how: &str) -> Error {
        Error::Broken { name: self.name.clone(), source: io::Error::new(io::ErrorKind::InvalidData, how) }
    }
}

/// A VM's events as they happen.
#[derive(Debug)]
pub struct EventStream {
    client: Client,
}

/// What waiting for an event came to.
#[derive(Debug)]
pub enum Heard {
    /// An event.
    Event(Record),
    /// Nothing within the time given.
    Nothing,
    /// The VM's process has closed the connection, after its last event or without one.
    Closed,
}

impl EventStream {
    /// Waits for the next event, at most `timeout`.
    pub fn next(&mut self, timeout: Duration) -> Result<Heard, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.client.receive(deadline.saturating_duration_since(Instant::now())) {
                Ok(Some(Answer::Event(record))) => return Ok(Heard::Event(record)),
                Ok(Some(Answer::Reply(Reply::Listening))) => {}
                Ok(Some(_)) => return Err(self.client.broken("an answer among the events")),
                Ok(None) => return Ok(Heard::Nothing),
                Err(Error::Gone { .. }) => return Ok(Heard::Closed),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Connects without waiting longer than `patience`: the backlog of a process that stands still fills up, and a
/// connect would wait for it for ever.
fn connect_within(path: &Path, patience: Duration) -> Result<UnixStream, Errno> {
    let deadline = Instant::now() + patience;
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    rustix::io::ioctl_fionbio(&socket, false)?;
    Ok(UnixStream::from(socket))
}
