//! A thread that does operations one after the other: what io_uring cannot do, and everything where the host does not
//! permit io_uring (containers, `kernel.io_uring_disabled`). Slower, but the VM starts.

use super::event::Event;
use super::image::ImageFile;
use super::op::{Done, Op};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};

/// It only makes system calls.
const STACK_BYTES: usize = 64 << 10;

/// See the module.
pub struct Worker {
    /// `None` only while dropping.
    jobs: Option<Sender<(u16, Op)>>,
    done: Receiver<Done>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread. It signals `completed` after each operation.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start(file: &Arc<ImageFile>, completed: &Event) -> io::Result<Self> {
        let (jobs, next) = channel::<(u16, Op)>();
        let (finished, done) = channel();
        let (file, completed) = (Arc::clone(file), completed.clone());
        let thread = Builder::new().name("blk-worker".into()).stack_size(STACK_BYTES).spawn(move || {
            for (token, mut op) in next {
                let result = op.run(&file);
                if finished.send(Done { token, op, result }).is_err() {
                    return;
                }
                completed.signal();
            }
        })?;
        Ok(Self { jobs: Some(jobs), done, thread: Some(thread) })
    }

    /// Hands `op` over; given back if the thread is gone.
    pub fn push(&self, token: u16, op: Op) -> Result<(), Op> {
        let Some(jobs) = &self.jobs else { return Err(op) };
        jobs.send((token, op)).map_err(|returned| returned.0.1)
    }

    /// The next operation that has ended.
    pub fn pop(&self) -> Option<Done> {
        self.done.try_recv().ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the thread itself.
            let _ended = thread.join();
        }
    }
}
