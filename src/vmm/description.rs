//! What a machine is beside its state: all that a target or a restore needs to build it. JSON, so that a person can read it in a
//! file and a newer program can add to it; it knows nothing of how it travels.

use super::parts::PartError;
use super::vm::{Identity, Vm};
use crate::config::{Problems, SerialConfig, VmConfig};
use crate::control::movement::Map;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;
use sterna_arch::CpuProfile;
use sterna_devices::Saved;
use sterna_devices::virtio::blk::{Image, ImageError};
use sterna_migration::{Section, SectionError, Sections};

/// See the module. What a newer program adds is refused by name by an older one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Version of the program that wrote it.
    pub program: String,
    /// Host that it was written on.
    pub host: String,
    /// When, nanoseconds since 1970 by that host's clock.
    pub written_unix_ns: u64,
    /// The machine.
    pub config: VmConfig,
    /// Its serial port is at the machine's own place, or on a terminal, and goes to its own place elsewhere too.
    pub own_console: bool,
    /// What it keeps wherever it goes.
    pub identity: Identity,
    /// What its processors can do.
    pub cpu: CpuProfile,
    /// The MSRs that are in its state.
    #[serde(default)]
    pub state_msrs: Vec<u32>,
    /// Memory that it has touched, bytes.
    pub present_bytes: u64,
    /// How its disks can be recognised, in the configuration's order.
    pub disks: Vec<DiskMark>,
}

/// Whether a serial port goes where `run --detach` puts it, or to a terminal.
pub fn has_own_console(config: &VmConfig) -> bool {
    match &config.serial {
        SerialConfig::Stdio => true,
        SerialConfig::Socket(path) => path.file_name().is_some_and(|file| *file == *format!("{}.console", config.name)),
        SerialConfig::Null | SerialConfig::File(_) => false,
    }
}

/// How a disk is recognised on another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskMark {
    /// Size.
    pub size_bytes: u64,
    /// The guest may not write to it.
    pub readonly: bool,
    /// A block device, which carries no lock between hosts.
    pub block_device: bool,
    /// Hashes of a sample of its blocks.
    pub sample: Vec<u64>,
}

impl DiskMark {
    /// The mark of `image`.
    ///
    /// # Errors
    /// The image's.
    pub fn of(image: &Image) -> Result<Self, ImageError> {
        Ok(Self {
            size_bytes: image.size_bytes(),
            readonly: image.readonly(),
            block_device: image.block_device(),
            sample: image.sample()?,
        })
    }
}

impl Description {
    /// As bytes.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// Reads one, as hostile as it may be.
    ///
    /// # Errors
    /// What is not a description that this program knows.
    pub fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// Gives the machine another name and other paths where `map` says so.
    pub fn rehome(&mut self, name: Option<&str>, map: &Map) -> Problems {
        let mut problems = Problems::default();
        if let Some(name) = name {
            self.config.name = name.to_owned();
        }
        for (id, to) in map {
            if !map_one(&mut self.config, id, to) {
                let ids = mappable(&self.config).join(", ");
                problems.add(format!("--map: the machine has no '{id}'; it has {ids}"));
            }
            self.own_console &= id != "serial";
        }
        problems
    }

    /// Puts a serial port that was at its own place, or on a terminal, to its own place on this host.
    pub fn settle(&mut self, console: impl Fn(&str) -> PathBuf) {
        if self.own_console {
            self.config.serial = SerialConfig::Socket(console(&self.config.name));
        }
    }

    /// The first problem that lies in what was sent rather than in this host.
    pub fn inconsistency(&self) -> Option<String> {
        let (disks, marks) = (self.config.disks.len(), self.disks.len());
        (disks != marks).then(|| format!("the machine has {disks} disks and {marks} marks of disks"))
    }
}

fn map_one(config: &mut VmConfig, id: &str, to: &str) -> bool {
    if let Some(disk) = config.disks.iter_mut().find(|disk| disk.id == id) {
        disk.path = PathBuf::from(to);
    } else if let Some(net) = config.nets.iter_mut().find(|net| net.id == id) {
        net.tap = to.to_owned();
    } else {
        match (id, &mut config.vsock) {
            ("vsock", Some(vsock)) => vsock.socket = PathBuf::from(to),
            ("kernel", _) => config.kernel = PathBuf::from(to),
            ("initrd", _) if config.initrd.is_some() => config.initrd = Some(PathBuf::from(to)),
            ("serial", _) => {
                config.serial = match to.split_once(':') {
                    _ if to == "null" => SerialConfig::Null,
                    Some(("file", path)) => SerialConfig::File(PathBuf::from(path)),
                    Some(("socket", path)) => SerialConfig::Socket(PathBuf::from(path)),
                    _ => return false,
                }
            }
            _ => return false,
        }
    }
    true
}

/// What can be mapped.
fn mappable(config: &VmConfig) -> Vec<String> {
    let disks = config.disks.iter().map(|disk| disk.id.clone());
    let nets = config.nets.iter().map(|net| net.id.clone());
    let others = ["kernel", "initrd", "serial (null, file:PATH or socket:PATH)"].map(str::to_owned);
    disks.chain(nets).chain(config.vsock.iter().map(|_| "vsock".to_owned())).chain(others).collect()
}

/// Files that the guest's next boot needs and that are not there; it runs without them until then.
pub fn missing_for_reboot(config: &VmConfig) -> Vec<String> {
    let files = [("kernel", Some(&config.kernel)), ("initrd", config.initrd.as_ref())];
    let missing = files.into_iter().filter_map(|(what, path)| Some((what, path.filter(|path| !is_file(path))?)));
    missing
        .map(|(what, path)| {
            format!(
                "{what} {} is not there: the guest runs on, but cannot reboot there; --map {what}=PATH",
                path.display()
            )
        })
        .collect()
}

fn is_file(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
}

/// Memory that this host can still give away, bytes; `None` where /proc does not tell.
pub fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// This host's name.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Nanoseconds since 1970.
pub fn unix_ns() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// How the guest stood when it was stopped: a section beside those of the machine's parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSection {
    /// It stood still before, on a person's wish, and is to stand still at its destination.
    pub paused: bool,
    /// How long it had been up, nanoseconds.
    pub uptime_ns: u64,
}

impl RunSection {
    const NAME: &str = "run";
    const VERSION: u16 = 1;

    /// Of the machine of `vm`.
    pub fn of(vm: &Vm, paused: bool) -> Self {
        Self { paused, uptime_ns: u64::try_from(vm.uptime().as_nanos()).unwrap_or(u64::MAX) }
    }

    /// How long it had been up.
    pub fn uptime(&self) -> Duration {
        Duration::from_nanos(self.uptime_ns)
    }

    /// Adds it to `sections`.
    ///
    /// # Errors
    /// The list's.
    pub fn push(&self, sections: &mut Sections) -> Result<(), SectionError> {
        let Saved { version, contents } = Saved::of(Self::VERSION, self);
        sections.push(Section { name: Self::NAME.into(), version, contents })
    }

    /// Takes it out of `sections`.
    ///
    /// # Errors
    /// When it is missing or malformed.
    pub fn take(sections: &mut Sections) -> Result<Self, PartError> {
        let Section { name, version, contents } = sections.take(Self::NAME)?;
        let saved = Saved { version, contents };
        saved.decode(Self::VERSION).map_err(|source| PartError::Refused { part: name, source })
    }
}
