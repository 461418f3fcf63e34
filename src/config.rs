//! The one description of a machine: what the command line and `--config` produce, what `build` takes, what travels.
//!
//! Plain data. Host paths are kept as given; nothing here opens anything.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

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
    /// The guest's address.
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
