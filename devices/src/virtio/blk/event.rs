//! An eventfd: a descriptor that is readable while something has ended.

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

/// See the module. Clones share the descriptor.
#[derive(Clone, Debug)]
pub struct Event(Arc<OwnedFd>);

impl Event {
    /// An event that is not signalled.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)))
    }

    /// The descriptor to wait on or to register.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Signals it.
    pub fn signal(&self) {
        // The counter can only refuse near 2^64, when the event is pending anyway.
        let _pending = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    /// Clears it. Look for what has ended after, not before.
    pub fn clear(&self) {
        // Nothing to read means nothing to clear.
        let _count = rustix::io::read(&*self.0, &mut [0; 8]);
    }

    /// Waits until it is signalled, at most `timeout_s` seconds; says whether it was.
    pub fn wait(&self, timeout_s: i64) -> bool {
        let timeout = Timespec { tv_sec: timeout_s, tv_nsec: 0 };
        // An interruption is as good as a time-out: the caller looks again.
        poll(&mut [PollFd::new(&*self.0, PollFlags::IN)], Some(&timeout)).is_ok_and(|ready| ready != 0)
    }
}
