//! `sterna pause`, `resume` and `stop`.

use super::{Outcome, Output};
use crate::cli::StopArgs;
use crate::control::client::{self, Client, EventStream, Heard, PATIENCE};
use crate::control::machine::{Ended, RunState};
use crate::control::protocol::Request;
use crate::error::Error;
use crate::events::Event;
use crate::registry::Registry;
use rustix::process::{Pid, Signal, kill_process};
use std::time::{Duration, Instant};

/// How long a killed VM may take to end.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// How long a VM that is to be killed may take to answer before its process is.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// Lets the guest stand still.
pub fn pause(registry: &Registry, name: &str, output: Output) -> Result<(), Error> {
    let was = Client::connect(registry, name, PATIENCE)?.change(Request::Pause)?;
    let (result, words) = match was {
        RunState::Paused => ("paused", "was paused already"),
        RunState::Created => ("created", "has not run yet, and waits for `sterna resume`"),
        _ => ("paused", "is paused"),
    };
    output.result(&Outcome { name, result }, |_| format!("{name} {words}\n"))
}

/// Lets the guest go on.
pub fn resume(registry: &Registry, name: &str, output: Output) -> Result<(), Error> {
    let was = Client::connect(registry, name, PATIENCE)?.change(Request::Resume)?;
    let words = match was {
        RunState::Running | RunState::Stopping => "was running already",
        RunState::Created => "runs for the first time",
        _ => "runs on",
    };
    output.result(&Outcome { name, result: "running" }, |_| format!("{name} {words}\n"))
}

/// Asks the guest to power off, or ends it.
pub fn stop(registry: &Registry, args: &StopArgs, output: Output) -> Result<(), Error> {
    let name = args.name.as_str();
    let ended = if args.force { kill(registry, name)? } else { press(registry, name, args.timeout)? };
    match ended {
        None | Some(Ended::Killed) => {
            output.result(&Outcome { name, result: "killed" }, |_| format!("{name} was killed\n"))
        }
        Some(Ended::NotArrived(_)) => {
            let words = format!("{name} does not come here any more\n");
            output.result(&Outcome { name, result: "not-arrived" }, |_| words)
        }
        Some(Ended::PoweredOff) => {
            output.result(&Outcome { name, result: "powered-off" }, |_| format!("{name} has powered off\n"))
        }
        Some(ended) => Err(Error::Ended { name: name.to_owned(), ended }),
    }
}

fn press(registry: &Registry, name: &str, timeout: Duration) -> Result<Option<Ended>, Error> {
    let mut events = Client::connect(registry, name, PATIENCE)?.listen()?;
    Client::connect(registry, name, PATIENCE)?.change(Request::PowerButton)?;
    match wait_for_end(&mut events, timeout)? {
        End::Told(ended) => Ok(Some(ended)),
        End::Gone => Err(client::Error::Gone { name: name.to_owned() }.into()),
        End::NotYet => Err(Error::NotReacting { name: name.to_owned(), after: timeout }),
    }
}

/// Ends the guest through its VM; a VM that does not answer is killed as a process. `None` where nobody told how it
/// ended.
fn kill(registry: &Registry, name: &str) -> Result<Option<Ended>, Error> {
    let mut client = Client::connect(registry, name, PATIENCE)?;
    let pid = client.pid();
    let answer = client.call(Request::Events, ANSWER_PATIENCE).and_then(|_| {
        let mut killer = Client::connect(registry, name, ANSWER_PATIENCE)?;
        killer.call(Request::Kill, ANSWER_PATIENCE)
    });
    match (answer, pid.and_then(|pid| Pid::from_raw(pid.try_into().ok()?))) {
        (Ok(_) | Err(client::Error::Gone { .. }), _) => {}
        // The connection stands, so the process is the one that made the socket.
        (Err(client::Error::NotAnswering { .. }), Some(pid)) => {
            log::warn!("{name} does not answer; killing process {}", pid.as_raw_nonzero());
            kill_process(pid, Signal::KILL)
                .map_err(|errno| Error::Process { attempt: "kill the process of the VM", source: errno.into() })?;
        }
        (Err(error), _) => return Err(error.into()),
    }
    match wait_for_end(&mut client.into_events(), KILL_PATIENCE)? {
        End::Told(ended) => Ok(Some(ended)),
        End::Gone => {
            // Whoever takes the name removes what is left under it; failing that, the next VM of the name does.
            drop(registry.claim(name));
            Ok(None)
        }
        End::NotYet => Err(Error::NotEnding { name: name.to_owned(), after: KILL_PATIENCE }),
    }
}

/// What waiting for a VM's end came to.
enum End {
    /// It told how it ended.
    Told(Ended),
    /// Its process has gone without a word.
    Gone,
    /// It is still there.
    NotYet,
}

fn wait_for_end(events: &mut EventStream, timeout: Duration) -> Result<End, client::Error> {
    let deadline = Instant::now() + timeout;
    loop {
        match events.next(deadline.saturating_duration_since(Instant::now()))? {
            Heard::Event(record) => {
                if let Event::Ended(ended) = record.event {
                    return Ok(End::Told(ended));
                }
            }
            Heard::Closed => return Ok(End::Gone),
            Heard::Nothing => return Ok(End::NotYet),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Draft, SerialConfig};
    use crate::control::fake::Fake;
    use crate::control::server::{Server, Subject};
    use crate::events::EventBus;
    use crate::exit;
    use std::sync::Arc;
    use std::thread;

    const QUIET: Output = Output { json: true };

    /// A VM `web` with a guest that does nothing by itself.
    fn vm(state: RunState) -> (tempfile::TempDir, Registry, Arc<Fake>, Arc<EventBus>, Server) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().to_owned());
        let (machine, events) = (Arc::new(Fake::new(state)), Arc::new(EventBus::new("web")));
        let config = Draft::default().build(SerialConfig::Null, &mut Default::default());
        let subject = Subject { config, machine: machine.clone(), events: events.clone() };
        let server = Server::start(&registry.socket("web"), subject).unwrap();
        (dir, registry, machine, events, server)
    }

    fn stop_args(force: bool, timeout: Duration) -> StopArgs {
        StopArgs { name: "web".into(), force, timeout }
    }

    #[test]
    fn a_guest_that_does_not_react_is_told_of_and_runs_on() {
        let (_dir, registry, machine, _events, _server) = vm(RunState::Running);
        let error = stop(&registry, &stop_args(false, Duration::from_millis(20)), QUIET).unwrap_err();
        assert_eq!(error.exit_code(), exit::TIMED_OUT);
        assert!(error.report().contains("it runs on\n  next: sterna stop web --force"), "{}", error.report());
        assert_eq!(machine.lock().asked, ["power button"]);
    }

    #[test]
    fn a_paused_guest_cannot_be_asked() {
        let (_dir, registry, _machine, _events, _server) = vm(RunState::Paused);
        let error = stop(&registry, &stop_args(false, PATIENCE), QUIET).unwrap_err();
        assert!(error.report().contains("next: sterna resume web"), "{}", error.report());
    }

    #[test]
    fn stop_tells_how_the_guest_ended() {
        for (force, ended, code) in [
            (false, Ended::PoweredOff, None),
            (true, Ended::Killed, None),
            (false, Ended::GuestPanic, Some(exit::GUEST_LOST)),
        ] {
            let (_dir, registry, machine, events, server) = vm(RunState::Running);
            let guest = thread::spawn(move || {
                let deadline = Instant::now() + PATIENCE;
                while machine.lock().asked.is_empty() {
                    assert!(Instant::now() < deadline, "nobody asked the guest to stop");
                    thread::yield_now();
                }
                events.publish(Event::Ended(ended));
                events.close();
                drop(server);
            });
            let result = stop(&registry, &stop_args(force, PATIENCE), QUIET);
            assert_eq!(result.err().map(|error| error.exit_code()), code);
            guest.join().unwrap();
        }
    }
}
