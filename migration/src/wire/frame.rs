//! Frames: a header of 16 bytes that says how much follows, then the contents.
//!
//! | bytes | field |
//! | --- | --- |
//! | 1 | [`FrameKind`] |
//! | 1 | flags |
//! | 2 | 0 |
//! | 4 | count: ranges of a RAM frame, number of the pass at its end |
//! | 8 | length of the contents, bytes |
//!
//! Contents by kind: a *message* or *state* is its bytes and the XXH3 (8 bytes) of the header and them; *ram* is a table of
//! `count` [`Range`]s of 16 bytes each, then the pages of those of kind data, in that order; *pass end* is empty; *failure* is
//! UTF-8 text, in every version, so that a reason gets through where nothing else does.

use super::WireError;
use crate::pages::{PAGE_BYTES, Run};
use std::io::{Read, Write};
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 16;
/// Bytes of an entry of a RAM frame's table.
pub const RANGE_BYTES: usize = 16;
/// Most ranges in a RAM frame: with the header they fill less than the 1024 entries that one writev takes.
pub const MAX_RANGES: usize = 512;
/// Most pages in a RAM frame that carry data: 8 MiB.
pub const MAX_DATA_PAGES: u64 = 2048;
/// Longest message, bytes.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Longest state of a whole machine, bytes.
pub const MAX_STATE_BYTES: usize = 64 << 20;
/// Longest text of a failure, bytes.
pub const MAX_FAILURE_BYTES: usize = 4096;

const SUM_BYTES: usize = 8;
/// Contents that come in are read in steps of this, so that a length alone allocates nothing.
const STEP_BYTES: usize = 64 << 10;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// An encoded message.
    Message,
    /// The machine's sections.
    State,
    /// Pages.
    Ram,
    /// On each connection: nothing of this pass follows.
    PassEnd,
    /// Why the sender gives up; text.
    Failure,
}

const KINDS: [(u8, FrameKind); 5] = [
    (1, FrameKind::Message),
    (2, FrameKind::State),
    (3, FrameKind::Ram),
    (4, FrameKind::PassEnd),
    (0xff, FrameKind::Failure),
];

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: FrameKind,
    /// By kind; 0 unless said otherwise.
    pub flags: u8,
    /// By kind.
    pub count: u32,
    /// Bytes that follow.
    pub length: u64,
}

impl Header {
    /// As bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let kind = KINDS.iter().find(|(_, kind)| *kind == self.kind).map_or(0, |(number, _)| *number);
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = kind;
        bytes[1] = self.flags;
        bytes[4..8].copy_from_slice(&self.count.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Reads one and holds it against the limits of its kind.
    ///
    /// # Errors
    /// An unknown kind, or a number beyond its limit.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let [number, flags, zero, zero2, c0, c1, c2, c3, length @ ..] = *bytes;
        let known = KINDS.iter().find(|(known, _)| *known == number).map(|(_, kind)| *kind);
        let kind = known.ok_or(WireError::Unexpected { what: "frame kind", found: number.into() })?;
        if (zero, zero2) != (0, 0) {
            return Err(WireError::Unexpected { what: "reserved bytes of a frame", found: zero.max(zero2).into() });
        }
        let header =
            Self { kind, flags, count: u32::from_le_bytes([c0, c1, c2, c3]), length: u64::from_le_bytes(length) };
        let most = match kind {
            FrameKind::Message => (MAX_MESSAGE_BYTES + SUM_BYTES) as u64,
            FrameKind::State => (MAX_STATE_BYTES + SUM_BYTES) as u64,
            FrameKind::Ram => MAX_RANGES as u64 * RANGE_BYTES as u64 + MAX_DATA_PAGES * PAGE_BYTES,
            FrameKind::PassEnd => 0,
            FrameKind::Failure => MAX_FAILURE_BYTES as u64,
        };
        limit("the length of a frame", header.length, most)?;
        if kind == FrameKind::Ram {
            limit("the number of ranges in a frame", header.count.into(), MAX_RANGES as u64)?;
        }
        Ok(header)
    }
}

fn limit(what: &'static str, found: u64, limit: u64) -> Result<(), WireError> {
    if found <= limit { Ok(()) } else { Err(WireError::Limit { what, found, limit }) }
}

/// What the pages of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Their contents follow the table.
    Data,
    /// They are all zeros; nothing follows.
    Zero,
}

/// An entry of a RAM frame's table: first page (8 bytes), pages (4 bytes), kind (4 bytes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Which pages.
    pub run: Run,
    /// What they are.
    pub kind: RangeKind,
}

impl Range {
    /// Appends its bytes.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.run.first.to_le_bytes());
        // A frame has at most MAX_DATA_PAGES of data; a run of zero pages is cut to 32 bits by whoever made it.
        bytes.extend(u32::try_from(self.run.pages).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(u32::from(self.kind == RangeKind::Zero).to_le_bytes());
    }

    /// Reads one that must lie in a RAM of `ram_pages`.
    ///
    /// # Errors
    /// An unknown kind, an empty range, or one outside RAM.
    pub fn decode(bytes: &[u8; RANGE_BYTES], ram_pages: u64) -> Result<Self, WireError> {
        let [f0, f1, f2, f3, f4, f5, f6, f7, p0, p1, p2, p3, k0, k1, k2, k3] = *bytes;
        let first = u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]);
        let pages = u64::from(u32::from_le_bytes([p0, p1, p2, p3]));
        let kind = match u32::from_le_bytes([k0, k1, k2, k3]) {
            0 => RangeKind::Data,
            1 => RangeKind::Zero,
            found => return Err(WireError::Unexpected { what: "kind of a range", found: found.into() }),
        };
        let inside = pages > 0 && first.checked_add(pages).is_some_and(|end| end <= ram_pages);
        if !inside {
            return Err(WireError::Range { first, pages, ram_pages });
        }
        Ok(Self { run: Run { first, pages }, kind })
    }
}

/// A frame other than one of RAM, read whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// Its contents without the checksum, which was right.
    pub contents: Vec<u8>,
}

/// Reads a header.
///
/// # Errors
/// The reader's, and what [`Header::decode`] refuses.
pub fn read_header(input: &mut impl Read) -> Result<Header, WireError> {
    let mut bytes = [0; HEADER_BYTES];
    input.read_exact(&mut bytes).map_err(WireError::io("reading a frame"))?;
    Header::decode(&bytes)
}

/// Reads what follows `header`, which is of no RAM frame.
///
/// # Errors
/// The reader's, and a checksum that does not match.
pub fn read_contents(input: &mut impl Read, header: Header) -> Result<Frame, WireError> {
    let mut left = header.length as usize; // within its limit
    let mut contents = Vec::new();
    while left > 0 {
        let step = left.min(STEP_BYTES);
        let start = contents.len();
        contents.resize(start + step, 0);
        input.read_exact(&mut contents[start..]).map_err(WireError::io("reading a frame"))?;
        left -= step;
    }
    if matches!(header.kind, FrameKind::Message | FrameKind::State) {
        let what = if header.kind == FrameKind::State { "state" } else { "message" };
        let body = contents.len().checked_sub(SUM_BYTES).ok_or(WireError::Checksum { what })?;
        if contents[body..] != sum(&header.encode(), &contents[..body]) {
            return Err(WireError::Checksum { what });
        }
        contents.truncate(body);
    }
    Ok(Frame { header, contents })
}

/// Checksum of a message or state: of its header too, whose flags say what a state is for.
fn sum(header: &[u8; HEADER_BYTES], contents: &[u8]) -> [u8; SUM_BYTES] {
    let mut sum = Xxh3::new();
    sum.update(header);
    sum.update(contents);
    sum.digest().to_le_bytes()
}

/// Writes a message or state with its checksum, in one call.
///
/// # Errors
/// The writer's, and contents beyond the limit of their kind.
pub fn write_summed(output: &mut impl Write, kind: FrameKind, flags: u8, contents: &[u8]) -> Result<(), WireError> {
    let most = if kind == FrameKind::State { MAX_STATE_BYTES } else { MAX_MESSAGE_BYTES };
    limit("the length of a frame", contents.len() as u64, most as u64)?;
    let header = Header { kind, flags, count: 0, length: (contents.len() + SUM_BYTES) as u64 };
    let header = header.encode();
    let bytes = [header.as_slice(), contents, &sum(&header, contents)].concat();
    output.write_all(&bytes).map_err(WireError::io("writing a frame"))
}

/// Writes why this side gives up; a text that is too long is cut.
///
/// # Errors
/// The writer's.
pub fn write_failure(output: &mut impl Write, text: &str) -> Result<(), WireError> {
    let mut end = text.len().min(MAX_FAILURE_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let contents = &text.as_bytes()[..end];
    let header = Header { kind: FrameKind::Failure, flags: 0, count: 0, length: contents.len() as u64 };
    output.write_all(&[header.encode().as_slice(), contents].concat()).map_err(WireError::io("writing a frame"))
}

/// Writes the end of `pass`.
///
/// # Errors
/// The writer's.
pub fn write_pass_end(output: &mut impl Write, pass: u32) -> Result<(), WireError> {
    let header = Header { kind: FrameKind::PassEnd, flags: 0, count: pass, length: 0 };
    output.write_all(&header.encode()).map_err(WireError::io("writing a frame"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_and_counts_have_limits() {
        for kind in [FrameKind::Message, FrameKind::State, FrameKind::Ram, FrameKind::PassEnd, FrameKind::Failure] {
            let huge = Header { kind, flags: 0, count: 0, length: u64::MAX }.encode();
            assert!(matches!(Header::decode(&huge), Err(WireError::Limit { .. })), "{kind:?}");
        }
        let ranges = Header { kind: FrameKind::Ram, flags: 0, count: MAX_RANGES as u32 + 1, length: 0 }.encode();
        assert!(matches!(Header::decode(&ranges), Err(WireError::Limit { .. })));
    }

    #[test]
    fn a_message_is_read_back_and_a_flipped_bit_is_told() {
        let mut bytes = Vec::new();
        write_summed(&mut bytes, FrameKind::Message, 0, b"hello").unwrap();
        let mut input = bytes.as_slice();
        let header = read_header(&mut input).unwrap();
        assert_eq!(read_contents(&mut input, header).unwrap().contents, b"hello");
        for bit in HEADER_BYTES * 8..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut input = damaged.as_slice();
            let header = read_header(&mut input).unwrap();
            assert!(matches!(read_contents(&mut input, header), Err(WireError::Checksum { what: "message" })));
        }
    }

    #[test]
    fn a_flipped_bit_in_the_header_of_a_state_is_told() {
        let mut bytes = Vec::new();
        write_summed(&mut bytes, FrameKind::State, 1, b"a machine").unwrap();
        // Room for a length that has become longer.
        bytes.resize(bytes.len() + 64, 0);
        for bit in 0..HEADER_BYTES * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut input = damaged.as_slice();
            // Another kind of frame is nothing that a state is expected to be.
            match read_header(&mut input) {
                Ok(header) if matches!(header.kind, FrameKind::Message | FrameKind::State) => {
                    read_contents(&mut input, header).unwrap_err();
                }
                Ok(header) => assert_eq!((bit, header.kind), (0, FrameKind::Ram)),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn ranges_outside_ram_are_refused() {
        let encode = |first, pages| {
            let mut bytes = Vec::new();
            Range { run: Run { first, pages }, kind: RangeKind::Zero }.encode(&mut bytes);
            <[u8; RANGE_BYTES]>::try_from(bytes).unwrap()
        };
        assert!(Range::decode(&encode(6, 2), 8).is_ok());
        for (first, pages) in [(0, 0), (7, 2), (8, 1), (u64::MAX, 1), (u64::MAX - 1, 2)] {
            let result = Range::decode(&encode(first, pages), 8);
            assert!(matches!(result, Err(WireError::Range { .. })), "{first} {pages}");
        }
    }

    #[test]
    fn a_long_failure_is_cut_at_a_character() {
        let mut bytes = Vec::new();
        write_failure(&mut bytes, &"ä".repeat(MAX_FAILURE_BYTES)).unwrap();
        let mut input = bytes.as_slice();
        let header = read_header(&mut input).unwrap();
        let text = String::from_utf8(read_contents(&mut input, header).unwrap().contents).unwrap();
        assert_eq!(text.len(), MAX_FAILURE_BYTES);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut input = bytes.as_slice();
            while let Ok(header) = read_header(&mut input) {
                if read_contents(&mut input, header).is_err() {
                    break;
                }
            }
        }
    }
}
