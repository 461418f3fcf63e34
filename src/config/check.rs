//! What is wrong with a configuration, as far as it shows without opening anything.
//!
//! Locks, tap devices and the contents of files are for the one who opens them, and may be asked part by part.

use super::{
    DEFAULT_MEMORY_BYTES, DiskConfig, MAX_CPUS, MAX_DEVICES, MIN_MEMORY_BYTES, NetConfig, Problems, SerialConfig,
    VmConfig, VsockConfig,
};
use crate::config::mac;
use crate::registry::{self, MAX_SOCKET_PATH_BYTES};
use crate::units::format_size;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Longest id of a device: the guest sees it as a serial number (virtio 1.3, 5.2.6: 20 bytes).
const MAX_ID_BYTES: usize = 20;
/// Longest name of a network interface: IFNAMSIZ less its NUL.
const MAX_TAP_BYTES: usize = 15;
/// Bytes in a sector.
const SECTOR_BYTES: u64 = 512;
/// Ids of the devices that have no configuration.
const OWN_IDS: [&str; 4] = ["rng", "balloon", "vsock", "serial"];

/// What of a machine is had of this host, or not, by itself.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// Kernel, initrd and command line.
    Boot(&'a VmConfig),
    /// A disk.
    Disk(&'a DiskConfig),
    /// A network interface.
    Net(&'a NetConfig),
    /// The socket device.
    Vsock(&'a VsockConfig),
    /// The far end of the serial port.
    Serial(&'a SerialConfig),
}

/// Tries to have a part, lets it go again, and says what was in the way.
pub type Attempt<'a> = dyn FnMut(Part<'_>) -> Option<String> + 'a;

impl VmConfig {
    /// Everything that is wrong, at once: by itself, and on this host.
    pub fn validate(&self) -> Problems {
        self.validate_trying(true, &mut |_| None)
    }

    /// As [`Self::validate`], for a machine that does not boot but goes on here: it needs its kernel only when it reboots.
    pub fn validate_arrival(&self) -> Problems {
        self.validate_trying(false, &mut |_| None)
    }

    /// Its parts, in the order of the configuration; a kernel only for one that `boots`.
    pub fn parts(&self, boots: bool) -> impl Iterator<Item = Part<'_>> {
        let boot = boots.then_some(Part::Boot(self)).into_iter();
        let disks = self.disks.iter().map(Part::Disk);
        let nets = self.nets.iter().map(Part::Net);
        boot.chain(disks).chain(nets).chain(self.vsock.iter().map(Part::Vsock)).chain([Part::Serial(&self.serial)])
    }

    /// RAM in bytes; where that much cannot be, what a machine has for which none is given.
    pub fn possible_memory_bytes(&self) -> u64 {
        if self.memory_problem(host_memory_bytes()).is_none() { self.memory_bytes } else { DEFAULT_MEMORY_BYTES }
    }

    /// Everything that is wrong, of the kernel only with a machine that `boots`, and what `attempt` says of each part that nothing is
    /// wrong with by itself.
    pub fn validate_trying(&self, boots: bool, attempt: &mut Attempt) -> Problems {
        let mut problems = Problems::default();
        let mut check_part = |part, problems: &mut Problems| check_part(part, attempt, problems);
        match self.name.as_str() {
            "" => problems.add("no name is given; add --name NAME"),
            name => registry::name_problem(name).into_iter().for_each(|problem| problems.add(problem)),
        }
        if boots {
            check_part(Part::Boot(self), &mut problems);
        }
        self.check_sizes(&mut problems);
        self.check_ids(&mut problems);
        self.disks.iter().for_each(|disk| check_part(Part::Disk(disk), &mut problems));
        self.check_shared_disks(&mut problems);
        self.nets.iter().for_each(|net| check_part(Part::Net(net), &mut problems));
        self.check_shared_nets(&mut problems);
        self.vsock.iter().for_each(|vsock| check_part(Part::Vsock(vsock), &mut problems));
        check_part(Part::Serial(&self.serial), &mut problems);
        problems
    }

    fn check_boot(&self, problems: &mut Problems) {
        if self.kernel.as_os_str().is_empty() {
            problems.add("no kernel is given; add --kernel FILE (a bzImage or an ELF vmlinux)");
        } else {
            check_file("kernel", &self.kernel, problems);
        }
        if let Some(initrd) = &self.initrd {
            check_file("initrd", initrd, problems);
        }
        if self.cmdline.chars().any(char::is_control) {
            problems.add("cmdline holds a control character; it must be one line of text");
        }
    }

    fn memory_problem(&self, host_bytes: Option<u64>) -> Option<String> {
        let asked = format_size(self.memory_bytes);
        if self.memory_bytes < MIN_MEMORY_BYTES {
            return Some(format!("memory is {asked}; a guest needs {} or more", format_size(MIN_MEMORY_BYTES)));
        }
        if !self.memory_bytes.is_multiple_of(4096) {
            return Some(format!("memory is {} bytes; it must be a multiple of 4K", self.memory_bytes));
        }
        let host_bytes = host_bytes.filter(|host_bytes| self.memory_bytes > *host_bytes)?;
        Some(format!("memory is {asked}; this host has {} in all", format_size(host_bytes)))
    }

    fn check_sizes(&self, problems: &mut Problems) {
        self.memory_problem(host_memory_bytes()).into_iter().for_each(|problem| problems.add(problem));
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            problems.add(format!("cpus is {}; it must be 1 to {MAX_CPUS}", self.cpus));
        }
        let devices = self.disks.len() + self.nets.len() + usize::from(self.vsock.is_some());
        if devices > MAX_DEVICES {
            problems
                .add(format!("{devices} disks, networks and vsock are given; a machine has room for {MAX_DEVICES}"));
        }
    }

    fn check_ids(&self, problems: &mut Problems) {
        let ids = self.disks.iter().map(|disk| &disk.id).chain(self.nets.iter().map(|net| &net.id));
        for (id, count) in count_by(ids.clone()) {
            if count > 1 {
                problems.add(format!("id '{id}' is given to {count} devices; each needs its own"));
            }
        }
        for id in ids {
            if OWN_IDS.contains(&id.as_str()) {
                problems.add(format!("id '{id}' belongs to a device that every machine has; choose another"));
            } else if id.is_empty() || id.len() > MAX_ID_BYTES || !id.bytes().all(registry::is_name_byte) {
                problems.add(format!("id '{id}' must be 1 to {MAX_ID_BYTES} letters, digits, '.', '_' or '-'"));
            }
        }
    }

    /// No image may have a writer and another user: each would ruin what the other sees.
    fn check_shared_disks(&self, problems: &mut Problems) {
        let mut users: HashMap<(u64, u64, u64), Vec<&DiskConfig>> = HashMap::new();
        for disk in &self.disks {
            if let Ok(metadata) = fs::metadata(&disk.path) {
                let block = metadata.file_type().is_block_device();
                let key = if block { (0, 0, metadata.rdev()) } else { (metadata.dev(), metadata.ino(), 0) };
                users.entry(key).or_default().push(disk);
            }
        }
        let mut shared: Vec<_> = users.into_values().filter(|disks| disks.len() > 1).collect();
        shared.sort_by(|a, b| a.first().map(|disk| &disk.id).cmp(&b.first().map(|disk| &disk.id)));
        for disks in shared.iter().filter(|disks| disks.iter().any(|disk| !disk.readonly)) {
            let ids: Vec<_> = disks.iter().map(|disk| disk.id.as_str()).collect();
            let path = disks.first().map(|disk| disk.path.display().to_string()).unwrap_or_default();
            problems.add(format!("{} are the same image, {path}; then all must be readonly=on", ids.join(" and ")));
        }
    }

    fn check_shared_nets(&self, problems: &mut Problems) {
        for (mac, count) in count_by(self.nets.iter().map(|net| mac::format(&net.mac))) {
            if count > 1 {
                problems.add(format!("MAC address {mac} is given to {count} interfaces; each needs its own"));
            }
        }
        for (tap, count) in count_by(self.nets.iter().map(|net| &net.tap).filter(|tap| !tap.is_empty())) {
            if count > 1 {
                problems.add(format!("tap '{tap}' is given to {count} interfaces; each needs its own"));
            }
        }
    }
}

/// Notes what is wrong with `part` by itself, else what `attempt` says of it.
fn check_part(part: Part, attempt: &mut Attempt, problems: &mut Problems) {
    let before = problems.list().len();
    match part {
        Part::Boot(config) => config.check_boot(problems),
        Part::Disk(disk) => check_disk(disk, problems),
        Part::Net(net) => check_net(net, problems),
        Part::Vsock(vsock) => check_vsock(vsock, problems),
        Part::Serial(serial) => check_serial(serial, problems),
    }
    if problems.list().len() == before {
        attempt(part).into_iter().for_each(|problem| problems.add(problem));
    }
}

fn check_file(what: &str, path: &Path, problems: &mut Problems) {
    match fs::metadata(path) {
        Err(error) => problems.add(format!("{what} {}: {}", path.display(), reason(&error))),
        Ok(metadata) if metadata.is_dir() => problems.add(format!("{what} {} is a directory", path.display())),
        Ok(metadata) if !metadata.is_file() => problems.add(format!("{what} {} is not a file", path.display())),
        Ok(_) => {}
    }
}

fn check_disk(disk: &DiskConfig, problems: &mut Problems) {
    let DiskConfig { id, path, serial, .. } = disk;
    if serial.len() > MAX_ID_BYTES || !serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
        problems.add(format!("{id}: serial '{serial}' must be at most {MAX_ID_BYTES} printable ASCII characters"));
    }
    if path.as_os_str().is_empty() {
        return problems.add(format!("{id}: no image is given; add path=FILE"));
    }
    let path = path.display();
    let metadata = match fs::metadata(&disk.path) {
        Ok(metadata) => metadata,
        Err(error) => return problems.add(format!("{id}: {path}: {}", reason(&error))),
    };
    if metadata.is_dir() {
        problems.add(format!("{id}: {path} is a directory; it must be a raw image or a block device"));
    } else if !metadata.is_file() && !metadata.file_type().is_block_device() {
        problems.add(format!("{id}: {path} is neither a file nor a block device"));
    } else if metadata.is_file() && metadata.len() < SECTOR_BYTES {
        problems.add(format!("{id}: {path} has {} bytes, less than a sector ({SECTOR_BYTES})", metadata.len()));
    }
}

/// The rules of the kernel's `dev_valid_name`; `%` would make it number the device.
fn check_net(net: &NetConfig, problems: &mut Problems) {
    let NetConfig { id, tap, mac, .. } = net;
    if tap.is_empty() {
        problems.add(format!("{id}: no tap device is given; add tap=NAME"));
    } else if tap.len() > MAX_TAP_BYTES {
        problems.add(format!("{id}: tap '{tap}' has {} characters; at most {MAX_TAP_BYTES} are possible", tap.len()));
    } else if matches!(tap.as_str(), "." | "..") || tap.contains(|c: char| "/:%".contains(c) || c.is_whitespace()) {
        problems.add(format!("{id}: tap '{tap}' is not a possible name of a network interface"));
    }
    if mac.first().is_some_and(|first| first & 1 != 0) || *mac == [0; 6] {
        problems.add(format!("{id}: MAC address {} is not one of a single interface", mac::format(mac)));
    }
}

fn check_vsock(vsock: &VsockConfig, problems: &mut Problems) {
    if !(3..u32::MAX).contains(&vsock.cid) {
        problems.add(format!("vsock: cid is {}; 3 is the first that a guest can have", vsock.cid));
    }
    if vsock.socket.as_os_str().is_empty() {
        problems.add("vsock: no socket is given; add socket=PATH");
    } else {
        check_new_file("vsock: socket", &vsock.socket, "_4294967295".len(), problems);
    }
}

fn check_serial(serial: &SerialConfig, problems: &mut Problems) {
    match serial {
        SerialConfig::Socket(path) => check_new_file("serial: socket", path, 0, problems),
        SerialConfig::File(path) if path.is_dir() => {
            problems.add(format!("serial: file {} is a directory", path.display()));
        }
        SerialConfig::Stdio | SerialConfig::Null | SerialConfig::File(_) => {}
    }
}

/// A socket that will be made: its directory must be there and its path fit with `suffix_bytes` more.
fn check_new_file(what: &str, path: &Path, suffix_bytes: usize, problems: &mut Problems) {
    let bytes = path.as_os_str().len();
    let most = MAX_SOCKET_PATH_BYTES - suffix_bytes;
    if bytes > most {
        problems.add(format!("{what} {} has {bytes} bytes; a socket's path has at most {most} here", path.display()));
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        problems.add(format!("{what} {}: {} is not a directory", path.display(), parent.display()));
    } else if path.is_dir() {
        problems.add(format!("{what} {} is a directory", path.display()));
    }
}

/// An I/O error without its number.
fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_owned()
}

/// Each value with how often it occurs, in order.
fn count_by<T: Ord>(values: impl Iterator<Item = T>) -> std::collections::BTreeMap<T, usize> {
    values.fold(Default::default(), |mut counts, value| {
        *counts.entry(value).or_default() += 1;
        counts
    })
}

/// All memory of this host; `None` where /proc does not tell.
fn host_memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
