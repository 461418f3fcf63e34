//! `sterna run --detach`: a process of its own for the VM, in a new session, that reports once.
//!
//! The parent starts this program again with its orders on standard input and reads one line from its standard
//! output. What the VM has to say later goes to its log.

use super::run::{Orders, execute};
use super::{Output, print};
use crate::config::SerialConfig;
use crate::error::Error;
use crate::registry::Registry;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write, stdin};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    pid: u32,
    log: PathBuf,
    /// The console's socket, where the serial port is one.
    console: Option<PathBuf>,
}

/// Starts a VM's process and returns when its guest runs.
pub fn start(registry: &Registry, orders: &Orders, verbose: u8, output: Output) -> Result<(), Error> {
    let name = orders.config().name.clone();
    let log = registry.log(&name);
    let stderr = OpenOptions::new().create(true).append(true).mode(0o600).open(&log);
    let stderr = stderr.map_err(|source| Error::File { attempt: "open the log", path: log.clone(), source })?;
    let failed = |source| Error::Process { attempt: "start the process of the VM", source };
    let mut child = spawn(&name, stderr, verbose).map_err(failed)?;
    let report = converse(&mut child, orders).map_err(failed)?;
    match report {
        Some(Report::Running) => {}
        Some(Report::Failed { code, report }) => {
            child.wait().map_err(failed)?;
            return Err(Error::Detached { code, report });
        }
        None => {
            let status = child.wait().map_err(failed)?;
            return Err(Error::DetachedDied { name, status, log });
        }
    }
    let console = match &orders.config().serial {
        SerialConfig::Socket(path) => Some(path.clone()),
        SerialConfig::Stdio | SerialConfig::Null | SerialConfig::File(_) => None,
    };
    output.result(&Detached { name, pid: child.id(), log, console }, |vm| {
        let mut text = format!("{} runs in process {}, log in {}\n", vm.name, vm.pid, vm.log.display());
        if vm.console.is_some() {
            text += &format!("its console: sterna console {}\n", vm.name);
        }
        text
    })
}

fn spawn(name: &str, stderr: File, verbose: u8) -> io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::iter::repeat_n("-v", verbose.into())).args(["detached", name]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr).spawn()
}

/// Hands over the orders and waits for the report; `None` if the process ends without one.
fn converse(child: &mut Child, orders: &Orders) -> io::Result<Option<Report>> {
    let mut line = String::new();
    if let Some(mut stdin) = child.stdin.take() {
        // At once: the pipe is not buffered, and orders to restore are 3000 tokens.
        match serde_json::to_vec(orders).map_err(io::Error::from).and_then(|orders| stdin.write_all(&orders)) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
            _ => {}
        }
    }
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout.take(MAX_REPORT_BYTES)).read_line(&mut line)?;
    }
    if line.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&line)?)) }
}

/// Is the VM's process.
pub fn serve(registry: &Registry) -> Result<(), Error> {
    let reported = Arc::new(AtomicBool::new(false));
    let result = obey(registry, Arc::clone(&reported));
    if let (Err(error), false) = (&result, reported.load(Ordering::Acquire)) {
        tell_parent(&Report::Failed { code: error.exit_code(), report: error.report() })?;
    }
    result
}

fn obey(registry: &Registry, reported: Arc<AtomicBool>) -> Result<(), Error> {
    let failed = |source| Error::Process { attempt: "take over from the parent", source };
    // Fails only for the leader of a process group, which a child of `start` is not, and which needs no new one.
    if let Err(errno) = rustix::process::setsid() {
        log::debug!("no new session: {errno}");
    }
    let mut text = String::new();
    stdin().read_to_string(&mut text).map_err(failed)?;
    let orders: Orders = serde_json::from_str(&text).map_err(|error| failed(error.into()))?;
    let claim = registry.claim(&orders.config().name)?;
    execute(claim, orders, move || {
        reported.store(true, Ordering::Release);
        // A parent that has gone was told to; the VM stays.
        if let Err(error) = tell_parent(&Report::Running) {
            log::warn!("{error}");
        }
        Ok(())
    })
}

fn tell_parent(report: &Report) -> Result<(), Error> {
    let mut line = serde_json::to_string(report).map_err(|error| Error::Output(error.into()))?;
    line.push('\n');
    print(&line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(script: &str) -> Option<Report> {
        let config = crate::config::Draft::default().build(SerialConfig::Null, &mut Default::default());
        let source = crate::commands::run::Source::Boot(Box::new(config));
        let orders = Orders { source, paused: true, stop_timeout: std::time::Duration::from_secs(1) };
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let report = converse(&mut child, &orders).unwrap();
        child.wait().unwrap();
        report
    }

    #[test]
    fn the_parent_hears_what_became_of_the_vm() {
        assert_eq!(conversation(r#"cat >/dev/null; echo '"running"'; sleep 0"#), Some(Report::Running));
        assert_eq!(
            conversation(r#"echo '{"failed":{"code":3,"report":"error: no"}}'"#),
            Some(Report::Failed { code: 3, report: "error: no".into() })
        );
        assert_eq!(conversation("exit 1"), None);
        assert_eq!(conversation(r#"grep -q '"paused":true' && echo '"running"'"#), Some(Report::Running));
    }
}
