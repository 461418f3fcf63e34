//! A target's side of a move, on one to three connections of a hostile source that end: it ends too, and no page changes that was
//! not named.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};
use sterna_fuzz::format_logs;
use sterna_fuzz::patch::{Patch, spoil};
use sterna_migration::ram::GuestRam;
use sterna_migration::stream::{Event, Receiver, Socket};
use sterna_migration::wire::frame::{FrameKind, Header, Range, RangeKind, write_failure, write_pass_end, write_summed};
use sterna_migration::{PAGE_BYTES, Ram, Run};
use vm_memory::GuestAddress;

/// Pages of RAM, in two regions.
const LOW: u64 = 64;
const HIGH: u64 = 20;
/// What is written must fit into a socket that nobody reads yet.
const MOST_BYTES: usize = 96 << 10;
/// Longer than any wait for a peer whose connections have ended, which are at most two of half a second.
const LONG: Duration = Duration::from_secs(5);

#[derive(Arbitrary, Debug)]
struct Input {
    streams: Vec<Stream>,
}

#[derive(Arbitrary, Debug)]
struct Stream {
    pieces: Vec<Piece>,
    patches: Vec<Patch>,
    cut: Option<u16>,
}

#[derive(Arbitrary, Debug)]
enum Piece {
    Pages { ranges: Vec<(u8, u8, bool)>, byte: u8, flags: u8 },
    Wild { first: u64, pages: u32, kind: u32, length: u64 },
    PassEnd(u8),
    Message(Vec<u8>),
    State(u8, Vec<u8>),
    Failure(String),
    Bytes(Vec<u8>),
}

impl Piece {
    fn write(self, bytes: &mut Vec<u8>) {
        let written = match self {
            Self::Pages { ranges, byte, flags } => {
                pages(bytes, &ranges, byte, flags);
                Ok(())
            }
            Self::Wild { first, pages, kind, length } => {
                let header = Header { kind: FrameKind::Ram, flags: 0, count: 1, length };
                bytes.extend(header.encode());
                bytes.extend(first.to_le_bytes());
                bytes.extend(pages.to_le_bytes());
                bytes.extend(kind.to_le_bytes());
                Ok(())
            }
            Self::PassEnd(pass) => write_pass_end(bytes, pass.into()),
            Self::Message(contents) => write_summed(bytes, FrameKind::Message, 0, &contents),
            Self::State(flags, contents) => write_summed(bytes, FrameKind::State, flags, &contents),
            Self::Failure(text) => write_failure(bytes, &text),
            Self::Bytes(more) => {
                bytes.extend(more);
                Ok(())
            }
        };
        written.expect("a short frame can be written");
    }
}

/// A frame of pages, most of them in RAM.
fn pages(bytes: &mut Vec<u8>, ranges: &[(u8, u8, bool)], byte: u8, flags: u8) {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(first, pages, zero)| {
            let run = Run { first: u64::from(*first) % (LOW + HIGH + 1), pages: u64::from(*pages % 8) };
            Range { run, kind: if *zero { RangeKind::Zero } else { RangeKind::Data } }
        })
        .collect();
    let data: u64 = ranges.iter().filter(|range| range.kind == RangeKind::Data).map(|range| range.run.pages).sum();
    let count = ranges.len() as u32;
    let length = u64::from(count) * 16 + data * PAGE_BYTES;
    bytes.extend(Header { kind: FrameKind::Ram, flags: flags & 0x11, count, length }.encode());
    ranges.iter().for_each(|range| range.encode(bytes));
    bytes.resize((bytes.len() + (data * PAGE_BYTES) as usize).min(MOST_BYTES), byte);
}

fn stream(Stream { pieces, patches, cut }: Stream) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        piece.write(&mut bytes);
        if bytes.len() >= MOST_BYTES {
            break;
        }
    }
    bytes.truncate(cut.map_or(MOST_BYTES, usize::from));
    spoil(&mut bytes, &patches);
    bytes
}

fn ram() -> Ram {
    let regions =
        [(GuestAddress(0), (LOW * PAGE_BYTES) as usize), (GuestAddress(1 << 32), (HIGH * PAGE_BYTES) as usize)];
    Ram::new(Arc::new(GuestRam::from_ranges(&regions).expect("some memory")))
}

fuzz_target!(|input: Input| {
    format_logs();
    let ram = ram();
    let (mut near, mut far) = (Vec::new(), Vec::new());
    let mut sent_bytes = 0;
    for bytes in input.streams.into_iter().take(3).map(stream) {
        let (mut one, other) = Socket::pair().expect("a descriptor");
        one.write_all(&bytes).expect("it fits");
        one.shut_write();
        sent_bytes += bytes.len();
        near.push(one);
        far.push(other);
    }
    let begin = Instant::now();
    let Ok(mut receiver) = Receiver::new(ram.clone(), far) else { return assert!(near.is_empty()) };
    let mut passes = 0;
    let ended = loop {
        match receiver.next_event() {
            Ok(Event::PassEnd(pass)) => {
                passes += 1;
                assert_eq!(pass, passes);
            }
            Ok(Event::Frame(frame)) => {
                assert!(!matches!(frame.header.kind, FrameKind::Ram | FrameKind::Failure | FrameKind::PassEnd));
            }
            Err(error) => break error.to_string(),
        }
    };
    assert!(!ended.is_empty());
    drop(receiver);
    assert!(begin.elapsed() < LONG, "it took {:?}", begin.elapsed());
    // A frame that is cut may leave part of a page behind it.
    let written = (0..ram.pages()).filter(|page| !ram.is_zero(*page)).count();
    assert!(written <= sent_bytes / PAGE_BYTES as usize + near.len(), "{written} pages of {sent_bytes} bytes");
});
