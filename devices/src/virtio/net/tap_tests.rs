//! Real taps, each test in a network namespace of its own that ends with it.
//!
//! A test starts itself again under `unshare --net`; where that is not allowed it fails and says so, since a tap that
//! was never opened proves nothing.

use super::*;
use crate::virtio::testing::Driver;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use std::process::Command;
use std::time::{Duration, Instant};

const INSIDE: &str = "STERNA_TEST_NAMESPACE";

/// Runs `body` in a fresh network namespace; `name` is the calling test's.
fn in_namespace(name: &str, body: impl FnOnce()) {
    if std::env::var(INSIDE).is_ok_and(|inside| inside == name) {
        return body();
    }
    let path = format!("virtio::net::tap_tests::{name}");
    let output = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &path, "--nocapture"])
        .env(INSIDE, name)
        .output()
        .expect("unshare (util-linux) is needed to test real taps");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "in a network namespace (needs root): {said}");
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("ip (iproute2) is needed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn message(result: Result<Tap, TapError>) -> String {
    result.expect_err("should be refused").to_string()
}

#[test]
fn names_that_no_interface_can_have_are_refused() {
    for name in ["", "sixteen-bytes-xx", "a/b", "a b", "tap%d", ".", "..", "a:1", "tap\n", "täp"] {
        assert!(matches!(Tap::open(name, true), Err(TapError::Name { .. })), "{name:?}");
    }
}

#[test]
fn a_missing_tap_is_named_with_its_remedy() {
    in_namespace("a_missing_tap_is_named_with_its_remedy", || {
        let said = "tap interface tern0 does not exist; to make it: \
                    ip tuntap add dev tern0 mode tap && ip link set dev tern0 up";
        assert_eq!(message(Tap::open("tern0", false)), said);
        assert!(!ip("link show").contains("tern0"), "asking must not create it");
    });
}

#[test]
fn a_created_tap_is_up_and_goes_with_its_last_handle() {
    in_namespace("a_created_tap_is_up_and_goes_with_its_last_handle", || {
        let tap = Tap::open("tern0", true).unwrap();
        assert_eq!((tap.name(), tap.mtu()), ("tern0", 1500));
        let second = tap.try_clone().unwrap();
        drop(tap);
        let shown = ip("-d link show dev tern0");
        assert!(shown.contains(",UP") && shown.contains("vnet_hdr on"), "{shown}");
        drop(second);
        assert!(!ip("link show").contains("tern0"));
    });
}

#[test]
fn an_existing_tap_is_attached_as_it_is_and_stays() {
    in_namespace("an_existing_tap_is_attached_as_it_is_and_stays", || {
        ip("tuntap add dev tern0 mode tap");
        ip("link set dev tern0 mtu 9000");
        for create in [false, true] {
            let tap = Tap::open("tern0", create).unwrap();
            assert_eq!(tap.mtu(), 9000);
            assert!(!ip("link show dev tern0").contains(",UP"), "its state is its owner's business");
        }
        ip("link show dev tern0");
    });
}

#[test]
fn a_busy_tap_says_who_holds_it() {
    in_namespace("a_busy_tap_says_who_holds_it", || {
        let _held = Tap::open("tern0", true).unwrap();
        let command = std::fs::read_to_string("/proc/self/comm").unwrap();
        let holder = format!("process {} ({})", std::process::id(), command.trim());
        for create in [false, true] {
            assert_eq!(message(Tap::open("tern0", create)), format!("tap interface tern0 is busy: held by {holder}"));
        }
    });
}

#[test]
fn what_is_not_a_tap_is_named() {
    in_namespace("what_is_not_a_tap_is_named", || {
        ip("tuntap add dev routed0 mode tun");
        for name in ["lo", "routed0"] {
            let said = format!(
                "interface {name} exists but is not a single-queue tap interface; \
                 `ip -d link show dev {name}` tells what it is"
            );
            assert_eq!(message(Tap::open(name, true)), said);
        }
    });
}

#[test]
fn one_without_rights_is_told_what_to_do() {
    in_namespace("one_without_rights_is_told_what_to_do", || {
        // Of the caller's rights only CAP_NET_ADMIN matters to tun; this thread gives it up.
        rustix::thread::set_capabilities(
            None,
            rustix::thread::CapabilitySets {
                effective: rustix::thread::CapabilitySet::empty(),
                permitted: rustix::thread::CapabilitySet::empty(),
                inheritable: rustix::thread::CapabilitySet::empty(),
            },
        )
        .unwrap();
        let said = message(Tap::open("tern0", true));
        assert!(
            said.starts_with("not allowed to use tap interface tern0: run as root, or have root make it"),
            "{said}"
        );
    });
}

const HOST: [u8; 4] = [10, 99, 0, 1];
const GUEST: [u8; 4] = [10, 99, 0, 2];
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// An ARP request for the host's address, behind an empty header.
fn arp_request() -> Vec<u8> {
    let ethernet = [&[0xff; 6], &MAC[..], &[8, 6]].concat();
    let arp = [&[0, 1, 8, 0, 6, 4, 0, 1], &MAC[..], &GUEST, &[0; 6], &HOST].concat();
    [vec![0; HEADER_BYTES], ethernet, arp].concat()
}

/// Whether the frame is the host's ARP reply to the guest.
fn is_arp_reply(frame: &[u8]) -> bool {
    let Some(arp) = frame.get(HEADER_BYTES + 14..) else { return false };
    frame[HEADER_BYTES..][..6] == MAC && arp.starts_with(&[0, 1, 8, 0, 6, 4, 0, 2]) && arp[14..18] == HOST
}

/// Waits until the tap has something, or panics.
fn wait(net: &Net, deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).unwrap();
    let mut descriptors = [PollFd::new(&net.port, PollFlags::IN)];
    assert_ne!(poll(&mut descriptors, Some(&timeout)).unwrap(), 0, "nothing came from the tap in time");
}

fn device(driver: &mut Driver) -> Net {
    let mut net = Net::new(Tap::open("tern0", true).unwrap(), MAC);
    driver.features = net.features();
    for _ in 0..64 {
        driver.add(RX, &[], &[1536]);
    }
    net.activate(&mut driver.io()).unwrap();
    net
}

#[test]
fn the_host_answers_the_guest_through_a_real_tap() {
    in_namespace("the_host_answers_the_guest_through_a_real_tap", || {
        let mut driver = Driver::new(&[256, 256]);
        let mut net = device(&mut driver);
        ip("addr add 10.99.0.1/24 dev tern0");
        driver.add(TX, &[&arp_request()], &[]);
        net.queue_notified(TX, &mut driver.io()).unwrap();
        assert_eq!(net.counters().sent.get(), Traffic { frames: 1, bytes: 42, dropped: 0 });
        let deadline = Instant::now() + Duration::from_secs(10);
        // The host also says things of its own, such as IPv6 router solicitations.
        loop {
            wait(&net, deadline);
            net.backend_ready(&mut driver.io()).unwrap();
            let frames = std::iter::from_fn(|| driver.used(RX)).map(|used| used.bytes).collect::<Vec<_>>();
            assert!(frames.iter().all(|frame| frame[10..12] == [1, 0]));
            if frames.iter().any(|frame| is_arp_reply(frame)) {
                break;
            }
        }
        // An interface that is down takes nothing, which is a drop and not a fault.
        ip("link set dev tern0 down");
        driver.add(TX, &[&arp_request()], &[]);
        net.queue_notified(TX, &mut driver.io()).unwrap();
        assert_eq!(net.counters().sent.get().dropped, 1);
    });
}

#[test]
fn a_deleted_tap_takes_the_link_down() {
    in_namespace("a_deleted_tap_takes_the_link_down", || {
        let mut driver = Driver::new(&[256, 256]);
        let mut net = device(&mut driver);
        ip("link delete tern0");
        let deadline = Instant::now() + Duration::from_secs(10);
        while net.backend().is_some() {
            wait(&net, deadline);
            net.backend_ready(&mut driver.io()).unwrap();
        }
        assert_eq!(driver.config_interrupts, 1);
        net.quiesce(&mut driver.io()).unwrap();
        net.reset();
        net.activate(&mut driver.io()).unwrap();
        assert!(net.backend().is_none(), "a tap that is gone does not come back");
    });
}

#[test]
fn an_announcement_reaches_the_other_ports_of_the_bridge() {
    in_namespace("an_announcement_reaches_the_other_ports_of_the_bridge", || {
        let mut driver = Driver::new(&[256, 256]);
        let net = device(&mut driver);
        let other = Tap::open("tern1", true).unwrap();
        ip("link add br0 type bridge");
        for port in ["tern0", "tern1"] {
            ip(&format!("link set dev {port} master br0"));
        }
        ip("link set dev br0 up");
        let handle = net.handle();
        let deadline = Instant::now() + Duration::from_secs(10);
        let arrived = || {
            let mut bytes = [0; 2048];
            let length = rustix::io::read(&other, &mut bytes).ok()?;
            Some(bytes[..length].to_vec())
        };
        // A port forwards once the bridge has seen its carrier, which nothing tells; the host has things of its own to say.
        loop {
            assert!(Instant::now() < deadline, "no announcement came through the bridge");
            handle.announce_once().unwrap();
            let mut descriptors = [PollFd::new(&other, PollFlags::IN)];
            poll(&mut descriptors, Some(&Timespec::try_from(Duration::from_millis(50)).unwrap())).unwrap();
            if std::iter::from_fn(arrived).any(|frame| frame[HEADER_BYTES..] == rarp_frame(MAC)) {
                break;
            }
        }
    });
}
