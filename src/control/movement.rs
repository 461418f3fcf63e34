//! A move as those who order and watch it see it: orders, status, figures. Refuses to know how a machine moves.
//!
//! Names follow QEMU's `query-migrate` where it has one; times are milliseconds, sizes bytes.

use crate::units::{self, parse_size};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use uuid::Uuid;

/// How a machine leaves or arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Its memory is copied while the guest runs.
    Live,
    /// The guest stops, its memory is carried over, and it goes on.
    Quick,
    /// It goes to a file.
    Save,
    /// It comes from a file.
    Restore,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Live => "live migration",
            Kind::Quick => "quick migration",
            Kind::Save => "save",
            Kind::Restore => "restore",
        })
    }
}

/// Where a move is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The target builds the machine; the guest runs.
    Preparing,
    /// Memory is copied; the guest runs.
    Copying,
    /// The guest stands still: its state is saved.
    Saving,
    /// The guest stands still: its memory is carried over.
    Transferring,
    /// The guest stands still: the other side takes it over.
    Restoring,
    /// It runs at its destination, or lies whole in its file.
    Done,
    /// It came to nothing; the guest is where it was.
    Failed,
    /// It was called off; the guest is where it was.
    Cancelled,
    /// Time ran out; the guest is where it was.
    TimedOut,
    /// The target was told to start and has not said that it runs: the guest stands still here.
    InDoubt,
}

impl Phase {
    /// Whether nothing more will happen by itself.
    pub fn is_over(self) -> bool {
        matches!(self, Phase::Done | Phase::Failed | Phase::Cancelled | Phase::TimedOut)
    }

    /// As a word for people.
    pub fn word(self) -> &'static str {
        match self {
            Phase::Preparing => "preparing",
            Phase::Copying => "copying",
            Phase::Saving => "saving",
            Phase::Transferring => "transferring",
            Phase::Restoring => "restoring",
            Phase::Done => "done",
            Phase::Failed => "failed",
            Phase::Cancelled => "cancelled",
            Phase::TimedOut => "timed out",
            Phase::InDoubt => "in doubt",
        }
    }
}

/// What happens to memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamStatus {
    /// The guest's RAM.
    pub total: u64,
    /// Of it, what exists and is to be carried over in the first pass.
    pub present: u64,
    /// Sent or written so far, all passes together.
    pub transferred: u64,
    /// Left of this pass.
    pub remaining: u64,
    /// Pages found to be zeros.
    pub duplicate: u64,
    /// Pages sent or written.
    pub normal: u64,
    /// Passes begun.
    pub dirty_sync_count: u32,
    /// Bytes a second that the guest dirtied over the last pass.
    pub dirty_rate: u64,
    /// Bytes a second of late.
    pub bandwidth: u64,
}

/// Where the guest's standstill went, microseconds. What the target does is on its clock, the rest on the source's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Downtime {
    /// Stopping vCPUs and devices, and flushing disks.
    pub stop_us: u64,
    /// The last pages.
    pub pages_us: u64,
    /// Saving the state and sending it.
    pub state_us: u64,
    /// Restoring it at the target.
    pub restore_us: u64,
    /// Handing over: disk locks, and the word to start.
    pub hand_over_us: u64,
    /// Starting at the target.
    pub start_us: u64,
    /// All of it, from the guest's last instruction here to its first there, as the source sees it.
    pub total_us: u64,
}

/// Kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// A check refused it before anything was moved.
    Refused,
    /// The other side cannot be reached.
    Unreachable,
    /// Something broke on the way.
    Broken,
    /// The guest has ended meanwhile.
    Ended,
}

impl MoveStatus {
    /// A move that has just been ordered.
    pub fn begin(id: Uuid, epoch: u64, kind: Kind, peer: String, ram_bytes: u64) -> Self {
        Self {
            id,
            epoch,
            kind,
            peer,
            incoming: false,
            phase: Phase::Preparing,
            percent: 0,
            ram: RamStatus { total: ram_bytes, ..RamStatus::default() },
            total_time: 0,
            expected_downtime: None,
            downtime: None,
            downtime_parts: None,
            precopy_stall: None,
            verdict: None,
            warnings: Vec::new(),
            error: None,
            failure: None,
            guest: String::new(),
        }
    }

    /// Whether the machine has left this host by it.
    pub fn leaves(&self) -> bool {
        self.phase == Phase::Done && !self.incoming
    }
}

/// How long KVM's memory management was held up on a move's behalf while the guest ran: a vCPU that needed it meanwhile waited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stall {
    /// The longest at a stretch, microseconds.
    pub longest_us: u64,
    /// In all, microseconds.
    pub total_us: u64,
}

/// A move at one moment, or as it ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MoveStatus {
    /// Id of the move.
    pub id: Uuid,
    /// Epoch that it gives the machine.
    pub epoch: u64,
    /// How.
    pub kind: Kind,
    /// The other side: an address or a file.
    pub peer: String,
    /// Whether the machine arrives here.
    pub incoming: bool,
    /// Where it is.
    pub phase: Phase,
    /// Of the whole, as well as it can be told; never decreases.
    pub percent: u8,
    /// Memory.
    pub ram: RamStatus,
    /// Since the order.
    pub total_time: u64,
    /// Standstill that is expected.
    pub expected_downtime: Option<u64>,
    /// Standstill that was measured.
    pub downtime: Option<u64>,
    /// In its parts.
    pub downtime_parts: Option<Downtime>,
    /// What the copying cost a guest that ran, of a live move.
    #[serde(default)]
    pub precopy_stall: Option<Stall>,
    /// What the convergence policy thinks of it.
    pub verdict: Option<String>,
    /// What a person should know and nothing refused for.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// Why it failed.
    pub error: Option<String>,
    /// What kind of failure it was, for programs.
    #[serde(default)]
    pub failure: Option<Failure>,
    /// Where the guest is, in a sentence.
    pub guest: String,
}

/// What replaces host paths of the machine at its destination, by the id of the device: `disk0`, `net0`, `vsock`,
/// `serial`, `kernel`, `initrd`.
pub type Map = BTreeMap<String, String>;

/// What `--on-timeout` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// The move is called off and the guest goes on here.
    #[default]
    Cancel,
    /// The guest is stopped for as long as the rest takes.
    Pause,
}

/// Limits of a move that may be changed while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Limits {
    /// Longest standstill that is wanted, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime_us: Option<u64>,
    /// Bytes a second at most, but for the last pass; 0 lifts the limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
}

/// An order to move to another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MigrateOrder {
    /// `tcp:HOST:PORT` or `unix:PATH` of a receiver.
    pub to: String,
    /// Stop first, and copy then.
    pub quick: bool,
    /// Limits at the start.
    pub limits: Limits,
    /// Connections, 1 to 64.
    pub connections: u16,
    /// Longest time in all, milliseconds.
    pub timeout_ms: u64,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// What has another path there.
    pub map: Map,
    /// Another name there.
    pub name: Option<String>,
    /// Both sides hash all of memory.
    pub verify: bool,
    /// Also with writable disks behind the host's page cache.
    pub unsafe_cache: bool,
}

/// An order to save to a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SaveOrder {
    /// The file, which must not exist.
    pub file: PathBuf,
    /// Unless this is set.
    pub overwrite: bool,
    /// Compress with zstd.
    pub compress: bool,
    /// Also with writable disks behind the host's page cache.
    pub unsafe_cache: bool,
}

/// What a trial of a move found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Its address.
    pub target: String,
    /// Its name; nothing where it was not reached.
    pub host: Option<String>,
    /// Version of its program.
    pub program: String,
    /// What the move would be refused for; a sentence each.
    pub problems: Vec<String>,
    /// What kind of failure kept the target from being asked.
    #[serde(default)]
    pub failure: Option<Failure>,
    /// What a person should know.
    pub warnings: Vec<String>,
    /// What the way carries, bytes a second.
    pub bandwidth: u64,
    /// Memory that there is to carry, bytes.
    pub present: u64,
    /// Bytes a second that the guest dirties.
    pub dirty_rate: u64,
    /// Target's clock less this host's, milliseconds.
    pub clock_skew: i64,
    /// A live move.
    pub live: Option<Foretold>,
    /// A quick move.
    pub quick: Option<Foretold>,
}

/// How long a move would take, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Foretold {
    /// In all.
    pub total: u64,
    /// Standstill; nothing where it would not come to an end.
    pub downtime: Option<u64>,
}

/// What a person says of a move in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Resolution {
    /// It does not run there: it goes on here.
    Here,
    /// It runs there: it ends here.
    There,
}

/// Reads `--map` texts: `disk0=/new/path,net0=tap7`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_map(text: &str) -> Result<Map, String> {
    let mut map = Map::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (id, path) = part.split_once('=').ok_or(format!("'{part}' is not ID=PATH, as in disk0=/srv/web.img"))?;
        if map.insert(id.to_owned(), path.to_owned()).is_some() {
            return Err(format!("'{id}' is mapped twice"));
        }
    }
    Ok(map)
}

/// Reads a bandwidth: a size, with or without `/s`.
///
/// # Errors
/// A sentence that says what is wrong.
pub fn parse_bandwidth(text: &str) -> Result<u64, units::Error> {
    parse_size(text.strip_suffix("/s").unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_read_and_mistakes_named() {
        let map = parse_map("disk0=/a b,net0=tap7").unwrap();
        assert_eq!(map.get("disk0").map(String::as_str), Some("/a b"));
        assert_eq!(map.len(), 2);
        assert_eq!(parse_map("disk0").unwrap_err(), "'disk0' is not ID=PATH, as in disk0=/srv/web.img");
        assert_eq!(parse_map("a=1,a=2").unwrap_err(), "'a' is mapped twice");
    }

    #[test]
    fn bandwidths_take_units() {
        assert_eq!(parse_bandwidth("1GiB/s").unwrap(), 1 << 30);
        assert_eq!(parse_bandwidth("100M").unwrap(), 100 << 20);
    }

    #[test]
    fn a_status_is_read_back() {
        let peer = "tcp:b:7300".to_owned();
        let begun = MoveStatus::begin(Uuid::nil(), 1, Kind::Quick, peer, 1 << 30);
        let status = MoveStatus { phase: Phase::InDoubt, expected_downtime: Some(7), ..begun };
        let text = serde_json::to_string(&status).unwrap();
        assert!(text.contains(r#""dirty-sync-count":0"#) && text.contains(r#""phase":"in-doubt""#), "{text}");
        assert_eq!(serde_json::from_str::<MoveStatus>(&text).unwrap(), status);
    }
}
