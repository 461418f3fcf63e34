//! A wire between two hosts that a test holds at a word of the protocol, spoils, alters, cuts and heals.
//!
//! It reads the frames that it carries, so a test says "hold Loaded" where others would sleep and hope.

use crate::vm::LONG;
use serde_json::Value;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;
use sterna_migration::handover::Order;
use sterna_migration::wire::frame::{FrameKind, Header, read_contents, read_header};
use sterna_migration::wire::message::{FINAL_STATE, decode, send};
use sterna_migration::wire::{Preamble, ToSource, ToTarget, preamble};

/// What goes over the wire, in the order in which it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Machine,
    Ready,
    Make,
    Made,
    Rehearsal,
    Rehearsed,
    Ram,
    State,
    Loaded,
    Go,
    Running,
    Ask,
    Answer,
    Checked,
}

/// See the module. Everything it carries is cut when it is dropped.
pub struct Wire {
    /// Where it takes connections.
    pub address: String,
    shared: Arc<Shared>,
}

struct Shared {
    target: String,
    state: Mutex<State>,
    changed: Condvar,
}

/// What a test makes of the JSON in a word.
type Change = Box<dyn Fn(&mut Value) + Send>;

#[derive(Default)]
struct State {
    /// The first of these is held, with all that follows it on its connection.
    hold: Option<Word>,
    held: bool,
    /// In the first of these a bit is turned.
    spoil: Option<Word>,
    /// What the JSON in each of these becomes, as if its sender had said so.
    alter: Option<(Word, Change)>,
    /// The same for what opens a connection.
    alter_preamble: Option<fn(&mut Preamble)>,
    /// No connection gets through.
    down: bool,
    /// Grows when the wire is cut.
    cuts: u32,
    open: Vec<TcpStream>,
    seen: Vec<Word>,
}

impl Wire {
    /// A wire to the receiver at `address`.
    pub fn to(address: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = format!("tcp:{}", listener.local_addr().unwrap());
        let target = address.strip_prefix("tcp:").unwrap().to_owned();
        let shared = Arc::new(Shared { target, state: Mutex::default(), changed: Condvar::new() });
        let carrier = Arc::clone(&shared);
        // Ends with the test's process: nothing tells a listener that nobody needs it any more.
        thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(|stream| carrier.carry(stream)));
        Self { address: own, shared }
    }

    /// The next `word` is to be held.
    pub fn hold(&self, word: Word) {
        let mut state = self.shared.lock();
        (state.hold, state.held) = (Some(word), false);
    }

    /// In the next `word` a bit is to be turned, in the middle of what it says.
    pub fn spoil(&self, word: Word) {
        self.shared.lock().spoil = Some(word);
    }

    /// From now on `change` is made to the machine's description in each `Machine`, or to the report in each `Checked`; what was
    /// changed so far no longer is.
    pub fn alter(&self, word: Word, change: impl Fn(&mut Value) + Send + 'static) {
        let change: Change = Box::new(change);
        let mut state = self.shared.lock();
        (state.alter, state.alter_preamble) = (Some((word, change)), None);
    }

    /// The same for the preamble of each connection.
    pub fn alter_preamble(&self, change: fn(&mut Preamble)) {
        let mut state = self.shared.lock();
        (state.alter, state.alter_preamble) = (None, Some(change));
    }

    /// Waits until the word is held.
    pub fn await_held(&self) {
        let deadline = Instant::now() + LONG;
        let mut state = self.shared.lock();
        while !state.held {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{:?} did not come within {LONG:?}, but {:?}", state.hold, state.seen);
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
    }

    /// Lets go of what is held.
    pub fn release(&self) {
        self.shared.lock().hold = None;
        self.shared.changed.notify_all();
    }

    /// Cuts all connections; what is held is lost. New ones get through.
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        state.cuts += 1;
        (state.hold, state.held) = (None, false);
        for stream in state.open.drain(..) {
            let _gone = stream.shutdown(Shutdown::Both); // the other end may have closed it
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Lets no new connection through, or does again.
    pub fn set_down(&self, down: bool) {
        self.shared.lock().down = down;
    }

    /// What has gone over it.
    pub fn seen(&self) -> Vec<Word> {
        self.shared.lock().seen.clone()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.set_down(true);
        self.cut();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn carry(self: &Arc<Self>, source: TcpStream) {
        if self.lock().down {
            return;
        }
        let Ok(target) = TcpStream::connect(&self.target) else { return };
        let mut state = self.lock();
        let cuts = state.cuts;
        for stream in [&source, &target] {
            stream.set_nodelay(true).unwrap();
            state.open.push(stream.try_clone().unwrap());
        }
        drop(state);
        for towards_target in [true, false] {
            let (mut from, mut to) = (source.try_clone().unwrap(), target.try_clone().unwrap());
            if !towards_target {
                (from, to) = (to, from);
            }
            let shared = Arc::clone(self);
            thread::spawn(move || match shared.forward(&mut from, &mut to, towards_target, cuts) {
                // The end, or a reset: what came before has been carried on.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => drop(to.shutdown(Shutdown::Write)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                    [&from, &to].iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
                }
                // Nobody takes it there any more; what was said there before is still on its way back.
                _ => drop(io::copy(&mut from, &mut io::sink())),
            });
        }
    }

    fn forward(&self, from: &mut TcpStream, to: &mut TcpStream, towards_target: bool, cuts: u32) -> io::Result<()> {
        if towards_target {
            let mut bytes = [0; preamble::BYTES];
            from.read_exact(&mut bytes)?;
            if let Some(change) = self.lock().alter_preamble {
                let mut opening = Preamble::decode(&bytes).unwrap();
                change(&mut opening);
                bytes = opening.encode();
            }
            to.write_all(&bytes)?;
        }
        loop {
            let header = read_header(from).map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            let mut bytes = vec![0; usize::try_from(header.length).unwrap()];
            from.read_exact(&mut bytes)?;
            let (word, raw_bytes) = read_word(header, &bytes, towards_target);
            if let Some(word) = word
                && self.pass(word, cuts)?
            {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x10;
            }
            let altered = word.and_then(|word| self.altered(word, header, &bytes));
            to.write_all(&altered.unwrap_or_else(|| [&header.encode(), &bytes[..]].concat()))?;
            copy(from, to, raw_bytes)?;
        }
    }

    /// Waits while `word`, or a word before it on its way, is held. Whether it is to be spoiled.
    fn pass(&self, word: Word, cuts: u32) -> io::Result<bool> {
        let mut state = self.lock();
        while state.cuts == cuts && state.hold == Some(word) {
            state.held = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap();
        }
        state.seen.push(word);
        if state.cuts != cuts {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Ok(state.spoil.take_if(|wanted| *wanted == word).is_some())
    }

    /// The frame of `word` as it is to be, where it is to be another.
    fn altered(&self, word: Word, header: Header, bytes: &[u8]) -> Option<Vec<u8>> {
        let state = self.lock();
        let (_, change) = state.alter.as_ref().filter(|(wanted, _)| *wanted == word)?;
        let frame = read_contents(&mut &bytes[..], header).unwrap();
        let mut altered = Vec::new();
        if word == Word::Machine {
            let ToTarget::Machine(mut machine) = decode(&frame).unwrap() else { return None };
            machine.description = changed(&machine.description, change);
            send(&mut altered, &ToTarget::Machine(machine)).unwrap();
        } else {
            let ToSource::Checked(report) = decode(&frame).unwrap() else { return None };
            send(&mut altered, &ToSource::Checked(changed(&report, change))).unwrap();
        }
        Some(altered)
    }
}

/// `json` after `change`.
fn changed(json: &[u8], change: &Change) -> Vec<u8> {
    let mut value = serde_json::from_slice(json).unwrap();
    change(&mut value);
    serde_json::to_vec(&value).unwrap()
}

fn copy(from: &mut TcpStream, to: &mut TcpStream, bytes: u64) -> io::Result<()> {
    if io::copy(&mut from.take(bytes), to)? == bytes { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// What a frame says, and how many bytes follow it without a frame.
fn read_word(header: Header, bytes: &[u8], towards_target: bool) -> (Option<Word>, u64) {
    if header.kind == FrameKind::Ram {
        return (Some(Word::Ram), 0);
    }
    let Ok(frame) = read_contents(&mut &bytes[..], header) else { return (None, 0) };
    let word = match (header.kind, towards_target) {
        (FrameKind::State, _) if header.flags & FINAL_STATE != 0 => Word::State,
        (FrameKind::State, _) => Word::Rehearsal,
        (FrameKind::Message, true) => match decode::<ToTarget>(&frame) {
            Ok(ToTarget::Machine(_)) => Word::Machine,
            Ok(ToTarget::Make(_)) => Word::Make,
            Ok(ToTarget::Order(Order::Go)) => Word::Go,
            Ok(ToTarget::Order(Order::Ask)) => Word::Ask,
            Ok(ToTarget::Probe { bytes }) => return (None, bytes),
            _ => return (None, 0),
        },
        (FrameKind::Message, false) => match decode::<ToSource>(&frame) {
            Ok(ToSource::Ready(_)) => Word::Ready,
            Ok(ToSource::Made) => Word::Made,
            Ok(ToSource::Rehearsed { .. }) => Word::Rehearsed,
            Ok(ToSource::Loaded(_)) => Word::Loaded,
            Ok(ToSource::Running(_)) => Word::Running,
            Ok(ToSource::Checked(_)) => Word::Checked,
            Ok(_) => Word::Answer,
            _ => return (None, 0),
        },
        _ => return (None, 0),
    };
    (Some(word), 0)
}
