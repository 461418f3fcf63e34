//! The source's side: passes over RAM, on one or more connections.
//!
//! RAM is cut into chunks that the connections take from one list, whoever is free. Each connection has a thread of low priority
//! for passes beside a running guest. While the guest waits the caller's thread works on connection 0 and each further one has a thread
//! of ordinary priority. Refuses to know why a page is in a pass.

use super::batch::Batch;
use super::socket::Socket;
use super::throttle::Throttle;
use super::{FIRST_PASS, REASON, StreamError, connections, peer_text, spawn, step_back};
use crate::pages::{PAGE_BYTES, PageSet, Run};
use crate::ram::Ram;
use crate::wire::frame::{self, FrameKind, HEADER_BYTES, MAX_DATA_PAGES, RangeKind};
use crate::wire::{WireError, message};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pages of a chunk: 8 MiB, what a frame carries. A multiple of 64, as KVM_CLEAR_DIRTY_LOG wants it.
pub const CHUNK_PAGES: u64 = MAX_DATA_PAGES;
/// A pass of no more bytes is sent by the caller alone: waking other threads takes longer than it saves (measured on loopback:
/// 5 to 25 us more for 2 to 4 connections, and nothing gained up to 2 MiB).
const ALONE_BYTES: u64 = 2 << 20;
/// How often it is asked whether the move is cancelled.
const WATCH: Duration = Duration::from_millis(25);
/// A pass that is to stop may finish the frames under way for so long, then the connections are cut.
const GRACE: Duration = Duration::from_millis(50);

/// What a pass asks and tells the machine's owner. Called from several threads.
pub trait Hooks: Send + Sync {
    /// Pages of `chunk` are about to be read, those whose bits are set in `words`, its bit 0 being the first page: whatever
    /// is written from now on must be noted again. `chunk` lies in one region and begins at a multiple of 64 pages of it.
    ///
    /// # Errors
    /// End the pass.
    fn before(&self, chunk: Run, words: &[u64]) -> io::Result<()>;
    /// So many more pages of the pass are dealt with, and so many bytes were sent for them.
    fn sent(&self, pages: u64, bytes: u64);
    /// Whether to stop.
    fn cancelled(&self) -> bool;
}

/// How fast a pass goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// No faster than the throttle says, behind the guest that runs beside it.
    Limited,
    /// No faster than the throttle says, at ordinary priority: a guest that outruns the copy shares the processors with it.
    Pressed,
    /// As fast as it goes: the guest waits.
    Full,
}

/// What a pass came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassFigures {
    /// Its number.
    pub pass: u32,
    /// Pages in it.
    pub pages: u64,
    /// Those of them that were zeros.
    pub zero_pages: u64,
    /// Bytes sent, headers included.
    pub bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// See the module. When dropped, it ends its connections.
pub struct Sender {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The caller's.
    batch: Batch,
    pass: u32,
    control_stays: bool,
}

struct Shared {
    ram: Ram,
    sockets: Vec<Socket>,
    chunks: Vec<Run>,
    hooks: Arc<dyn Hooks>,
    throttle: Arc<Throttle>,
    /// No more frames; why is in the state.
    stop: AtomicBool,
    state: Mutex<State>,
    /// There is a job, or no more will come.
    begun: Condvar,
    /// A thread is done with its job.
    done: Condvar,
    /// No more passes will come; apart from `begun`, so that the watcher does not wake for each.
    closed: Condvar,
}

#[derive(Default)]
struct State {
    /// What the threads shall work on.
    job: Option<Arc<Job>>,
    /// A pass is under way.
    active: bool,
    /// Threads that are not done with it.
    pending: usize,
    /// Why the pass stops, and since when.
    error: Option<(StreamError, Instant)>,
    closing: bool,
}

/// A pass.
struct Job {
    pass: u32,
    pages: Arc<PageSet>,
    pace: Pace,
    /// The next chunk to be taken.
    next: AtomicUsize,
    seen_pages: AtomicU64,
    zero_pages: AtomicU64,
    sent_bytes: AtomicU64,
}

impl Sender {
    /// Sends `ram` over `sockets`, the first of which is the connection on which messages go too.
    ///
    /// # Errors
    /// Too few or many connections, RAM that cannot be cut, no thread.
    pub fn new(
        ram: Ram,
        sockets: Vec<Socket>,
        throttle: Arc<Throttle>,
        hooks: Arc<dyn Hooks>,
    ) -> Result<Self, StreamError> {
        connections(sockets.len())?;
        let chunks = chunks(&ram)?;
        let number = sockets.len();
        let shared = Arc::new(Shared {
            ram,
            sockets,
            chunks,
            hooks,
            throttle,
            stop: AtomicBool::new(false),
            state: Mutex::default(),
            begun: Condvar::new(),
            done: Condvar::new(),
            closed: Condvar::new(),
        });
        let batch = Batch::default();
        let mut sender = Self { shared, threads: Vec::new(), batch, pass: FIRST_PASS, control_stays: false };
        let shared = Arc::clone(&sender.shared);
        sender.threads.push(spawn("move-watch", move || shared.watch())?);
        let behind = (0..number).map(|number| (number, true, "beside"));
        let ordinary = (1..number).map(|number| (number, false, "send"));
        for (number, behind, name) in behind.chain(ordinary) {
            let shared = Arc::clone(&sender.shared);
            sender.threads.push(spawn(&format!("move-{name}-{number}"), move || shared.serve(number, behind))?);
        }
        Ok(sender)
    }

    /// The first connection, for messages between passes.
    pub fn control(&self) -> &Socket {
        &self.shared.sockets[0]
    }

    /// Sends `pages` as the next pass and ends it on every connection. In the first, pages that are zeros are left out: the
    /// target's RAM is fresh.
    ///
    /// # Errors
    /// The first failure, or the peer's reason; nothing more can be sent then. [`StreamError::Cancelled`] comes within a
    /// tenth of a second even if the peer takes nothing.
    pub fn send_pass(&mut self, pages: &Arc<PageSet>, pace: Pace) -> Result<PassFigures, StreamError> {
        let start = Instant::now();
        let shared = &self.shared;
        let job = Arc::new(Job {
            pass: self.pass,
            pages: Arc::clone(pages),
            pace,
            next: AtomicUsize::new(0),
            seen_pages: AtomicU64::new(0),
            zero_pages: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        });
        let alone = pages.count() * PAGE_BYTES <= ALONE_BYTES;
        shared.begin(&job, alone)?;
        // On connections that carry nothing the pass ends first, so that the target's threads wait for the last byte.
        let idle = if alone { 1..shared.sockets.len() } else { 0..0 };
        let ended = idle.into_iter().try_for_each(|number| shared.end_pass(number, &job));
        let result = match pace {
            Pace::Limited if !alone => Ok(()),
            _ => ended.and_then(|()| shared.work(0, &job, &mut self.batch)),
        };
        shared.finish_pass(result).map_err(|error| self.reason(error))?;
        self.pass += 1;
        Ok(PassFigures {
            pass: job.pass,
            pages: job.seen_pages.load(Ordering::Relaxed),
            zero_pages: job.zero_pages.load(Ordering::Relaxed),
            bytes: job.sent_bytes.load(Ordering::Relaxed),
            elapsed: start.elapsed(),
        })
    }

    /// Ends all connections but the first, which goes back to the caller.
    pub fn finish(mut self) -> Socket {
        self.control_stays = true;
        self.control().clone()
    }

    /// A peer that breaks a connection has said why on the first, if it could.
    fn reason(&self, error: StreamError) -> StreamError {
        if !error.is_broken() || self.control().set_timeout(REASON).is_err() {
            return error;
        }
        match message::read_frame(&mut self.control()) {
            Ok(frame) if frame.header.kind == FrameKind::Failure => peer_text(&frame.contents),
            _ => error,
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.begun.notify_all();
        self.shared.closed.notify_all();
        self.shared.sockets.iter().skip(self.control_stays.into()).for_each(Socket::shut);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a thread of the move panicked");
            }
        }
    }
}

/// RAM in the pieces that the connections take.
fn chunks(ram: &Ram) -> Result<Vec<Run>, StreamError> {
    let mut chunks = Vec::new();
    for region in ram.regions() {
        if !region.first.is_multiple_of(64) {
            return Err(StreamError::Layout { first: region.first });
        }
        let starts = (region.first..region.end()).step_by(CHUNK_PAGES as usize);
        chunks.extend(starts.map(|first| Run { first, pages: CHUNK_PAGES.min(region.end() - first) }));
    }
    Ok(chunks)
}

impl Shared {
    fn begin(&self, job: &Arc<Job>, alone: bool) -> Result<(), StreamError> {
        let mut state = self.lock();
        if self.stop.load(Ordering::Acquire) {
            return Err(StreamError::Failed);
        }
        state.active = true;
        if !alone {
            state.job = Some(Arc::clone(job));
            state.pending = self.sockets.len() - usize::from(job.pace != Pace::Limited);
            self.begun.notify_all();
        }
        Ok(())
    }

    /// The caller's part of a pass came to `result`: waits for the others.
    fn finish_pass(&self, result: Result<(), StreamError>) -> Result<(), StreamError> {
        if let Err(error) = result {
            self.fail(error);
        }
        let mut state = self.lock();
        while state.pending > 0 {
            state = self.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.active = false;
        state.job = None;
        let Some((error, _)) = state.error.take() else { return Ok(()) };
        // The target must not wait for what will not come; on the first connection it can be told why.
        self.sockets.iter().skip(1).for_each(Socket::shut_write);
        Err(error)
    }

    /// Ends the pass under way. The first reason counts: the others follow from it.
    fn fail(&self, error: StreamError) {
        let mut state = self.lock();
        if state.active && state.error.is_none() {
            state.error = Some((error, Instant::now()));
            self.stop.store(true, Ordering::Release);
        }
        drop(state);
        self.throttle.wake();
    }

    /// A thread's life: its connection's part of every pass that goes `behind` the guest, or of every other.
    fn serve(&self, number: usize, behind: bool) {
        if behind {
            step_back();
        }
        let (mut batch, mut last) = (Batch::default(), 0);
        loop {
            let mut state = self.lock();
            let job = loop {
                match &state.job {
                    _ if state.closing => return,
                    Some(job) if job.pass != last && (job.pace == Pace::Limited) == behind => break Arc::clone(job),
                    _ => state = self.begun.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(state);
            last = job.pass;
            if let Err(error) = self.work(number, &job, &mut batch) {
                self.fail(error);
            }
            self.lock().pending -= 1;
            self.done.notify_one();
        }
    }

    /// One connection's part of a pass.
    fn work(&self, number: usize, job: &Job, batch: &mut Batch) -> Result<(), StreamError> {
        batch.clear();
        while let Some(chunk) = self.chunks.get(job.next.fetch_add(1, Ordering::Relaxed)) {
            let words = job.pages.words(chunk.first, chunk.pages);
            if words.iter().all(|word| *word == 0) {
                continue;
            }
            self.check()?;
            self.hooks.before(*chunk, words).map_err(|source| StreamError::Memory {
                attempt: "clearing the dirty log",
                first: chunk.first,
                pages: chunk.pages,
                source,
            })?;
            let most_pages = match job.pace {
                Pace::Limited | Pace::Pressed => self.throttle.frame_pages(self.sockets.len()),
                Pace::Full => MAX_DATA_PAGES,
            };
            for page in job.pages.runs_in(*chunk).flat_map(|run| run.first..run.end()) {
                if batch.is_full(most_pages) {
                    self.flush(number, job, batch)?;
                }
                match self.ram.is_zero(page) {
                    true if job.pass == FIRST_PASS => batch.skip(),
                    true => batch.push(page, RangeKind::Zero),
                    false => batch.push(page, RangeKind::Data),
                }
            }
            if batch.is_empty() {
                self.flush(number, job, batch)?;
            }
        }
        self.flush(number, job, batch)?;
        self.end_pass(number, job)
    }

    /// Sends what was gathered.
    fn flush(&self, number: usize, job: &Job, batch: &mut Batch) -> Result<(), StreamError> {
        let mut bytes = 0;
        if !batch.is_empty() {
            bytes = batch.bytes();
            if job.pace != Pace::Full {
                self.throttle.take(bytes, &self.stop);
            }
            self.check()?;
            let done = batch.write(&self.ram, &self.sockets[number]);
            done.map_err(WireError::io("sending pages"))
                .map_err(|source| StreamError::Connection { number, source })?;
        }
        let (seen_pages, zero_pages) = batch.pages();
        job.seen_pages.fetch_add(seen_pages, Ordering::Relaxed);
        job.zero_pages.fetch_add(zero_pages, Ordering::Relaxed);
        job.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        if seen_pages > 0 {
            self.hooks.sent(seen_pages, bytes);
        }
        batch.clear();
        Ok(())
    }

    fn end_pass(&self, number: usize, job: &Job) -> Result<(), StreamError> {
        self.check()?;
        let done = frame::write_pass_end(&mut &self.sockets[number], job.pass);
        job.sent_bytes.fetch_add(HEADER_BYTES as u64, Ordering::Relaxed);
        done.map_err(|source| StreamError::Connection { number, source })
    }

    /// Whether a frame may still go out. The error is of no interest: the pass has one already.
    fn check(&self) -> Result<(), StreamError> {
        if self.stop.load(Ordering::Acquire) { Err(StreamError::Failed) } else { Ok(()) }
    }

    /// Asks from time to time whether to stop, and cuts a pass that is to stop but waits for its peer.
    fn watch(&self) {
        let mut state = self.lock();
        while !state.closing {
            state = self.closed.wait_timeout(state, WATCH).unwrap_or_else(PoisonError::into_inner).0;
            if !state.active {
                continue;
            }
            if let Some((_, since)) = &state.error {
                if since.elapsed() >= GRACE {
                    self.sockets.iter().for_each(Socket::shut_write);
                }
                continue;
            }
            drop(state);
            if self.hooks.cancelled() {
                self.fail(StreamError::Cancelled);
            }
            state = self.lock();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
