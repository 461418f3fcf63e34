//! Where console input is read from, and when.
//!
//! A descriptor is in the event loop's set only while its bytes are wanted: one that is taken out cannot make the loop
//! spin on a hang-up or an end. It refuses to know what the bytes mean.

use event_manager::{Error, EventOps, EventSet, Events};
use log::warn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Bytes per read: a few FIFOs of 64.
const READ_BYTES: usize = 256;

/// Bytes read that the guest has not taken. At most one read's worth, since no other follows before it is empty.
#[derive(Debug, Default)]
pub struct Pending(Vec<u8>);

impl Pending {
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Offers what waits to `take`, which says how much it took. True if nothing waits any more.
    pub fn consume(&mut self, take: impl FnOnce(&[u8]) -> usize) -> bool {
        if !self.0.is_empty() {
            let taken = take(&self.0).min(self.0.len());
            self.0.drain(..taken);
        }
        self.0.is_empty()
    }
}

/// How the event loop sees the descriptor.
#[derive(Debug, PartialEq, Eq)]
enum Watch {
    Off,
    On,
    /// Cannot be polled, since it is always ready: a regular file or /dev/null.
    AlwaysReady,
    Ended,
}

/// What a read brought.
pub enum Got<'a> {
    Bytes(&'a [u8]),
    Nothing,
    End,
}

/// One source of input.
#[derive(Debug)]
pub struct Input {
    fd: OwnedFd,
    watch: Watch,
    buffer: [u8; READ_BYTES],
}

impl Input {
    pub fn new(fd: OwnedFd) -> Self {
        let kind = rustix::fs::fstat(&fd).map(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode));
        let watch = if kind == Ok(rustix::fs::FileType::RegularFile) { Watch::AlwaysReady } else { Watch::Off };
        Self { fd, watch, buffer: [0; READ_BYTES] }
    }

    pub fn always_ready(&self) -> bool {
        self.watch == Watch::AlwaysReady
    }

    /// Puts it into the event loop's set.
    pub fn watch(&mut self, ops: &mut EventOps) {
        if self.watch == Watch::Off {
            match ops.add(Events::new(&self.fd, EventSet::IN)) {
                Ok(()) => self.watch = Watch::On,
                // /dev/null and its like: nothing to wait for and nothing to read.
                Err(Error::Epoll(errno)) if errno.errno() == Errno::PERM.raw_os_error() => self.watch = Watch::Ended,
                Err(error) => warn!("cannot wait for console input: {error}"),
            }
        }
    }

    /// Takes it out again.
    pub fn unwatch(&mut self, ops: &mut EventOps) {
        if self.watch == Watch::On {
            let _always_there = ops.remove(Events::empty(&self.fd));
            self.watch = Watch::Off;
        }
    }

    /// It is in no set: the loop that had it is gone.
    pub fn forget_loop(&mut self) {
        if self.watch == Watch::On {
            self.watch = Watch::Off;
        }
    }

    /// There will be no more.
    pub fn end(&mut self) {
        self.watch = Watch::Ended;
    }

    /// Reads once; blocks only where the descriptor does and has nothing.
    pub fn read(&mut self) -> Got<'_> {
        match rustix::io::read(&self.fd, &mut self.buffer) {
            Ok(0) => Got::End,
            Ok(read) => Got::Bytes(&self.buffer[..read]),
            Err(Errno::INTR | Errno::AGAIN) => Got::Nothing,
            Err(errno) => {
                if errno != Errno::CONNRESET {
                    warn!("cannot read console input: {errno}");
                }
                Got::End
            }
        }
    }

    /// Whether the other side of a socket is gone for good.
    pub fn hung_up(&self) -> bool {
        let mut polled = [PollFd::new(&self.fd, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
