//! `sterna receive`: other hosts' VMs come to this one.
//!
//! The receiver accepts connections and reads 48 bytes of each, by which it knows where the connection belongs. A new move gets a
//! process of its own, confined before it reads a byte, which becomes the VM; the thread that started it keeps what that process
//! must not take with it when it dies: whether the guest has started there ([`Keeper`]).

use super::Output;
use super::run::{carry_out, catch};
use crate::cli::{ReceiveArgs, ReceivedArgs};
use crate::error::Error;
use crate::records::Records;
use crate::registry::Registry;
use crate::vmm::{self, Arrival, KeeperLink, MoveError, Start, Word};
use serde::Serialize;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use sterna_migration::handover::{Keeper, KeeperAction, KeeperEvent, KeeperState, Move, Order};
use sterna_migration::stream::{Address, Listener, Socket, StreamError};
use sterna_migration::wire::frame::{read_contents, read_header, write_failure};
use sterna_migration::wire::message::send;
use sterna_migration::wire::{Preamble, Purpose, ToSource, preamble};

/// How long a peer may take to say what it wants.
const PREAMBLE_PATIENCE: Duration = Duration::from_secs(5);
/// Longest question about a move: this process is not confined, so it reads little.
const MAX_QUESTION_BYTES: u64 = 256;
/// How long a guest may take after a SIGTERM before it is said that it has not reacted.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections that are looked at at one time.
const MAX_CONNECTIONS: usize = 128;
/// Moves whose guest has not started yet, at one time.
const MAX_LIVING: usize = 32;
/// Moves that are remembered; beyond it the oldest that have ended are forgotten.
const MAX_MOVES: usize = 256;

/// What is printed once connections are accepted.
#[derive(Serialize)]
struct Listening<'a> {
    listening: &'a Address,
}

/// What the receiver knows of its moves.
struct Moves {
    plan: ProcessPlan,
    /// A process that waits for the next machine: starting and confining one takes a good part of a small move.
    spare: Mutex<Option<Process>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// In the order in which they came.
    order: Vec<Move>,
    moves: HashMap<Move, Entry>,
    /// Connections that are being looked at.
    connections: usize,
    /// A move has come to its end: it arrived, or it did not.
    first: Option<bool>,
}

struct Entry {
    keeper: Keeper,
    /// There while the VM's process may live.
    link: Option<Arc<KeeperLink>>,
}

/// A process that is to be a VM, and whom it belongs to.
struct Started {
    this_move: Move,
    /// What its end says of the receiver's only move: nothing where it was a trial.
    counts: bool,
    link: Arc<KeeperLink>,
    child: Child,
    /// Its first connection, held until the guest starts: what kills the process leaves somebody to tell the source.
    main: Option<Socket>,
}

/// Takes one machine after another.
pub fn receive(registry: &Registry, args: &ReceiveArgs, verbose: u8, output: Output) -> Result<(), Error> {
    registry.make_dir()?;
    let records = Records::from_env();
    records.prepare().map_err(|source| Error::File {
        attempt: "make the directory",
        path: records.dir().to_owned(),
        source,
    })?;
    let listener = Listener::bind(&args.listen).map_err(|source| Error::Receive { source })?;
    let plan = ProcessPlan { storage: args.storage.clone(), verbose };
    let moves = Arc::new(Moves { plan, spare: Mutex::default(), state: Mutex::default() });
    moves.start_spare();
    output.line(&Listening { listening: listener.address() }, |ready| format!("listening on {}\n", ready.listening))?;
    loop {
        let accepted = listener.accept(args.once.then_some(Duration::from_millis(100)));
        match accepted {
            Ok(socket) => moves.admit(socket),
            Err(error) if matches!(&error, StreamError::Listen { source, .. } if source.kind() == io::ErrorKind::TimedOut) =>
                {}
            Err(error) => {
                log::warn!("{error}");
                thread::sleep(Duration::from_millis(100)); // out of descriptors: others must end first
            }
        }
        if args.once
            && let Some(arrived) = moves.lock().first
        {
            return if arrived { Ok(()) } else { Err(Error::NothingArrived) };
        }
    }
}

/// How a VM's process is started.
struct ProcessPlan {
    storage: Vec<std::path::PathBuf>,
    verbose: u8,
}

/// A process that becomes a VM when it is given a connection. It ends when the line to it does.
struct Process {
    child: Child,
    link: KeeperLink,
    /// The storage that it could see when it was confined.
    storage: Vec<Vec<u8>>,
}

/// What decides which storage a process can reach from its confinement on: mounts, block devices, directories of the root.
fn storage_in_sight() -> Vec<Vec<u8>> {
    let mut seen: Vec<_> = ["/proc/self/mountinfo", "/proc/partitions"]
        .iter()
        .map(|path| std::fs::read(path).unwrap_or_default())
        .collect();
    let root = std::fs::metadata("/").map_or((0, 0), |root| (root.mtime(), root.mtime_nsec()));
    seen.push([root.0.to_le_bytes(), root.1.to_le_bytes()].concat());
    seen
}

impl Moves {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Starts the process of the next machine, if there is none: not while one arrives, which has better use for the processors.
    fn start_spare(&self) {
        let mut spare = lock(&self.spare);
        if spare.is_none() {
            *spare = self.plan.start().inspect_err(|error| log::warn!("no process for the next VM: {error}")).ok();
        }
    }

    /// Looks at a connection on a thread of its own, if there is room.
    fn admit(self: &Arc<Self>, socket: Socket) {
        let mut state = self.lock();
        if state.connections >= MAX_CONNECTIONS {
            log::warn!("more than {MAX_CONNECTIONS} connections at one time; one is refused");
            return;
        }
        state.connections += 1;
        drop(state);
        let moves = Arc::clone(self);
        let look = move || {
            let looked = moves.look(&socket);
            if let Err(error) = &looked {
                log::warn!("a connection is refused: {error}");
                let _told = write_failure(&mut &socket, &error.to_string()); // a peer that has gone does not hear it
            }
            drop(socket);
            moves.lock().connections -= 1;
            if let Ok(Some(started)) = looked {
                moves.keep(started);
            }
        };
        if let Err(error) = thread::Builder::new().name("connection".into()).spawn(look) {
            log::warn!("a connection is refused: {error}");
            self.lock().connections -= 1;
        }
    }

    /// Reads where a connection belongs and gives it there; a process that was started for it is to be kept.
    fn look(&self, socket: &Socket) -> io::Result<Option<Started>> {
        socket.set_timeout(PREAMBLE_PATIENCE)?;
        let mut bytes = [0; preamble::BYTES];
        socket.until(Instant::now() + PREAMBLE_PATIENCE).read_exact(&mut bytes)?;
        let preamble = Preamble::decode(&bytes).map_err(io::Error::other)?;
        let this_move = Move { id: preamble.id, epoch: preamble.epoch };
        match preamble.purpose {
            Purpose::Move | Purpose::Check => self.begin(this_move, &preamble, socket).map(Some),
            Purpose::Join => match self.link(this_move) {
                Some(link) => link.pass(&preamble, socket).map(|()| None),
                None => Err(io::Error::other("this connection belongs to no move that is under way here")),
            },
            Purpose::Ask => self.answer(this_move, &preamble, socket).map(|()| None),
            Purpose::File => Err(io::Error::other("a saved file came over the network; use sterna restore")),
        }
    }

    fn link(&self, this_move: Move) -> Option<Arc<KeeperLink>> {
        self.lock().moves.get(&this_move)?.link.clone()
    }

    /// Gives the connection to the process that is to be the VM. The move is remembered before that process can do anything.
    fn begin(&self, this_move: Move, preamble: &Preamble, socket: &Socket) -> io::Result<Started> {
        let counts = preamble.purpose == Purpose::Move;
        let spare = lock(&self.spare).take().and_then(Process::still_good);
        let Process { mut child, link, .. } = spare.map_or_else(|| self.plan.start(), Ok)?;
        let link = Arc::new(link);
        let taken = self.lock().take_in(this_move, Arc::clone(&link)).map_err(io::Error::other);
        let was_taken = taken.is_ok();
        match taken.and_then(|()| link.pass(preamble, socket)) {
            Ok(()) => Ok(Started { this_move, counts, link, child, main: Some(socket.clone()) }),
            // The process has nothing, so it cannot run a guest.
            Err(error) => {
                let ended = child.kill().and_then(|()| child.wait());
                if was_taken {
                    self.lock().end(this_move, counts);
                }
                ended.and(Err(error))
            }
        }
    }

    /// Hears what the VM's process says, to its end.
    fn keep(&self, started: Started) {
        let Started { this_move, counts, link, mut child, mut main } = started;
        loop {
            match link.hear() {
                Word::Starting => {
                    main = None;
                    self.lock().tell(this_move, KeeperEvent::Starting);
                }
                Word::Settled => {
                    if counts {
                        self.lock().first.get_or_insert(true);
                    }
                    self.start_spare();
                }
                Word::End => break,
            }
        }
        match child.wait() {
            Ok(status) => tell_end(status, main),
            Err(error) => log::warn!("a VM's process cannot be waited for: {error}"),
        }
        self.start_spare();
        self.lock().end(this_move, counts);
    }

    /// Somebody asks what became of a move: its process answers, or the keeper for it.
    fn answer(&self, this_move: Move, preamble: &Preamble, socket: &Socket) -> io::Result<()> {
        let action = match self.lock().moves.get_mut(&this_move) {
            Some(entry) => {
                let asked = entry.keeper.on(KeeperEvent::Order(this_move, Order::Ask));
                (asked.map_err(io::Error::other)?, entry.link.clone())
            }
            None => (None, None),
        };
        let said = match action {
            (Some(KeeperAction::PassOn(_)), Some(link)) => return link.pass(preamble, socket),
            (Some(KeeperAction::Send(answer)), _) => ToSource::from(answer),
            _ => ToSource::Unknown,
        };
        // What is asked is in the preamble; the order itself is read so that the answer meets an open connection.
        let mut input = socket.until(Instant::now() + PREAMBLE_PATIENCE);
        let header = read_header(&mut input).map_err(io::Error::other)?;
        if header.length > MAX_QUESTION_BYTES {
            return Err(io::Error::other(format!("a question of {} bytes", header.length)));
        }
        read_contents(&mut input, header).map_err(io::Error::other)?;
        send(&mut &*socket, &said).map_err(io::Error::other)
    }
}

impl State {
    /// Remembers a move whose process is about to be started, in one step: of two that come with one id the second is refused.
    fn take_in(&mut self, this_move: Move, link: Arc<KeeperLink>) -> Result<(), String> {
        if self.moves.contains_key(&this_move) {
            return Err("this move has been here before".to_owned());
        }
        let on_the_way = |entry: &&Entry| entry.link.is_some() && entry.keeper.state() == KeeperState::Waiting;
        if self.moves.values().filter(on_the_way).count() >= MAX_LIVING {
            return Err(format!(
                "{MAX_LIVING} machines are on their way to here already; try again when some have arrived"
            ));
        }
        self.order.push(this_move);
        self.moves.insert(this_move, Entry { keeper: Keeper::new(this_move), link: Some(link) });
        if self.order.len() > MAX_MOVES {
            let moves = &self.moves;
            let oldest = self.order.iter().find(|known| moves.get(known).is_none_or(|entry| entry.link.is_none()));
            if let Some(oldest) = oldest.copied() {
                self.forget(oldest);
            }
        }
        Ok(())
    }

    fn tell(&mut self, this_move: Move, event: KeeperEvent) {
        if let Some(entry) = self.moves.get_mut(&this_move)
            && let Err(refusal) = entry.keeper.on(event)
        {
            log::warn!("{refusal}");
        }
    }

    /// The process of a move has ended, or was never there. Nobody asks about one that does not count.
    fn end(&mut self, this_move: Move, counts: bool) {
        if !counts {
            return self.forget(this_move);
        }
        self.tell(this_move, KeeperEvent::Ended);
        if let Some(entry) = self.moves.get_mut(&this_move) {
            entry.link = None;
            let arrived = entry.keeper.state() == KeeperState::Gone;
            self.first.get_or_insert(arrived);
        }
    }

    fn forget(&mut self, this_move: Move) {
        self.order.retain(|known| *known != this_move);
        self.moves.remove(&this_move);
    }
}

/// What a process that was killed could not say itself, to the operator here and to a source that waits for it.
fn tell_end(status: ExitStatus, main: Option<Socket>) {
    let Some(signal) = status.signal() else { return };
    let reason = format!("the VM's process was killed by signal {signal}; `dmesg` tells whether memory had run out");
    log::warn!("{reason}");
    if let Some(main) = main
        && let Err(error) = write_failure(&mut &main, &reason)
    {
        log::debug!("the source is not told: {error}");
    }
}

impl ProcessPlan {
    fn start(&self) -> io::Result<Process> {
        let (near, far) = UnixStream::pair()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::iter::repeat_n("-v", self.verbose.into())).arg("received");
        for dir in &self.storage {
            command.arg("--storage").arg(dir);
        }
        command.stdin(Stdio::from(OwnedFd::from(far))).stdout(Stdio::null()).stderr(Stdio::inherit());
        let storage = storage_in_sight();
        Ok(Process { child: command.spawn()?, link: KeeperLink::new(near), storage })
    }
}

impl Process {
    /// Itself, unless it has ended, or cannot reach what was mounted since.
    fn still_good(mut self) -> Option<Self> {
        if matches!(self.child.try_wait(), Ok(None)) && self.storage == storage_in_sight() {
            return Some(self);
        }
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            log::warn!("a process that is not needed does not end: {error}");
        }
        None
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Is the process that a receiver has made for a machine to come.
pub fn serve(registry: &Registry, args: &ReceivedArgs) -> Result<(), Error> {
    // Fails only for the leader of a process group, which a child of `spawn` is not, and which needs no new one.
    if let Err(errno) = rustix::process::setsid() {
        log::debug!("no new session: {errno}");
    }
    let signals = catch()?;
    super::confine::receiver(registry, args)?;
    let failed = |source| Error::Process { attempt: "take over from the receiver", source };
    let stream = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let keeper = KeeperLink::new(UnixStream::from(stream));
    let Some((preamble, socket)) = keeper.take().map_err(failed)? else { return Ok(()) };
    let refused = |error: MoveError| Error::Arrival { source: error };
    let mut arrival = Arrival::read(socket, &preamble).map_err(refused)?;
    arrival.description.settle(|name| registry.console(name));
    if preamble.purpose == Purpose::Check {
        return vmm::answer_check(&arrival, registry).map_err(refused);
    }
    let config = &arrival.description.config;
    let refuse = |error: Error| {
        arrival.refuse(&error.line());
        error
    };
    config.validate_arrival().none_or(()).map_err(|problems| refuse(problems.into()))?;
    let claim = registry.claim(&config.name).map_err(|error| refuse(error.into()))?;
    let log = registry.log(&config.name);
    let opened = OpenOptions::new().create(true).append(true).mode(0o600).open(&log);
    let file = opened.map_err(|source| refuse(Error::File { attempt: "open the log", path: log, source }))?;
    rustix::stdio::dup2_stderr(&file).map_err(|errno| failed(errno.into()))?;
    let start = Start::Receive(Box::new(arrival), keeper);
    carry_out(claim, start, signals, false, STOP_TIMEOUT, || Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn number(number: u128) -> Move {
        Move { id: Uuid::from_u128(number), epoch: 1 }
    }

    fn take_in(state: &mut State, this_move: Move) -> Result<(), String> {
        let (near, _far) = UnixStream::pair().unwrap();
        state.take_in(this_move, Arc::new(KeeperLink::new(near)))
    }

    #[test]
    fn the_second_of_two_moves_with_one_id_is_refused() {
        let mut state = State::default();
        take_in(&mut state, number(1)).unwrap();
        assert_eq!(take_in(&mut state, number(1)).unwrap_err(), "this move has been here before");
        state.end(number(1), true);
        assert!(take_in(&mut state, number(1)).is_err());
        assert_eq!(state.moves[&number(1)].keeper.state(), KeeperState::Discarded);
        assert_eq!(state.first, Some(false));
    }

    #[test]
    fn a_peer_cannot_have_processes_without_end() {
        let mut state = State::default();
        for id in 0..MAX_LIVING as u128 {
            take_in(&mut state, number(id)).unwrap();
        }
        assert!(take_in(&mut state, number(99)).unwrap_err().starts_with("32 machines are on their way"));
        // A guest that has started is one of this host's, and no longer on its way.
        state.tell(number(0), KeeperEvent::Starting);
        take_in(&mut state, number(99)).unwrap();
    }

    #[test]
    fn trials_do_not_push_moves_out_of_memory() {
        let mut state = State::default();
        take_in(&mut state, number(0)).unwrap();
        state.end(number(0), true);
        for id in 1..=MAX_MOVES as u128 * 2 {
            take_in(&mut state, number(id)).unwrap();
            state.end(number(id), false);
        }
        assert!(state.moves.contains_key(&number(0)) && state.order == [number(0)]);
    }
}
