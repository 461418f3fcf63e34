//! Frames from the port into the driver's buffers (virtio 1.2, section 5.1.6.4).
//!
//! Buffers are taken from the ring until any frame would fit, and one `readv` puts the next frame straight into them;
//! those it did not reach serve the next frame, or go back to the ring before a pause. Only while the driver offers
//! less room than the largest frame needs does a frame go through `bounce`: a frame that then does not fit waits there
//! for more buffers, once, so that a busy guest slows the host's senders down instead of losing 64 KiB at a time.

use super::port::{MAX_PIECES, Port, read_frame};
use super::{FRAME_BYTES, HEADER_BYTES, RX};
use crate::virtio::{Chain, Fault, GuestRam, Io};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::io;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};

/// Offset of `flags` in the header.
const FLAGS: u64 = 0;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: u64 = 10;

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
    /// Room for one frame with its header.
    bounce: Vec<u8>,
    /// Bytes of `bounce` that wait for buffers, or zero.
    held: usize,
    /// The driver must notify before anything else can arrive.
    pub(super) starved: bool,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { posted: VecDeque::new(), bounce: vec![0; FRAME_BYTES], held: 0, starved: false }
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
        let room = self.room();
        let retried = self.held != 0;
        let bytes = match std::mem::take(&mut self.held) {
            0 if room >= FRAME_BYTES as u64 => {
                let segments = self.posted.iter().flat_map(|chain| chain.writable.iter());
                match read_frame(port, io.ram, segments) {
                    Ok(bytes) if bytes >= HEADER_BYTES => return self.hand_over(bytes, io),
                    result => return Ok(without_frame(result)),
                }
            }
            0 => match rustix::io::read(port, &mut self.bounce[..]) {
                Ok(bytes) if bytes >= HEADER_BYTES => bytes,
                result => return Ok(without_frame(result.map_err(io::Error::from))),
            },
            held => held,
        };
        if bytes as u64 <= room {
            self.copy_in(bytes, io.ram);
            return self.hand_over(bytes, io);
        }
        if exhausted && !retried && io.has_feature(VIRTIO_NET_F_MRG_RXBUF) {
            self.held = bytes;
            self.starved = true;
            return Ok(Step::Starved);
        }
        Ok(Step::Dropped)
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

    fn copy_in(&self, bytes: usize, ram: &GuestRam) {
        let mut frame = self.bounce.get(..bytes).unwrap_or_default();
        for chain in &self.posted {
            frame = frame.get(chain.write_at(ram, 0, frame)..).unwrap_or_default();
        }
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
