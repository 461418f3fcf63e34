//! The contract between a running machine and whoever controls it.
//!
//! `vmm` implements [`Machine`]; the control socket, the signal handler and the tests drive it. This file refuses to
//! know how a request arrived and how a machine carries it out.

use super::movement::{CheckReport, Limits, MigrateOrder, MoveStatus, Resolution, SaveOrder};
use crate::events::EventBus;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::sync::Arc;

/// A machine that may be looked at and controlled from any thread.
pub trait Machine: Send + Sync {
    /// What the machine is doing. Never waits for the guest.
    fn status(&self) -> Status;
    /// Stops vCPUs and devices; returns once nothing of the guest runs. On a paused machine does nothing.
    fn pause(&self) -> Result<(), MachineError>;
    /// Lets a paused machine go on. On a running machine does nothing.
    fn resume(&self) -> Result<(), MachineError>;
    /// Presses the ACPI power button; what comes of it is the guest's decision. Refused with
    /// [`MachineError::Paused`] while the guest cannot react.
    fn press_power_button(&self) -> Result<(), MachineError>;
    /// Ends the machine without asking the guest: `vmm::run` returns [`Ended::Killed`] soon after. May be repeated.
    fn kill(&self);
    /// Asks the guest to give up `target_bytes` of its memory (the balloon's size; 0 gives all of it back). Returns
    /// once the guest has been asked.
    fn set_balloon(&self, target_bytes: u64) -> Result<(), MachineError>;
    /// Begins to save the machine to a file; it ends as [`Ended::Saved`]. Returns once that has begun.
    fn save(&self, order: SaveOrder) -> Result<(), MachineError>;
    /// Begins to move the machine to another host; it ends as [`Ended::Moved`]. Returns once that has begun.
    fn migrate(&self, order: MigrateOrder) -> Result<(), MachineError>;
    /// Tests all that such a move could fail at. The guest is not touched.
    fn check_move(&self, order: MigrateOrder) -> Result<CheckReport, MachineError>;
    /// The move under way, or the last one.
    fn movement(&self) -> Option<MoveStatus>;
    /// Calls the move off; the guest goes on here. Returns once it was told.
    fn cancel_move(&self) -> Result<(), MachineError>;
    /// Changes limits of the move under way.
    fn set_move(&self, limits: Limits) -> Result<(), MachineError>;
    /// Ends a move that is in doubt, on a person's word.
    fn resolve_move(&self, resolution: Resolution) -> Result<(), MachineError>;
}

/// Why a machine did not do what it was asked to. The guest runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Nothing is left to act on.
    #[error("the guest has ended")]
    Ended,
    /// The guest must run for this.
    #[error("the guest is paused")]
    Paused,
    /// It is being moved, and must not be touched meanwhile.
    #[error("{0}")]
    Moving(String),
    /// The request makes no sense for this machine; the text says why.
    #[error("{0}")]
    Refused(String),
    /// It was tried and did not work.
    #[error("{attempted} failed")]
    Failed {
        /// What was tried, as a noun: "stopping vCPU 3".
        attempted: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Built; no vCPU has run yet (`run --paused`).
    Created,
    /// vCPUs run.
    Running,
    /// vCPUs and devices stand still.
    Paused,
    /// The power button was pressed and the guest has not powered off yet.
    Stopping,
    /// vCPUs and devices stand still for a move.
    Moving,
    /// It was handed over and the other side has not said that it runs: it stands still here.
    InDoubt,
    /// It arrives from elsewhere; nothing of it runs here yet.
    Incoming,
    /// The guest is gone.
    Ended,
}

impl RunState {
    /// As a word, for programs.
    pub fn word(self) -> &'static str {
        match self {
            RunState::Created => "created",
            RunState::Running => "running",
            RunState::Paused => "paused",
            RunState::Stopping => "stopping",
            RunState::Moving => "moving",
            RunState::InDoubt => "in-doubt",
            RunState::Incoming => "incoming",
            RunState::Ended => "ended",
        }
    }
}

/// A machine at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// What it is doing.
    pub state: RunState,
    /// Milliseconds since the vCPUs first ran; 0 before that.
    pub uptime_ms: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest RAM as configured, bytes.
    pub memory_bytes: u64,
    /// Host memory that the VM's process occupies, bytes.
    pub resident_bytes: u64,
    /// The memory balloon.
    pub balloon: BalloonStatus,
    /// Devices in PCI order, then the rest.
    pub devices: Vec<DeviceStatus>,
}

/// The memory balloon at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// Bytes that the guest was asked to give up.
    pub target_bytes: u64,
    /// Bytes that it has given up.
    pub actual_bytes: u64,
    /// What the guest's driver last reported about its memory.
    pub guest: GuestMemory,
}

/// The guest's own view of its memory (virtio 1.3, 5.5.6.4); a number is there if the guest has reported it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestMemory {
    /// Pages swapped in, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_in_bytes: Option<u64>,
    /// Pages swapped out, bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed I/O.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_faults: Option<u64>,
    /// Page faults that needed none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minor_faults: Option<u64>,
    /// Unused memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_bytes: Option<u64>,
    /// All memory that the kernel manages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Memory that programs could have without swapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Memory that caches occupy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_caches_bytes: Option<u64>,
}

/// A device at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its id in the configuration, or its own name: `disk0`, `net0`, `vsock`, `rng`, `balloon`.
    pub id: String,
    /// Why it waits for a reset by the guest's driver (DEVICE_NEEDS_RESET), if it does.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fault: Option<String>,
}

/// What `vmm::run` needs beside the configuration.
pub struct RunOptions {
    /// Stand still before the first instruction until resumed.
    pub paused: bool,
    /// Where the machine publishes what happens to it: everything but `Ended`, which its caller publishes.
    pub events: Arc<EventBus>,
    /// Called once, when vCPUs run, or are ready and paused. Dropped uncalled if the machine cannot be built.
    pub ready: Box<dyn FnOnce(Arc<dyn Machine>) + Send>,
}

/// How a guest has ended for good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", content = "detail", rename_all = "kebab-case")]
pub enum Ended {
    /// It powered itself off.
    PoweredOff,
    /// It was killed from outside.
    Killed,
    /// It runs at another host, which is named.
    Moved(String),
    /// It lies in a file, which is named.
    Saved(String),
    /// A move to this host came to nothing, for the reason given.
    NotArrived(String),
    /// Its kernel panicked.
    GuestPanic,
    /// A vCPU took a fault that it could not handle.
    TripleFault,
    /// KVM or Sterna could not go on; the text says why.
    InternalError(String),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::PoweredOff => f.write_str("the guest has powered off"),
            Ended::Killed => f.write_str("the guest was killed"),
            Ended::Moved(to) => write!(f, "the guest has moved to {to}"),
            Ended::Saved(file) => write!(f, "the guest is saved in {file}"),
            Ended::NotArrived(why) => write!(f, "the guest did not arrive: {why}"),
            Ended::GuestPanic => f.write_str("the guest's kernel has panicked"),
            Ended::TripleFault => f.write_str("the guest has stopped on a triple fault"),
            Ended::InternalError(why) => write!(f, "the guest was stopped because it could not go on: {why}"),
        }
    }
}
