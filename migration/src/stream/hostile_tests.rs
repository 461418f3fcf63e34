//! Streams that are cut, damaged or made up: both sides end with an error, soon, and RAM outside the damage stays as it was.

use super::rig::{LONG, Random, Rig, connections, fill, ram, set};
use super::*;
use crate::handover::Order;
use crate::pages::Run;
use crate::ram::Ram;
use crate::wire::frame::{self, FrameKind, Header, MAX_DATA_PAGES, Range, RangeKind};
use crate::wire::message::{self, ToSource, ToTarget};
use std::io::{Read, Write};
use std::time::{Duration, Instant};

const DATA: RangeKind = RangeKind::Data;
const ZERO: RangeKind = RangeKind::Zero;

/// A frame of `ranges`, its pages full of `byte`.
fn pages(ranges: &[(u64, u64, RangeKind)], byte: u8) -> Vec<u8> {
    let sent: u64 = ranges.iter().filter(|(.., kind)| *kind == DATA).map(|(_, pages, _)| pages).sum();
    let length = ranges.len() as u64 * 16 + sent * 4096;
    let mut bytes = Header { kind: FrameKind::Ram, flags: 0, count: ranges.len() as u32, length }.encode().to_vec();
    for (first, pages, kind) in ranges {
        Range { run: Run { first: *first, pages: *pages }, kind: *kind }.encode(&mut bytes);
    }
    bytes.resize(16 + length as usize, byte);
    bytes
}

fn pass_end(pass: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::write_pass_end(&mut bytes, pass).unwrap();
    bytes
}

fn go() -> Vec<u8> {
    let mut bytes = Vec::new();
    message::send(&mut bytes, &ToTarget::Order(Order::Go)).unwrap();
    bytes
}

/// What a target of `ram` makes of these bytes, a connection each, which then end. Never waits long.
fn receive(ram: &Ram, streams: &[&[u8]]) -> Result<u32, StreamError> {
    let start = Instant::now();
    let (ours, theirs) = connections(streams.len(), false);
    for (mut socket, stream) in ours.iter().zip(streams) {
        socket.write_all(stream).unwrap();
        socket.shut_write();
    }
    let result = drain(Receiver::new(ram.clone(), theirs).unwrap());
    assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
    result
}

/// Passes until a message comes.
fn drain(mut receiver: Receiver) -> Result<u32, StreamError> {
    let mut passes = 0;
    while let Event::PassEnd(_) = receiver.next_event()? {
        passes += 1;
    }
    receiver.finish().map(|_| passes)
}

#[test]
fn a_target_whose_stream_is_cut_after_any_byte_says_so() {
    let first = [pages(&[(1, 1, DATA), (3, 2, ZERO)], 1), pass_end(1), pass_end(2), go()].concat();
    let second = [pages(&[(5, 1, DATA)], 2), pass_end(1), pages(&[(1, 1, ZERO)], 0), pass_end(2)].concat();
    let ram = ram(8, 0);
    assert_eq!(receive(&ram, &[&first, &second]).unwrap(), 2);
    for cut in 0..first.len() {
        assert!(receive(&ram, &[&first[..cut], &second]).is_err(), "connection 0 cut after {cut}");
    }
    for cut in 0..second.len() {
        let error = receive(&ram, &[&first, &second[..cut]]).unwrap_err().to_string();
        assert!(error.contains("connection 1"), "cut after {cut}: {error}");
    }
}

#[test]
fn a_source_whose_peer_goes_after_any_byte_says_so() {
    let here = ram(64, 0);
    fill(&here, 1, 1);
    fill(&here, 9, 1);
    // What the whole conversation sends, then cut by a peer that reads so much and goes. The answer never comes.
    let talk = |limit: u64| {
        let (ours, mut theirs) = connections(1, false);
        let peer =
            thread::spawn(move || std::io::copy(&mut theirs.remove(0).take(limit), &mut std::io::sink()).unwrap());
        let mut sender = Rig::new(here.clone()).sender(ours, None);
        let result = (|| {
            sender.send_pass(&set(&here, [1]), Pace::Limited).map_err(|error| error.to_string())?;
            sender.send_pass(&set(&here, [9, 10]), Pace::Full).map_err(|error| error.to_string())?;
            let control = sender.finish();
            control.shut_write();
            message::read_frame(&mut &control).map_err(|error| error.to_string())
        })();
        (result, peer.join().unwrap())
    };
    let (_, all) = talk(u64::MAX);
    assert_eq!(all, 2 * 4096 + 16 + 16 + 16 + 16 + 32 + 16);
    let start = Instant::now();
    for cut in 0..all {
        talk(cut).0.unwrap_err();
    }
    assert!(start.elapsed() < 3 * LONG, "{:?}", start.elapsed());
}

#[test]
fn any_flipped_bit_around_the_pages_is_harmless() {
    let whole = [pages(&[(1, 1, DATA), (3, 2, ZERO)], 1), pass_end(1), go()].concat();
    let ram = ram(8, 0);
    let plain = (0..48).chain(48 + 4096..48 + 4096 + 16);
    for bit in plain.flat_map(|byte| byte * 8..byte * 8 + 8) {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // Another page of RAM is all that may pass for the right one.
        if receive(&ram, &[&damaged]).is_ok() {
            assert!((16 * 8..48 * 8).contains(&bit), "bit {bit}");
        }
    }
}

#[test]
fn garbage_ends_in_an_error() {
    let mut random = Random::new();
    for _ in 0..2000 {
        let bytes: Vec<u8> = (0..random.below(200)).map(|_| random.next() as u8).collect();
        // As it is, and behind a header that is believed.
        receive(&ram(8, 0), &[&bytes]).unwrap_err();
        let count = bytes.len() as u32 / 16;
        let header = Header { kind: FrameKind::Ram, flags: 0, count, length: bytes.len() as u64 };
        receive(&ram(8, 0), &[&[header.encode().as_slice(), &bytes].concat()]).unwrap_err();
    }
}

#[test]
fn a_table_is_checked_before_a_byte_lands() {
    let header = |flags, count, length| Header { kind: FrameKind::Ram, flags, count, length }.encode().to_vec();
    let with = |header: Vec<u8>, like: Vec<u8>| [&header, &like[16..]].concat();
    let good = || pages(&[(1, 1, DATA)], 9);
    let cases = [
        ("do not lie in the machine's RAM", pages(&[(1, 1, DATA), (8, 1, DATA)], 9)),
        ("do not lie in the machine's RAM", pages(&[(1, 1, DATA), (0, u64::from(u32::MAX), ZERO)], 9)),
        ("do not lie in the machine's RAM", pages(&[(1, 1, DATA), (2, 0, ZERO)], 9)),
        ("unexpected flags of a frame of pages 1", with(header(1, 1, 16 + 4096), good())),
        ("unexpected length of a frame of pages 16", with(header(0, 1, 16), good())),
        ("unexpected length of a frame of pages 4113", with(header(0, 1, 17 + 4096), good())),
        ("unexpected length of a frame of pages 8208", with(header(0, 1, 16 + 8192), good())),
        ("the number of ranges in a frame is 513, more than 512", with(header(0, 513, 16 + 4096), good())),
        ("the length of a frame is 18446744073709551615", with(header(0, 1, u64::MAX), good())),
    ];
    for (words, stream) in cases {
        let ram = ram(8, 0);
        fill(&ram, 1, 5);
        let error = receive(&ram, &[&[stream, pass_end(1)].concat()]).unwrap_err();
        let text = std::error::Error::source(&error).unwrap().to_string();
        assert!(text.contains(words), "{text}");
        let mut page = [0; 4096];
        ram.copy_page(1, &mut page);
        assert_eq!(page[..8], 5u64.to_le_bytes(), "{words}");
    }
    // Each range is in RAM, all together are not a frame.
    let ram = ram(MAX_DATA_PAGES + 1, 0);
    let stream = header(0, 1, 16 + MAX_DATA_PAGES * 4096);
    let mut range = Vec::new();
    Range { run: Run { first: 0, pages: MAX_DATA_PAGES + 1 }, kind: DATA }.encode(&mut range);
    let error = receive(&ram, &[&[stream, range].concat()]).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("more than 2048"));
}

#[test]
fn passes_go_up_by_one() {
    for (stream, found, expected) in [
        (pass_end(0), 0, 1),
        (pass_end(2), 2, 1),
        ([pass_end(1), pass_end(1)].concat(), 1, 2),
        ([pass_end(1), pass_end(3)].concat(), 3, 2),
    ] {
        let text = format!("connection 0 ended pass {found} where pass {expected} is under way");
        assert_eq!(receive(&ram(8, 0), &[&stream]).unwrap_err().to_string(), text);
        let others = [pass_end(1), pass_end(2), go()].concat();
        let error = receive(&ram(8, 0), &[&others, &stream]).unwrap_err().to_string();
        assert_eq!(error, text.replace("connection 0", "connection 1"));
    }
}

#[test]
fn only_ram_comes_on_further_connections() {
    let first = [pass_end(1), go()].concat();
    let error = receive(&ram(8, 0), &[&first, &go()]).unwrap_err();
    assert_eq!(error.to_string(), "connection 1 of the move failed");
    let mut failure = Vec::new();
    frame::write_failure(&mut failure, "out of\nmemory").unwrap();
    let error = receive(&ram(8, 0), &[&first, &failure]).unwrap_err();
    assert_eq!(error.to_string(), "the other side gave up: out of\u{fffd}memory");
}

#[test]
fn a_peer_that_gives_up_is_heard_though_it_broke_a_connection_first() {
    let mut failure = Vec::new();
    frame::write_failure(&mut failure, "cancelled").unwrap();
    let whole = pages(&[(1, 1, DATA)], 1);
    // Connection 0 has ended the pass, is between two frames, or has not begun; 1 ends between two frames or within one.
    for begin in [pass_end(1), whole.clone(), Vec::new()] {
        for end in [0, 100, whole.len()] {
            let (mut ours, theirs) = connections(2, true);
            let receiver = Receiver::new(ram(8, 0), theirs).unwrap();
            let target = thread::spawn(move || drain(receiver));
            ours[0].write_all(&begin).unwrap();
            ours[1].write_all(&whole[..end]).unwrap();
            ours[1].shut_write();
            ours[0].write_all(&failure).unwrap();
            let error = target.join().unwrap().unwrap_err();
            assert_eq!(error.to_string(), "the other side gave up: cancelled");
        }
    }
}

#[test]
fn a_later_pass_waits_for_the_earlier_one() {
    let ram = ram(8, 0);
    let (mut ours, theirs) = connections(2, false);
    let receiver = Receiver::new(ram.clone(), theirs).unwrap();
    // All of connection 1, its later page included, is there before connection 0 begins.
    ours[1].write_all(&[pass_end(1), pages(&[(1, 1, DATA)], 2), pass_end(2)].concat()).unwrap();
    let target = thread::spawn(move || drain(receiver));
    ours[0].write_all(&[pages(&[(1, 1, DATA)], 1), pass_end(1), pass_end(2), go()].concat()).unwrap();
    assert_eq!(target.join().unwrap().unwrap(), 2);
    let mut page = [0; 4096];
    ram.copy_page(1, &mut page);
    assert_eq!(page, [2; 4096]);
}

#[test]
fn one_connection_that_owes_its_end_is_not_waited_for_forever() {
    let (mut ours, theirs) = connections(3, true);
    theirs[1..].iter().for_each(|socket| socket.set_timeout(Duration::from_millis(100)).unwrap());
    let start = Instant::now();
    let receiver = Receiver::new(ram(8, 0), theirs).unwrap();
    ours[0].write_all(&pass_end(1)).unwrap();
    ours[1].write_all(&pass_end(1)).unwrap();
    let error = drain(receiver).unwrap_err();
    assert!(matches!(error, StreamError::Connection { number: 2, .. }), "{error:?}");
    assert!(start.elapsed() < LONG);
}

#[test]
fn silence_between_passes_is_nothing() {
    let (mut ours, theirs) = connections(2, false);
    theirs[1].set_timeout(Duration::from_millis(20)).unwrap();
    let receiver = Receiver::new(ram(8, 0), theirs).unwrap();
    let target = thread::spawn(move || drain(receiver));
    thread::sleep(Duration::from_millis(100));
    ours[1].write_all(&pass_end(1)).unwrap();
    ours[0].write_all(&[pass_end(1), go()].concat()).unwrap();
    assert_eq!(target.join().unwrap().unwrap(), 1);
}

#[test]
fn an_answer_gets_through_after_an_error() {
    let (mut ours, theirs) = connections(2, true);
    let mut receiver = Receiver::new(ram(8, 0), theirs).unwrap();
    ours[1].write_all(&pages(&[(8, 1, DATA)], 1)).unwrap();
    assert!(matches!(receiver.next_event(), Err(StreamError::Connection { number: 1, .. })));
    frame::write_failure(&mut receiver.control(), "page 8").unwrap();
    drop(receiver);
    let frame = message::read_frame(&mut ours[0]).unwrap();
    assert_eq!(frame.contents, b"page 8");
    assert!(message::decode::<ToSource>(&frame).is_err());
}
