//! A terminal in raw mode, and back.
//!
//! The former mode is restored when [`RawTerminal`] is dropped and, because a release build aborts on a panic without
//! dropping anything, by a panic hook; before a crash, an abort or SIGQUIT ends the process, by [`last_words`]. Whoever owns
//! the terminal turns SIGTERM, SIGINT and SIGHUP into an ordinary return. After SIGKILL nobody can restore it; `stty sane` does.

use super::last_words;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr};
use std::io;
use std::panic;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};

/// What a descriptor is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A pipe, a file, a socket, a device.
    NoTerminal,
    /// A terminal that another job of the shell owns: reading it or changing its mode would stop this process.
    Background,
    /// Our terminal.
    Foreground,
}

/// What `fd` is.
pub fn kind(fd: impl AsFd) -> Kind {
    if !isatty(&fd) {
        return Kind::NoTerminal;
    }
    match tcgetpgrp(&fd) {
        Ok(group) if group != getpgrp() => Kind::Background,
        // A terminal that is not our controlling one has no job control over us.
        Ok(_) | Err(_) => Kind::Foreground,
    }
}

/// A terminal in raw mode. See the module.
#[derive(Debug)]
pub struct RawTerminal {
    saved: Arc<Saved>,
}

#[derive(Debug)]
struct Saved {
    terminal: OwnedFd,
    mode: Termios,
    raw: AtomicBool,
}

impl Saved {
    fn restore(&self) {
        if self.raw.swap(false, Ordering::AcqRel) {
            while tcsetattr(&self.terminal, OptionalActions::Now, &self.mode) == Err(Errno::INTR) {}
        }
    }
}

/// The terminals that a panic or a signal has to restore. A process is given at most a few.
static RAW_TERMINALS: Mutex<Vec<Arc<Saved>>> = Mutex::new(Vec::new());
static HOOK: Once = Once::new();

/// For a panic and for a signal handler: it waits for nothing and allocates nothing. Where this very list is locked, by whoever
/// panicked or was interrupted, nothing is restored.
fn restore_all() {
    if let Ok(terminals) = RAW_TERMINALS.try_lock() {
        terminals.iter().for_each(|saved| saved.restore());
    }
}

impl RawTerminal {
    /// Puts `terminal` into raw mode: no echo, no signals from keys, bytes as they are.
    ///
    /// # Errors
    /// What tcgetattr(3) and tcsetattr(3) say.
    pub fn enter(terminal: impl AsFd) -> io::Result<Self> {
        let mode = tcgetattr(&terminal)?;
        let terminal = rustix::io::fcntl_dupfd_cloexec(&terminal, 3)?;
        let mut raw = mode.clone();
        raw.make_raw();
        let saved = Arc::new(Saved { terminal, mode, raw: AtomicBool::new(true) });
        // Hook and handlers must know before the mode changes.
        RAW_TERMINALS.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&saved));
        HOOK.call_once(|| {
            let next = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore_all();
                next(info);
            }));
        });
        let entered = Self { saved };
        last_words::call_first(restore_all)?;
        tcsetattr(&entered.saved.terminal, OptionalActions::Now, &raw)?;
        Ok(entered)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        self.saved.restore();
        let mut terminals = RAW_TERMINALS.lock().unwrap_or_else(PoisonError::into_inner);
        terminals.retain(|saved| !Arc::ptr_eq(saved, &self.saved));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    fn terminal() -> (OwnedFd, OwnedFd) {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&controller).unwrap();
        unlockpt(&controller).unwrap();
        let name = ptsname(&controller, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let terminal = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
        (controller, terminal)
    }

    fn echoes(terminal: &OwnedFd) -> bool {
        tcgetattr(terminal).unwrap().local_modes.contains(LocalModes::ECHO)
    }

    // One test, since a panic restores every terminal of the process.
    #[test]
    fn raw_while_it_lives_and_restored_by_drop_and_by_a_panic() {
        let (_controller, terminal) = terminal();
        assert!(echoes(&terminal));
        let raw = RawTerminal::enter(&terminal).unwrap();
        assert!(!echoes(&terminal));
        drop(raw);
        assert!(echoes(&terminal));

        let raw = RawTerminal::enter(&terminal).unwrap();
        assert!(!echoes(&terminal));
        std::thread::spawn(|| panic!("on purpose")).join().unwrap_err();
        assert!(echoes(&terminal), "before anything is dropped");
        drop(raw);
    }

    #[test]
    fn a_pipe_is_no_terminal_and_a_foreign_terminal_has_no_jobs_of_ours() {
        let (reader, _writer) = io::pipe().unwrap();
        assert_eq!(kind(&reader), Kind::NoTerminal);
        assert!(RawTerminal::enter(&reader).is_err());
        let (_controller, terminal) = terminal();
        assert_eq!(kind(&terminal), Kind::Foreground);
    }
}
