//! The wire format of version 1, byte for byte, for ever: each message, each kind of frame, each purpose of a connection.
//!
//! What is in here never changes. Whatever is added to the format gets bytes of its own in here: without them it does not compile.

use super::frame::{read_contents, read_header, write_failure, write_pass_end, write_summed};
use super::message::{Loaded, Machine, Mode, Ready, Started, decode, read_frame, send};
use super::*;
use crate::handover::Order;
use crate::pages::Run;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::fmt::Debug;
use uuid::Uuid;

fn machine(mode: Mode, verify: bool) -> ToTarget {
    let description = b"{}".to_vec();
    ToTarget::Machine(Machine { description, layout: vec![(0, 4096), (1 << 32, 8192)], mode, connections: 300, verify })
}

fn to_target() -> Vec<(ToTarget, &'static [u8])> {
    vec![
        (machine(Mode::Live, true), b"\x00\x02{}\x02\x00\x80\x20\x80\x80\x80\x80\x10\x80\x40\x00\xac\x02\x01"),
        (machine(Mode::Quick, false), b"\x00\x02{}\x02\x00\x80\x20\x80\x80\x80\x80\x10\x80\x40\x01\xac\x02\x00"),
        (ToTarget::Order(Order::Go), b"\x01\x00"),
        (ToTarget::Order(Order::Ask), b"\x01\x01"),
        (ToTarget::Order(Order::Cancel), b"\x01\x02"),
        (ToTarget::Probe { bytes: 1 << 20 }, b"\x02\x80\x80\x40"),
        (ToTarget::Report(b"{}".to_vec()), b"\x03\x02{}"),
        (ToTarget::Make(vec![(512, 128), (1 << 20, 1)]), b"\x04\x02\x80\x04\x80\x01\x80\x80\x40\x01"),
    ]
}

/// Place of a message's variant on the wire, so that one that is new has to be thought of.
fn place_to_target(message: &ToTarget) -> u8 {
    match message {
        ToTarget::Machine(_) => 0,
        ToTarget::Order(Order::Go | Order::Ask | Order::Cancel) => 1,
        ToTarget::Probe { .. } => 2,
        ToTarget::Report(_) => 3,
        ToTarget::Make(_) => 4,
    }
}

fn to_source() -> Vec<(ToSource, &'static [u8])> {
    let warnings = || vec!["hot".to_owned(), String::new()];
    let loaded = |ram_hash| ToSource::Loaded(Loaded { restore_ns: 300, ram_hash });
    vec![
        (
            ToSource::Ready(Ready { build_ns: 300, warnings: warnings(), unknown_msrs: vec![0x277] }),
            b"\x00\xac\x02\x02\x03hot\x00\x01\xf7\x04",
        ),
        (ToSource::Rehearsed { restore_ns: 128 }, b"\x01\x80\x01"),
        (loaded(None), b"\x02\xac\x02\x00"),
        (loaded(Some(u64::MAX)), b"\x02\xac\x02\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        (ToSource::Running(Started { locks_ns: 1, start_ns: 300, answered_ns: 4 }), b"\x03\x01\xac\x02\x04"),
        (ToSource::NotStarted("locked".into()), b"\x04\x06locked"),
        (ToSource::Discarded, b"\x05"),
        (ToSource::Pending, b"\x06"),
        (ToSource::Ended, b"\x07"),
        (ToSource::Unknown, b"\x08"),
        (ToSource::Checked(b"{}".to_vec()), b"\x09\x02{}"),
        (ToSource::Probed, b"\x0a"),
        (ToSource::Made, b"\x0b"),
    ]
}

fn place_to_source(message: &ToSource) -> u8 {
    match message {
        ToSource::Ready(_) => 0,
        ToSource::Rehearsed { .. } => 1,
        ToSource::Loaded(_) => 2,
        ToSource::Running(_) => 3,
        ToSource::NotStarted(_) => 4,
        ToSource::Discarded => 5,
        ToSource::Pending => 6,
        ToSource::Ended => 7,
        ToSource::Unknown => 8,
        ToSource::Checked(_) => 9,
        ToSource::Probed => 10,
        ToSource::Made => 11,
    }
}

#[track_caller]
fn assert_golden<T>(table: Vec<(T, &[u8])>, variants: u8, place: impl Fn(&T) -> u8)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    for (message, golden) in &table {
        let mut bytes = Vec::new();
        send(&mut bytes, message).unwrap();
        let frame = read_frame(&mut bytes.as_slice()).unwrap();
        assert_eq!(frame.contents, *golden, "{message:?}");
        assert_eq!(golden[0], place(message), "{message:?}");
        let golden_frame = Frame { header: frame.header, contents: golden.to_vec() };
        assert_eq!(decode::<T>(&golden_frame).unwrap(), *message);
        for length in 0..golden.len() {
            let shorter = Frame { header: frame.header, contents: golden[..length].to_vec() };
            assert!(decode::<T>(&shorter).is_err(), "{length} bytes of {message:?} are enough");
        }
    }
    let places: BTreeSet<_> = table.iter().map(|(message, _)| place(message)).collect();
    assert_eq!(places, (0..variants).collect(), "a variant has no golden bytes");
}

#[test]
fn version_1_of_what_a_source_says_is_read_for_ever() {
    assert_golden(to_target(), 5, place_to_target);
}

#[test]
fn version_1_of_what_a_target_says_is_read_for_ever() {
    assert_golden(to_source(), 12, place_to_source);
}

#[test]
fn a_message_that_version_1_does_not_have_is_refused() {
    let mut bytes = Vec::new();
    for number in [5, 0xff] {
        write_summed(&mut bytes, FrameKind::Message, 0, &[number, 0, 0]).unwrap();
        let frame = read_frame(&mut bytes.as_slice()).unwrap();
        assert!(matches!(decode::<ToTarget>(&frame), Err(WireError::Decode { what: "message", .. })));
    }
}

/// Every kind of frame but one of pages, whole: with its header, and its checksum where it has one.
#[test]
fn version_1_of_each_frame_is_read_for_ever() {
    let mut message = Vec::new();
    write_summed(&mut message, FrameKind::Message, 0, b"\x01\x00").unwrap();
    let mut state = Vec::new();
    write_summed(&mut state, FrameKind::State, message::FINAL_STATE, b"\x00\x00").unwrap();
    let mut end = Vec::new();
    write_pass_end(&mut end, 0x0102).unwrap();
    let mut failure = Vec::new();
    write_failure(&mut failure, "no tap").unwrap();
    let golden: [(&[u8], &[u8]); 4] = [
        (&message, b"\x01\0\0\0\0\0\0\0\x0a\0\0\0\0\0\0\0\x01\x00\x00\xc9\x84\x0d\x8f\x7b\x32\xdb"),
        (&state, b"\x02\x01\0\0\0\0\0\0\x0a\0\0\0\0\0\0\0\x00\x00\xbf\x40\x5d\xb5\x67\xfb\x59\xfa"),
        (&end, b"\x04\0\0\0\x02\x01\0\0\0\0\0\0\0\0\0\0"),
        (&failure, b"\xff\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0no tap"),
    ];
    for (written, golden) in golden {
        assert_eq!(written, golden);
        let mut input = golden;
        let header = read_header(&mut input).unwrap();
        read_contents(&mut input, header).unwrap();
    }
}

/// A frame of pages: its header, and its table of data, whose bytes follow the table, and of zeros.
#[test]
fn version_1_of_a_frame_of_pages_is_read_for_ever() {
    let header = Header { kind: FrameKind::Ram, flags: 1, count: 2, length: 0x2020 };
    let golden = *b"\x03\x01\0\0\x02\0\0\0\x20\x20\0\0\0\0\0\0";
    assert_eq!(header.encode(), golden);
    assert_eq!(Header::decode(&golden).unwrap(), header);
    let golden: [(RangeKind, &[u8; 16]); 2] = [
        (RangeKind::Data, b"\x02\x01\0\0\0\0\0\0\x03\0\0\0\0\0\0\0"),
        (RangeKind::Zero, b"\x02\x01\0\0\0\0\0\0\x03\0\0\0\x01\0\0\0"),
    ];
    for (kind, golden) in golden {
        let range = Range { run: Run { first: 0x0102, pages: 3 }, kind };
        let mut bytes = Vec::new();
        range.encode(&mut bytes);
        assert_eq!(bytes, golden);
        assert_eq!(Range::decode(golden, 0x0105).unwrap(), range);
    }
}

#[test]
fn version_1_of_each_preamble_is_read_for_ever() {
    let id = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
    let golden: [(Purpose, u8, &[u8; 8]); 5] = [
        (Purpose::File, 1, b"\x98\xdd\xb7\x7c\x0b\xda\x82\x37"),
        (Purpose::Move, 2, b"\x3a\x89\x70\x49\xe5\xff\x18\xa8"),
        (Purpose::Join, 3, b"\xb3\x84\xc6\x97\x4c\x58\xcf\x96"),
        (Purpose::Ask, 4, b"\xe8\x7e\xbf\x6e\x72\x2d\x69\xc9"),
        (Purpose::Check, 5, b"\xc0\xb5\xee\x1d\x4a\x2c\xe0\xfa"),
    ];
    for (purpose, number, sum) in golden {
        let start = [b"\x8fSTERN\r\n\x01\0\x3e\0", [number, 0].as_slice(), b"\x02\x01"].concat();
        let id_bytes = b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff";
        let golden = [start.as_slice(), id_bytes, b"\x08\x07\x06\x05\x04\x03\x02\x01", sum].concat();
        let preamble = Preamble::new(purpose, 0x0102, id, 0x0102_0304_0506_0708);
        assert_eq!(preamble.encode().as_slice(), golden, "{purpose:?}");
        assert_eq!(Preamble::decode(&golden.try_into().unwrap()).unwrap(), preamble);
    }
}
