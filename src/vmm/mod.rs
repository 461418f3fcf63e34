//! The machine: KVM, memory, vCPUs, buses and devices put together, and the life of the whole.
//!
//! ```text
//! Host::open ── build ──> NewMachine ── park ──> Parked ─┬─ boot ────┬─> Machine ── drop ──> (gone)
//!  disks, taps,   never run, any      threads that       │  a kernel │   pause, resume
//!  console, RAM   error drops it all  stand still        └─ restore ─┘   Stopped, Committed: for a move
//!      └───────────────── the guest's reboot builds a new machine <─────────────────┘
//! ```
//!
//! [`run`] is the whole of it, and returns when the guest has ended for good.

mod board;
#[cfg(test)]
mod board_tests;
mod build;
mod bus;
mod description;
mod dirty;
mod error;
mod event_loop;
mod gate;
#[cfg(test)]
mod golden_tests;
mod host;
mod incoming;
mod keeper_link;
mod kick;
mod machine;
mod memory;
mod move_error;
mod movement;
mod obstacles;
mod outgoing;
mod parts;
mod receive;
mod restore;
mod save;
mod stop_key;
mod stopped;
mod vcpu;
mod vm;
mod wiring;

pub use board::Board;
pub use description::{Description, has_own_console};
pub use error::Error;
pub use incoming::Arrival;
pub use keeper_link::{KeeperLink, Word};
pub use move_error::MoveError;
pub use obstacles::everything_wrong;
pub use parts::PartError;
pub use receive::answer_check;
pub use restore::{Load, RestoreOrder, Restoring, open as open_saved};

use crate::config::VmConfig;
use crate::control::machine::{Ended, RunOptions};
use crate::events::{Event, EventBus};
pub use host::{Host, Locks};
use movement::Off;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use stop_key::StopKey;
use vcpu::Outcome;
use vm::{Identity, Vm};

/// Where a machine comes from, with all that it needs of this host opened.
pub enum Start {
    /// It boots.
    Boot(Box<(VmConfig, Host)>),
    /// It goes on from a file.
    Restore(Box<Restoring>),
    /// It is on its way to here; the line to the receiver that said so.
    Receive(Box<Arrival>, KeeperLink),
}

impl Start {
    /// Opens what `config` names, to boot it.
    ///
    /// # Errors
    /// What cannot be had.
    pub fn boot(config: VmConfig) -> Result<Self, Error> {
        let host = Host::open(&config, None, Locks::Now)?;
        Ok(Self::Boot(Box::new((config, host))))
    }

    /// Opens what a saved machine needs.
    ///
    /// # Errors
    /// What cannot be had.
    pub fn restore(order: RestoreOrder) -> Result<Self, Error> {
        Restoring::open(order).map(Box::new).map(Self::Restore)
    }

    /// The machine.
    pub fn config(&self) -> &VmConfig {
        match self {
            Self::Boot(boot) => &boot.0,
            Self::Restore(restoring) => restoring.config(),
            Self::Receive(arrival, _) => &arrival.description.config,
        }
    }
}

/// Runs a machine until its guest has ended here for good.
///
/// # Errors
/// Before the guest's first instruction here only: afterwards what goes wrong is an [`Ended`]. A reboot that cannot build the
/// machine again is `Ended::InternalError`.
pub fn run(start: Start, options: RunOptions) -> Result<Ended, Error> {
    kick::install().map_err(|source| Error::Host { what: "the signal that stops vCPUs", source })?;
    let (sender, outcomes) = channel();
    let events = Arc::clone(&options.events);
    let vm = match start {
        Start::Boot(opened) => boot(opened.0, opened.1, options, &sender)?,
        Start::Restore(restoring) => restore::run(*restoring, options, &sender)?,
        Start::Receive(arrival, keeper) => match receive::run(*arrival, keeper, options, &sender)? {
            Ok(vm) => vm,
            Err(not_arrived) => return Ok(not_arrived),
        },
    };
    live(&vm, &sender, &outcomes, &events)
}

/// From the first instruction here to the last.
fn live(
    vm: &Arc<Vm>,
    sender: &Sender<Outcome>,
    outcomes: &Receiver<Outcome>,
    events: &Arc<EventBus>,
) -> Result<Ended, Error> {
    loop {
        let outcome = outcomes.recv().unwrap_or(Outcome::Ended(Ended::Killed));
        let Some(was_paused) = vm.remove(&outcome) else {
            return Ok(Ended::InternalError("a move does not let go of the machine".into()));
        };
        let ended = match outcome {
            Outcome::Ended(ended) => Some(ended),
            Outcome::Reset => ended_meanwhile(outcomes),
        };
        if let Some(ended) = ended {
            if ended == Ended::GuestPanic {
                events.publish(Event::GuestPanic);
            }
            vm.remove(&Outcome::Ended(ended.clone()));
            return Ok(ended);
        }
        let again = vm.host.recycle().and_then(|()| boot_machine(vm, sender));
        match again {
            Ok(machine) => vm.insert(machine, was_paused),
            Err(error) => return Ok(Ended::InternalError(format!("the guest rebooted and {}", chain(&error)))),
        }
        events.publish(Event::Rebooted);
    }
}

/// Builds the machine and boots it.
fn boot(config: VmConfig, host: Host, options: RunOptions, sender: &Sender<Outcome>) -> Result<Arc<Vm>, Error> {
    let RunOptions { paused, events, ready } = options;
    let vm = Vm::new(config, Arc::new(host), Identity::new(), events, sender.clone());
    vm.insert(boot_machine(&vm, sender)?, paused);
    ready(Arc::clone(&vm) as Arc<dyn crate::control::machine::Machine>);
    Ok(vm)
}

/// Builds a machine and puts it at its kernel's entry.
fn boot_machine(vm: &Arc<Vm>, sender: &Sender<Outcome>) -> Result<machine::Machine, Error> {
    let new = build::build(&vm.config, &vm.host, &vm.events);
    let new = new.map_err(|error| obstacles::with_kernel(error, &vm.config))?;
    new.park(console(vm), sender.clone())?.boot(&vm.config, &vm.host)
}

/// The console of `vm` as the event loop sees it.
fn console(vm: &Arc<Vm>) -> event_loop::Subscriber {
    Arc::new(Mutex::new(StopKey(vm.host.console.clone())))
}

/// Empties the channel of what the vCPUs of a machine that is gone had to say; a kill, and the end of a move, are not theirs.
fn ended_meanwhile(outcomes: &Receiver<Outcome>) -> Option<Ended> {
    let own = |outcome| match outcome {
        Outcome::Ended(ended @ (Ended::Killed | Ended::Moved(_) | Ended::Saved(_))) => Some(ended),
        _ => None,
    };
    outcomes.try_iter().find_map(own)
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
