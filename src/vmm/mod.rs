//! The machine: KVM, memory, vCPUs, buses and devices put together, and the life of the whole.
//!
//! ```text
//! Host::open ── build ──> NewMachine ── boot ──> Booted ── start ──> Machine ── drop ──> (gone)
//!  disks, taps,   never run, any error     kernel in RAM,    threads, pause,      │
//!  console, RAM   drops all of it          registers set     resume               │
//!      └───────────────── the guest's reboot builds a new machine <───────────────┘
//! ```
//!
//! [`run`] is the whole of it, and returns when the guest has ended for good.

mod build;
mod bus;
mod error;
mod event_loop;
mod gate;
mod host;
mod kick;
mod machine;
mod memory;
mod stop_key;
mod vcpu;
mod vm;
mod wiring;

pub use error::Error;

use crate::config::VmConfig;
use crate::control::machine::{Ended, RunOptions};
use crate::events::{Event, EventBus};
use host::Host;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, mpsc};
use stop_key::StopKey;
use vcpu::Outcome;
use vm::Vm;

/// Runs the machine that `config` describes until the guest has ended for good.
///
/// # Errors
/// Before the guest's first instruction only: afterwards what goes wrong is an [`Ended`]. A reboot that cannot build the
/// machine again is `Ended::InternalError`.
pub fn run(config: &VmConfig, options: RunOptions) -> Result<Ended, Error> {
    let RunOptions { paused, events, ready } = options;
    kick::install().map_err(|source| Error::Host { what: "the signal that stops vCPUs", source })?;
    let host = Host::open(config)?;
    let (sender, outcomes) = channel();
    let vm = Arc::new(Vm::new(config.cpus, config.memory_bytes, Arc::clone(&events), sender.clone()));
    start(config, &host, &vm, &sender, &events, paused)?;
    ready(Arc::clone(&vm) as Arc<dyn crate::control::machine::Machine>);
    loop {
        let outcome = outcomes.recv().unwrap_or(Outcome::Ended(Ended::Killed));
        let was_paused = vm.remove(&outcome);
        let ended = match outcome {
            Outcome::Ended(ended) => Some(ended),
            Outcome::Reset => killed_meanwhile(&outcomes),
        };
        if let Some(ended) = ended {
            if ended == Ended::GuestPanic {
                events.publish(Event::GuestPanic);
            }
            vm.remove(&Outcome::Ended(ended.clone()));
            return Ok(ended);
        }
        if let Err(error) = host.recycle().and_then(|()| start(config, &host, &vm, &sender, &events, was_paused)) {
            return Ok(Ended::InternalError(format!("the guest rebooted and {}", chain(&error))));
        }
        events.publish(Event::Rebooted);
    }
}

/// Builds a machine, boots it, and puts it in.
fn start(
    config: &VmConfig,
    host: &Host,
    vm: &Arc<Vm>,
    outcomes: &mpsc::Sender<Outcome>,
    events: &Arc<EventBus>,
    paused: bool,
) -> Result<(), Error> {
    let console = Arc::new(Mutex::new(StopKey::new(host.console.clone(), vm)));
    let machine = build::build(config, host, events)?.boot(config, host)?.start(console, outcomes.clone())?;
    vm.insert(machine, paused);
    Ok(())
}

/// Empties the channel of what the vCPUs of a machine that is gone had to say; a kill is not theirs.
fn killed_meanwhile(outcomes: &Receiver<Outcome>) -> Option<Ended> {
    let mut pending = outcomes.try_iter();
    pending.any(|outcome| outcome == Outcome::Ended(Ended::Killed)).then_some(Ended::Killed)
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
