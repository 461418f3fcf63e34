//! A person's terminal joined to a host's console.

use crate::{Error, Result};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::{read, write},
    stdio::{stdin, stdout},
    termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr},
};
use std::{
    io::{self, ErrorKind, Read, Write},
    os::unix::net::UnixStream,
};

/// Ctrl-]: the next key is for the testbed and not for the host.
const ESCAPE: u8 = 0x1d;

/// Why a session on a console ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Escape and this key.
    Key(u8),
    /// The terminal's input ended.
    InputEnded,
    /// The host went away.
    HostGone,
}

/// Joins terminal and console until the person leaves with Ctrl-] and a key.
pub fn join(console: &mut UnixStream) -> Result<Left> {
    let _raw = Raw::enter().map_err(Error::io("set up the terminal"))?;
    relay(console).map_err(Error::io("pass the console through"))
}

fn relay(console: &mut UnixStream) -> io::Result<Left> {
    let mut buffer = [0u8; 4096];
    let mut escaped = false;
    loop {
        let mut ready = [PollFd::from_borrowed_fd(stdin(), PollFlags::IN), PollFd::new(console, PollFlags::IN)];
        match poll(&mut ready, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let (person, host) = (!ready[0].revents().is_empty(), !ready[1].revents().is_empty());
        if host {
            let count = match console.read(&mut buffer) {
                Ok(0) => return Ok(Left::HostGone),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Left::HostGone),
                other => other?,
            };
            show(buffer.get(..count).unwrap_or_default())?;
        }
        if person {
            let count = read(stdin(), &mut buffer)?;
            if count == 0 {
                return Ok(Left::InputEnded);
            }
            let (pass, key) = filter(buffer.get(..count).unwrap_or_default(), &mut escaped);
            console.write_all(&pass)?;
            if let Some(key) = key {
                return Ok(Left::Key(key));
            }
        }
    }
}

/// What of the typed bytes goes to the host, and the key after an escape, which ends the session. Twice the escape sends it.
fn filter(typed: &[u8], escaped: &mut bool) -> (Vec<u8>, Option<u8>) {
    let mut pass = Vec::with_capacity(typed.len());
    for byte in typed {
        match (*escaped, *byte) {
            (false, ESCAPE) => *escaped = true,
            (true, key) if key != ESCAPE => return (pass, Some(key)),
            (_, byte) => {
                *escaped = false;
                pass.push(byte);
            }
        }
    }
    (pass, None)
}

fn show(mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = write(stdout(), bytes)?;
        bytes = bytes.get(count..).unwrap_or_default();
    }
    Ok(())
}

/// The terminal in raw mode until dropped; nothing to do where standard input is none.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> io::Result<Self> {
        if !isatty(stdin()) {
            return Ok(Self(None));
        }
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Nothing is left to do about a terminal that is gone.
            let _ = tcsetattr(stdin(), OptionalActions::Flush, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_is_seen_across_reads_and_can_be_sent() {
        let mut escaped = false;
        assert_eq!(filter(b"ls\x1d", &mut escaped), (b"ls".to_vec(), None));
        assert_eq!(filter(b"\x1dx", &mut escaped), (b"\x1dx".to_vec(), None));
        assert_eq!(filter(b"y\x1dqz", &mut escaped), (b"y".to_vec(), Some(b'q')));
    }
}
