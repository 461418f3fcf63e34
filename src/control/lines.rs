//! Lines over a stream socket, bounded in length and in time. Refuses to know what they say.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Bytes taken from the socket at once.
const CHUNK_BYTES: usize = 4096;

/// A stream socket on which both sides send lines.
#[derive(Debug)]
pub struct Lines {
    stream: UnixStream,
    /// What came after the last line that was taken.
    pending: Vec<u8>,
    /// Longest line that is taken, with its newline.
    max_bytes: usize,
}

/// What waiting for a line came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// A line without its newline.
    Line(Vec<u8>),
    /// The other side has closed, perhaps within a line.
    Closed,
    /// No whole line has come within the time given.
    TimedOut,
    /// The line is longer than is taken; the rest of the stream cannot be trusted.
    TooLong,
}

impl Lines {
    /// Lines of at most `max_bytes` over `stream`; a write that makes no progress for `write_timeout` fails.
    pub fn new(stream: UnixStream, max_bytes: usize, write_timeout: Duration) -> io::Result<Self> {
        stream.set_write_timeout(Some(write_timeout))?;
        Ok(Lines { stream, pending: Vec::new(), max_bytes })
    }

    /// The socket itself.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Waits for a line, at most `timeout` for all of it.
    pub fn receive(&mut self, timeout: Duration) -> io::Result<Received> {
        let deadline = Instant::now() + timeout;
        let mut searched = 0;
        loop {
            if let Some(end) = self.pending.iter().skip(searched).position(|byte| *byte == b'\n') {
                let rest = self.pending.split_off(searched + end + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                line.pop();
                return Ok(if line.len() < self.max_bytes { Received::Line(line) } else { Received::TooLong });
            }
            searched = self.pending.len();
            if searched >= self.max_bytes {
                return Ok(Received::TooLong);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Received::TimedOut);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; CHUNK_BYTES];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(Received::Closed),
                Ok(count) => self.pending.extend(chunk.iter().take(count)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Received::Closed),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends `value` as one line of JSON.
    pub fn send(&mut self, value: &impl serde::Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(value)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    fn pair(max_bytes: usize) -> (UnixStream, Lines) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (theirs, Lines::new(ours, max_bytes, SOON).unwrap())
    }

    #[test]
    fn lines_are_cut_wherever_the_stream_is() {
        let (mut peer, mut lines) = pair(100);
        peer.write_all(b"one\ntw").unwrap();
        assert_eq!(lines.receive(SOON).unwrap(), Received::Line(b"one".to_vec()));
        assert_eq!(lines.receive(SOON).unwrap(), Received::TimedOut);
        peer.write_all(b"o\n\nthree").unwrap();
        assert_eq!(lines.receive(SOON).unwrap(), Received::Line(b"two".to_vec()));
        assert_eq!(lines.receive(SOON).unwrap(), Received::Line(b"".to_vec()));
        drop(peer);
        assert_eq!(lines.receive(SOON).unwrap(), Received::Closed);
    }

    #[test]
    fn a_line_has_a_longest_length() {
        let (mut peer, mut lines) = pair(4);
        peer.write_all(b"abc\nabcd\n").unwrap();
        assert_eq!(lines.receive(SOON).unwrap(), Received::Line(b"abc".to_vec()));
        assert_eq!(lines.receive(SOON).unwrap(), Received::TooLong);
        let (mut peer, mut lines) = pair(4);
        peer.write_all(&[b'x'; 5000]).unwrap();
        assert_eq!(lines.receive(SOON).unwrap(), Received::TooLong);
    }

    #[test]
    fn a_peer_that_does_not_read_is_given_up() {
        let (_peer, mut lines) = pair(4);
        let long = "x".repeat(16 << 20);
        assert_eq!(lines.send(&long).unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_dripping_peer_does_not_extend_its_time() {
        let (mut peer, mut lines) = pair(100);
        let drip = std::thread::spawn(move || {
            while peer.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        assert_eq!(lines.receive(Duration::from_millis(50)).unwrap(), Received::TimedOut);
        drop(lines);
        drip.join().unwrap();
    }
}
