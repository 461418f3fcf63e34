//! The sandbox of a VM's process: what it may do to its host, whatever its guest, its disks or its peer make it try.
//!
//! [`enter`] is called once, before a byte of a peer is read and before there are threads, and nothing leaves it. Three
//! locks, each good without the others: no new privileges, [`files`] (landlock), [`seccomp`] (system calls). It refuses
//! to know what a VM is: the caller says which paths the process needs.
//!
//! Two things it cannot do. What io_uring does in the kernel's place is seen by landlock and not by seccomp, so a ring
//! can make a socket of any family. And in a landlock domain `/proc` shows no other process's descriptors, so that who
//! holds a disk's lock or a tap cannot be told from inside.

mod disks;
mod files;
mod seccomp;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;

/// Environment variable with a [`Mode`].
pub const VARIABLE: &str = "STERNA_SANDBOX";

/// Why a process is not in its sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not a [`Mode`].
    #[error("{VARIABLE} is '{0}'; it must be on, log or off")]
    Mode(String),
    /// A path of the plan cannot be looked at.
    #[error("cannot look at {} for the sandbox", path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Landlock is there and refuses.
    #[error("cannot fence off the host's files; {VARIABLE}=off runs without the sandbox")]
    Files(#[source] landlock::RulesetError),
    /// The list of system calls makes no filter: our own mistake.
    #[error("cannot compile the filter of system calls")]
    Filter(#[source] seccompiler::BackendError),
    /// The kernel does not take the filter.
    #[error("cannot limit system calls; {VARIABLE}=off runs without the sandbox")]
    SystemCalls(#[source] seccompiler::Error),
}

/// How strict the sandbox is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// There is none.
    Off,
    /// System calls that are not on the list are made, and noted in the host's audit log: to find a forgotten one. Files
    /// are fenced off as with `On`.
    Log,
    /// System calls that are not on the list fail with EPERM.
    #[default]
    On,
}

impl Mode {
    /// What [`VARIABLE`] says; `On` if it is not set.
    ///
    /// # Errors
    /// It says something else.
    pub fn from_env() -> Result<Self, Error> {
        match std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            Some(value) => value.to_string_lossy().parse(),
            None => Ok(Self::default()),
        }
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "off" => Ok(Self::Off),
            "log" => Ok(Self::Log),
            "on" => Ok(Self::On),
            other => Err(Error::Mode(other.to_owned())),
        }
    }
}

/// What a process needs of its host's files. A path that is not there is passed over: it stays out of reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// How strict.
    pub mode: Mode,
    /// Directories where files and sockets may be made, written, renamed and removed.
    pub writable_dirs: Vec<PathBuf>,
    /// Files, and directories of files, that may be read: kernels.
    pub readable: Vec<PathBuf>,
    /// Where disks and saved machines are read and written.
    pub storage: Storage,
}

/// Where disks and saved machines are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// Outside the directories of the system itself, in files: enough for whom has its disks open already.
    #[default]
    Files,
    /// That, and the block devices that the host does not use. To look for them takes half a millisecond, and more where
    /// there are many.
    FilesAndDevices,
    /// At these paths and beneath.
    At(Vec<PathBuf>),
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// As planned.
    pub mode: Mode,
    /// Version of landlock's interface that this kernel and we share; `None` where it has none.
    pub landlock_abi: Option<u32>,
    /// What was planned and is not enforced, one sentence each.
    pub gaps: Vec<String>,
}

/// Puts the calling thread, and all threads made later, into the sandbox, for good.
///
/// # Errors
/// The process may then be half inside, and is to end. A kernel that lacks a part of landlock is no error but a gap in
/// the report.
pub fn enter(plan: &Plan) -> Result<Report, Error> {
    let mut report = Report { mode: plan.mode, landlock_abi: None, gaps: Vec::new() };
    if plan.mode == Mode::Off {
        report.gaps.push(format!("there is no sandbox: {VARIABLE} is off"));
        return Ok(report);
    }
    files::restrict(plan, &mut report)?;
    // Last, since the calls of the first are not on its list.
    seccomp::restrict(plan.mode)?;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_is_one_of_three_words() {
        for (word, mode) in [("off", Mode::Off), ("log", Mode::Log), ("on", Mode::On)] {
            assert_eq!(word.parse::<Mode>().unwrap(), mode);
        }
        let error = "yes".parse::<Mode>().unwrap_err().to_string();
        assert_eq!(error, "STERNA_SANDBOX is 'yes'; it must be on, log or off");
    }

    #[test]
    fn off_does_nothing_and_says_so() {
        let report = enter(&Plan { mode: Mode::Off, ..Plan::default() }).unwrap();
        assert_eq!(report.gaps, ["there is no sandbox: STERNA_SANDBOX is off"]);
        assert!(!std::fs::read_to_string("/proc/self/status").unwrap().contains("NoNewPrivs:\t1"));
    }
}
