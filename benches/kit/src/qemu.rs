//! QEMU of the distribution, with the machine that is nearest to ours and the same guest, driven over QMP.

use crate::console::Console;
use crate::sterna::Guest;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PROGRAM: &str = "qemu-system-x86_64";
const MACHINE: &str = "microvm,accel=kvm,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off";

/// A process of QEMU's; killed when it is dropped.
pub struct Qemu {
    child: Child,
    qmp: Option<BufReader<UnixStream>>,
    dir: TempDir,
}

impl Qemu {
    /// Starts `guest` with `console` as its serial port, or waits for it to come in from `incoming`.
    pub fn start(guest: &Guest, console: &Console, incoming: Option<&str>) -> Self {
        let dir = TempDir::with_prefix("sterna-bench-").unwrap();
        let serial = format!("file,id=serial,append=on,path={}", console.path.display());
        let qmp = format!("unix:{},server=on,wait=off", dir.path().join("qmp").display());
        let mut command = Command::new(PROGRAM);
        // Set by `-cpu host` and refused by some hosts' KVM.
        command.args([
            "-M",
            MACHINE,
            "-cpu",
            "host,arch-capabilities=off",
            "-smp",
            "1",
            "-nodefaults",
            "-no-user-config",
        ]);
        command.args(["-display", "none", "-no-reboot", "-m", &format!("{}M", guest.memory_mib)]);
        command.args(["-kernel", guest.kernel, "-append", &guest.cmdline]);
        command.args(["-chardev", &serial, "-serial", "chardev:serial", "-qmp", &qmp]);
        command.args(incoming.map(|from| ["-incoming", from]).into_iter().flatten());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { child: command.spawn().unwrap(), qmp: None, dir }
    }

    /// An address that is free now.
    pub fn free_address() -> String {
        format!("tcp:{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
    }

    /// Whether QEMU is here.
    pub fn is_there() -> bool {
        Command::new(PROGRAM).arg("--version").output().is_ok()
    }

    /// One line that says which.
    pub fn version() -> String {
        let output = Command::new(PROGRAM).arg("--version").output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned()
    }

    fn connect(&mut self) -> &mut BufReader<UnixStream> {
        let path = self.dir.path().join("qmp");
        let deadline = Instant::now() + super::LIMIT;
        self.qmp.get_or_insert_with(|| {
            let stream = loop {
                match UnixStream::connect(&path) {
                    Ok(stream) => break stream,
                    Err(error) => assert!(Instant::now() < deadline, "no QMP: {error}"),
                }
                thread::sleep(Duration::from_millis(5));
            };
            stream.set_read_timeout(Some(super::LIMIT)).unwrap();
            let mut qmp = BufReader::new(stream);
            receive(&mut qmp, "QMP");
            send(&mut qmp, "qmp_capabilities", json!({}));
            receive(&mut qmp, "return");
            qmp
        })
    }

    /// CPU time so far, milliseconds.
    pub fn cpu_ms(&self) -> f64 {
        crate::cpu::cpu_ms(self.child.id())
    }

    /// Waits until it answers.
    pub fn wait_ready(&mut self) {
        self.execute("query-status", json!({}));
    }

    /// Does `command`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let qmp = self.connect();
        send(qmp, command, arguments);
        receive(qmp, "return")
    }

    /// Asks for a budget of `downtime_ms`, no limit of bandwidth, and word of each state of a move.
    pub fn prepare_move(&mut self, downtime_ms: u64) {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", events);
        self.execute("migrate-set-parameters", json!({ "max-bandwidth": 0, "downtime-limit": downtime_ms }));
    }

    /// Moves the guest to `uri`; returns when that began and ended, and what QEMU says of it.
    pub fn migrate(&mut self, uri: &str) -> (Instant, Instant, Value) {
        let qmp = self.connect();
        let began = Instant::now();
        send(qmp, "migrate", json!({ "uri": uri }));
        loop {
            match receive(qmp, "event") {
                Value::String(state) if state == "completed" => break,
                Value::String(state) if state == "failed" => panic!("QEMU's migration to {uri} has failed"),
                _ => {}
            }
        }
        let ended = Instant::now();
        (began, ended, self.execute("query-migrate", json!({})))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn send(qmp: &mut BufReader<UnixStream>, command: &str, arguments: Value) {
    let order = json!({ "execute": command, "arguments": arguments });
    qmp.get_mut().write_all(format!("{order}\n").as_bytes()).unwrap();
}

/// The next message that has `key`; of an event, the state that it tells of.
fn receive(qmp: &mut BufReader<UnixStream>, key: &str) -> Value {
    loop {
        let mut line = String::new();
        assert!(qmp.read_line(&mut line).unwrap() > 0, "QEMU has gone");
        let message: Value = serde_json::from_str(&line).unwrap();
        assert!(message.get("error").is_none(), "QEMU: {message}");
        match message.get(key) {
            Some(_) if key == "event" => return message["data"]["status"].clone(),
            Some(value) => return value.clone(),
            None => {}
        }
    }
}
