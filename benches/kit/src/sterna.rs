//! Sterna as its user drives it: a host is a directory of control sockets.

use crate::console::Console;
use crate::cpu::{children_cpu_ms, cpu_ms};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;
use tempfile::TempDir;

/// What every VM here is called.
const NAME: &str = "vm";

/// A machine to be measured, the same for each monitor; it has one vCPU.
#[derive(Clone)]
pub struct Guest {
    /// Path of the test guest.
    pub kernel: &'static str,
    /// Of RAM.
    pub memory_mib: u64,
    /// What it does.
    pub cmdline: String,
}

/// A host of Sterna's. What runs on it is ended when it is dropped.
pub struct Host {
    /// Sockets and locks, in memory as `/run` is.
    dir: TempDir,
    /// Records of moves, on a disk as `/var/lib` is.
    _records: TempDir,
    program: PathBuf,
    /// The process of the VM that was booted here.
    booted: Option<Child>,
    receiver: Option<Child>,
}

/// How a move went, as who ordered it saw it.
pub struct MoveOutcome {
    /// When the command was started.
    pub began: Instant,
    /// When it had ended.
    pub ended: Instant,
    /// What it said in between, a JSON object a line.
    pub said: Vec<Value>,
}

impl Host {
    /// With no VM, for the program at `program`.
    pub fn new(program: &str) -> Self {
        let dir = TempDir::with_prefix_in("sterna-bench-", "/dev/shm").unwrap();
        let records = TempDir::with_prefix("sterna-bench-").unwrap();
        std::os::unix::fs::symlink(records.path(), dir.path().join("records")).unwrap();
        Self { dir, _records: records, program: program.into(), booted: None, receiver: None }
    }

    /// The program with `arguments`, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("STERNA_DIR", self.dir.path()).env_remove("STERNA_LOG").stdin(Stdio::null());
        command
    }

    /// Starts the VM with `console` as its serial port.
    pub fn boot(&mut self, guest: &Guest, console: &Console) {
        let (memory, serial) = (format!("{}M", guest.memory_mib), format!("file={}", console.path.display()));
        let mut command = self.command(&["run", "--name", NAME, "--cpus", "1", "--kernel", guest.kernel]);
        command.args(["--memory", &memory, "--cmdline", &guest.cmdline, "--serial", &serial]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        self.booted = Some(command.spawn().unwrap());
    }

    /// CPU time that the VM booted here has used, milliseconds.
    pub fn booted_cpu_ms(&self) -> f64 {
        self.booted.as_ref().map_or(f64::NAN, |child| cpu_ms(child.id()))
    }

    /// The same in all, once its process has ended, which it does by itself.
    pub fn last_cpu_ms(&mut self) -> f64 {
        let before = children_cpu_ms();
        let _reaped = self.booted.take().map(|mut child| child.wait().unwrap());
        children_cpu_ms() - before
    }

    /// The process of the VM that came here.
    pub fn arrived_cpu_ms(&self) -> f64 {
        let output = self.command(&["list", "--json"]).output().unwrap();
        let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
        listed[0]["pid"].as_u64().map_or(f64::NAN, |pid| cpu_ms(u32::try_from(pid).unwrap()))
    }

    /// Starts a receiver, and returns its address.
    pub fn receive(&mut self) -> String {
        let mut command = self.command(&["receive", "--listen", "tcp:127.0.0.1:0", "--json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        self.receiver = Some(child);
        let said: Value = serde_json::from_str(&line).unwrap();
        said["listening"].as_str().unwrap().to_owned()
    }

    /// Moves the VM to `target`, with `more` arguments.
    pub fn migrate(&self, target: &str, more: &[&str]) -> MoveOutcome {
        let mut arguments = vec!["migrate", NAME, target, "--json"];
        arguments.extend(more);
        self.follow(&arguments)
    }

    /// Saves the VM to `file`.
    pub fn save(&self, file: &str) -> MoveOutcome {
        self.follow(&["save", NAME, file, "--overwrite", "--json"])
    }

    fn follow(&self, arguments: &[&str]) -> MoveOutcome {
        let mut command = self.command(arguments);
        let began = Instant::now();
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let said = lines.map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
        let ended = child.wait_with_output().unwrap();
        let outcome = MoveOutcome { began, ended: Instant::now(), said };
        assert!(ended.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ended.stderr));
        outcome
    }

    /// What became of the VM's last move, as its process tells it.
    pub fn status(&self) -> Value {
        let output = self.command(&["migration", "status", NAME, "--json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// Ends the VM, if there is one, and waits until its process is gone.
    pub fn end(&self) {
        let _there_or_not = self.command(&["stop", NAME, "--force"]).output();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end();
        for mut child in self.receiver.take().into_iter().chain(self.booted.take()) {
            let _ended = child.kill();
            let _reaped = child.wait();
        }
    }
}

impl MoveOutcome {
    /// Its last word.
    pub fn result(&self) -> &Value {
        self.said.last().unwrap_or(&Value::Null)
    }

    /// From the command's start to its end, milliseconds.
    pub fn total_ms(&self) -> f64 {
        super::ms(self.ended - self.began)
    }

    /// The standstill that was reported, milliseconds.
    pub fn downtime_ms(&self) -> f64 {
        self.result()["downtime-parts"]["total-us"].as_f64().unwrap_or(f64::NAN) / 1e3
    }

    /// What the first pass carried, MiB a second: the first bandwidth that was told.
    pub fn first_pass_mib_per_s(&self) -> f64 {
        let told = self.said.iter().filter_map(|status| status["ram"]["bandwidth"].as_f64());
        { told }.find(|bandwidth| *bandwidth > 0.0).unwrap_or(f64::NAN) / (1 << 20) as f64
    }
}
