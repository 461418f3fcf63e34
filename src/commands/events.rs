//! `sterna events`: what happens, as JSON lines.

use super::print;
use crate::control::client::{Client, Error as ClientError, EventStream, Heard, PATIENCE};
use crate::error::Error;
use crate::events::{Event, Record};
use crate::registry::Registry;
use std::collections::HashSet;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked for VMs that have appeared.
const LOOK_AROUND: Duration = Duration::from_secs(1);
/// How long one step of waiting takes; the wait itself has no end.
const STEP: Duration = Duration::from_secs(3600);

/// Prints the events of `name`, or of all VMs.
pub fn events(registry: &Registry, name: Option<&str>) -> Result<(), Error> {
    match name {
        Some(name) => {
            let mut stream = Client::connect(registry, name, PATIENCE)?.listen()?;
            while let Some(record) = next_record(&mut stream)? {
                print(&line(&record)?)?;
                if matches!(record.event, Event::Ended(_)) {
                    return Ok(());
                }
            }
            Err(ClientError::Gone { name: name.to_owned() }.into())
        }
        None => all(registry),
    }
}

/// The next event; `None` when there will be none.
fn next_record(stream: &mut EventStream) -> Result<Option<Record>, ClientError> {
    loop {
        match stream.next(STEP)? {
            Heard::Event(record) => return Ok(Some(record)),
            Heard::Nothing => {}
            Heard::Closed => return Ok(None),
        }
    }
}

fn line(record: &Record) -> Result<String, Error> {
    let line = serde_json::to_string(record).map_err(|error| Error::Output(error.into()))?;
    Ok(line + "\n")
}

/// What a thread that listens to one VM tells.
enum Said {
    Event(Record),
    /// The VM of this name is not listened to any more.
    Over(String),
}

/// Follows every VM, those that appear later as well, until standard output is closed.
fn all(registry: &Registry) -> Result<(), Error> {
    let (sender, said) = channel();
    let mut followed: HashSet<String> = HashSet::new();
    loop {
        for name in registry.names()? {
            if followed.insert(name.clone()) {
                follow(registry.clone(), name, sender.clone());
            }
        }
        relay(&said, &mut followed)?;
    }
}

/// Prints what comes within [`LOOK_AROUND`].
fn relay(said: &Receiver<Said>, followed: &mut HashSet<String>) -> Result<(), Error> {
    let deadline = Instant::now() + LOOK_AROUND;
    loop {
        match said.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Said::Event(record)) => print(&line(&record)?)?,
            Ok(Said::Over(name)) => {
                followed.remove(&name);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

fn follow(registry: Registry, name: String, sender: Sender<Said>) {
    thread::spawn(move || {
        let listen = || {
            let mut stream = Client::connect(&registry, &name, PATIENCE)?.listen()?;
            while let Some(record) = next_record(&mut stream)? {
                if sender.send(Said::Event(record)).is_err() {
                    break;
                }
            }
            Ok(())
        };
        match listen() {
            // Left by a VM that crashed, or has ended between the look and the call.
            Ok(()) | Err(ClientError::Gone { .. } | ClientError::NoSuchVm { .. }) => {}
            Err(error) => log::warn!("{error}"),
        }
        let _ = sender.send(Said::Over(name)); // nobody is left to tell when the program ends
    });
}
