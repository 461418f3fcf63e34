//! Two hosts on this machine, as their operator sees them: a directory each, and what a move needs at either end.

use crate::vm::{Host, LONG, Vm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use std::fmt::Debug;
use std::thread;
use std::time::{Duration, Instant};

/// Any free port.
pub const ANY_PORT: &str = "tcp:127.0.0.1:0";
/// The VM of most tests.
pub const NAME: &str = "vm";
/// Between two looks at something that tells no event.
pub const LOOK: Duration = Duration::from_millis(10);

/// Looks until `look` gives what is `expected`.
pub fn await_equal<T: PartialEq + Debug>(what: &str, expected: &T, mut look: impl FnMut() -> T) {
    let deadline = Instant::now() + LONG;
    loop {
        let found = look();
        if found == *expected {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {found:?} and not {expected:?} after {LONG:?}");
        thread::sleep(LOOK);
    }
}

/// Fails unless `said` has every one of `parts`.
pub fn assert_says(said: &str, parts: &[&str]) {
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

/// Ends a process without a word, and waits until all that it held is free.
pub fn kill(pid: Pid) {
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    let limit = Timespec { tv_sec: LONG.as_secs().try_into().unwrap(), tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ended, 1, "process {pid} did not end within {LONG:?}");
}

impl Host {
    /// Starts a detached VM with the test guest, whose serial port is at its own place.
    pub fn boot(&self, cmdline: &str, more: &[&str]) {
        let mut words = vec!["run", "--detach", "--name", NAME, "--kernel", sterna_guest::GUEST_ELF];
        words.extend(["--cmdline", cmdline]);
        for (flag, value) in [("--memory", "64M"), ("--cpus", "1")] {
            if !more.contains(&flag) {
                words.extend([flag, value]);
            }
        }
        words.extend(more);
        self.ok(&words);
    }

    /// The serial port of the VM `name`, to read and to type into.
    pub fn console(&self, name: &str) -> Vm {
        Vm::start(self.command(&["console", name]), "console")
    }

    /// Runs a command that must succeed, and returns its JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?}: {error} in {text}"))
    }

    /// The line of `name` in the list, `Null` where it is not there.
    pub fn listed(&self, name: &str) -> Value {
        let list = self.json(&["list"]);
        list.as_array().unwrap().iter().find(|vm| vm["name"] == name).cloned().unwrap_or_default()
    }

    /// State of the VM `name`, if it is here.
    pub fn state(&self, name: &str) -> Option<String> {
        self.listed(name)["state"].as_str().map(str::to_owned)
    }

    /// Process of the VM `name`.
    pub fn pid(&self, name: &str) -> Pid {
        let listed = self.listed(name);
        let pid = listed["pid"].as_i64().unwrap_or_else(|| panic!("{name} has no process: {listed}"));
        Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }

    /// Ends the process of the VM `name` without a word, and waits until all that it held is free.
    pub fn kill(&self, name: &str) {
        kill(self.pid(name));
    }

    /// How the move of the VM stands.
    pub fn migration(&self) -> Value {
        self.json(&["migration", "status", NAME])
    }

    /// Waits until the move of the VM is in `phase`.
    pub fn await_phase(&self, phase: &str) {
        await_equal("phase", &Some(phase.to_owned()), || self.migration()["phase"].as_str().map(str::to_owned));
    }
}

/// A `sterna receive`. Killed when dropped; the VMs that came by it run on.
pub struct Receiver {
    /// The command.
    pub process: Vm,
    /// Where it listens.
    pub address: String,
}

impl Receiver {
    /// Listens on `listen`; `more` are further arguments.
    pub fn start(host: &Host, listen: &str, more: &[&str]) -> Self {
        let words = [&["receive", "--listen", listen], more].concat();
        let mut process = Vm::start(host.command(&words), "receiver");
        let line = process.wait_for("listening");
        let address = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line}")).to_owned();
        Self { process, address }
    }
}

/// Two hosts, and a receiver on each.
pub struct Pair {
    /// Where the VM boots, and where it goes.
    pub hosts: [Host; 2],
    /// A receiver on each.
    pub receivers: [Receiver; 2],
}

impl Pair {
    /// Two hosts with no VM.
    pub fn new() -> Self {
        Self::of([Host::new(), Host::new()])
    }

    /// `hosts` with their receivers.
    pub fn of(hosts: [Host; 2]) -> Self {
        let receivers = [0, 1].map(|index| Receiver::start(&hosts[index], ANY_PORT, &[]));
        Self { hosts, receivers }
    }

    /// The host where the VM boots.
    pub fn a(&self) -> &Host {
        &self.hosts[0]
    }

    /// The other.
    pub fn b(&self) -> &Host {
        &self.hosts[1]
    }

    /// Where the receiver on B listens.
    pub fn to_b(&self) -> &str {
        &self.receivers[1].address
    }

    /// Moves the VM from A to B, which must succeed; the last status.
    pub fn go(&self, more: &[&str]) -> Value {
        self.leave(0, more)
    }

    /// Moves the VM from the host of index `from` to the other.
    pub fn leave(&self, from: usize, more: &[&str]) -> Value {
        let to = &self.receivers[1 - from].address;
        let status = moved(&self.hosts[from], to, more);
        assert_eq!(self.states(), from_index(1 - from, status["phase"].as_str()), "after {more:?}");
        assert_eq!(self.hosts[from].left_behind(), [""; 0], "left by the VM that has gone");
        status
    }

    /// The VM's state on A and on B.
    pub fn states(&self) -> [Option<String>; 2] {
        [0, 1].map(|index| self.hosts[index].state(NAME))
    }

    /// Waits until the VM has these states on A and B.
    pub fn await_states(&self, a: Option<&str>, b: Option<&str>) {
        await_equal("the VM on A and B", &[a, b].map(|state| state.map(str::to_owned)), || self.states());
    }
}

fn from_index(index: usize, phase: Option<&str>) -> [Option<String>; 2] {
    assert_eq!(phase, Some("done"));
    let mut states = [None, None];
    states[index] = Some("running".to_owned());
    states
}

/// Runs `sterna migrate --json` to its good end and holds every line against the rules; the last status.
pub fn moved(host: &Host, to: &str, more: &[&str]) -> Value {
    let text = host.ok(&[&["migrate", NAME, to, "--json"], more].concat());
    let (mut percent, mut last) = (0, Value::Null);
    for line in text.lines() {
        let status: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        let now = status["percent"].as_u64().unwrap();
        assert!((percent..=100).contains(&now), "the percentage goes from {percent} to {now}:\n{text}");
        (percent, last) = (now, status);
    }
    assert_eq!((percent, &last["phase"]), (100, &Value::from("done")), "{text}");
    assert_eq!(last["guest"], "The guest has started at the target; the copy here is destroyed.");
    last
}

/// Has the guest check every page of its memory, which goes on working then. Once for a console.
pub fn verify(console: &mut Vm, pages: u64) {
    console.type_in("v");
    let line = console.wait_for("pages=");
    assert!(line.contains(&format!("verified pages={pages} ")), "{line}");
}

/// The next tick of the guest: its number, and microseconds on the guest's clock.
pub fn tick(console: &mut Vm) -> (u64, u64) {
    let line = console.wait_for("tick ");
    let mut words = line.split(' ').skip(1);
    let mut number = |end: &str| words.next().and_then(|word| word.trim_end_matches(end).parse().ok());
    match (number(""), number("us")) {
        (Some(number), Some(us)) => (number, us),
        _ => panic!("no tick: {line:?}"),
    }
}
