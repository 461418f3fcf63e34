//! The first bytes of a connection, frames and messages, as a hostile peer sends them: what is accepted is what would be written.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sterna_fuzz::patch::{Patch, spoil};
use sterna_migration::wire::frame::{
    FrameKind, HEADER_BYTES, Header, MAX_RANGES, RANGE_BYTES, Range, read_contents, read_header, write_failure,
    write_pass_end, write_summed,
};
use sterna_migration::wire::message::{decode, read_frame, send};
use sterna_migration::wire::{Preamble, Purpose, ToSource, ToTarget, checksum, preamble};
use uuid::Uuid;

#[derive(Arbitrary, Debug)]
enum Input {
    /// The first bytes, right but for some, with a checksum that is right all the same.
    Preamble { purpose: u8, connection: u16, id: u128, epoch: u64, patches: Vec<Patch>, summed: bool },
    /// Frames one after the other, then some bytes changed.
    Frames { frames: Vec<Piece>, patches: Vec<Patch> },
    /// Whatever.
    Bytes(Vec<u8>),
    /// An entry of a table of pages.
    Range { bytes: [u8; RANGE_BYTES], ram_pages: u32 },
}

#[derive(Arbitrary, Debug)]
enum Piece {
    Message(Vec<u8>),
    State { flags: u8, contents: Vec<u8> },
    Failure(String),
    PassEnd(u32),
    Header { kind: u8, flags: u8, count: u32, length: u64 },
}

impl Piece {
    fn write(self, bytes: &mut Vec<u8>) {
        let written = match self {
            Self::Message(contents) => write_summed(bytes, FrameKind::Message, 0, &contents),
            Self::State { flags, contents } => write_summed(bytes, FrameKind::State, flags, &contents),
            Self::Failure(text) => write_failure(bytes, &text),
            Self::PassEnd(pass) => write_pass_end(bytes, pass),
            Self::Header { kind, flags, count, length } => {
                let mut header = [kind, flags, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
                header[4..8].copy_from_slice(&count.to_le_bytes());
                header[8..].copy_from_slice(&length.to_le_bytes());
                bytes.extend(header);
                Ok(())
            }
        };
        written.expect("a short frame can be written");
    }
}

fn first_bytes(bytes: &[u8; preamble::BYTES]) {
    match Preamble::decode(bytes) {
        Ok(preamble) => assert_eq!(preamble.encode(), *bytes),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// All that can be read of `bytes`, which end.
fn frames(bytes: &[u8]) {
    let mut input = bytes;
    while let Some(header) = input.first_chunk::<HEADER_BYTES>() {
        let Ok(decoded) = Header::decode(header) else { break };
        assert_eq!(decoded.encode(), *header);
        assert!(decoded.count as usize <= MAX_RANGES || decoded.kind != FrameKind::Ram);
        let before = input;
        assert_eq!(read_header(&mut input).ok(), Some(decoded));
        let Ok(frame) = read_contents(&mut input, decoded) else { break };
        message::<ToTarget>(&frame);
        message::<ToSource>(&frame);
        let whole = read_frame(&mut &*before);
        assert_eq!(whole.ok(), (decoded.kind != FrameKind::Ram).then_some(frame));
    }
}

fn message<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(frame: &sterna_migration::wire::Frame) {
    let Ok(message) = decode::<T>(frame) else { return };
    let mut bytes = Vec::new();
    send(&mut bytes, &message).expect("what was in a frame fits one");
    let again = read_frame(&mut bytes.as_slice()).expect("a frame");
    assert_eq!(decode::<T>(&again).expect("the message"), message);
}

fuzz_target!(|input: Input| match input {
    Input::Preamble { purpose, connection, id, epoch, patches, summed } => {
        let purposes = [Purpose::File, Purpose::Move, Purpose::Join, Purpose::Ask, Purpose::Check];
        let purpose = purposes[usize::from(purpose) % purposes.len()];
        let mut bytes = Preamble::new(purpose, connection, Uuid::from_u128(id), epoch).encode();
        spoil(&mut bytes, &patches);
        if summed {
            let sum = checksum(&bytes[..40]).to_le_bytes();
            bytes[40..].copy_from_slice(&sum);
        }
        first_bytes(&bytes);
    }
    Input::Frames { frames: pieces, patches } => {
        let mut bytes = Vec::new();
        pieces.into_iter().for_each(|piece| piece.write(&mut bytes));
        spoil(&mut bytes, &patches);
        frames(&bytes);
    }
    Input::Bytes(bytes) => {
        if let Some(first) = bytes.first_chunk() {
            first_bytes(first);
        }
        frames(&bytes);
    }
    Input::Range { bytes, ram_pages } => {
        let Ok(range) = Range::decode(&bytes, ram_pages.into()) else { return };
        assert!(range.run.pages > 0 && range.run.end() <= ram_pages.into());
        let mut again = Vec::new();
        range.encode(&mut again);
        assert_eq!(again, bytes);
    }
});
