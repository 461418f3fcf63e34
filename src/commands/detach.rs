//! `sterna run --detach` and `sterna restore`: a process of its own for the VM, in a new session, that reports once.
//!
//! The child is forked when its orders are checked, while there is one thread, and holds the VM's name with its parent. The
//! parent reads one line from a pipe. What the VM has to say later goes to its log.

use super::Output;
use super::fork::fork;
use super::run::{Orders, execute};
use crate::config::SerialConfig;
use crate::error::Error;
use crate::registry::{Claim, Registry};
use log::LevelFilter;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};

/// Longest report that the parent reads, bytes.
const MAX_REPORT_BYTES: u64 = 1 << 20;

/// The one line that the VM's process sends to its parent.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Report {
    /// vCPUs run and the VM can be controlled.
    Running,
    /// It came to nothing.
    Failed {
        /// Exit code for it.
        code: u8,
        /// All that a person is told.
        report: String,
    },
}

/// A VM that was left behind.
#[derive(Serialize)]
struct Detached {
    name: String,
    pid: i32,
    log: PathBuf,
    /// The console's socket, where the serial port is one.
    console: Option<PathBuf>,
}

/// Starts a VM's process, which holds `claim` then, and returns when its guest runs. In that process, returns when the VM has ended.
pub fn start(registry: &Registry, claim: Claim, orders: Orders, verbose: u8, output: Output) -> Result<(), Error> {
    let name = orders.config().name.clone();
    let console = match &orders.config().serial {
        SerialConfig::Socket(path) => Some(path.clone()),
        SerialConfig::Stdio | SerialConfig::Null | SerialConfig::File(_) => None,
    };
    let log = registry.log(&name);
    let stderr = OpenOptions::new().create(true).append(true).mode(0o600).open(&log);
    let stderr = stderr.map_err(|source| Error::File { attempt: "open the log", path: log.clone(), source })?;
    let failed = |source| Error::Process { attempt: "start the process of the VM", source };
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
    let Some(pid) = fork().map_err(failed)? else {
        drop(reader);
        return serve(claim, orders, &Parent::new(writer.into()), &stderr, verbose);
    };
    drop(writer);
    claim.leave();
    match listen(reader.into()).map_err(failed)? {
        Some(Report::Running) => {}
        Some(Report::Failed { code, report }) => {
            wait(pid).map_err(failed)?;
            return Err(Error::Detached { code, report });
        }
        None => {
            let status = wait(pid).map_err(failed)?;
            return Err(Error::DetachedDied { name, status, log });
        }
    }
    let pid = pid.as_raw_nonzero().get();
    output.result(&Detached { name, pid, log, console }, |vm| {
        let mut text = format!("{} runs in process {}, log in {}\n", vm.name, vm.pid, vm.log.display());
        if vm.console.is_some() {
            text += &format!("its console: sterna console {}\n", vm.name);
        }
        text
    })
}

/// Waits for the report; `None` if the process ends without one.
fn listen(reader: File) -> io::Result<Option<Report>> {
    let mut line = String::new();
    BufReader::new(reader.take(MAX_REPORT_BYTES)).read_line(&mut line)?;
    if line.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&line)?)) }
}

/// How the process ended.
fn wait(pid: Pid) -> io::Result<ExitStatus> {
    let ended = rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()))?;
    Ok(ExitStatus::from_raw(ended.map_or(0, |(_, status)| status.as_raw())))
}

/// Is the VM's process.
fn serve(claim: Claim, orders: Orders, parent: &Parent, stderr: &File, verbose: u8) -> Result<(), Error> {
    let result = obey(claim, orders, parent.clone(), stderr, verbose);
    if let Err(error) = &result {
        parent.tell(&Report::Failed { code: error.exit_code(), report: error.report() });
    }
    result
}

fn obey(claim: Claim, orders: Orders, parent: Parent, stderr: &File, verbose: u8) -> Result<(), Error> {
    leave_terminal(stderr).map_err(|source| Error::Process { attempt: "leave the terminal", source })?;
    crate::log::start(LevelFilter::Info, verbose);
    claim.adopt()?;
    execute(claim, orders, move || {
        parent.tell(&Report::Running);
        Ok(())
    })
}

/// A session without a terminal, and standard streams that lead to none.
fn leave_terminal(stderr: &File) -> io::Result<()> {
    // Fails only for the leader of a process group, which a child is not, and which needs no new one.
    if let Err(errno) = rustix::process::setsid() {
        log::debug!("no new session: {errno}");
    }
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(stderr)?)
}

/// The way to the parent, for one report.
#[derive(Clone)]
struct Parent(Arc<Mutex<Option<File>>>);

impl Parent {
    fn new(writer: File) -> Self {
        Self(Arc::new(Mutex::new(Some(writer))))
    }

    /// Tells it, unless it was told. A parent that has gone was told to go; the VM stays.
    fn tell(&self, report: &Report) {
        let Some(mut writer) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let line = serde_json::to_string(report).map_err(io::Error::from);
        if let Err(error) = line.and_then(|line| writer.write_all((line + "\n").as_bytes())) {
            log::warn!("the parent is not told: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(said: impl FnOnce(&Parent)) -> Option<Report> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let parent = Parent::new(writer.into());
        said(&parent);
        drop(parent);
        listen(reader.into()).unwrap()
    }

    #[test]
    fn the_parent_hears_once_what_became_of_the_vm() {
        let failed = || Report::Failed { code: 3, report: "error: no\n  next: this".into() };
        assert_eq!(conversation(|parent| parent.tell(&failed())), Some(failed()));
        let twice = |parent: &Parent| {
            parent.tell(&Report::Running);
            parent.tell(&failed());
        };
        assert_eq!(conversation(twice), Some(Report::Running));
        assert_eq!(conversation(|_| ()), None);
    }

    #[test]
    #[expect(clippy::zombie_processes, reason = "what is tested waits")]
    fn a_child_that_ends_without_a_word_is_waited_for() {
        let child = std::process::Command::new("sh").args(["-c", "exit 5"]).spawn().unwrap();
        assert_eq!(wait(Pid::from_child(&child)).unwrap().code(), Some(5));
    }

    #[test]
    fn a_process_with_threads_does_not_fork() {
        let (leave, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        assert_eq!(fork().unwrap_err().raw_os_error(), Some(libc::EBUSY));
        drop(leave);
        let _gone = thread.join();
    }
}
