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
        End::Gone => Ok(None),
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
