//! Who may use an image: OFD locks, and finding who holds one that is in the way.
//!
//! The lock covers the whole file, so that it also stands against QEMU's, which locks single bytes. It knows nothing
//! of virtual machines but how to tell the name of one.

use super::sys;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The longest process id and its newline are shorter.
const MAX_PID_BYTES: u64 = 16;

/// Who holds a lock that is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This very process: the image was given twice.
    Itself,
    /// Another process of this host.
    Process {
        /// Process id, as this process sees it.
        pid: u32,
        /// Its command name.
        command: String,
        /// The VM's name, if it is a Sterna VM.
        vm: Option<String>,
    },
    /// No process that can be seen from here: another host sharing the filesystem, another PID namespace, or one
    /// whose files may not be looked at.
    Elsewhere,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Itself => write!(f, "this VM itself: the image is given twice"),
            Self::Process { pid, command, vm: Some(name) } => write!(f, "VM {name} ({command}, process {pid})"),
            Self::Process { pid, command, vm: None } => write!(f, "process {pid} ({command})"),
            Self::Elsewhere => write!(f, "another host, or a process that cannot be seen from here"),
        }
    }
}

/// What came of an attempt to lock.
#[derive(Debug)]
pub enum Denied {
    /// Somebody else has it.
    Held(Holder),
    /// The filesystem cannot lock, or the attempt failed.
    Failed(io::Error),
}

/// Locks all of `file`, alone if `exclusive`, else together with other readers. Does not wait.
///
/// # Errors
/// A lock in the way, with its holder where that can be found, or a filesystem without locks.
pub fn take(file: &File, exclusive: bool) -> Result<(), Denied> {
    match sys::lock(file, exclusive) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(Denied::Held(find_holder(file).unwrap_or(Holder::Elsewhere)))
        }
        Err(error) => Err(Denied::Failed(error)),
    }
}

/// Looks for the process that holds a lock on `file`. The kernel does not tell (an OFD lock has no process id), but
/// each descriptor's fdinfo lists the locks that were taken through it.
fn find_holder(file: &File) -> Option<Holder> {
    let wanted = file.metadata().ok()?;
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let pid = pids.find(|pid| holds_lock(*pid, &wanted))?;
    if pid == std::process::id() {
        return Some(Holder::Itself);
    }
    let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned();
    Some(Holder::Process { pid, command, vm: vm_name(pid) })
}

/// Whether process `pid` has a lock on the file that `wanted` describes.
fn holds_lock(pid: u32, wanted: &fs::Metadata) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
    descriptors.flatten().any(|entry| {
        let Ok(info) = fs::read_to_string(entry.path()) else { return false };
        // The inode number first: it costs no look at the file itself, which may lie on a server that is away. The
        // device number in the line is the filesystem's own and need not be what stat gives.
        names_inode(&info, wanted.ino())
            && fs::metadata(Path::new(&format!("/proc/{pid}/fd")).join(entry.file_name()))
                .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
    })
}

/// Whether `info` has a line such as `lock: 1: OFDLCK  ADVISORY  WRITE -1 fe:00:131 0 EOF` on this inode.
fn names_inode(info: &str, inode: u64) -> bool {
    let locks = info.lines().filter(|line| line.starts_with("lock:"));
    let files = locks.filter_map(|line| line.split_whitespace().find(|word| word.matches(':').count() == 2));
    files.filter_map(|file| file.rsplit(':').next()).any(|number| number.parse() == Ok(inode))
}

/// The name of the Sterna VM that is process `pid`: it holds a file `NAME.lock` open in which its process id stands.
fn vm_name(pid: u32) -> Option<String> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    descriptors.into_iter().find_map(|entry| {
        let path = fs::read_link(entry.path()).ok()?;
        let name = path.file_name()?.to_str()?.strip_suffix(".lock").filter(|name| !name.contains(char::is_control))?;
        // Not waiting: whatever it is, by whose ever choice.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(entry.path()).ok()?;
        let mut text = String::new();
        file.take(MAX_PID_BYTES).read_to_string(&mut text).ok()?;
        (text.trim_end().parse() == Ok(pid)).then(|| name.to_owned())
    })
}
