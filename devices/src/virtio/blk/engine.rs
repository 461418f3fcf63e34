//! Runs operations on a file: io_uring where it may be used, a thread for the rest, one event for both.

use super::event::Event;
use super::image::ImageFile;
use super::op::{Done, Op};
use super::ring::Ring;
use super::worker::Worker;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// See the module. Whoever drops it has waited for all operations: [`Self::in_flight`] is 0.
pub struct Engine {
    file: Arc<ImageFile>,
    /// Absent where the host does not permit it.
    pub ring: Option<Ring>,
    worker: Option<Worker>,
    /// Operations that could not even be started.
    failed: Vec<Done>,
    completed: Event,
    in_flight: usize,
}

impl Engine {
    /// An engine that signals `completed`. Without io_uring it says so in the log, by `name`.
    pub fn new(file: Arc<ImageFile>, completed: Event, name: &str) -> Self {
        let ring = Ring::new(&completed)
            .inspect_err(|error| {
                log::warn!("disk {name}: io_uring is not available ({error}): a thread does its I/O, slower")
            })
            .ok();
        Self { file, ring, worker: None, failed: Vec::new(), completed, in_flight: 0 }
    }

    /// Signalled when an operation has ended.
    pub fn completed(&self) -> &Event {
        &self.completed
    }

    /// Operations started and not yet returned by [`Self::next_done`].
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Starts `op`, at the latest with the next [`Self::submit`]. Its end is told by [`Self::next_done`] in any case.
    pub fn start(&mut self, token: u16, op: Op) {
        self.in_flight += 1;
        let entry = op.entry(self.file.as_raw_fd());
        let pushed = match (&mut self.ring, entry) {
            (Some(ring), Some(entry)) => ring.push(token, op, entry),
            _ => self.hand_over(token, op),
        };
        if let Err(op) = pushed {
            self.failed.push(Done { token, op, result: Err(io::ErrorKind::ResourceBusy.into()) });
            self.completed.signal();
        }
    }

    fn hand_over(&mut self, token: u16, op: Op) -> Result<(), Op> {
        if self.worker.is_none() {
            self.worker = Worker::start(&self.file, &self.completed)
                .inspect_err(|error| log::error!("no thread for block I/O: {error}"))
                .ok();
        }
        match &self.worker {
            Some(worker) => worker.push(token, op),
            None => Err(op),
        }
    }

    /// Hands what was started to the kernel. Where it has no room now, the event makes the caller come back.
    pub fn submit(&mut self) {
        if self.ring.as_mut().is_some_and(|ring| ring.submit().is_err()) {
            self.completed.signal();
        }
    }

    /// The next operation that has ended.
    pub fn next_done(&mut self) -> Option<Done> {
        let done = self.failed.pop().or_else(|| self.ring.as_mut()?.pop()).or_else(|| self.worker.as_ref()?.pop())?;
        self.in_flight -= 1;
        Some(done)
    }
}
