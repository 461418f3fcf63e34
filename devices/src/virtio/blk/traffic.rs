//! The requests of a disk between its virtqueue and its engine: a bounded table of what is in flight.
//!
//! It answers on the ring and knows nothing of configuration space. A FLUSH needs no order of its own: virtio has it
//! cover the writes that were *reported* before it was made available (1.2, 5.2.6.2), and fdatasync covers all writes
//! that have ended, which those have.

use super::engine::Engine;
use super::flight::{Flight, Ground, Next};
use super::op::Done;
use super::request::{Limits, Request, Status, Verb};
use super::{ID_BYTES, SLOTS};
use crate::virtio::chain::slice;
use crate::virtio::{BUDGET, Chain, Fault, Io};
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};
use vm_memory::Bytes;

/// The one virtqueue.
pub const QUEUE: usize = 0;
/// Requests that may hold a bounce buffer at once.
const MAX_BOUNCES: usize = 16;
/// How often a wait for the host's storage is reported.
const REPORT_S: i64 = 5;

/// See the module.
pub struct Traffic {
    /// For the log.
    name: String,
    id: [u8; ID_BYTES],
    limits: Limits,
    ground: Ground,
    /// Does the I/O.
    pub engine: Engine,
    /// What is in flight, by token.
    flights: Vec<Option<Flight>>,
    /// Tokens to be had.
    free: Vec<u16>,
    complaints: Complaints,
}

/// What came of taking a chain.
enum Taken {
    Started,
    /// Answered without I/O.
    Answered,
    /// It has to wait for what is in flight.
    Blocked,
}

impl Traffic {
    /// No traffic yet. `id` answers GET_ID.
    pub fn new(name: String, id: [u8; ID_BYTES], limits: Limits, ground: Ground, engine: Engine) -> Self {
        let flights = (0..SLOTS).map(|_| None).collect();
        let complaints = Complaints::default();
        Self { name, id, limits, ground, engine, flights, free: (0..SLOTS).rev().collect(), complaints }
    }

    /// Takes what the driver has made available and answers what has ended.
    ///
    /// # Errors
    /// What the driver did wrong; requests taken before go on.
    pub fn pump(&mut self, io: &mut Io) -> Result<(), Fault> {
        let mut news = self.answer_all(io)?;
        let taken = self.take_all(io, &mut news);
        self.engine.submit();
        // Some end at once, and some of these go on.
        news |= self.answer_all(io)?;
        self.engine.submit();
        if news {
            io.signal(QUEUE)?;
        }
        taken
    }

    fn take_all(&mut self, io: &mut Io, news: &mut bool) -> Result<(), Fault> {
        for _ in 0..BUDGET {
            // When there is no slot or no way, the next completion comes back here.
            if self.free.is_empty() {
                return Ok(());
            }
            let Some(chain) = io.pop(QUEUE)? else { return Ok(()) };
            match self.take(io, &chain)? {
                Taken::Started => {}
                Taken::Answered => *news = true,
                Taken::Blocked => {
                    io.put_back(QUEUE);
                    return Ok(());
                }
            }
        }
        io.again(QUEUE);
        Ok(())
    }

    fn take(&mut self, io: &mut Io, chain: &Chain) -> Result<Taken, Fault> {
        let request = Request::parse(io.ram, QUEUE, chain, self.limits)?;
        let verb = match request.verb {
            Ok(Verb::Identify) => {
                let length = self.identify(io, &request);
                answer(io, chain.head, &request, Status::Ok, length)?;
                return Ok(Taken::Answered);
            }
            Ok(Verb::Flush) => Verb::Flush,
            Ok(verb) if request.length != 0 => verb,
            Ok(_nothing_to_do) => {
                answer(io, chain.head, &request, Status::Ok, 0)?;
                return Ok(Taken::Answered);
            }
            Err(status) => {
                answer(io, chain.head, &request, status, 0)?;
                return Ok(Taken::Answered);
            }
        };
        let flight = Flight::new(chain.head, verb, request, &self.ground);
        if self.must_wait(&flight) {
            return Ok(Taken::Blocked);
        }
        let Some(token) = self.free.pop() else { return Ok(Taken::Blocked) };
        let Some(slot) = self.flights.get_mut(usize::from(token)) else { return Ok(Taken::Blocked) };
        let op = slot.insert(flight).first(&self.ground);
        self.engine.start(token, op);
        Ok(Taken::Started)
    }

    /// Writes the serial number and returns how much of it there was room for.
    fn identify(&self, io: &Io, request: &Request) -> u32 {
        let mut rest = self.id.as_slice();
        for segment in slice(&request.data, 0, ID_BYTES as u64) {
            let (part, left) = rest.split_at(rest.len().min(segment.length as usize));
            // Cannot fail: the segment was checked against this RAM.
            let _copied = io.ram.write_slice(part, segment.address);
            rest = left;
        }
        (ID_BYTES - rest.len()) as u32
    }

    /// Whether `flight` has to wait for others: for one of the few bounce buffers, or because one of the two writes
    /// back bytes of an O_DIRECT block that the other changes.
    fn must_wait(&self, flight: &Flight) -> bool {
        let mut others = self.flights.iter().flatten();
        if flight.bounces() && others.clone().filter(|other| other.bounces()).count() >= MAX_BOUNCES {
            return true;
        }
        if self.ground.alignment.offset == 1 || !flight.changes() {
            return false;
        }
        let exclusive = flight.exclusive(&self.ground);
        let blocks = flight.blocks(&self.ground);
        others.any(|other| {
            let theirs = other.exclusive(&self.ground);
            (exclusive.is_some() && other.changes() && overlap(&blocks, &other.blocks(&self.ground)))
                || theirs.is_some_and(|theirs| overlap(&blocks, &theirs))
        })
    }

    fn answer_all(&mut self, io: &mut Io) -> Result<bool, Fault> {
        let mut news = false;
        while let Some(done) = self.engine.next_done() {
            if let Some((flight, status)) = self.settle(done) {
                // Cannot fail: the status byte's address was checked against this RAM.
                let _written = io.ram.write_obj(status as u8, flight.status);
                io.complete(QUEUE, flight.head, flight.written(status))?;
                news = true;
            }
        }
        Ok(news)
    }

    /// Takes an ended operation to its request: either that goes on, or it is over with a status.
    fn settle(&mut self, done: Done) -> Option<(Flight, Status)> {
        let token = done.token;
        let slot = self.flights.get_mut(usize::from(token))?;
        let (status, error) = match slot.as_mut()?.after(done, &self.ground) {
            Next::Start(op) => {
                self.engine.start(token, op);
                return None;
            }
            Next::Answer(status, error) => (status, error),
        };
        let flight = slot.take()?;
        self.free.push(token);
        if let Some(error) = error {
            self.complaints.failed(&self.name, &flight, &error);
        }
        Some((flight, status))
    }

    /// Clears the event and does what [`Self::pump`] does.
    pub fn completed(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.engine.completed().clear();
        self.pump(io)
    }

    /// Waits until nothing is in flight. Storage that does not answer is waited for, however long: to go on without
    /// it would let it write into the guest later. The log says what is waited for.
    ///
    /// # Errors
    /// A ring that cannot be written.
    pub fn quiesce(&mut self, io: &mut Io) -> Result<(), Fault> {
        let mut outcome = Ok(());
        let mut news = false;
        self.wait_for_all(|traffic| match traffic.answer_all(io) {
            Ok(some) => news |= some,
            Err(fault) => outcome = Err(fault),
        });
        if news {
            io.signal(QUEUE)?;
        }
        outcome
    }

    fn wait_for_all(&mut self, mut collect: impl FnMut(&mut Self)) {
        let started = Instant::now();
        let mut report = Duration::from_secs(REPORT_S as u64);
        loop {
            self.engine.completed().clear();
            collect(self);
            self.engine.submit();
            if self.engine.in_flight() == 0 {
                return;
            }
            self.engine.completed().wait(REPORT_S);
            let waited = started.elapsed();
            if waited >= report {
                report = waited + Duration::from_secs(REPORT_S as u64);
                let first = self.flights.iter().flatten().next();
                let what = first.map_or_else(String::new, |flight| format!(", the first {flight}"));
                let count = self.engine.in_flight();
                log::warn!("disk {}: waiting for {count} requests for {} s{what}", self.name, waited.as_secs());
            }
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        // Nobody is there to be answered; the operations only have to end before their memory goes.
        self.wait_for_all(|traffic| {
            while let Some(done) = traffic.engine.next_done() {
                drop(traffic.settle(done));
            }
        });
    }
}

/// Answers a request that needs no I/O, with `length` bytes written before the status byte.
fn answer(io: &mut Io, head: u16, request: &Request, status: Status, length: u32) -> Result<(), Fault> {
    // Cannot fail: the status byte's address was checked against this RAM.
    let _written = io.ram.write_obj(status as u8, request.status);
    // The status byte counts only where nothing unwritten lies before it (virtio 1.2, 2.7.8).
    let written = if u64::from(length) == request.room { length + 1 } else { length };
    io.complete(QUEUE, head, written)
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Failures of the host's storage as the log gets them: at most one a second, however fast the guest repeats them.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    suppressed: u32,
}

impl Complaints {
    fn failed(&mut self, name: &str, flight: &Flight, error: &io::Error) {
        if self.last.is_some_and(|last| last.elapsed() < Duration::from_secs(1)) {
            self.suppressed = self.suppressed.saturating_add(1);
            return;
        }
        let more = match std::mem::take(&mut self.suppressed) {
            0 => String::new(),
            count => format!(" ({count} more before it)"),
        };
        log::error!("disk {name}: {flight} failed: {error}{more}");
        self.last = Some(Instant::now());
    }
}
