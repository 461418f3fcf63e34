//! SIGTERM, SIGINT and SIGHUP of a VM's process: the first presses the power button, the next ends the guest.

use crate::control::machine::{Machine, MachineError};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use std::io::{self, ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, Weak};
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

    /// Looks, in a thread, on behalf of the VM `name`; says so when its guest has not reacted within `limit`.
    pub fn watch(self, name: &str, limit: Duration) -> io::Result<StopSignals> {
        StopSignals::start(self.reader, name, limit)
    }
}

/// Watches for signals that ask a VM to stop, for the life of the process.
pub struct StopSignals {
    target: Arc<Mutex<Target>>,
}

#[derive(Default)]
struct Target {
    /// What is to be stopped, once it is there. It goes, with the files of its sockets, when it has ended: not with the process.
    machine: Option<Weak<dyn Machine>>,
    /// Signals so far.
    count: u32,
}

impl StopSignals {
    /// Takes each byte from `reader` for a signal.
    fn start(reader: UnixStream, name: &str, limit: Duration) -> io::Result<StopSignals> {
        let target = Arc::new(Mutex::new(Target::default()));
        thread::Builder::new().name("signals".into()).spawn({
            let (target, name) = (Arc::clone(&target), name.to_owned());
            move || {
                if let Err(error) = follow(reader, &target, &name, limit) {
                    log::error!("signals are not watched any more: {error}");
                }
            }
        })?;
        Ok(StopSignals { target })
    }

    /// Says what to stop. A signal that came before ends it at once: its guest has done nothing yet.
    pub fn attach(&self, machine: Arc<dyn Machine>) {
        let mut target = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        if target.count > 0 {
            machine.kill();
        }
        target.machine = Some(Arc::downgrade(&machine));
    }
}

/// Acts on signals until the process ends.
fn follow(mut reader: UnixStream, target: &Mutex<Target>, name: &str, limit: Duration) -> io::Result<()> {
    loop {
        let mut byte = [0];
        match reader.read(&mut byte) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                log::warn!(
                    "the guest has not reacted to its power button within {} s; `sterna stop {name} --force` or the \
                     signal once more ends it without asking",
                    limit.as_secs_f32()
                );
                reader.set_read_timeout(None)?;
                continue;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        let mut target = target.lock().unwrap_or_else(PoisonError::into_inner);
        target.count += 1;
        let Some(machine) = target.machine.as_ref().and_then(Weak::upgrade) else { continue };
        let first = target.count == 1;
        drop(target);
        reader.set_read_timeout(None)?;
        if !first {
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
            log::warn!("pressed the guest's power button; the signal once more ends it without asking");
            true
        }
        Err(MachineError::Paused) => {
            log::warn!(
                "the guest is paused and cannot power off; `sterna resume {name}` lets it go on, the signal once more \
                 ends it without asking"
            );
            false
        }
        Err(error) => {
            log::warn!("cannot press the guest's power button: {error}; the signal once more ends it without asking");
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

    fn signals() -> (UnixStream, StopSignals) {
        let (reader, writer) = UnixStream::pair().unwrap();
        (writer, StopSignals::start(reader, "web", Duration::from_millis(1)).unwrap())
    }

    #[test]
    fn the_first_signal_presses_the_button_and_the_second_kills() {
        let machine = Arc::new(Fake::new(RunState::Running));
        let (mut signal, signals) = signals();
        signals.attach(machine.clone());
        signal.write_all(b"x").unwrap();
        wait_for(&machine, &["power button"]);
        signal.write_all(b"x").unwrap();
        wait_for(&machine, &["power button", "kill"]);
    }

    #[test]
    fn a_paused_guest_is_killed_by_the_second_signal_only() {
        let machine = Arc::new(Fake::new(RunState::Paused));
        let (mut signal, signals) = signals();
        signals.attach(machine.clone());
        signal.write_all(b"x").unwrap();
        signal.write_all(b"x").unwrap();
        wait_for(&machine, &["kill"]);
    }

    #[test]
    fn a_signal_before_the_guest_runs_ends_it_at_once() {
        let machine = Arc::new(Fake::new(RunState::Created));
        let (mut signal, signals) = signals();
        signal.write_all(b"x").unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while signals.target.lock().unwrap().count == 0 {
            assert!(Instant::now() < deadline, "the signal was not noted");
            thread::yield_now();
        }
        signals.attach(machine.clone());
        wait_for(&machine, &["kill"]);
    }
}
