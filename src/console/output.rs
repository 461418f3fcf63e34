//! Where the guest's console output goes, without ever making the guest wait.
//!
//! The writer the serial port holds and the event loop share an [`Output`]: a bounded memory of the latest bytes and
//! a sink that may be absent, slow or broken. Bytes go to the sink at once while it takes them; then they wait, the
//! oldest being lost when there are too many, until the event loop finds the sink writable again. It refuses to know
//! what the sink is and who replaces it.

use log::warn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, fstat};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// A pipe that polls writable takes this much without blocking (pipe(7), PIPE_BUF), and so do sockets.
const STREAM_CHUNK: usize = 4096;
/// A terminal that polls writable has room for one byte; more might block.
const TERMINAL_CHUNK: usize = 1;

/// The latest output, and a sink for it. See the module.
pub struct Output {
    /// The latest bytes, ending at `end`.
    kept: VecDeque<u8>,
    /// Most bytes that may wait in `kept`.
    capacity: usize,
    /// Keep bytes that were sent, for the next sink.
    replay: bool,
    /// Bytes written since the beginning.
    end: u64,
    /// Bytes that some sink has never seen because it was too slow or broken.
    dropped_bytes: u64,
    sink: Option<Sink>,
    /// Written when the sink blocks or is gone.
    wake: EventFd,
}

struct Sink {
    fd: OwnedFd,
    /// Position of the next byte to send.
    position: u64,
    /// Bytes that one write may have.
    chunk: usize,
    /// Whether to look before each write, because descriptors that others share cannot be made non-blocking.
    look: bool,
    /// It took nothing last time; only the event loop tries again.
    blocked: bool,
}

/// What became of one attempt to send.
enum Sent {
    Some(usize),
    Blocked,
    /// This sink will not take these bytes but may take others: the disk is full.
    Refused(Errno),
    Gone(Errno),
}

impl Sink {
    fn new(fd: OwnedFd, position: u64) -> Self {
        let kind = fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let (look, chunk) = match kind {
            Ok(FileType::RegularFile) => (false, usize::MAX),
            Ok(FileType::CharacterDevice) => (true, TERMINAL_CHUNK),
            _ => (true, STREAM_CHUNK),
        };
        Self { fd, position, chunk, look, blocked: false }
    }

    fn writable(&self, wait: Duration) -> bool {
        let mut polled = [PollFd::new(&self.fd, PollFlags::OUT)];
        let timeout = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
        poll(&mut polled, Some(&timeout)).is_ok_and(|ready| ready > 0)
    }

    fn send(&self, bytes: &[u8]) -> Sent {
        let bytes = bytes.get(..self.chunk).unwrap_or(bytes);
        if self.look && !self.writable(Duration::ZERO) {
            return Sent::Blocked;
        }
        match rustix::io::retry_on_intr(|| rustix::io::write(&self.fd, bytes)) {
            Ok(0) | Err(Errno::AGAIN) => Sent::Blocked,
            Ok(sent) => Sent::Some(sent),
            Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => Sent::Refused(errno),
            Err(errno) => Sent::Gone(errno),
        }
    }
}

impl Output {
    /// Keeps at most `capacity` bytes, also those already sent if `replay` is set.
    pub fn new(capacity: usize, replay: bool, wake: EventFd) -> Self {
        Self { kept: VecDeque::new(), capacity, replay, end: 0, dropped_bytes: 0, sink: None, wake }
    }

    /// Replaces the sink; the new one gets what is kept first.
    pub fn set_sink(&mut self, fd: OwnedFd) {
        self.sink = Some(Sink::new(fd, self.start()));
        self.pump();
    }

    /// Forgets the sink. Output is kept for the next.
    pub fn clear_sink(&mut self) {
        self.sink = None;
    }

    /// Whether there is a sink, as far as is known.
    pub fn has_sink(&self) -> bool {
        self.sink.is_some()
    }

    /// The sink's descriptor if it has to be polled until it is writable.
    pub fn blocked_fd(&self) -> Option<RawFd> {
        self.sink.as_ref().filter(|sink| sink.blocked).map(|sink| sink.fd.as_raw_fd())
    }

    /// The sink may be writable again.
    pub fn resume(&mut self) {
        if let Some(sink) = &mut self.sink {
            sink.blocked = false;
        }
        self.pump();
    }

    /// Bytes that a sink was too slow or too broken for, so far.
    pub fn dropped_bytes(&self) -> u64 {
        self.dropped_bytes
    }

    /// Sends what waits, for at most `limit`. For the end, when nobody polls any more.
    pub fn drain(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            self.resume();
            let left = deadline.saturating_duration_since(Instant::now()).min(Duration::from_millis(100));
            match &self.sink {
                Some(sink) if sink.blocked && !left.is_zero() => sink.writable(left),
                _ => return,
            };
        }
    }

    fn start(&self) -> u64 {
        self.end - self.kept.len() as u64
    }

    fn push(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        self.end += bytes.len() as u64;
        let excess = self.kept.len().saturating_sub(self.capacity);
        self.kept.drain(..excess);
        self.pump();
        if !self.replay && self.sink.is_none() {
            self.kept.clear();
        }
    }

    /// Sends until everything is sent or the sink takes no more.
    fn pump(&mut self) {
        let start = self.start();
        let Some(sink) = self.sink.as_mut().filter(|sink| !sink.blocked) else { return };
        let mut lost = start.saturating_sub(sink.position);
        sink.position += lost;
        let mut gone = None;
        while sink.position < self.end {
            // `kept` is at most `capacity` long, so the distance fits.
            let skip = (sink.position - start) as usize;
            let (front, back) = self.kept.as_slices();
            let waiting = front.get(skip..).filter(|rest| !rest.is_empty());
            match sink.send(waiting.unwrap_or_else(|| &back[skip - front.len()..])) {
                Sent::Some(sent) => sink.position += sent as u64,
                Sent::Blocked => {
                    sink.blocked = true;
                    break;
                }
                Sent::Refused(errno) => {
                    if self.dropped_bytes + lost == 0 {
                        warn!("console output is being lost: {errno}");
                    }
                    lost += self.end - sink.position;
                    sink.position = self.end;
                }
                Sent::Gone(errno) => {
                    gone = Some(errno);
                    break;
                }
            }
        }
        let sent = sink.position;
        let waits = sink.blocked;
        self.dropped_bytes += lost;
        if let Some(errno) = gone {
            warn!("the console's reader is gone: {errno}");
            self.sink = None;
        }
        if gone.is_some() || waits {
            // The counter can only refuse near 2^64, when the event is pending anyway.
            let _pending = self.wake.write(1);
        }
        if !self.replay {
            self.kept.drain(..(sent - start) as usize);
        }
    }
}

/// An [`Output`] for two threads.
#[derive(Clone)]
pub struct Shared(Arc<Mutex<Output>>);

impl Shared {
    /// Shares `output`.
    pub fn new(output: Output) -> Self {
        Self(Arc::new(Mutex::new(output)))
    }

    /// Exclusive use. A thread that panicked in between leaves at worst a byte sent twice.
    pub fn lock(&self) -> MutexGuard<'_, Output> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A duplicate of a standard descriptor, to be polled and dropped apart from it.
///
/// # Errors
/// What fcntl(2) says.
pub fn duplicate(fd: impl AsFd) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    fn output(capacity: usize, replay: bool) -> (Shared, EventFd) {
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        (Shared::new(Output::new(capacity, replay, wake.try_clone().unwrap())), wake)
    }

    #[test]
    fn a_sink_gets_the_latest_bytes_first_and_then_all_that_follow() {
        let (mut shared, _) = output(4, true);
        shared.write_all(b"abcdef").unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        shared.lock().set_sink(ours.into());
        shared.write_all(b"gh").unwrap();
        shared.lock().clear_sink();
        let mut text = String::new();
        theirs.read_to_string(&mut text).unwrap();
        assert_eq!(text, "cdefgh");
        assert_eq!(shared.lock().dropped_bytes(), 0);
    }

    #[test]
    fn a_full_pipe_keeps_the_newest_and_never_blocks() {
        let (reader, writer) = io::pipe().unwrap();
        let (mut shared, wake) = output(10_000, false);
        shared.lock().set_sink(writer.into());
        let all: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
        all.chunks(1000).for_each(|part| shared.write_all(part).unwrap());
        assert!(wake.read().is_ok());
        assert!(shared.lock().blocked_fd().is_some());
        let mut reader = reader;
        let mut got = vec![0; 30_000];
        reader.read_exact(&mut got).unwrap();
        shared.lock().resume();
        shared.lock().clear_sink();
        reader.read_to_end(&mut got).unwrap();
        let dropped = shared.lock().dropped_bytes();
        assert_eq!(got.len() as u64 + dropped, 200_000);
        assert_eq!(got[got.len() - 10_000..], all[190_000..]);
    }

    #[test]
    fn a_reader_that_leaves_is_noticed_and_forgotten() {
        let (reader, writer) = io::pipe().unwrap();
        let (mut shared, wake) = output(100, false);
        shared.lock().set_sink(writer.into());
        drop(reader);
        shared.write_all(b"lost").unwrap();
        assert!(!shared.lock().has_sink());
        assert!(wake.read().is_ok());
        shared.write_all(b"nobody").unwrap();
        assert_eq!(shared.lock().kept.len(), 0);
    }

    #[test]
    fn a_full_disk_loses_bytes_and_not_the_guest() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (mut shared, _) = output(100, false);
        shared.lock().set_sink(full.into());
        shared.write_all(b"abc").unwrap();
        assert_eq!(shared.lock().dropped_bytes(), 3);
        assert!(shared.lock().has_sink(), "the disk may have room again");
    }

    #[test]
    fn the_end_waits_for_a_slow_reader_only_so_long() {
        let (_reader, writer) = io::pipe().unwrap();
        let (mut shared, _) = output(100_000, false);
        shared.lock().set_sink(writer.into());
        shared.write_all(&[b'x'; 80_000]).unwrap();
        let before = Instant::now();
        shared.lock().drain(Duration::from_millis(50));
        assert!(before.elapsed() < Duration::from_secs(5));
    }
}
