//! The far end of the serial port: a file, a socket, nothing.

use crate::vm::{Host, LONG, wait};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{InputModes, LocalModes, OutputModes, Termios, tcgetattr};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};

/// Reads lines until one contains `part`.
pub fn read_until(reader: &mut BufReader<UnixStream>, part: &str) -> String {
    let mut said = String::new();
    loop {
        let before = said.len();
        assert!(reader.read_line(&mut said).unwrap() > 0, "the console closed without {part:?}: {said:?}");
        if said[before..].contains(part) {
            return said;
        }
    }
}

/// A file keeps what is in it, and each run of the guest is appended.
pub fn a_file_is_appended() {
    let host = Host::new();
    let log = host.path("console.log");
    fs::write(&log, "kept\n").unwrap();
    for _ in 0..2 {
        let (code, said) = host.run("off", &["--serial", &format!("file={log}")]).wait_exit();
        assert_eq!(code, Some(0), "{said}");
        assert!(!said.contains("Sterna-guest"), "also on standard output: {said}");
    }
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<_> = text.lines().map(|line| line.split(" ram_kib").next().unwrap_or(line)).collect();
    assert_eq!(lines, ["kept", "Sterna-guest ready", "Sterna-guest ready"]);
}

/// Who joins late sees what was said before; one at a time; what is typed reaches the guest; the end closes the socket
/// and removes it.
pub fn a_socket_has_one_client_at_a_time() {
    let host = Host::new();
    let socket = format!("socket={}", host.path("serial"));
    let vm = host.run("tick=50", &["--serial", &socket]);
    let mut first = BufReader::new(host.connect("serial"));
    read_until(&mut first, "tick 2 ");
    let mut second = BufReader::new(host.connect("serial"));
    let mut refused = String::new();
    second.read_to_string(&mut refused).unwrap();
    assert_eq!(refused, "The console is in use by another client.\r\n");
    read_until(&mut first, "tick ");
    drop(first);
    // The place is free once the VM has seen the first client leave.
    let mut third = loop {
        let mut third = BufReader::new(host.connect("serial"));
        let mut line = String::new();
        third.read_line(&mut line).unwrap();
        if !line.contains("in use") {
            assert!(line.contains("Sterna-guest ready"), "what was said before comes first: {line:?}");
            break third;
        }
    };
    read_until(&mut third, "tick 1 ");
    third.get_mut().write_all(b"q").unwrap();
    let mut rest = String::new();
    third.read_to_string(&mut rest).unwrap();
    let (code, said) = vm.wait_exit();
    assert_eq!(code, Some(0), "{said}");
    assert!(!fs::exists(host.path("serial")).unwrap(), "the socket is still there");
}

/// The socket goes with the VM, however short its life was.
pub fn a_guest_that_ends_at_once_leaves_no_socket() {
    let host = Host::new();
    for _ in 0..5 {
        let (code, said) = host.run("off", &["--serial", &format!("socket={}", host.path("serial"))]).wait_exit();
        assert_eq!(code, Some(0), "{said}");
        assert!(!fs::exists(host.path("serial")).unwrap(), "the socket is still there");
    }
}

/// `sterna console` joins the socket of a VM by its name, and a reset of the guest does not end the visit.
pub fn the_console_command_outlives_a_reset() {
    let host = Host::new();
    let kernel = sterna_guest::GUEST_ELF;
    host.ok(&[
        "run",
        "--detach",
        "--name",
        "far",
        "--kernel",
        kernel,
        "--cmdline",
        "tick=50",
        "--memory",
        "64M",
        "--cpus",
        "1",
    ]);
    let mut console = crate::vm::Vm::start(host.command(&["console", "far"]), "console");
    console.wait_for("Sterna-guest ready");
    console.type_in("r");
    console.wait_for("Sterna-guest ready");
    console.wait_for("tick 1 ");
    console.power_off();
    assert!(!host.ok(&["list"]).contains("far"));
}

/// Nobody listens, and the guest runs.
pub fn null_takes_everything() {
    let host = Host::new();
    let (code, said) = host.run("touch=8 off", &["--serial", "null"]).wait_exit();
    assert_eq!((code, said.as_str()), (Some(0), ""));
}

/// A terminal as a person has it: the key that stops asks the guest first and ends one that does not listen second, and what the
/// terminal was before it is again, however the VM ends.
pub fn a_terminal_stops_the_vm_and_is_as_before() {
    /// What is typed, and what is said before the next.
    type Keys = &'static [(&'static str, &'static str)];
    // (what the guest does, the keys, the exit code)
    let ends: [(&str, Keys, i32); 4] = [
        ("tick=50 button", &[("\x1dq", "pressed the guest's power button")], 0),
        ("tick=50", &[("\x1dq", "pressed the guest's power button"), ("\x1dq", "ending the guest")], 0),
        ("tick=50", &[("\x1dh", "Ctrl-] q"), ("q", "")], 0),
        ("tick=50", &[("p", "")], 8),
    ];
    for (guest, keys, code) in ends {
        let host = Host::new();
        let mut visit = Visit::run(&host, guest);
        for (key, answer) in keys {
            visit.terminal.write_all(key.as_bytes()).unwrap();
            visit.hear(answer);
        }
        assert_eq!(visit.ends().code(), Some(code), "{guest}: {}", visit.said);
    }
}

/// The signals that end a process at once do so, and those that ask it to stop do that; the terminal is as before in any case, of
/// the VM as of the one who looks at its console.
pub fn a_terminal_is_as_before_whatever_signal_ends_the_process() {
    for signal in [Signal::QUIT, Signal::ABORT, Signal::SEGV, Signal::BUS, Signal::HUP, Signal::TERM, Signal::INT] {
        let host = Host::new();
        let mut run = Visit::run(&host, "tick=50 button");
        kill_process(Pid::from_child(&run.child), signal).unwrap();
        let is_asked = matches!(signal, Signal::HUP | Signal::TERM | Signal::INT);
        let status = run.ends();
        let expected = if is_asked { (Some(0), None) } else { (None, Some(signal.as_raw())) };
        assert_eq!((status.code(), status.signal()), expected, "{signal:?}: {}", run.said);

        let kernel = sterna_guest::GUEST_ELF;
        host.ok(&["run", "--detach", "--name", "far", "--kernel", kernel, "--memory", "64M", "--cmdline", "tick=50"]);
        let mut console = Visit::start(&host, &["console", "far"]);
        kill_process(Pid::from_child(&console.child), signal).unwrap();
        let status = console.ends();
        assert_eq!((status.code(), status.signal()), expected, "console, {signal:?}: {}", console.said);
    }
}

/// A command on a terminal of its own.
struct Visit {
    /// The terminal's other side.
    terminal: File,
    child: Child,
    /// How the terminal was before.
    before: Termios,
    /// What it has shown.
    said: String,
}

impl Visit {
    /// `sterna run`.
    fn run(host: &Host, guest: &str) -> Self {
        let kernel = sterna_guest::GUEST_ELF;
        Self::start(host, &["run", "--name", "vm", "--kernel", kernel, "--memory", "64M", "--cmdline", guest])
    }

    /// `words`, up to where its guest ticks and the terminal is raw.
    fn start(host: &Host, words: &[&str]) -> Self {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let path = ptsname(&terminal, Vec::new()).unwrap().into_string().unwrap();
        let side = || File::options().read(true).write(true).open(&path).unwrap();
        let before = tcgetattr(side()).unwrap();
        let child = host.command(words).stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        let mut visit = Self { terminal: File::from(terminal), child, before, said: String::new() };
        visit.hear("tick ");
        assert_ne!(visit.modes(), modes(&visit.before), "not raw: {}", visit.said);
        visit
    }

    /// Reads what the terminal shows until it has shown `part` anew.
    fn hear(&mut self, part: &str) {
        let from = self.said.len();
        while !self.said[from..].contains(part) {
            let mut bytes = [0; 512];
            // An error once nobody has the other side any more.
            let length = self.terminal.read(&mut bytes).unwrap_or(0);
            assert!(length > 0, "the terminal closed without {part:?}: {:?}", self.said);
            self.said.push_str(&String::from_utf8_lossy(&bytes[..length]));
        }
    }

    fn modes(&self) -> (LocalModes, InputModes, OutputModes) {
        modes(&tcgetattr(&self.terminal).unwrap())
    }

    /// Waits for the process to end, and finds the terminal as it was.
    fn ends(&mut self) -> ExitStatus {
        let status = wait(&mut self.child, LONG, "a command on a terminal");
        assert_eq!(self.modes(), modes(&self.before), "{status}: {}", self.said);
        status
    }
}

fn modes(terminal: &Termios) -> (LocalModes, InputModes, OutputModes) {
    (terminal.local_modes, terminal.input_modes, terminal.output_modes)
}
