//! The one description of a machine: what the command line and `--config` produce, what `build` takes, what travels.
//!
//! Plain data. Host paths are absolute; nothing here opens anything.

mod check;
mod draft;
mod fields;
mod mac;

pub use check::Part;
pub use draft::{DEFAULT_CMDLINE, DEFAULT_CPUS, DEFAULT_MEMORY_BYTES, Draft};

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use sterna_arch::CpuModel;

/// The fewest bytes of RAM a machine can have.
pub const MIN_MEMORY_BYTES: u64 = 4 << 20;
/// The most vCPUs a machine can have.
pub const MAX_CPUS: u32 = 32;
/// Disks, network interfaces and the vsock device together: slots 1 to 31 of the bus, less the ones that every
/// machine has (rng, balloon).
pub const MAX_DEVICES: usize = 29;

/// A whole machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Name on this host, and the stem of its control socket.
    pub name: String,
    /// bzImage or ELF vmlinux.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Guest RAM, bytes; a multiple of 4 KiB.
    pub memory_bytes: u64,
    /// vCPUs.
    pub cpus: u32,
    /// What they are like: as this host's, or a level that more hosts have.
    pub cpu: CpuModel,
    /// Disks, in PCI order.
    pub disks: Vec<DiskConfig>,
    /// Network interfaces, in PCI order.
    pub nets: Vec<NetConfig>,
    /// Socket device, if any.
    pub vsock: Option<VsockConfig>,
    /// Where the first serial port goes.
    pub serial: SerialConfig,
}

/// A raw disk image or block device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Stable name, `disk0` and so on unless given; also the serial number the guest sees unless `serial` is set.
    pub id: String,
    /// File or block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub readonly: bool,
    /// O_DIRECT (the default) or the host's page cache.
    pub direct: bool,
    /// Serial number the guest sees, at most 20 bytes.
    pub serial: String,
}

/// A network interface on a tap device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Stable name, `net0` and so on unless given.
    pub id: String,
    /// Tap device on the host; made if it does not exist and `create` is set.
    pub tap: String,
    /// Create the tap device, and let it go with the VM.
    pub create: bool,
    /// The guest's address; derived from the machine's name and the interface's place unless given. Written as
    /// `02:1b:...` outside the program.
    #[serde(with = "mac")]
    pub mac: [u8; 6],
}

/// A socket device backed by a Unix socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Context id of the guest, 3 or more.
    pub cid: u32,
    /// Listening Unix socket; a guest's connection to host port P goes to `<socket>_P`.
    pub socket: PathBuf,
}

/// Where the first serial port goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SerialConfig {
    /// The terminal or pipe that `sterna run` was started on.
    Stdio,
    /// Nowhere.
    Null,
    /// A file, appended to.
    File(PathBuf),
    /// A listening Unix socket, one client at a time.
    Socket(PathBuf),
}

impl fmt::Display for SerialConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SerialConfig::Stdio => f.write_str("stdio"),
            SerialConfig::Null => f.write_str("null"),
            SerialConfig::File(path) => write!(f, "file={}", path.display()),
            SerialConfig::Socket(path) => write!(f, "socket={}", path.display()),
        }
    }
}

/// Everything that is wrong with a configuration, one sentence each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<String>);

impl Problems {
    /// Notes one more.
    pub fn add(&mut self, problem: impl Into<String>) {
        self.0.push(problem.into());
    }

    /// Notes all of `others` as well.
    pub fn append(&mut self, mut others: Problems) {
        self.0.append(&mut others.0);
    }

    /// `value` if nothing is wrong.
    pub fn none_or<T>(self, value: T) -> Result<T, Problems> {
        if self.0.is_empty() { Ok(value) } else { Err(self) }
    }

    /// The sentences, in the order of the configuration.
    pub fn list(&self) -> &[String] {
        &self.0
    }
}

impl std::error::Error for Problems {}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.list() {
            [] => f.write_str("nothing is wrong"),
            [one] => f.write_str(one),
            several => {
                write!(f, "{} things are wrong:", several.len())?;
                several.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
            }
        }
    }
}
