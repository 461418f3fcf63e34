//! `sterna events`: what happens, as JSON lines.

use super::print;
use crate::control::client::{Client, Error as ClientError, EventStream, Heard, PATIENCE};
use crate::error::Error;
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
            while let Some(line) = next_line(&mut stream)? {
                print(&line)?;
            }
            Ok(())
        }
        None => all(registry),
    }
}

/// The next event as a line; `None` when there will be none.
fn next_line(stream: &mut EventStream) -> Result<Option<String>, Error> {
    loop {
        match stream.next(STEP)? {
            Heard::Event(record) => {
                let line = serde_json::to_string(&record).map_err(|error| Error::Output(error.into()))?;
                return Ok(Some(line + "\n"));
            }
            Heard::Nothing => {}
            Heard::Closed => return Ok(None),
        }
    }
}

/// What a thread that listens to one VM tells.
enum Said {
    Line(String),
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
            Ok(Said::Line(line)) => print(&line)?,
            Ok(Said::Over(name)) => {
                followed.remove(&name);
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}

fn follow(registry: Registry, name: String, sender: Sender<Said>) {
    thread::spawn(move || {
        let result = Client::connect(&registry, &name, PATIENCE)
            .and_then(Client::listen)
            .map_err(Error::from)
            .and_then(|mut stream| {
                while let Some(line) = next_line(&mut stream)? {
                    if sender.send(Said::Line(line)).is_err() {
                        break;
                    }
                }
                Ok(())
            });
        match result {
            // Left by a VM that crashed, or has ended between the look and the call.
            Ok(()) | Err(Error::Client(ClientError::Gone { .. } | ClientError::NoSuchVm { .. })) => {}
            Err(error) => log::warn!("{error}"),
        }
        let _ = sender.send(Said::Over(name)); // nobody is left to tell when the program ends
    });
}
