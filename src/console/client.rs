//! `sterna console`: a terminal joined to a console's socket until one of them ends.
//!
//! It refuses to know the machine behind the socket: leaving does nothing to it.

use super::escape::{Escape, Key};
use super::terminal::{Kind, RawTerminal, kind};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::{pipe, unregister};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

const NOTICE: &str = "Connected. Ctrl-] q leaves, the machine runs on; Ctrl-] h shows the keys.\n";
const HELP: &str = "\r\nCtrl-] q       leave; the machine runs on\r\nCtrl-] h       this help\r\n\
                    Ctrl-] Ctrl-]  send Ctrl-] to the guest\r\n";

/// How a visit to a console ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The user left, or a signal said to.
    ByUser,
    /// The machine closed the console.
    ByMachine,
}

/// Joins standard input and output to `console`. When standard input is no terminal and ends, output goes on until
/// the machine closes it.
///
/// # Errors
/// What the system calls say. The terminal is restored in any case.
pub fn attach(console: UnixStream) -> io::Result<Left> {
    // Before the terminal is raw: a signal from then on ends the visit and not the process.
    let (signal, handler) = UnixStream::pair()?;
    let mut registered = Vec::new();
    for number in [SIGTERM, SIGINT, SIGHUP] {
        registered.push(pipe::register(number, handler.try_clone()?)?);
    }
    let terminal = match kind(io::stdin()) {
        Kind::Foreground => {
            io::stderr().write_all(NOTICE.as_bytes())?;
            Some(RawTerminal::enter(io::stdin())?)
        }
        Kind::NoTerminal | Kind::Background => None,
    };
    let escape = terminal.is_some().then(Escape::default);
    let stdin = io::stdin();
    let input = (kind(&stdin) != Kind::Background).then(|| stdin.as_fd());
    let result = join(console, &signal, input, &mut io::stdout(), escape);
    registered.into_iter().for_each(|id| {
        unregister(id);
    });
    result
}

fn join(
    mut console: UnixStream,
    signal: &UnixStream,
    mut input: Option<BorrowedFd>,
    output: &mut impl Write,
    mut escape: Option<Escape>,
) -> io::Result<Left> {
    let mut buffer = [0; 4096];
    loop {
        let user = input.unwrap_or_else(|| signal.as_fd());
        let mut polled = [console.as_fd(), signal.as_fd(), user].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut polled, None) {
            Err(Errno::INTR) => continue,
            result => result?,
        };
        let [from_console, from_signal, from_user] = polled.map(|polled| !polled.revents().is_empty());
        if from_signal {
            return Ok(Left::ByUser);
        }
        if from_console {
            let read = match console.read(&mut buffer) {
                Ok(0) => return Ok(Left::ByMachine),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Left::ByMachine),
                result => result?,
            };
            output.write_all(&buffer[..read])?;
            output.flush()?;
        }
        if let (Some(user), true) = (input, from_user) {
            let read = rustix::io::retry_on_intr(|| rustix::io::read(user, &mut buffer))?;
            if read == 0 {
                input = None;
                console.shutdown(Shutdown::Write)?;
            } else if !send(&mut console, &buffer[..read], escape.as_mut())? {
                return Ok(Left::ByUser);
            }
        }
    }
}

/// Sends what is for the guest. False when the user leaves.
fn send(console: &mut UnixStream, bytes: &[u8], escape: Option<&mut Escape>) -> io::Result<bool> {
    let Some(escape) = escape else { return console.write_all(bytes).map(|()| true) };
    let mut passed = Vec::with_capacity(bytes.len());
    for byte in bytes {
        match escape.feed(*byte) {
            Key::Pass(byte) => passed.push(byte),
            Key::Pending => {}
            Key::Help => io::stderr().write_all(HELP.as_bytes())?,
            Key::Quit => return console.write_all(&passed).map(|()| false),
        }
    }
    console.write_all(&passed).map(|()| true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// Runs a visit with `keys` typed; the machine says "hello", collects what it gets, and hangs up if told to.
    fn visit(keys: &[u8], machine_leaves: bool) -> (Left, Vec<u8>, Vec<u8>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (signal, _handler) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        theirs.write_all(b"hello").unwrap();
        writer.write_all(keys).unwrap();
        let machine = thread::spawn(move || {
            let mut got = Vec::new();
            if machine_leaves {
                drop(writer);
                theirs.read_to_end(&mut got).unwrap();
                drop(theirs);
            } else {
                theirs.read_to_end(&mut got).unwrap();
            }
            got
        });
        let mut shown = Vec::new();
        let escape = (!machine_leaves).then(Escape::default);
        let left = join(ours, &signal, Some(reader.as_fd()), &mut shown, escape).unwrap();
        (left, shown, machine.join().unwrap())
    }

    #[test]
    fn the_user_types_and_leaves() {
        assert_eq!(visit(b"ls\r\x1d\x1d\x1dqx", false), (Left::ByUser, b"hello".to_vec(), b"ls\r\x1d".to_vec()));
    }

    #[test]
    fn the_end_of_a_pipe_is_passed_on_and_output_goes_on_until_the_machine_ends() {
        assert_eq!(visit(b"ls\x1dq", true), (Left::ByMachine, b"hello".to_vec(), b"ls\x1dq".to_vec()));
    }

    #[test]
    fn a_signal_ends_the_visit() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (signal, mut handler) = UnixStream::pair().unwrap();
        handler.write_all(&[1]).unwrap();
        assert_eq!(join(ours, &signal, None, &mut Vec::new(), None).unwrap(), Left::ByUser);
    }
}
