//! Block devices that the host itself does not use: neither mounted nor swapped to, nor a part of one that is, nor what it
//! lies on.
//!
//! For a process that may be told to use any disk, so that it cannot be told to use its host's. What is found is what is
//! there now.

use super::Error;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Block devices in /dev and /dev/mapper; all other names for them are symbolic links.
const PLACES: [&str; 2] = ["/dev", "/dev/mapper"];

/// Paths of the block devices that are free to be a guest's.
pub(super) fn unused() -> Result<Vec<PathBuf>, Error> {
    let used = used();
    let mut free = Vec::new();
    for place in PLACES.map(Path::new) {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_block_device())
                && number(&entry.path()).is_some_and(|number| !used.contains(&number))
            {
                free.push(entry.path());
            }
        }
    }
    Ok(free)
}

/// The numbers of all devices that the host uses.
fn used() -> BTreeSet<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut used = BTreeSet::new();
    for number in mounted(&mounts).chain(swapped(&swaps)) {
        note(&number, &mut used);
    }
    used
}

/// Numbers and sources of all mounts (proc_pid_mountinfo(5)). A filesystem over several devices has a number of its own.
fn mounted(mountinfo: &str) -> impl Iterator<Item = String> {
    mountinfo.lines().flat_map(|line| {
        let by_number = line.split(' ').nth(2).map(str::to_owned);
        let source = line.split(" - ").nth(1).and_then(|tail| tail.split(' ').nth(1));
        by_number.into_iter().chain(source.and_then(|source| number(Path::new(source))))
    })
}

/// Devices that are swapped to (proc_swaps(5)); a file there lies on a mounted one.
fn swapped(swaps: &str) -> impl Iterator<Item = String> {
    swaps.lines().filter_map(|line| number(Path::new(line.split_whitespace().next()?)))
}

/// `MAJOR:MINOR` of a block device.
fn number(path: &Path) -> Option<String> {
    let metadata = fs::metadata(path).ok().filter(|metadata| metadata.file_type().is_block_device())?;
    let device = metadata.rdev();
    Some(format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device)))
}

/// Adds a device, the disk that it is a partition of, and the devices that it is made from.
fn note(number: &str, used: &mut BTreeSet<String>) {
    let Ok(entry) = fs::canonicalize(format!("/sys/dev/block/{number}")) else { return };
    if !used.insert(number.to_owned()) {
        return;
    }
    let whole = entry.parent().filter(|_| entry.join("partition").exists()).map(Path::to_owned);
    let below = fs::read_dir(entry.join("slaves")).into_iter().flatten().flatten().map(|slave| slave.path());
    for device in whole.into_iter().chain(below) {
        if let Ok(number) = fs::read_to_string(device.join("dev")) {
            note(number.trim(), used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_known_by_its_number() {
        let line = "25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/nowhere rw\n";
        assert_eq!(mounted(line).collect::<Vec<_>>(), ["254:0"]);
        assert_eq!(mounted("nonsense").count(), 0);
        assert_eq!(swapped("Filename Type\n/swapfile file 1 0 -2\n").count(), 0);
    }

    #[test]
    fn the_disk_under_a_mounted_filesystem_is_not_free() {
        let used = used();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        for line in mounts.lines() {
            let number = line.split(' ').nth(2).unwrap();
            // Filesystems without a block device have the major number 0.
            assert!(number.starts_with("0:") || used.contains(number), "{number} is mounted: {line}");
        }
        assert!(unused().unwrap().iter().all(|path| !used.contains(&number(path).unwrap())));
    }
}
