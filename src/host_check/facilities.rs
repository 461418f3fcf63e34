//! What Sterna uses beside KVM: kernel interfaces, devices, memory. What it makes to try is gone again when it returns.

use super::sys::try_userfaultfd;
use super::{Check, Need};
use io_uring::IoUring;
use std::fs::{self, OpenOptions};
use std::io;
use sterna_devices::virtio::net::Tap;

const GROUP: &str = "host";

/// All of them.
pub fn check() -> Vec<Check> {
    let opened = |path: &str| OpenOptions::new().read(true).write(true).open(path).map(drop);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let huge = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    vec![
        tried(
            "io_uring",
            Need::Required,
            IoUring::new(8).map(drop),
            "sysctl kernel.io_uring_disabled=0 (disks need it)",
        ),
        tried("/dev/net/tun", Need::Optional, opened("/dev/net/tun"), "modprobe tun; run as root (networks need it)"),
        tried(
            "a tap",
            Need::Optional,
            try_tap(),
            "run as root, or have somebody make the taps: net tap=NAME takes one that is there",
        ),
        tried("userfaultfd", Need::Optional, try_userfaultfd(), "run as root, or sysctl vm.unprivileged_userfaultfd=1"),
        tried("/dev/vhost-net", Need::Optional, opened("/dev/vhost-net"), "modprobe vhost_net (not used yet)"),
        huge_pages(huge),
        Check::fact(GROUP, "reserved huge pages", format!("{} free", field(&meminfo, "HugePages_Free:").unwrap_or(0))),
        memory(&meminfo),
    ]
}

/// Makes a tap, which vanishes at once. /dev/net/tun opens for anybody.
fn try_tap() -> io::Result<()> {
    Tap::open(&format!("check{}", std::process::id()), true).map(drop).map_err(io::Error::other)
}

fn tried(name: &str, need: Need, result: io::Result<()>, remedy: &str) -> Check {
    let found = result.map(|()| "works".to_owned()).map_err(|error| error.to_string());
    Check::new(GROUP, name, need, found, remedy)
}

/// `modes` is the kernel's list with the chosen one in brackets.
fn huge_pages(modes: io::Result<String>) -> Check {
    let found = match modes {
        Ok(modes) if modes.contains("[never]") => Err("never".to_owned()),
        Ok(modes) => Ok(modes.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let remedy = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled";
    Check::new(GROUP, "transparent huge pages", Need::Optional, found, remedy)
}

fn memory(meminfo: &str) -> Check {
    let detail = match (field(meminfo, "MemAvailable:"), field(meminfo, "MemTotal:")) {
        (Some(available), Some(total)) => format!("{} MiB of {} MiB", available >> 10, total >> 10),
        _ => "unknown".to_owned(),
    };
    Check::fact(GROUP, "memory available", detail)
}

/// The number after `name` in /proc/meminfo, KiB or pages.
fn field(meminfo: &str, name: &str) -> Option<u64> {
    meminfo.lines().find_map(|line| line.strip_prefix(name))?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_meminfo() {
        let text =
            "MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   2048000 kB\nHugePages_Free:        3\n";
        assert_eq!(memory(text).detail, "2000 MiB of 23437 MiB");
        assert_eq!(field(text, "HugePages_Free:"), Some(3));
        assert_eq!(memory("").detail, "unknown");
    }

    #[test]
    fn huge_pages_that_are_off_come_with_a_remedy() {
        assert_eq!(huge_pages(Ok("always [madvise] never\n".to_owned())).detail, "madvise");
        let off = huge_pages(Ok("always madvise [never]\n".to_owned()));
        assert!(!off.present && off.remedy.is_some_and(|remedy| remedy.contains("madvise")));
    }

    #[test]
    fn failure_is_told_with_its_cause() {
        let denied = tried("x", Need::Optional, Err(io::ErrorKind::PermissionDenied.into()), "be root");
        assert_eq!((denied.detail.as_str(), denied.remedy.as_deref()), ("permission denied", Some("be root")));
    }
}
