//! Which files the process may touch: a landlock rule for each path, nothing for the rest.
//!
//! Everything is denied that is not granted below, and running a file is granted nowhere. It refuses to know system calls.

use super::{Error, Plan, Report, Storage, disks};
use landlock::{
    ABI, Access, AccessFs, AddRuleError, AddRulesError, BitFlags, LandlockStatus, PathBeneath, RestrictSelfAttr,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, Scope, make_bitflags,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::{self, File};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The newest interface whose rights were looked at one by one. Later: who may connect to a Unix socket (9), which a guest's
/// vsock connections would need everywhere.
const KNOWN: ABI = ABI::V8;

/// What a writable directory grants.
const WRITABLE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadFile | ReadDir | WriteFile | Truncate | RemoveFile | MakeReg | MakeSock
});
/// What a disk and a directory of disks grants: ioctl, since a block device is asked for its geometry; making and removing
/// files, since a machine can be saved beside its disks, under a name that is not there before it is whole, and its sockets
/// may lie there.
const STORAGE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadFile | ReadDir | WriteFile | Truncate | IoctlDev | MakeReg | MakeSock | RemoveFile
});
const READABLE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
const DEVICE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});

/// What every VM needs.
const DEVICES: &[&str] = &["/dev/kvm", "/dev/net/tun", "/dev/userfaultfd", "/dev/null", "/dev/zero", "/dev/urandom"];
/// How many CPUs and nodes there are, and whether there are huge pages.
const HOST_FACTS: &[&str] = &["/sys/devices/system/cpu", "/sys/devices/system/node", "/sys/kernel/mm"];
/// The process itself, and how much memory there is. These stay open: the kernel may forget an entry of /proc that nobody
/// holds, and the next that it makes would be another, without a rule.
const HELD: &[&str] = &["/proc/self", "/proc/meminfo"];

/// Directories of / that hold the system, and no disks; /dev is looked through by [`disks`].
const SYSTEM: &[&str] =
    &["bin", "sbin", "usr", "lib", "lib32", "lib64", "libx32", "boot", "etc", "proc", "sys", "dev", "root", "run"];

/// Restricts the calling thread and those it makes, and notes in `report` what this kernel cannot do.
pub(super) fn restrict(plan: &Plan, report: &mut Report) -> Result<(), Error> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))
        .and_then(|rules| rules.scope(Scope::AbstractUnixSocket | Scope::Signal))
        .and_then(Ruleset::create)
        .map_err(Error::Files)?;
    let mut fence = Fence { ruleset: ruleset.all_threads(true).map_err(Error::Files)?, held: Vec::new() };
    fence.plan(plan)?;
    let Fence { ruleset, held } = fence;
    let threads = threads();
    let status = ruleset.restrict_self().map_err(Error::Files)?;
    // For the life of the process, see `HELD`.
    held.into_iter().map(IntoRawFd::into_raw_fd).for_each(drop);
    report.landlock_abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => Some(effective_abi as u32),
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => None,
    };
    report.gaps.extend(gaps(report.landlock_abi).into_iter().map(str::to_owned));
    if report.landlock_abi.is_some() && !status.all_threads && threads > 1 {
        report.gaps.push(format!("{} threads were there before and reach every file", threads - 1));
    }
    Ok(())
}

/// What a kernel with this interface cannot enforce of what [`restrict`] asks.
fn gaps(abi: Option<u32>) -> Vec<&'static str> {
    let Some(abi) = abi else {
        return vec!["landlock is not there on this kernel: files are protected by their permissions only"];
    };
    let since = [
        (3, "files that may only be read can be cut short (landlock has no say in it before Linux 6.2)"),
        (5, "ioctls on device files are limited by the list of system calls only (before Linux 6.10)"),
        (6, "abstract Unix sockets of other processes can be reached (before Linux 6.12)"),
    ];
    since.into_iter().filter(|(from, _)| abi < *from).map(|(_, gap)| gap).collect()
}

/// Threads of this process; 1 if that cannot be seen.
fn threads() -> u64 {
    // A directory has two links and one more for each directory in it.
    fs::metadata("/proc/self/task").map_or(1, |tasks| tasks.nlink().saturating_sub(2))
}

/// Rules on their way to the kernel.
struct Fence {
    ruleset: RulesetCreated,
    /// Descriptors that must stay open.
    held: Vec<File>,
}

impl Fence {
    fn plan(&mut self, plan: &Plan) -> Result<(), Error> {
        for path in DEVICES {
            self.allow(Path::new(path), DEVICE)?;
        }
        for path in HOST_FACTS {
            self.allow(Path::new(path), READABLE)?;
        }
        for path in HELD {
            let held = self.allow(Path::new(path), READABLE)?;
            self.held.extend(held);
        }
        for path in &plan.readable {
            self.allow(path, READABLE)?;
        }
        for path in &plan.writable_dirs {
            self.allow(path, WRITABLE)?;
        }
        let mut places = match &plan.storage {
            Storage::At(paths) => paths.clone(),
            Storage::Files | Storage::FilesAndDevices => data_dirs(Path::new("/"))?,
        };
        if plan.storage == Storage::FilesAndDevices {
            places.extend(disks::unused()?);
        }
        places.iter().try_for_each(|path| self.allow(path, STORAGE).map(drop))
    }

    /// Grants `access` on `path` and what lies beneath, as far as it means something there; `None` if nothing is.
    fn allow(&mut self, path: &Path, access: BitFlags<AccessFs>) -> Result<Option<File>, Error> {
        let failed = |errno: Errno| Error::Path { path: path.to_owned(), source: errno.into() };
        let opened = match rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Ok(opened) => opened,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(failed(errno)),
        };
        match (&mut self.ruleset).add_rule(PathBeneath::new(&opened, access)) {
            Ok(_) => Ok(Some(opened.into())),
            // A pipe or a memfd behind a link of /proc: on no filesystem, so landlock lets it be.
            Err(RulesetError::AddRules(AddRulesError::Fs(AddRuleError::AddRuleCall { source, .. })))
                if source.raw_os_error() == Some(libc::EBADFD) =>
            {
                Ok(None)
            }
            Err(error) => Err(Error::Files(error)),
        }
    }
}

/// Directories of `root` that may hold disks. A symbolic link leads to one that is listed itself, or to the system.
fn data_dirs(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Path { path: root.to_owned(), source };
    let mut dirs = Vec::new();
    for entry in fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if entry.file_type().map_err(failed)?.is_dir() && !SYSTEM.iter().any(|system| name == *system) {
            dirs.push(entry.path());
        }
    }
    Ok(dirs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_the_system_hold_no_disks() {
        let root = tempfile::tempdir().unwrap();
        for name in ["usr", "etc", "boot", "dev", "srv", "vms", "var"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        fs::write(root.path().join("vmlinuz"), "").unwrap();
        std::os::unix::fs::symlink("usr/bin", root.path().join("programs")).unwrap();
        let mut dirs = data_dirs(root.path()).unwrap();
        dirs.sort();
        assert_eq!(dirs, ["srv", "var", "vms"].map(|name| root.path().join(name)));
    }

    #[test]
    fn each_older_interface_has_its_gaps() {
        assert_eq!(gaps(None).len(), 1);
        assert!(gaps(None)[0].contains("landlock is not there on this kernel"));
        // Debian 12's kernel.
        assert_eq!(gaps(Some(2)).len(), 3);
        assert_eq!(gaps(Some(5)).len(), 1);
        assert!(gaps(Some(6)).is_empty());
    }

    #[test]
    fn this_process_has_its_threads() {
        let before = threads();
        let (leave, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        assert!(before >= 1 && threads() >= 2, "{before}, then {}", threads());
        drop(leave);
        let _gone = thread.join();
    }
}
