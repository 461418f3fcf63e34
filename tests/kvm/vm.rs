//! A VM under test: `sterna run` as its user runs it, in a directory of its own, with deadlines on every wait.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest wait for anything that a guest or command of a test does.
pub const LONG: Duration = Duration::from_secs(180);

/// Names the binary that is shipped, which `make test` has built; without it these tests run what cargo built for them.
const SHIPPED: &str = "STERNA_UNDER_TEST";

/// The program under test.
pub fn sterna() -> String {
    std::env::var(SHIPPED).unwrap_or_else(|_| env!("CARGO_BIN_EXE_sterna").to_owned())
}

/// Whether the program under test is built as it is shipped.
pub fn is_shipped() -> bool {
    !cfg!(debug_assertions) || std::env::var_os(SHIPPED).is_some()
}

/// A directory of control sockets, on which commands work; removed at the end.
pub struct Host {
    dir: TempDir,
    /// What stands ahead of every command: the program that runs it in a world of its own.
    wrapper: Vec<String>,
}

impl Host {
    /// A host with no VM.
    pub fn new() -> Self {
        Self::within(&[])
    }

    /// The same, with every command run by `wrapper`, which must execute what follows it.
    pub fn within(wrapper: &[&str]) -> Self {
        let wrapper = wrapper.iter().map(|word| (*word).to_owned()).collect();
        Self { dir: TempDir::with_prefix("sterna-test-").unwrap(), wrapper }
    }

    /// A path for a file or socket of the test.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// A file of `bytes` zeros.
    pub fn disk(&self, name: &str, bytes: u64) -> String {
        let path = self.path(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// The command line tool with `arguments`, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.program(&sterna(), arguments)
    }

    /// Any program with `arguments` in this host's world, not started yet.
    pub fn program(&self, program: &str, arguments: &[&str]) -> Command {
        let mut words = self.wrapper.iter().map(String::as_str).chain([program]).chain(arguments.iter().copied());
        let mut command = Command::new(words.next().unwrap());
        command.args(words).env("STERNA_DIR", self.dir.path()).env_remove("STERNA_LOG");
        command
    }

    /// Runs a command to its end.
    pub fn sterna(&self, arguments: &[&str]) -> Output {
        finish(self.command(arguments), &format!("sterna {}", arguments.join(" ")))
    }

    /// Runs a command that must succeed, and returns what it printed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.sterna(arguments);
        assert!(output.status.success(), "sterna {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with `code`, and returns what it said.
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.sterna(arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "sterna {arguments:?} said: {said}");
        said
    }

    /// What a VM that has ended must not leave behind.
    pub fn left_behind(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| [".sock", ".lock", ".console"].iter().any(|end| name.ends_with(end))).collect()
    }

    /// Connects to a socket in the directory of sockets, once it is there.
    pub fn connect(&self, socket: &str) -> UnixStream {
        let deadline = Instant::now() + LONG;
        loop {
            match UnixStream::connect(self.path(socket)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(LONG)).unwrap();
                    return stream;
                }
                Err(error) if Instant::now() > deadline => panic!("no connection to {socket} within {LONG:?}: {error}"),
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Starts a VM called `vm` with the test guest, told `cmdline`, and `more` arguments.
    pub fn run(&self, cmdline: &str, more: &[&str]) -> Vm {
        self.run_named("vm", cmdline, more)
    }

    /// The same with a name.
    pub fn run_named(&self, name: &str, cmdline: &str, more: &[&str]) -> Vm {
        let kernel = sterna_guest::GUEST_ELF;
        let mut arguments = vec!["run", "--name", name, "--kernel", kernel, "--cmdline", cmdline];
        if !more.contains(&"--memory") {
            arguments.extend(["--memory", "64M"]);
        }
        if !more.contains(&"--cpus") {
            arguments.extend(["--cpus", "1"]);
        }
        arguments.extend(more);
        Vm::start(self.command(&arguments), name)
    }
}

impl Drop for Host {
    /// Ends what a failed test left running in the background.
    fn drop(&mut self) {
        let output = self.command(&["list", "--json"]).output().unwrap();
        let listed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        for name in listed.as_array().into_iter().flatten().filter_map(|vm| vm["name"].as_str()) {
            // It may have ended by itself meanwhile.
            let _ended = self.command(&["stop", name, "--force"]).output();
        }
    }
}

/// A running `sterna run`. Killed when dropped.
pub struct Vm {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    /// Everything that was said so far, for messages of failures.
    transcript: String,
}

impl Vm {
    /// Starts what `command` runs, called `name` in messages.
    pub fn start(mut command: Command, name: &str) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (sender, lines) = channel();
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for stream in streams {
            let sender = sender.clone();
            thread::spawn(move || {
                for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                    let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        let stdin = child.stdin.take();
        Self { name: name.to_owned(), child, stdin, lines, transcript: String::new() }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends `keys` to the guest's serial port.
    pub fn type_in(&mut self, keys: &str) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(keys.as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    /// Waits for a line, of guest or monitor, that contains `part`, and returns it.
    pub fn wait_for(&mut self, part: &str) -> String {
        let deadline = Instant::now() + LONG;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.transcript.push_str(&line);
                    self.transcript.push('\n');
                    if line.contains(part) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no {part:?} within {LONG:?}:\n{}", self.transcript),
                Err(RecvTimeoutError::Disconnected) => panic!("ended without {part:?}:\n{}", self.transcript),
            }
        }
    }

    /// Lines said within `time` from now.
    pub fn lines_within(&mut self, time: Duration) -> Vec<String> {
        let deadline = Instant::now() + time;
        let mut lines = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            lines.push(line);
        }
        lines
    }

    /// Waits for the end, and returns the exit code and everything that was said.
    pub fn wait_exit(mut self) -> (Option<i32>, String) {
        let what = format!("VM {}", self.name);
        let status = wait(&mut self.child, LONG, &what);
        while let Ok(line) = self.lines.recv_timeout(Duration::from_secs(5)) {
            self.transcript.push_str(&line);
            self.transcript.push('\n');
        }
        (status.code(), std::mem::take(&mut self.transcript))
    }

    /// Ends the guest by its power-off and expects a clean exit.
    pub fn power_off(mut self) {
        self.type_in("q");
        let (code, said) = self.wait_exit();
        assert_eq!(code, Some(0), "{said}");
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// CPU time that the process has used so far, all threads.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Already gone, or ours to end.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Runs `command`, called `what` in messages, to its end.
pub fn finish(mut command: Command, what: &str) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let errors = thread::spawn(move || read_all(&mut err));
    let output = thread::spawn(move || read_all(&mut out));
    let status = wait(&mut child, LONG, what);
    Output { status, stdout: output.join().unwrap(), stderr: errors.join().unwrap() }
}

fn read_all(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Waits for a process; one that does not end is killed and fails the test.
pub fn wait(child: &mut Child, limit: Duration, what: &str) -> ExitStatus {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{what} did not end within {limit:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}
