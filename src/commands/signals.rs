//! SIGTERM, SIGINT and SIGHUP of a VM's process, and the console's key Ctrl-] q: the first presses the power button, the next ends the guest.

use crate::control::machine::{Machine, MachineError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

/// Signals that ask a VM to stop: from here on they end the process no more, and wait for somebody to look.
pub struct Caught {
    reader: UnixStream,
}

impl Caught {
    /// Catches them, for the life of the process.
    pub fn catch() -> io::Result<Caught> {
        let (reader, writer) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            pipe::register(signal, writer.try_clone()?)?;
        }
        Ok(Caught { reader })
    }

    /// Looks, in a thread, on behalf of `machine`, the VM `name`; says so when its guest has not reacted within `limit`. A
    /// signal that came before ends it at once: its guest has done nothing yet.
    pub fn watch(self, machine: &Arc<dyn Machine>, name: &str, limit: Duration) -> io::Result<()> {
        let Self { mut reader } = self;
        reader.set_nonblocking(true)?;
        let asked = reader.read(&mut [0]).is_ok_and(|bytes| bytes > 0);
        reader.set_nonblocking(false)?;
        if asked {
            machine.kill();
        }
        // It goes, with the files of its sockets, when it has ended: not with the process.
        let (machine, name) = (Arc::downgrade(machine), name.to_owned());
        let watch = move || {
            if let Err(error) = follow(reader, &machine, &name, limit) {
                log::error!("signals are not watched any more: {error}");
            }
        };
        thread::Builder::new().name("signals".into()).spawn(watch).map(drop)
    }
}

/// Takes each byte from `reader` for a signal, and acts on it, until the process ends.
fn follow(mut reader: UnixStream, machine: &Weak<dyn Machine>, name: &str, limit: Duration) -> io::Result<()> {
    let mut first = true;
    loop {
        let mut byte = [0];
        match reader.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                log::warn!(
                    "the guest has not reacted to its power button within {} s; `sterna stop {name} --force`, or the signal \
                     or key once more, ends it without asking",
                    limit.as_secs_f32()
                );
                reader.set_read_timeout(None)?;
                continue;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        let Some(machine) = machine.upgrade() else { continue };
        reader.set_read_timeout(None)?;
        if !std::mem::take(&mut first) {
            log::warn!("ending the guest without asking it");
            machine.kill();
        } else if press(machine.as_ref(), name) {
            reader.set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        }
    }
}

/// Whether the guest can be expected to react.
fn press(machine: &dyn Machine, name: &str) -> bool {
    match machine.press_power_button() {
        Ok(()) => {
            log::warn!("pressed the guest's power button; the signal or key once more ends the guest without asking");
            true
        }
        Err(MachineError::Paused) => {
            log::warn!(
                "the guest is paused and cannot power off; `sterna resume {name}` lets it go on, the signal or key once \
                 more ends it without asking"
            );
            false
        }
        Err(error) => {
            log::warn!(
                "cannot press the guest's power button: {error}; the signal or key once more ends the guest without asking"
            );
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::fake::Fake;
    use crate::control::machine::RunState;
    use std::io::Write;
    use std::time::Instant;

    fn wait_for(machine: &Fake, asked: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while machine.lock().asked != asked {
            assert!(Instant::now() < deadline, "asked for {:?} and not {asked:?}", machine.lock().asked);
            thread::yield_now();
        }
    }

    fn watched(machine: &Arc<Fake>, before: &[u8]) -> UnixStream {
        let (reader, mut writer) = UnixStream::pair().unwrap();
        writer.write_all(before).unwrap();
        let machine = Arc::clone(machine) as Arc<dyn Machine>;
        Caught { reader }.watch(&machine, "web", Duration::from_millis(1)).unwrap();
        writer
    }

    #[test]
    fn the_first_signal_presses_the_button_and_the_second_kills() {
        let machine = Arc::new(Fake::new(RunState::Running));
        let mut signal = watched(&machine, b"");
        signal.write_all(b"x").unwrap();
        wait_for(&machine, &["power button"]);
        signal.write_all(b"x").unwrap();
        wait_for(&machine, &["power button", "kill"]);
    }

    #[test]
    fn a_paused_guest_is_killed_by_the_second_signal_only() {
        let machine = Arc::new(Fake::new(RunState::Paused));
        let mut signal = watched(&machine, b"");
        signal.write_all(b"x").unwrap();
        signal.write_all(b"x").unwrap();
        wait_for(&machine, &["kill"]);
    }

    #[test]
    fn a_signal_before_the_guest_runs_ends_it_at_once() {
        let machine = Arc::new(Fake::new(RunState::Created));
        let _signal = watched(&machine, b"x");
        wait_for(&machine, &["kill"]);
    }
}
