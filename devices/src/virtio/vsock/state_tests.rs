//! A socket device that goes from one machine to another, or stays where it was.

use super::guest::{CID, Guest};
use super::*;
use crate::virtio::testing::Driver;
use proptest::prelude::*;
use std::io::{Read, Write};

/// Version 1: cid 3, the next port of the host 2^30 + 2.
const GOLDEN: [u8; 6] = [3, 0x82, 0x80, 0x80, 0x80, 0x04];

/// A device of another host, for the same guest.
fn device(directory: &tempfile::TempDir) -> Vsock {
    let paths = ["new", "newer"].map(|name| directory.path().join(name));
    let path = paths.iter().find(|path| !path.exists()).unwrap();
    Vsock::new(CID as u32, path).unwrap()
}

/// Puts a device with the saved state in the place of the guest's, as a new host's transport would, and returns the old.
fn arrive(guest: &mut Guest) -> Vsock {
    let mut new = device(&guest.directory);
    new.restore(&guest.device.save()).unwrap();
    new.activate(&mut guest.driver.io()).unwrap();
    std::mem::replace(&mut guest.device, new)
}

fn events(driver: &mut Driver) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| driver.used(EVENT)).map(|used| used.bytes).collect()
}

#[test]
fn version_1_is_read_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let mut device = device(&directory);
    let golden = Saved { version: 1, contents: GOLDEN.to_vec() };
    assert_ne!(device.save(), golden);
    device.restore(&golden).unwrap();
    assert_eq!(device.save(), golden);
    assert_eq!((device.guest_cid, device.next_host_port), (CID, FIRST_HOST_PORT + 2));
}

#[test]
fn a_port_of_the_old_host_is_not_used_again() {
    let mut guest = Guest::new();
    let (_first, old) = guest.connect_in(22);
    arrive(&mut guest);
    let mut client = crate::listener::connect_now(&guest.directory.path().join("new")).unwrap();
    client.write_all(b"CONNECT 22\n").unwrap();
    assert_eq!(guest.expect(op::REQUEST).src_port, old.host_port + 1);
}

#[test]
fn the_guest_hears_of_the_move_once() {
    let mut guest = Guest::new();
    guest.driver.add(EVENT, &[], &[2, 2]);
    guest.driver.add(EVENT, &[], &[4]);
    arrive(&mut guest);
    assert_eq!(events(&mut guest.driver), Vec::<Vec<u8>>::new(), "RAM may still be on its way");
    guest.device.moved(&mut guest.driver.io()).unwrap();
    assert_eq!((events(&mut guest.driver), guest.driver.interrupts[EVENT]), (vec![vec![0; 4]], 1));
    for _ in 0..2 {
        guest.device.moved(&mut guest.driver.io()).unwrap();
        guest.device.queue_notified(EVENT, &mut guest.driver.io()).unwrap();
    }
    assert!(events(&mut guest.driver).is_empty(), "one event a move");
}

#[test]
fn the_event_waits_for_a_buffer_across_pauses_and_moves() {
    let mut guest = Guest::new();
    arrive(&mut guest);
    guest.device.moved(&mut guest.driver.io()).unwrap();
    guest.device.queue_notified(EVENT, &mut guest.driver.io()).unwrap();
    guest.device.quiesce(&mut guest.driver.io()).unwrap();
    arrive(&mut guest);
    guest.device.moved(&mut guest.driver.io()).unwrap();
    guest.driver.add(EVENT, &[], &[4]);
    guest.driver.add(EVENT, &[], &[4]);
    guest.device.queue_notified(EVENT, &mut guest.driver.io()).unwrap();
    assert_eq!(events(&mut guest.driver), [[0; 4]]);
}

#[test]
fn connections_of_the_old_host_are_answered_with_resets_and_new_ones_work() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let key = Key { guest_port: 10, host_port: 1 };
    let mut stream = guest.connect_out(&service, key);
    let old = arrive(&mut guest);
    guest.device.moved(&mut guest.driver.io()).unwrap();
    guest.data(key, b"is anybody there?");
    assert_eq!(guest.expect(op::RST).dst_port, 10);
    assert_eq!(guest.connections(), 0);
    drop(old);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the old host's end sees the end");
    let service = std::os::unix::net::UnixListener::bind(guest.directory.path().join("new_1")).unwrap();
    let mut stream = guest.connect_out(&service, key);
    guest.data(key, b"yes");
    let mut said = [0; 3];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"yes");
}

#[test]
fn a_move_that_failed_leaves_connections_alone() {
    let mut guest = Guest::new();
    guest.driver.add(EVENT, &[], &[4]);
    let (mut stream, key) = guest.connect_in(22);
    guest.device.quiesce(&mut guest.driver.io()).unwrap();
    let saved = guest.device.save();
    assert_eq!(guest.device.save(), saved, "saving changes nothing");
    stream.write_all(b"said meanwhile").unwrap();
    guest.device.moved(&mut guest.driver.io()).unwrap();
    assert_eq!(guest.next().1, b"said meanwhile");
    guest.data(key, b"answer");
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    assert!(events(&mut guest.driver).is_empty());
}

#[test]
fn a_driver_that_starts_anew_has_nothing_to_hear() {
    let mut guest = Guest::new();
    guest.driver.add(EVENT, &[], &[4]);
    arrive(&mut guest);
    guest.device.reset();
    guest.device.activate(&mut guest.driver.io()).unwrap();
    guest.device.queue_notified(EVENT, &mut guest.driver.io()).unwrap();
    assert!(events(&mut guest.driver).is_empty());
}

#[test]
fn an_event_buffer_that_is_too_short_is_a_fault() {
    for writable in [&[][..], &[3]] {
        let mut guest = Guest::new();
        guest.driver.add(EVENT, &[b"readable"], writable);
        guest.device.queue_notified(EVENT, &mut guest.driver.io()).unwrap();
        arrive(&mut guest);
        let fault = guest.device.moved(&mut guest.driver.io()).unwrap_err().to_string();
        assert_eq!(fault, "queue 2: an event buffer is shorter than an event");
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut device = device(&directory);
    let before = device.save();
    for (version, contents, said) in [
        (1, vec![4, 0x80, 0x80, 0x80, 0x80, 4], "it is of a guest with cid 4, and this one has 3"),
        (1, vec![3, 22], "host port 22 is none for connections of the host"),
        (1, vec![3, 0xff, 0xff, 0xff, 0xff, 0x0f], "host port 4294967295 is none for connections of the host"),
        (1, vec![3], "its bytes are damaged"),
        (1, [&GOLDEN[..], &[1]].concat(), "1 bytes follow it"),
        (2, GOLDEN.to_vec(), "it has version 2, and this program reads up to 1"),
        (0, GOLDEN.to_vec(), "it has version 0, and this program reads up to 1"),
    ] {
        assert_eq!(device.restore(&Saved { version, contents }).unwrap_err().to_string(), said);
        assert_eq!((device.save(), device.reset_pending), (before.clone(), false));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_bytes_are_taken_whole_or_not_at_all(
        version in 0u16..3,
        start in 0usize..3,
        rest in prop::collection::vec(any::<u8>(), 0..12),
    ) {
        let mut guest = Guest::new();
        let mut new = device(&guest.directory);
        let before = new.save();
        let taken = new.restore(&Saved { version, contents: [&GOLDEN[..start], &rest].concat() }).is_ok();
        prop_assert!(taken || new.save() == before);
        new.activate(&mut guest.driver.io()).unwrap();
        new.moved(&mut guest.driver.io()).unwrap();
        let mut client = crate::listener::connect_now(&guest.directory.path().join("new")).unwrap();
        client.write_all(b"CONNECT 22\n").unwrap();
        guest.device = new;
        guest.expect(op::REQUEST);
    }
}
