//! The device between a guest played by the fake driver and real Unix sockets.

use super::connection::BUFFER_BYTES;
use super::guest::{CID, DEADLINE, Guest};
use super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::virtio::testing::Driver;
use proptest::collection::vec;
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

fn key(guest_port: u32, host_port: u32) -> Key {
    Key { guest_port, host_port }
}

fn pattern(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

/// Sends `all` through a connection to a host that echoes, heeding credit both ways, and returns what came back.
fn echo(guest: &mut Guest, key: Key, all: &[u8]) -> Vec<u8> {
    let (mut sent, mut received, mut host) = (0, Vec::new(), (BUFFER_BYTES, 0_u32));
    let deadline = Instant::now() + DEADLINE;
    while received.len() < all.len() {
        assert!(Instant::now() < deadline, "sent {sent}, received {}", received.len());
        let credit = host.0 - (sent as u32).wrapping_sub(host.1);
        let end = all.len().min(sent + credit.min(32 << 10) as usize);
        let header = Header { fwd_cnt: received.len() as u32, ..guest.header(key, op::RW) };
        if end > sent {
            guest.send(Header { len: (end - sent) as u32, ..header }, &all[sent..end]);
            sent = end;
        } else {
            guest.send(Header { op: op::CREDIT_UPDATE, ..header }, b"");
        }
        guest.post(100);
        guest.turn();
        while let Some((header, payload)) = guest.inbox.pop_front() {
            assert!(matches!(header.op, op::RW | op::CREDIT_UPDATE | op::CREDIT_REQUEST), "{header:?}");
            host = (header.buf_alloc, header.fwd_cnt);
            received.extend(payload);
        }
    }
    received
}

fn echo_host(mut stream: UnixStream) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut copy = stream.try_clone().unwrap();
        // Ends with an error when the device resets the connection.
        let _end = io::copy(&mut stream, &mut copy);
    })
}

#[test]
fn a_mebibyte_from_the_guest_comes_back_whole() {
    let mut guest = Guest::new();
    let service = guest.service(1024);
    let host = echo_host(guest.connect_out(&service, key(5000, 1024)));
    assert!(echo(&mut guest, key(5000, 1024), &pattern(1 << 20)) == pattern(1 << 20));
    guest.control(key(5000, 1024), op::SHUTDOWN, SHUTDOWN_BOTH);
    host.join().unwrap();
}

#[test]
fn a_mebibyte_through_a_connection_of_the_host_comes_back_whole() {
    let mut guest = Guest::new();
    let (stream, key) = guest.connect_in(22);
    let host = echo_host(stream);
    assert!(echo(&mut guest, key, &pattern(1 << 20)) == pattern(1 << 20));
    drop(guest);
    host.join().unwrap();
}

#[test]
fn what_the_client_sends_with_its_line_is_for_the_guest() {
    let mut guest = Guest::new();
    let _stream = guest.dial(b"CONNECT 80\nGET /");
    let request = guest.expect(op::REQUEST);
    guest.control(key(80, request.src_port), op::RESPONSE, 0);
    let (header, payload) = guest.next();
    assert_eq!((header.op, payload.as_slice()), (op::RW, b"GET /".as_slice()));
}

#[test]
fn many_connections_and_no_more() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut streams = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        streams.push(guest.connect_out(&service, key(port, 1)));
        guest.post(100);
    }
    guest.control(key(9999, 1), op::REQUEST, 0);
    assert_eq!(guest.expect(op::RST).dst_port, 9999);
    let mut refused = guest.dial(b"CONNECT 5\n");
    guest.settle();
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    for (port, stream) in streams.iter_mut().enumerate() {
        stream.write_all(&port.to_le_bytes()).unwrap();
    }
    let mut heard = vec![false; streams.len()];
    for _ in 0..streams.len() {
        let (header, payload) = guest.next();
        guest.post(100);
        assert_eq!(payload, u64::from(header.dst_port).to_le_bytes());
        heard[header.dst_port as usize] = true;
    }
    assert!(heard.iter().all(|heard| *heard));
    // One goes, one may come.
    guest.control(key(7, 1), op::RST, 0);
    streams.push(guest.connect_out(&service, key(9999, 1)));
}

#[test]
fn nobody_at_the_port_is_a_reset() {
    let mut guest = Guest::new();
    guest.control(key(5000, 77), op::REQUEST, 0);
    let reset = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port, reset.src_cid), (77, 5000, HOST_CID));
    let mut stream = guest.dial(b"CONNECT 22\n");
    let request = guest.expect(op::REQUEST);
    guest.control(key(22, request.src_port), op::RST, 0);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the client sees the end");
    assert_eq!(guest.connections(), 0);
}

#[test]
fn nonsense_from_a_client_ends_it_and_idle_clients_are_bounded() {
    let mut guest = Guest::new();
    let mut stream = guest.dial(b"HELO\n");
    let mut idle: Vec<_> = (0..MAX_CLIENTS + 8)
        .map(|_| {
            let stream = guest.dial(b"CONN");
            guest.turn();
            stream
        })
        .collect();
    guest.settle();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.device.clients.len(), MAX_CLIENTS);
    assert_eq!(idle[0].read(&mut [0]).unwrap(), 0, "the oldest made room");
    idle.last_mut().unwrap().write_all(b"ECT 9\n").unwrap();
    assert_eq!(guest.expect(op::REQUEST).dst_port, 9);
}

#[test]
fn packets_that_fit_no_rule_are_reset_and_resets_are_not_answered() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let _stream = guest.connect_out(&service, key(10, 1));
    let good = guest.header(key(10, 1), op::CREDIT_UPDATE);
    for (what, bad) in [
        ("wrong destination", Header { dst_cid: 9, ..good }),
        ("forged source", Header { src_cid: 4, ..good }),
        ("unknown type", Header { kind: 7, ..good }),
        ("data without a connection", Header { src_port: 11, op: op::RW, ..good }),
        ("shutdown without a connection", Header { src_port: 11, op: op::SHUTDOWN, ..good }),
        ("response without a request", Header { src_port: 11, op: op::RESPONSE, ..good }),
    ] {
        guest.send(bad, b"");
        let reset = guest.expect(op::RST);
        assert_eq!((reset.dst_port, reset.src_cid, reset.kind), (bad.src_port, bad.dst_cid, bad.kind), "{what}");
        assert_eq!(guest.connections(), 1, "{what} is about no connection of ours");
        guest.send(Header { op: op::RST, ..bad }, b"");
        guest.expect_nothing();
    }
}

#[test]
fn a_connection_that_breaks_the_rules_is_ended() {
    let bad = |good: Header| {
        [
            ("unknown operation", Header { op: 99, ..good }),
            ("operation 0", Header { op: 0, ..good }),
            ("a second request", Header { op: op::REQUEST, ..good }),
            ("a response to nothing", Header { op: op::RESPONSE, ..good }),
            ("length beyond the chain", Header { op: op::RW, len: 100, ..good }),
            ("length beyond all credit", Header { op: op::RW, len: u32::MAX, ..good }),
        ]
    };
    for index in 0..bad(Header::default()).len() {
        let mut guest = Guest::new();
        let service = guest.service(1);
        let mut stream = guest.connect_out(&service, key(10, 1));
        let (what, header) = bad(guest.header(key(10, 1), op::RW))[index];
        guest.send(header, b"");
        assert_eq!(guest.expect(op::RST).dst_port, 10, "{what}");
        assert_eq!(guest.connections(), 0, "{what}");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{what}");
    }
}

#[test]
fn buffers_too_short_for_a_header_are_faults() {
    let mut guest = Guest::new();
    guest.driver.add(TX, &[&[0; HEADER_BYTES - 1]], &[]);
    let fault = guest.device.queue_notified(TX, &mut guest.driver.io()).unwrap_err();
    assert!(matches!(fault, Fault::Malformed { queue: TX, .. }), "{fault}");

    let mut driver = Driver::new(&[8, 8, 8]);
    let mut device = Vsock::new(CID as u32, &guest.directory.path().join("w")).unwrap();
    driver.add(RX, &[], &[HEADER_BYTES as u32 - 1]);
    driver.add(TX, &[&guest.header(key(1, 2), op::RW).bytes()], &[]);
    let fault = device.queue_notified(TX, &mut driver.io()).unwrap_err();
    assert!(matches!(fault, Fault::Malformed { queue: RX, .. }), "{fault}");
}

#[test]
fn the_guest_may_not_send_more_than_its_credit() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut stream = guest.connect_out(&service, key(10, 1));
    // The host reads nothing: first its socket fills, then our buffer.
    let mut sent = 0;
    let mut told = 0;
    let chunk = pattern(16 << 10);
    while sent - told + chunk.len() <= BUFFER_BYTES as usize {
        guest.data(key(10, 1), &chunk);
        sent += chunk.len();
        while let Some((header, _)) = guest.inbox.pop_front() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            told = header.fwd_cnt as usize;
        }
    }
    guest.expect_nothing();
    // Once the host reads, all arrives and credit comes back.
    let reader = std::thread::spawn(move || {
        let mut all = vec![0; sent];
        stream.read_exact(&mut all).unwrap();
        (all, stream)
    });
    while !reader.is_finished() {
        guest.turn();
    }
    let (all, stream) = reader.join().unwrap();
    assert!(all.chunks(chunk.len()).all(|part| part == chunk));
    let told = guest.inbox.drain(..).map(|(header, _)| header.fwd_cnt).max().unwrap();
    assert!(sent as u32 - told < BUFFER_BYTES / 4);
    // Without credit it is over.
    for _ in 0..1000 {
        guest.data(key(10, 1), &chunk);
        if guest.connections() == 0 {
            break;
        }
    }
    assert_eq!(guest.connections(), 0);
    assert_eq!(guest.inbox.pop_back().unwrap().0.op, op::RST);
    drop(stream);
}

#[test]
fn the_host_waits_for_the_guests_credit() {
    let mut guest = Guest::new();
    let (mut stream, key) = guest.connect_in(22);
    let credit = Header { buf_alloc: 1000, ..guest.header(key, op::CREDIT_UPDATE) };
    guest.send(credit, b"");
    stream.write_all(&pattern(3000)).unwrap();
    let (header, payload) = guest.next();
    assert_eq!((header.op, payload), (op::RW, pattern(1000)));
    guest.expect(op::CREDIT_REQUEST);
    guest.expect_nothing();
    guest.send(credit, b"");
    guest.expect_nothing();
    guest.send(Header { fwd_cnt: 600, ..credit }, b"");
    assert_eq!(guest.next().1, pattern(3000)[1000..1600]);
    guest.expect(op::CREDIT_REQUEST);
    // Counters that make no sense give no credit and harm nobody.
    guest.send(Header { fwd_cnt: 5000, ..credit }, b"");
    guest.send(Header { buf_alloc: 0, fwd_cnt: 0, ..credit }, b"");
    guest.expect_nothing();
    guest.send(Header { buf_alloc: u32::MAX, fwd_cnt: 1600, ..credit }, b"");
    assert_eq!(guest.next().1, pattern(3000)[1600..]);
    guest.control(key, op::CREDIT_REQUEST, 0);
    guest.expect(op::CREDIT_UPDATE);
}

#[test]
fn each_direction_ends_by_itself() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut stream = guest.connect_out(&service, key(10, 1));
    guest.data(key(10, 1), b"question");
    guest.control(key(10, 1), op::SHUTDOWN, SHUTDOWN_SEND);
    let mut question = String::new();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.next().1, b"answer");
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    // The host can receive no more either, since the guest sends no more.
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.control(key(10, 1), op::SHUTDOWN, SHUTDOWN_RECEIVE);
    guest.expect(op::RST);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_host_that_has_sent_all_still_receives() {
    let mut guest = Guest::new();
    let (mut stream, key) = guest.connect_in(22);
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.data(key, b"late");
    guest.control(key, op::SHUTDOWN, SHUTDOWN_BOTH);
    guest.expect(op::RST);
    let mut late = String::new();
    stream.read_to_string(&mut late).unwrap();
    assert_eq!(late, "late");
}

#[test]
fn data_after_the_end_of_data_is_a_reset() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let _stream = guest.connect_out(&service, key(10, 1));
    guest.control(key(10, 1), op::SHUTDOWN, SHUTDOWN_SEND);
    guest.data(key(10, 1), b"more");
    guest.expect(op::RST);
}

#[test]
fn a_host_that_leaves_is_told_after_its_last_bytes() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut stream = guest.connect_out(&service, key(10, 1));
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(guest.next().1, b"bye");
    assert_eq!(guest.expect(op::SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.data(key(10, 1), b"into the void");
    guest.control(key(10, 1), op::RST, 0);
    assert_eq!(guest.connections(), 0);

    // A client that leaves before the guest has answered.
    drop(guest.dial(b"CONNECT 22\n"));
    guest.expect(op::REQUEST);
    guest.expect(op::RST);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_guest_without_receive_buffers_is_held_back_and_loses_nothing() {
    let mut guest = Guest::new();
    while guest.posted > 0 {
        guest.control(key(1, 1), op::CREDIT_UPDATE, 0);
    }
    guest.inbox.clear();
    let count = 120;
    for round in 0..4 {
        for port in 0..count {
            let header = guest.header(key(round * count + port, 2), op::CREDIT_UPDATE);
            guest.driver.add(TX, &[&header.bytes()], &[]);
        }
        guest.device.queue_notified(TX, &mut guest.driver.io()).unwrap();
    }
    assert_eq!(guest.device.resets.len(), MAX_RESETS);
    let doorbell = guest.driver.doorbells[TX].try_clone().unwrap();
    for port in 0..4 * count {
        guest.post(20);
        while doorbell.read().is_ok() {
            guest.device.queue_notified(TX, &mut guest.driver.io()).unwrap();
        }
        assert_eq!(guest.expect(op::RST).dst_port, port);
    }
    assert!(guest.device.resets.is_empty());
}

#[test]
fn turns_of_connections_that_come_and_go_do_not_pile_up() {
    let mut guest = Guest::new();
    while guest.posted > 0 {
        guest.control(key(1, 1), op::CREDIT_UPDATE, 0);
    }
    let service = guest.service(1);
    for _ in 0..50 {
        guest.control(key(10, 1), op::REQUEST, 0);
        guest.control(key(10, 1), op::RST, 0);
        drop(service.accept().unwrap());
    }
    assert_eq!((guest.device.ready.len(), guest.connections()), (0, 0));
}

#[test]
fn a_reset_of_the_device_ends_all_connections_and_it_works_again() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut stream = guest.connect_out(&service, key(10, 1));
    guest.device.quiesce(&mut guest.driver.io()).unwrap();
    guest.device.reset();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    assert!(guest.device.backend().is_none());
    guest.device.activate(&mut guest.driver.io()).unwrap();
    guest.connect_out(&service, key(10, 1));
}

#[test]
fn configuration_is_the_context_id() {
    let mut guest = Guest::new();
    for (offset, expected) in [(0, [3, 0, 0, 0]), (6, [0; 4]), (u64::MAX, [0; 4])] {
        let mut data = [0xaa; 4];
        guest.device.read_config(offset, &mut data);
        assert_eq!(data, expected);
    }
    guest.device.write_config(0, &[9; 8]);
    assert_eq!(guest.device.guest_cid, CID);
}

#[test]
fn tokens_go_both_ways() {
    for token in [Token::Listener, Token::Client(0), Token::Client(7), Token::Connection(key(22, u32::MAX))] {
        assert_eq!(Token::decode(token.encode()), token);
    }
}

/// One packet of a hostile guest, its claimed length apart from its payload's.
fn any_packet() -> impl Strategy<Value = (Header, Vec<u8>)> {
    let credit = prop_oneof![Just(0), 0..5000_u32, Just(u32::MAX)];
    (0..9_u16, 0..3_u32, 0..3_u32, 0..200_u32, 0..4_u32, (credit, any::<u32>()), vec(any::<u8>(), 0..300)).prop_map(
        |(op, src_port, dst_port, len, flags, (buf_alloc, fwd_cnt), payload)| {
            let (src_cid, dst_cid, kind) = (CID, HOST_CID, TYPE_STREAM);
            (Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }, payload)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_packets_breaks_the_books(packets in vec(any_packet(), 1..100), talk in vec(any::<bool>(), 100)) {
        let mut guest = Guest::new();
        let service = guest.service(1);
        service.set_nonblocking(true).unwrap();
        let mut streams = Vec::new();
        for ((header, payload), talk) in packets.into_iter().zip(talk) {
            guest.send(header, &payload);
            if let Ok((mut stream, _)) = service.accept() {
                stream.write_all(&pattern(2000)).unwrap();
                streams.push(stream);
            }
            if talk {
                streams.truncate(2);
                guest.turn();
                guest.post(100);
            }
            let queued = guest.device.connections.iter().filter(|(_, connection)| connection.queued);
            let mut ready: Vec<_> = guest.device.ready.iter().copied().collect();
            ready.sort();
            prop_assert_eq!(queued.map(|(key, _)| *key).collect::<Vec<_>>(), ready);
        }
    }
}
