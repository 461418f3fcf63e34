//! Frames from the port into the driver's buffers (virtio 1.2, section 5.1.6.4).
//!
//! Buffers are taken from the ring until any frame would fit; those a frame did not reach serve the next one, or go
//! back to the ring before a pause. One `readv` puts a frame straight into as many of them as a frame like the last
//! ones needs; only what turns out longer goes through `bounce` and is copied. (Measured: naming buffers for 64 KiB to
//! the kernel each time took 3.6 us for a small frame, with the read that finds nothing more; so it takes 2.1 us.) A
//! frame that does not fit at all waits in `bounce` for more buffers, once, so that a busy guest slows the host's
//! senders down instead of losing 64 KiB at a time.

use super::port::{MAX_PIECES, Port, read_frame};
use super::{FRAME_BYTES, HEADER_BYTES, RX};
use crate::virtio::chain::{Segment, slice};
use crate::virtio::{Chain, Fault, GuestRam, Io};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::io;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Offset of `flags` in the header.
const FLAGS: u64 = 0;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: u64 = 10;

/// A frame without offloads, with its header: what is expected before anything came.
const ETHERNET_BYTES: usize = HEADER_BYTES + 1514;

/// The segments of the posted buffers a frame goes into.
type Segments = SmallVec<[Segment; 64]>;
type CopyResult = Result<(), GuestMemoryError>;

/// What became of one frame.
pub(super) enum Step {
    /// It is in the used ring, with this many bytes after the header.
    Delivered(u64),
    /// It is gone.
    Dropped,
    /// There was none.
    Drained,
    /// There is no buffer; nothing more can come before the driver adds some.
    Starved,
    /// The port gives no frames any more.
    Lost(io::Error),
}

/// The receiving half.
pub(super) struct Receiver {
    /// Taken from the ring and not filled yet, in ring order. Empty after `put_back`.
    posted: VecDeque<Chain>,
    /// Room for one frame with its header, for what its buffers turn out too short for.
    bounce: Vec<u8>,
    /// Bytes that the next frame is expected to have, from the last ones.
    expected: usize,
    /// Bytes of `bounce` that wait for buffers, or zero.
    held: usize,
    /// The driver must notify before anything else can arrive.
    pub(super) starved: bool,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            posted: VecDeque::new(),
            bounce: vec![0; FRAME_BYTES],
            expected: ETHERNET_BYTES,
            held: 0,
            starved: false,
        }
    }

    /// Gives unused buffers back to the ring.
    pub(super) fn put_back(&mut self, io: &mut Io) {
        for _ in self.posted.drain(..) {
            io.put_back(RX);
        }
    }

    /// Forgets the driver, and the frame it had no room for.
    pub(super) fn reset(&mut self) {
        self.posted.clear();
        self.expected = ETHERNET_BYTES;
        self.held = 0;
        self.starved = false;
    }

    /// Moves at most one frame.
    pub(super) fn step(&mut self, port: &impl Port, io: &mut Io) -> Result<Step, Fault> {
        let exhausted = self.gather(io)?;
        if self.posted.is_empty() {
            self.starved = true;
            return Ok(Step::Starved);
        }
        let retried = self.held != 0;
        let (bytes, direct) = if retried {
            (std::mem::take(&mut self.held), 0)
        } else {
            match self.read(port, io.ram) {
                (Ok(bytes), direct) if bytes >= HEADER_BYTES => (bytes, direct),
                (result, _) => return Ok(without_frame(result)),
            }
        };
        self.expected = bytes.max(self.expected / 2);
        if bytes as u64 <= self.room() {
            self.copy(direct, bytes, |target, piece| io.ram.write_slice(piece, target));
            return self.hand_over(bytes, io);
        }
        if exhausted && !retried && io.has_feature(VIRTIO_NET_F_MRG_RXBUF) {
            self.copy(0, direct, |source, piece| io.ram.read_slice(piece, source));
            self.held = bytes;
            self.starved = true;
            return Ok(Step::Starved);
        }
        Ok(Step::Dropped)
    }

    /// Reads one frame: the first bytes, as many as the second value says, into posted buffers, and what is beyond
    /// them to the same offset in `bounce`.
    fn read(&mut self, port: &impl Port, ram: &GuestRam) -> (io::Result<usize>, usize) {
        let mut segments = Segments::new();
        let mut direct = 0;
        for segment in self.segments().take(MAX_PIECES - 1) {
            if direct >= self.expected {
                break;
            }
            direct += segment.length as usize;
            segments.push(segment);
        }
        // Empty when the buffers alone hold any frame.
        let rest = self.bounce.get_mut(direct..).unwrap_or_default();
        (read_frame(port, ram, &segments, rest), direct)
    }

    fn segments(&self) -> impl Iterator<Item = Segment> {
        self.posted.iter().flat_map(|chain| chain.writable.iter().copied())
    }

    /// Moves bytes `from..to` of a frame between the posted buffers and the same offsets in `bounce`, piece by piece.
    fn copy(&mut self, from: usize, to: usize, mut piece: impl FnMut(GuestAddress, &mut [u8]) -> CopyResult) {
        if from >= to {
            return;
        }
        let segments: Segments = self.segments().collect();
        let mut at = from;
        for segment in slice(&segments, from as u64, (to - from) as u64) {
            let end = at + segment.length as usize;
            // Neither fails: the frame fits in `bounce`, and chains are checked to lie in RAM.
            let Some(bytes) = self.bounce.get_mut(at..end) else { break };
            if piece(segment.address, bytes).is_err() {
                break;
            }
            at = end;
        }
    }

    /// Takes buffers until any frame fits, or one when frames do not span buffers. Returns whether the ring has run
    /// out, in which case the driver will notify of more.
    fn gather(&mut self, io: &mut Io) -> Result<bool, Fault> {
        let mergeable = io.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        let mut room = self.room();
        let mut pieces: usize = self.posted.iter().map(|chain| chain.writable.len()).sum();
        while if mergeable { room < FRAME_BYTES as u64 } else { self.posted.is_empty() } {
            let Some(chain) = io.pop(RX)? else { return Ok(true) };
            if chain.writable_bytes() < HEADER_BYTES as u64 {
                return Err(Fault::Malformed { queue: RX, what: "a receive buffer is shorter than the header" });
            }
            pieces += chain.writable.len();
            if pieces > MAX_PIECES && !self.posted.is_empty() {
                io.put_back(RX);
                return Ok(false);
            }
            room += chain.writable_bytes();
            self.posted.push_back(chain);
        }
        Ok(false)
    }

    fn room(&self) -> u64 {
        self.posted.iter().map(Chain::writable_bytes).sum()
    }

    /// Completes the header of a frame of `bytes` that lies in the posted buffers, and gives those it reached back.
    fn hand_over(&mut self, bytes: usize, io: &mut Io) -> Result<Step, Fault> {
        let mut used = SmallVec::<[(u16, u32); 64]>::new();
        let mut left = bytes as u64;
        for chain in &self.posted {
            let part = left.min(chain.writable_bytes());
            left -= part;
            // A frame is at most FRAME_BYTES long, and spans at most MAX_PIECES buffers.
            used.push((chain.head, part as u32));
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.posted.front() {
            // The kernel leaves num_buffers alone; a driver without merging is told 1 as well (5.1.6.4.1).
            first.write_at(io.ram, NUM_BUFFERS, &(used.len() as u16).to_le_bytes());
            if !io.has_feature(VIRTIO_NET_F_GUEST_CSUM) {
                first.write_at(io.ram, FLAGS, &[0]);
            }
        }
        self.posted.drain(..used.len());
        io.complete_together(RX, &used)?;
        Ok(Step::Delivered((bytes - HEADER_BYTES) as u64))
    }
}

/// What a read that gave no frame means.
fn without_frame(result: io::Result<usize>) -> Step {
    let error = match result {
        Ok(0) => io::ErrorKind::UnexpectedEof.into(),
        Ok(_) => return Step::Dropped,
        Err(error) => error,
    };
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Step::Drained,
        // The tap took a frame from its queue that it cannot describe in a header, or had no memory for.
        Some(libc::EINTR | libc::EINVAL | libc::ENOMEM | libc::ENOBUFS) => Step::Dropped,
        _ => Step::Lost(error),
    }
}
