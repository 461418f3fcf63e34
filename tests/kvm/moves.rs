//! A VM goes to another host, live and quick, and everything about it is there.

use crate::host_pair::{ANY_PORT, NAME, Pair, Receiver, assert_says, await_equal, moved, tick, verify};
use crate::net::{Namespace, shell};
use crate::vm::{Host, LONG};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

/// Pages of a MiB.
const PAGES: u64 = 256;
/// What the guest writes and reads again: it is at it for seconds.
const DISK_SECTORS: u64 = 1 << 20;

/// The receiver says where it listens, for people and for programs, also where any port will do.
pub fn the_receiver_says_where_it_listens() {
    let host = Host::new();
    let receiver = Receiver::start(&host, ANY_PORT, &[]);
    let port: u16 = receiver.address.strip_prefix("tcp:127.0.0.1:").unwrap().parse().unwrap();
    assert_ne!(port, 0);
    let mut process = crate::vm::Vm::start(host.command(&["receive", "--json", "--listen", ANY_PORT]), "receiver");
    let said: serde_json::Value = serde_json::from_str(&process.wait_for("{")).unwrap();
    let port = said["listening"].as_str().unwrap().strip_prefix("tcp:127.0.0.1:").unwrap();
    assert_ne!(port.parse::<u16>().unwrap(), 0);
    let said = host.fails(7, &["receive", "--listen", &receiver.address]);
    assert_says(&said, &["error: ", &receiver.address, "Address already in use"]);
}

/// Both ways to move, with 1, 2 and 8 vCPUs: the target's memory is what the source's was, as both monitors and the guest say,
/// and the guest's clock and ticks go on.
pub fn memory_and_clock_go_along() {
    for (mode, cpus, touch) in
        [("live", "1", 16), ("quick", "2", 16), ("live", "2", 100), ("live", "8", 32), ("quick", "8", 32)]
    {
        let pair = Pair::new();
        let cmdline = format!("cpus={cpus} touch={touch} tick=20");
        pair.a().boot(&cmdline, &["--cpus", cpus, "--memory", "256M"]);
        let before = tick(&mut pair.a().console(NAME));
        let status = pair.go(&["--mode", mode, "--verify"]);
        let mut console = pair.b().console(NAME);
        let after = tick(&mut console);
        assert!(after > before, "{mode} with {cpus} vCPUs: ticks went from {before:?} to {after:?}");
        verify(&mut console, touch * PAGES);
        assert_eq!(status["kind"], mode);
        assert!(status["downtime"].as_u64().is_some(), "{status}");
        assert!(status["ram"]["transferred"].as_u64().unwrap() >= touch << 20, "{status}");
    }
}

/// 4 GiB go quick, and every page of them is there.
pub fn four_gib_go_quick() {
    const TOUCHED_MIB: u64 = 4096;
    let pair = Pair::new();
    let cmdline = format!("cpus=2 touch={TOUCHED_MIB} dirty=16 rate=50 pattern=rand tick=20");
    pair.a().boot(&cmdline, &["--cpus", "2", "--memory", "5G"]);
    tick(&mut pair.a().console(NAME));
    let status = pair.go(&["--mode", "quick"]);
    assert!(status["ram"]["transferred"].as_u64().unwrap() >= TOUCHED_MIB << 20, "{status}");
    verify(&mut pair.b().console(NAME), TOUCHED_MIB * PAGES);
}

/// While the guest writes 0, 10 and 100 MiB over and over, over 1, 2, 4 and 8 connections.
pub fn a_guest_that_writes_loses_no_write() {
    for (dirty, connections, mode) in [
        (0, "1", "live"),
        (10, "2", "live"),
        (10, "8", "live"),
        (100, "4", "live"),
        (100, "4", "quick"),
        (10, "1", "quick"),
    ] {
        let pair = Pair::new();
        let cmdline = format!("cpus=2 touch=128 dirty={dirty} rate=200 pattern=rand tick=20");
        pair.a().boot(&cmdline, &["--cpus", "2", "--memory", "256M"]);
        tick(&mut pair.a().console(NAME));
        pair.go(&["--mode", mode, "--connections", connections, "--verify", "--max-downtime", "1s"]);
        let mut console = pair.b().console(NAME);
        verify(&mut console, 128 * PAGES);
        tick(&mut console);
    }
}

/// Receivers on Unix sockets take machines too.
pub fn a_unix_socket_is_a_way() {
    let (a, b) = (Host::new(), Host::new());
    let receiver = Receiver::start(&b, &format!("unix:{}", b.path("move")), &[]);
    a.boot("touch=16 dirty=4 tick=20", &[]);
    tick(&mut a.console(NAME));
    moved(&a, &receiver.address, &["--verify"]);
    verify(&mut b.console(NAME), 16 * PAGES);
    assert_eq!(a.state(NAME), None);
}

/// How often a VM goes there and back; `STERNA_TEST_MOVES` sets another number.
fn rounds(default: u32) -> u32 {
    std::env::var("STERNA_TEST_MOVES").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn there_and_back(moves: u32, more: &[&str]) {
    let pair = Pair::new();
    pair.a().boot("cpus=2 touch=16 dirty=4 rate=50 tick=10", &["--cpus", "2"]);
    let mut last = tick(&mut pair.a().console(NAME));
    for count in 0..moves {
        let from = (count % 2) as usize;
        pair.leave(from, more);
        let now = tick(&mut pair.hosts[1 - from].console(NAME));
        assert!(now > last, "move {count}: ticks went from {last:?} to {now:?}");
        last = now;
    }
    let at = &pair.hosts[(moves % 2) as usize];
    verify(&mut at.console(NAME), 16 * PAGES);
    let epoch = at.migration()["epoch"].as_u64();
    assert_eq!(epoch, Some(moves.into()), "each move raises the epoch");
}

/// Over and over, live: each time at once, by the same receivers.
pub fn a_guest_goes_live_there_and_back() {
    there_and_back(rounds(100), &["--verify", "--max-downtime", "300ms"]);
}

/// Over and over, quick.
pub fn a_guest_goes_quick_there_and_back() {
    there_and_back(rounds(50), &["--mode", "quick", "--connections", "3"]);
}

/// A disk that the guest works on goes along, with its lock; whoever else wants it is refused.
pub fn a_disk_goes_along_with_its_lock() {
    for mode in ["live", "quick"] {
        let pair = Pair::new();
        let image = pair.a().disk("image", DISK_SECTORS * 512);
        let (disk, log) = (format!("path={image}"), pair.a().path("log"));
        let serial = format!("file={log}");
        pair.a().boot(&format!("disk={DISK_SECTORS} irq tick=1000"), &["--disk", &disk, "--serial", &serial]);
        await_equal("the guest", &true, || fs::read_to_string(&log).unwrap().contains("Sterna-guest ready"));
        let mut from = 0;
        for _ in 0..3 {
            pair.leave(from, &["--mode", mode]);
            from = 1 - from;
            let second = ["run", "--name", "second", "--kernel", sterna_guest::GUEST_ELF, "--disk", &disk];
            let said = pair.hosts[1 - from].fails(3, &second);
            assert_says(&said, &[&format!("disk image {image} is locked by ")]);
        }
        let said = fs::read_to_string(&log).unwrap();
        assert!(!said.contains("disk "), "over before the moves: nothing was tested:\n{said}");
        let outcome = format!("disk ok sectors={DISK_SECTORS} ");
        await_equal("the disk's work", &true, || {
            let said = fs::read_to_string(&log).unwrap();
            assert!(!said.contains("FAIL"), "{said}");
            said.contains(&outcome)
        });
        pair.hosts[from].ok(&["stop", NAME, "--force"]);
        // Its lock is gone with it.
        let free =
            ["run", "--name", "second", "--kernel", sterna_guest::GUEST_ELF, "--cmdline", "off", "--disk", &disk];
        pair.hosts[1 - from].ok(&free);
    }
}

/// Serial ports of each kind go along: a file goes on where it was, a socket is there at its path, and `null` stays.
pub fn serial_ports_go_along() {
    let pair = Pair::new();
    let log = pair.a().path("log");
    let ticks = |log: &str| fs::read_to_string(log).unwrap().lines().filter(|line| line.starts_with("tick ")).count();
    pair.a().boot("touch=16 tick=20", &["--serial", &format!("file={log}")]);
    await_equal("ticks", &true, || ticks(&log) > 3);
    pair.go(&[]);
    let before = ticks(&log);
    await_equal("ticks after the move", &true, || ticks(&log) > before + 3);
    let text = fs::read_to_string(&log).unwrap();
    // The last line may be being written.
    let whole = text.rsplit_once('\n').unwrap().0;
    let numbers = whole.lines().filter_map(|line| line.strip_prefix("tick ")?.split(' ').next()?.parse::<u64>().ok());
    let numbers: Vec<_> = numbers.collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "ticks are missing: {numbers:?}");
    // On to a socket, then to nothing.
    pair.leave(1, &["--map", &format!("serial=socket:{}", pair.a().path("serial"))]);
    let mut reader = BufReader::new(pair.a().connect("serial"));
    let mut line = String::new();
    while !line.contains("tick ") {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the socket closed");
    }
    drop(reader);
    pair.leave(0, &["--map", "serial=null"]);
    pair.leave(1, &[]);
    assert_eq!(pair.a().json(&["show", NAME])["config"]["serial"], "null");
}

/// The socket device goes along: its socket is there at the path that it has at the target, and gone at the source.
pub fn a_vsock_goes_along() {
    let pair = Pair::new();
    let (here, there) = (pair.a().path("vsock"), pair.b().path("vsock"));
    pair.a().boot("touch=16 tick=20", &["--vsock", &format!("cid=3,socket={here}")]);
    tick(&mut pair.a().console(NAME));
    pair.go(&["--map", &format!("vsock={there}")]);
    drop(UnixStream::connect(&there).unwrap());
    assert!(!fs::exists(&here).unwrap(), "the source's socket is still there");
    verify(&mut pair.b().console(NAME), 16 * PAGES);
}

/// A network goes along: the guest answers at the target's tap, which the bridge has learnt by the announcement.
pub fn a_network_goes_along_and_is_announced() {
    let namespace = Namespace::new();
    let hosts = [namespace.host(), namespace.host()];
    shell(
        &hosts[0],
        "ip link set lo up; ip link add br0 type bridge; ip addr add 10.0.0.1/24 dev br0; ip link set br0 up",
    );
    for tap in ["tapa", "tapb"] {
        shell(&hosts[0], &format!("ip tuntap add {tap} mode tap; ip link set {tap} master br0; ip link set {tap} up"));
    }
    let pair = Pair::of(hosts);
    pair.a().boot("net ip=10.0.0.2 tick=20", &["--net", "tap=tapa,mac=02:00:00:00:00:07"]);
    tick(&mut pair.a().console(NAME));
    let ping = || shell(pair.a(), "busybox ping -c 2 -W 10 10.0.0.2");
    assert_says(&ping(), &["2 packets received"]);
    for (from, tap, mode) in [(0, "tapb", "live"), (1, "tapa", "quick")] {
        // RARP, as RFC 903 has it: from the guest's address, to all.
        let (sender, announced) = channel();
        let listener = namespace.frames(0x8035, move |frame| {
            let from_guest = frame[..6] == [0xff; 6] && frame[6..12] == [2, 0, 0, 0, 0, 7];
            !(from_guest && sender.send(()).is_ok())
        });
        pair.leave(from, &["--mode", mode, "--map", &format!("net0={tap}")]);
        announced.recv_timeout(LONG).unwrap();
        listener.join().unwrap();
        let learnt = shell(pair.a(), "bridge fdb show br br0 | grep 02:00:00:00:00:07");
        assert_says(&learnt, &[&format!("dev {tap} ")]);
        assert_says(&ping(), &["2 packets received"]);
    }
    let missing = ["migrate", NAME, pair.to_b(), "--map", "net0=none0"];
    for words in [&missing[..], &[&missing[..], &["--check"]].concat()] {
        let output = pair.a().sterna(words);
        assert_eq!(output.status.code(), Some(3));
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_says(&said, &["tap interface none0 does not exist; to make it: ip tuntap add"]);
    }
    assert_says(&ping(), &["2 packets received"]);
}

/// `--once` ends with the first machine: 0 where it has arrived, 1 where it has not.
pub fn a_receiver_may_take_one_machine() {
    let (a, b) = (Host::new(), Host::new());
    a.boot("touch=16 tick=20", &[]);
    tick(&mut a.console(NAME));
    let Receiver { process, address } = Receiver::start(&b, ANY_PORT, &["--once"]);
    a.fails(3, &["migrate", NAME, &address, "--map", "kernel=/nowhere,serial=file:/nowhere/log"]);
    let (code, said) = process.wait_exit();
    assert_eq!(code, Some(1), "{said}");
    assert_says(&said, &["guest: it is at its source, where it was"]);
    let Receiver { process, address } = Receiver::start(&b, ANY_PORT, &["--once"]);
    moved(&a, &address, &[]);
    let (code, said) = process.wait_exit();
    assert_eq!(code, Some(0), "{said}");
    tick(&mut b.console(NAME));
}
