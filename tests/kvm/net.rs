//! Networks, each test in a network namespace of its own, which is gone with the test however that ends.

use crate::vm::{Host, LONG, Vm, finish, wait};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType, recv, socket};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::num::NonZeroU32;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};

/// The guest's address, and the host's on the tap.
const GUEST: &str = "10.0.0.2";
const HOST: &str = "10.0.0.1/24";

/// A network namespace: it lives as long as the process in it, which ends with its standard input.
pub struct Namespace(Child);

impl Namespace {
    /// An empty one. Needs root.
    pub fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--net", "sh", "-c", "echo there; exec cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "there\n", "unshare --net failed: these tests run as root");
        Self(holder)
    }

    /// Calls `listen` with every frame of `protocol` that an interface in it takes in, on a thread of its own, until that says
    /// no or the namespace's last frame has come.
    pub fn frames(&self, protocol: u16, mut listen: impl FnMut(&[u8]) -> bool + Send + 'static) -> JoinHandle<()> {
        let link = File::open(format!("/proc/{}/ns/net", self.0.id())).unwrap();
        let (sender, ready) = channel();
        let thread = thread::spawn(move || {
            move_into_link_name_space(link.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            let number = Protocol::from_raw(NonZeroU32::new(protocol.to_be().into()).unwrap());
            let socket = socket(AddressFamily::PACKET, SocketType::RAW, Some(number)).unwrap();
            set_socket_timeout(&socket, Timeout::Recv, Some(LONG)).unwrap();
            sender.send(()).unwrap();
            let mut frame = [0; 2048];
            while let Ok((_, bytes)) = recv(&socket, &mut frame, RecvFlags::empty()) {
                if !listen(&frame[..bytes]) {
                    return;
                }
            }
        });
        ready.recv().unwrap();
        thread
    }

    /// A host in it.
    pub fn host(&self) -> Host {
        Host::within(&["nsenter", &format!("--net=/proc/{}/ns/net", self.0.id())])
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        wait(&mut self.0, LONG, "the namespace");
    }
}

/// Runs `words` in the host's network, and returns whether that succeeded and what it printed.
pub fn try_shell(host: &Host, words: &str) -> (bool, String) {
    let output = finish(host.program("sh", &["-c", words]), words);
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

/// The same, where it must succeed.
pub fn shell(host: &Host, words: &str) -> String {
    let (success, said) = try_shell(host, words);
    assert!(success, "{words}: {said}");
    said
}

fn interfaces(host: &Host) -> String {
    shell(host, "ip -o link show")
}

fn ping(host: &Host, vm: &mut Vm) {
    let said = shell(host, &format!("busybox ping -c 3 -W 10 {GUEST}"));
    assert!(said.contains("3 packets received"), "{said}");
    vm.wait_for("net ok first echo answered");
}

/// A tap that is made for the VM carries a ping, also after a reset, when another device of the VM has faulted, and after
/// a pause; and it goes with the VM.
pub fn a_created_tap_carries_pings_and_vanishes() {
    let namespace = Namespace::new();
    let host = namespace.host();
    let disk = format!("path={}", host.disk("image", 1 << 20));
    let net = "tap=made0,create=on,mac=02:00:00:00:00:07";
    let mut vm = host.run(&format!("evil-ring=loop net ip={GUEST}"), &["--net", net, "--disk", &disk]);
    let ready = vm.wait_for("net ready");
    assert_eq!(ready, format!("net ready ip={GUEST} mac=[02, 00, 00, 00, 00, 07]"));
    shell(&host, &format!("ip addr add {HOST} dev made0"));
    ping(&host, &mut vm);
    vm.type_in("r");
    vm.wait_for("net ready");
    ping(&host, &mut vm);
    host.ok(&["pause", "vm"]);
    host.ok(&["resume", "vm"]);
    shell(&host, &format!("busybox ping -c 1 -W 10 {GUEST}"));
    vm.power_off();
    assert!(!interfaces(&host).contains("made0"), "{}", interfaces(&host));
}

/// A tap that was there is used as it is, and is there afterwards.
pub fn an_existing_tap_is_used_and_stays() {
    let namespace = Namespace::new();
    let host = namespace.host();
    shell(
        &host,
        &format!("ip tuntap add dev there0 mode tap && ip addr add {HOST} dev there0 && ip link set there0 up"),
    );
    for _ in 0..2 {
        let mut vm = host.run(&format!("net ip={GUEST}"), &["--net", "tap=there0"]);
        vm.wait_for("net ready");
        ping(&host, &mut vm);
        vm.power_off();
        assert!(interfaces(&host).contains("there0"), "{}", interfaces(&host));
    }
}

/// A tap that a VM has is refused to the next, which is told who has it; the first VM's network goes on.
pub fn a_busy_tap_is_refused_by_its_holder() {
    let namespace = Namespace::new();
    let host = namespace.host();
    let mut first = host.run_named("first", &format!("net ip={GUEST}"), &["--net", "tap=busy0,create=on"]);
    first.wait_for("net ready");
    shell(&host, &format!("ip addr add {HOST} dev busy0"));
    let kernel = sterna_guest::GUEST_ELF;
    for net in ["tap=busy0", "tap=busy0,create=on"] {
        let said = host.fails(3, &["run", "--name", "second", "--kernel", kernel, "--net", net]);
        let holder = format!("tap interface busy0 is busy: held by process {} (sterna)", first.pid());
        assert!(said.contains("cannot make net0") && said.contains(&holder), "{said}");
    }
    ping(&host, &mut first);
    first.power_off();
}

/// A tap that is not there is refused with the command that makes it, which does.
pub fn a_missing_tap_is_refused_with_the_command_that_makes_it() {
    let namespace = Namespace::new();
    let host = namespace.host();
    let kernel = sterna_guest::GUEST_ELF;
    let said = host.fails(3, &["run", "--name", "vm", "--kernel", kernel, "--net", "tap=none0"]);
    let (_, rest) =
        said.split_once("tap interface none0 does not exist; to make it: ").unwrap_or_else(|| panic!("{said}"));
    assert!(!interfaces(&host).contains("none0"));
    assert_eq!(host.left_behind(), [""; 0]);
    shell(&host, rest.lines().next().unwrap());
    let mut vm = host.run(&format!("net ip={GUEST}"), &["--net", "tap=none0"]);
    vm.wait_for("net ready");
    shell(&host, &format!("ip addr add {HOST} dev none0"));
    ping(&host, &mut vm);
    vm.power_off();
}

/// An interface that is no tap is refused, and a tap that was made for a VM that then does not start is gone.
pub fn a_start_that_fails_leaves_no_tap() {
    let namespace = Namespace::new();
    let host = namespace.host();
    let kernel = sterna_guest::GUEST_ELF;
    let said = host.fails(3, &["run", "--name", "vm", "--kernel", kernel, "--net", "tap=lo"]);
    assert!(said.contains("interface lo exists but is not a single-queue tap interface"), "{said}");
    let text = host.path("text");
    std::fs::write(&text, "not a kernel\n").unwrap();
    let said = host.fails(3, &["run", "--name", "vm", "--kernel", &text, "--net", "tap=made0,create=on"]);
    assert!(said.contains("the kernel is a text file"), "{said}");
    assert_eq!(interfaces(&host).lines().count(), 1, "only lo: {}", interfaces(&host));
    assert_eq!(host.left_behind(), [""; 0]);
}
