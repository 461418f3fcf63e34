//! An interface that goes from one machine to another: its state, its control queue, and who is told of the move.

use super::*;
use crate::virtio::testing::Driver;
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ANNOUNCE: u64 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
const ACK: [u8; 2] = [3, 0];
const LINK_UP: u8 = 1;
const ANNOUNCING: u8 = 2;

/// Version 1: an address, an MTU of 1500, announcing.
const GOLDEN: [u8; 9] = [2, 0, 0, 0, 0, 1, 0xdc, 0x0b, 1];

/// A port that keeps what is sent and what it is told, in order.
struct Recorder {
    end: OwnedFd,
    mtu: u16,
    told: Arc<Mutex<Vec<Offload>>>,
}

impl AsFd for Recorder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

impl Port for Recorder {
    fn name(&self) -> &str {
        "tern0"
    }
    fn mtu(&self) -> u16 {
        self.mtu
    }
    fn set_offload(&self, offload: Offload) -> io::Result<()> {
        self.told.lock().unwrap().push(offload);
        Ok(())
    }
}

struct Bench {
    net: Net<Recorder>,
    driver: Driver,
    far: OwnedFd,
    told: Arc<Mutex<Vec<Offload>>>,
}

impl Bench {
    /// A device that has never run, on a port with this MTU.
    fn fresh(mtu: u16) -> Self {
        let (end, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        let told = Arc::default();
        let net = Net::new(Recorder { end, mtu, told: Arc::clone(&told) }, MAC);
        Self { net, driver: Driver::new(&[64, 64, 64]), far, told }
    }

    fn new(features: u64) -> Self {
        let mut bench = Self::fresh(1500);
        bench.activate(features);
        bench
    }

    fn activate(&mut self, features: u64) {
        self.driver.features = features;
        self.net.activate(&mut self.driver.io()).unwrap();
    }

    fn moved(&mut self) {
        self.net.moved(&mut self.driver.io()).unwrap();
    }

    fn status(&self) -> u8 {
        let mut status = [0; 2];
        self.net.read_config(6, &mut status);
        assert_eq!(status[1], 0);
        status[0]
    }

    /// The event loop's turn, if the control queue's bell was rung.
    fn heed_bell(&mut self) -> bool {
        let rung = self.driver.doorbells[CONTROL].read().is_ok();
        if rung {
            self.net.queue_notified(CONTROL, &mut self.driver.io()).unwrap();
        }
        rung
    }

    /// Gives one command and returns the answer.
    fn command(&mut self, readable: &[&[u8]], writable: &[u32]) -> Result<Option<u8>, Fault> {
        self.driver.add(CONTROL, readable, writable);
        self.net.queue_notified(CONTROL, &mut self.driver.io())?;
        let used = self.driver.used(CONTROL).expect("every command is answered");
        assert_eq!(used.length, 1);
        Ok(used.bytes.first().copied())
    }

    fn ack(&mut self) {
        assert_eq!(self.command(&[&ACK], &[1]).unwrap(), Some(0));
    }

    /// Everything that left towards the host.
    fn departed(&self) -> Vec<Vec<u8>> {
        let next = || {
            let mut bytes = vec![0; 2048];
            let length = rustix::io::read(&self.far, &mut bytes[..]).ok()?;
            bytes.truncate(length);
            Some(bytes)
        };
        std::iter::from_fn(next).collect()
    }
}

#[test]
fn version_1_is_read_for_ever() {
    let mut bench = Bench::fresh(9000);
    let golden = Saved { version: 1, contents: GOLDEN.to_vec() };
    bench.net.restore(&golden).unwrap();
    assert_eq!(bench.net.save(), golden);
    let mut config = [0; 12];
    bench.net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, LINK_UP | ANNOUNCING, 0, 0, 0, 0xdc, 0x05]);
}

#[test]
fn the_guest_keeps_the_mtu_it_was_told_and_the_new_port_learns_its_offloads() {
    let checksum = 1 << VIRTIO_NET_F_GUEST_CSUM;
    let old = Bench::new(ANNOUNCE | checksum);
    let mut new = Bench::fresh(9000);
    assert_ne!(new.net.save(), old.net.save());
    new.net.restore(&old.net.save()).unwrap();
    assert_eq!(new.net.save(), old.net.save());
    new.activate(ANNOUNCE | checksum);
    assert_eq!(*new.told.lock().unwrap(), [Offload { checksum: true, ..Offload::default() }]);
    let mut mtu = [0; 2];
    new.net.read_config(10, &mut mtu);
    assert_eq!(mtu, 1500u16.to_le_bytes());
    assert!(new.net.backend().is_some(), "it receives");
}

#[test]
fn an_announcement_that_was_not_acknowledged_goes_along() {
    let mut old = Bench::new(ANNOUNCE);
    old.moved();
    let mut new = Bench::fresh(1500);
    new.net.restore(&old.net.save()).unwrap();
    new.activate(ANNOUNCE);
    assert_eq!(new.status(), LINK_UP | ANNOUNCING);
    new.ack();
    assert_eq!((new.status(), old.status()), (LINK_UP, LINK_UP | ANNOUNCING));
    // Nobody asked this driver to know of it.
    let mut without = Bench::fresh(1500);
    without.net.restore(&old.net.save()).unwrap();
    without.activate(0);
    assert_eq!(without.status(), LINK_UP);
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing() {
    let mut bench = Bench::fresh(1500);
    let good = Saved { version: 1, contents: GOLDEN.to_vec() };
    bench.net.restore(&good).unwrap();
    let saved = |mac, mtu| Saved::of(1, &State { mac, mtu, announcing: false });
    for (state, said) in [
        (
            saved([2, 0, 0, 0, 0, 2], 1500),
            "it is of the interface 02:00:00:00:00:02, and this one is 02:00:00:00:00:01",
        ),
        (saved(MAC, 9000), "the guest was told an MTU of 9000, and interface tern0 takes 68 to 1500"),
        (saved(MAC, 67), "the guest was told an MTU of 67, and interface tern0 takes 68 to 1500"),
        (Saved { version: 2, ..good.clone() }, "it has version 2, and this program reads up to 1"),
        (Saved { version: 1, contents: [&GOLDEN[..], &[0]].concat() }, "1 bytes follow it"),
        (Saved { version: 1, contents: GOLDEN[..8].to_vec() }, "its bytes are damaged"),
        (Saved::nothing(), "its bytes are damaged"),
    ] {
        assert_eq!(bench.net.restore(&state).unwrap_err().to_string(), said);
        assert_eq!(bench.net.save(), good);
    }
}

#[test]
fn a_guest_announces_itself_and_says_so() {
    let mut bench = Bench::new(ANNOUNCE);
    assert_eq!((bench.status(), bench.driver.config_interrupts), (LINK_UP, 0));
    bench.moved();
    assert_eq!((bench.status(), bench.driver.config_interrupts), (LINK_UP | ANNOUNCING, 1));
    bench.ack();
    assert_eq!((bench.status(), bench.driver.config_interrupts), (LINK_UP, 1));
    assert_eq!(bench.driver.interrupts, [0, 0, 1]);
    // A second move is a second announcement; a driver that starts anew owes none.
    bench.moved();
    assert_eq!((bench.status(), bench.driver.config_interrupts), (LINK_UP | ANNOUNCING, 2));
    bench.net.reset();
    assert_eq!(bench.status(), LINK_UP);
}

#[test]
fn a_driver_that_does_not_know_announcements_only_looks_at_its_link() {
    let mut bench = Bench::new(1 << VIRTIO_NET_F_CTRL_VQ);
    bench.moved();
    assert_eq!((bench.status(), bench.driver.config_interrupts), (LINK_UP, 1));
    assert_eq!(bench.command(&[&ACK], &[1]).unwrap(), Some(1), "the command was not offered");
}

#[test]
fn the_host_announces_and_reminds_until_the_guest_has_answered() {
    let mut bench = Bench::new(ANNOUNCE);
    let handle = bench.net.handle();
    let frame = [&[0; HEADER_BYTES][..], &rarp_frame(MAC)].concat();
    handle.announce_once().unwrap();
    assert!(bench.heed_bell());
    assert_eq!((bench.departed(), bench.driver.config_interrupts), (vec![frame.clone()], 0), "no move, no reminder");
    bench.moved();
    for interrupts in [2, 3] {
        handle.announce_once().unwrap();
        assert!(bench.heed_bell());
        assert_eq!(bench.driver.config_interrupts, interrupts);
    }
    bench.ack();
    handle.clone().announce_once().unwrap();
    assert!(bench.heed_bell());
    assert_eq!((bench.status(), bench.driver.config_interrupts), (LINK_UP, 3));
    assert_eq!(bench.departed(), vec![frame; 3]);
    assert_eq!(bench.net.counters().sent.get(), Traffic::default(), "the guest sent none of them");
}

#[test]
fn the_host_announces_without_a_driver_and_says_when_it_cannot() {
    let mut bench = Bench::fresh(1500);
    let handle = bench.net.handle();
    handle.announce_once().unwrap();
    assert_eq!((bench.departed().len(), bench.heed_bell()), (1, false));
    drop(bench.far);
    handle.announce_once().unwrap_err();
}

#[test]
fn a_rarp_frame_is_what_bridges_learn_from() {
    let frame = rarp_frame([2, 3, 4, 5, 6, 7]);
    let expected = [
        &[0xff; 6][..],      // to all
        &[2, 3, 4, 5, 6, 7], // from the guest
        &[0x80, 0x35],       // RARP
        &[0, 1, 8, 0, 6, 4], // Ethernet and IPv4
        &[0, 3],             // request reverse
        &[2, 3, 4, 5, 6, 7], // sender
        &[0; 4],             // whose IP address it does not know
        &[2, 3, 4, 5, 6, 7], // target
        &[0; 4],
        &[0; 18], // up to 60 bytes
    ];
    assert_eq!(frame.to_vec(), expected.concat());
}

#[test]
fn announcements_come_at_once_and_then_ever_later() {
    let delays: Vec<u128> = announce_delays().map(|delay| delay.as_millis()).collect();
    assert_eq!(delays, [0, 50, 150, 250, 350]);
}

#[test]
fn every_other_command_is_answered_with_an_error() {
    let mut bench = Bench::new(ANNOUNCE);
    bench.moved();
    for class in 0..=255u8 {
        for command in [0, 1, 255] {
            if [class, command] != ACK {
                assert_eq!(bench.command(&[&[class, command, 1]], &[1]).unwrap(), Some(1), "{class}.{command}");
            }
        }
    }
    for readable in [&[][..], &[&[][..]], &[&[3]], &[&[3], &[]]] {
        assert_eq!(bench.command(readable, &[1]).unwrap(), Some(1), "half a command is none: {readable:?}");
    }
    assert_eq!(bench.status(), LINK_UP | ANNOUNCING);
    // Cut anywhere, followed by anything, with more room than the answer needs.
    assert_eq!(bench.command(&[&[3], &[0], &[9; 5000]], &[0, 1, 100]).unwrap(), Some(0));
    assert_eq!(bench.status(), LINK_UP);
}

#[test]
fn a_command_without_room_for_its_answer_is_a_fault() {
    for writable in [&[][..], &[0]] {
        let mut bench = Bench::new(ANNOUNCE);
        bench.driver.add(CONTROL, &[&ACK], writable);
        let fault = bench.net.queue_notified(CONTROL, &mut bench.driver.io()).unwrap_err().to_string();
        assert_eq!(fault, "queue 2: a command without room for its answer");
    }
}

#[test]
fn a_reaction_answers_a_bounded_number_of_commands() {
    let mut bench = Bench::new(ANNOUNCE);
    bench.driver = Driver::new(&[64, 64, 1024]);
    bench.driver.features = ANNOUNCE;
    for _ in 0..=BUDGET {
        bench.driver.add(CONTROL, &[&ACK], &[1]);
    }
    bench.net.queue_notified(CONTROL, &mut bench.driver.io()).unwrap();
    assert_eq!(std::iter::from_fn(|| bench.driver.used(CONTROL)).count(), BUDGET);
    assert!(bench.heed_bell());
    assert_eq!(std::iter::from_fn(|| bench.driver.used(CONTROL)).count(), 1);
    assert!(!bench.heed_bell());
}

#[test]
fn commands_wait_for_driver_ok() {
    let mut bench = Bench::fresh(1500);
    bench.driver.add(CONTROL, &[&ACK], &[1]);
    bench.net.queue_notified(CONTROL, &mut bench.driver.io()).unwrap();
    assert!(bench.driver.used(CONTROL).is_none());
}

proptest! {
    #[test]
    fn any_bytes_are_taken_whole_or_not_at_all(
        version in 0u16..3,
        start in prop_oneof![Just(0usize), Just(6), Just(8)],
        rest in prop::collection::vec(any::<u8>(), 0..12),
    ) {
        let mut bench = Bench::fresh(1500);
        let before = bench.net.save();
        let saved = Saved { version, contents: [&GOLDEN[..start], &rest].concat() };
        let taken = bench.net.restore(&saved).is_ok();
        prop_assert!(taken || bench.net.save() == before);
        bench.activate(ANNOUNCE);
        bench.moved();
        bench.ack();
    }

    #[test]
    fn no_control_ring_makes_it_panic_or_spin(
        features: u64,
        descriptors in prop::collection::vec((0u16..8, 0u64..(17 << 20), 0u32..70_000, 0u16..8, 0u16..9), 0..12),
        offers in prop::collection::vec(0u16..9, 0..8),
    ) {
        let mut bench = Bench::new(features);
        bench.moved();
        for (index, address, length, flags, next) in descriptors {
            bench.driver.descriptor(CONTROL, index, address, length, flags, next);
        }
        for head in offers {
            bench.driver.offer(CONTROL, head);
            // Whatever comes of it, it comes to an end.
            let _fault = bench.net.queue_notified(CONTROL, &mut bench.driver.io());
        }
        bench.net.quiesce(&mut bench.driver.io()).unwrap();
        bench.net.reset();
    }
}
