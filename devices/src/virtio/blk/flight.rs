//! One request on its way: which operations it takes, one after the other, and what their results mean.
//!
//! Plain decisions on results: it neither starts operations nor sees a ring, so its tests need no kernel.

use super::image::{Alignment, MAX_ALIGNMENT};
use super::op::{Done, Op};
use super::request::{Request, Status, Verb};
use super::sys::{Bounce, Buffers};
use crate::virtio::GuestRam;
use crate::virtio::chain::{Segment, slice};
use rustix::fs::FallocateFlags;
use smallvec::SmallVec;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

/// Most bytes that go through a bounce buffer at once; a multiple of every alignment.
const CHUNK_BYTES: u64 = 256 << 10;
const _: () = assert!(CHUNK_BYTES.is_multiple_of(MAX_ALIGNMENT));
/// Times an interrupted operation is begun again before it counts as failed.
const MAX_RETRIES: u32 = 100;

/// What is the same for all requests of a disk.
#[derive(Clone)]
pub struct Ground {
    /// Guest RAM, kept mapped by every operation on it.
    pub ram: Arc<GuestRam>,
    /// What O_DIRECT wants.
    pub alignment: Alignment,
    /// A block device rather than a file.
    pub block_device: bool,
    /// The driver did not negotiate FLUSH: a change is durable before it is reported (virtio 1.2, 5.2.6.2).
    pub through: bool,
}

/// Where a request stands.
enum Step {
    /// Straight between the image and guest RAM.
    Direct,
    /// fallocate in one of the ways that zero a range.
    Allocate(FallocateFlags),
    /// Discard or flush: one operation.
    Once,
    /// Through a bounce buffer, a chunk at a time.
    Bounce(Chunk),
    /// The flush after a change without a write cache.
    Harden,
}

/// The part of the image in the bounce buffer: aligned, so that it may begin before and end after the request.
#[derive(Clone, Default)]
struct Chunk {
    range: Range<u64>,
    /// Bytes of it moved so far.
    moved: u64,
    /// It is being read to be written back with the request's part changed.
    filling: bool,
}

/// See the module.
pub struct Flight {
    /// Names the chain in the used ring.
    pub head: u16,
    /// Where the status byte goes.
    pub status: GuestAddress,
    /// What is asked.
    pub verb: Verb,
    /// Bytes of the image, the request's own.
    pub range: Range<u64>,
    /// Writable bytes before the status byte.
    room: u64,
    data: SmallVec<[Segment; 4]>,
    /// Bytes of `range` that are finished.
    done: u64,
    step: Step,
    retries: u32,
}

/// What follows an operation.
pub enum Next {
    /// Another one.
    Start(Op),
    /// The answer, and what went wrong on the host.
    Answer(Status, Option<io::Error>),
}

impl Flight {
    /// Takes off with a request that was not refused.
    pub fn new(head: u16, verb: Verb, request: Request, ground: &Ground) -> Self {
        let range = request.offset..request.offset + request.length;
        let step = match verb {
            Verb::Flush => Step::Once,
            Verb::Discard if ground.block_device => Step::Once,
            Verb::Discard | Verb::Zero { unmap: true } => {
                Step::Allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)
            }
            Verb::Zero { .. } => Step::Allocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
            _ if is_aligned(&request.data, &range, ground) => Step::Direct,
            _ => Step::Bounce(Chunk::default()),
        };
        let (status, room, data) = (request.status, request.room, request.data);
        Self { head, status, verb, range, room, data, done: 0, step, retries: 0 }
    }

    /// Whether it holds a bounce buffer.
    pub fn bounces(&self) -> bool {
        matches!(self.step, Step::Bounce(_))
    }

    /// The bytes of the image that no other change may touch meanwhile, if it may have to read some of them to write
    /// them back: those of the O_DIRECT blocks that it changes in part.
    pub fn exclusive(&self, ground: &Ground) -> Option<Range<u64>> {
        let whole = (self.range.start | self.range.end).is_multiple_of(ground.alignment.offset);
        (!whole && self.changes()).then(|| self.blocks(ground))
    }

    /// Whether it changes the image.
    pub fn changes(&self) -> bool {
        matches!(self.verb, Verb::Write | Verb::Zero { .. } | Verb::Discard)
    }

    /// The O_DIRECT blocks it touches.
    pub fn blocks(&self, ground: &Ground) -> Range<u64> {
        align_down(self.range.start, ground)..align_up(self.range.end, ground)
    }

    /// Bytes written into the chain's writable part, from its start (virtio 1.2, 2.7.8).
    pub fn written(&self, status: Status) -> u32 {
        let all = self.room == 0 || (self.verb == Verb::Read && status == Status::Ok);
        // A chain holds less than 4 GiB.
        if all { u32::try_from(self.room + 1).unwrap_or(u32::MAX) } else { 0 }
    }

    /// The first operation.
    pub fn first(&mut self, ground: &Ground) -> Op {
        self.proceed(ground)
    }

    /// What follows the end of the operation that was in flight.
    pub fn after(&mut self, done: Done, ground: &Ground) -> Next {
        let Done { op, result, .. } = done;
        match result {
            Ok(moved) => self.advance(op, u64::from(moved), ground),
            Err(error) => self.failed(op, error, ground),
        }
    }

    fn failed(&mut self, op: Op, error: io::Error, ground: &Ground) -> Next {
        let code = error.raw_os_error();
        // Cancelled: the thread that submitted it has ended.
        let again = matches!(code, Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED));
        if again && self.retries < MAX_RETRIES {
            self.retries += 1;
            return Next::Start(op);
        }
        if code == Some(libc::EOPNOTSUPP) && self.verb == Verb::Discard {
            return Next::Answer(Status::Unsupported, None);
        }
        // A block device says EINVAL to parts of its blocks, which may be larger than those that the guest was told of.
        // To keep the contents is one of the ways to discard them.
        if code == Some(libc::EINVAL) && ground.block_device && self.verb == Verb::Discard {
            return Next::Answer(Status::Ok, None);
        }
        // Zeroing parts has other ways.
        let cannot = code == Some(libc::EOPNOTSUPP) || (ground.block_device && code == Some(libc::EINVAL));
        if cannot && let Step::Allocate(way) = self.step {
            // Zeroing has another way on any image: by ZERO_RANGE, else by writing.
            self.step = if way.contains(FallocateFlags::PUNCH_HOLE) {
                Step::Allocate(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE)
            } else {
                Step::Bounce(Chunk::default())
            };
            return Next::Start(self.proceed(ground));
        }
        if let (Step::Direct, Verb::Read) = (&self.step, self.verb) {
            // A read that fails may have moved some of its bytes.
            mark_dirty(&ground.ram, slice(&self.data, self.done, u64::MAX));
        }
        Next::Answer(Status::IoError, Some(error))
    }

    fn advance(&mut self, op: Op, moved: u64, ground: &Ground) -> Next {
        match &mut self.step {
            Step::Harden => Next::Answer(Status::Ok, None),
            Step::Once | Step::Allocate(_) => self.finish(ground),
            Step::Direct => {
                if self.verb == Verb::Read {
                    mark_dirty(&ground.ram, slice(&self.data, self.done, moved));
                }
                // A short transfer goes on at the edge of an O_DIRECT block; the request begins at one.
                let length = self.range.end - self.range.start;
                let end = self.done + moved;
                let edge = if end >= length { length } else { align_down(end, ground) };
                if edge <= self.done {
                    return Next::Answer(Status::IoError, Some(io::ErrorKind::UnexpectedEof.into()));
                }
                self.done = edge;
                if self.done == length { self.finish(ground) } else { Next::Start(self.proceed(ground)) }
            }
            Step::Bounce(chunk) => {
                let end = align_down(chunk.moved + moved, ground);
                let bounce = op.into_buffers().and_then(Buffers::into_bounce).filter(|_| end > chunk.moved);
                let Some(bounce) = bounce else {
                    return Next::Answer(Status::IoError, Some(io::ErrorKind::UnexpectedEof.into()));
                };
                let chunk = Chunk { moved: end, ..chunk.clone() };
                self.chunk_moved(chunk, bounce, ground)
            }
        }
    }

    /// The operation of the step it has come to.
    fn proceed(&mut self, ground: &Ground) -> Op {
        let length = self.range.end - self.range.start;
        match &self.step {
            Step::Direct => {
                let rest = slice(&self.data, self.done, length - self.done);
                self.transfer(self.range.start + self.done, Buffers::guest(&ground.ram, rest), ground)
            }
            Step::Allocate(mode) => Op::Allocate { mode: *mode, offset: self.range.start, length },
            Step::Once if self.verb == Verb::Discard => Op::Discard { offset: self.range.start, length },
            Step::Once | Step::Harden => Op::Flush,
            Step::Bounce(_) => self.next_chunk(None, ground),
        }
    }

    fn finish(&mut self, ground: &Ground) -> Next {
        // Writes ask for this themselves; what a discard leaves is undefined anyway.
        if ground.through && matches!(self.verb, Verb::Zero { .. }) {
            self.step = Step::Harden;
            return Next::Start(self.proceed(ground));
        }
        Next::Answer(Status::Ok, None)
    }

    fn transfer(&self, offset: u64, buffers: Buffers, ground: &Ground) -> Op {
        let filling = matches!(&self.step, Step::Bounce(chunk) if chunk.filling);
        if self.verb == Verb::Read || filling {
            Op::Read { offset, into: buffers }
        } else {
            Op::Write { offset, from: buffers, through: ground.through }
        }
    }

    /// Begins with the next piece of the request that fits the bounce buffer.
    fn next_chunk(&mut self, spare: Option<Bounce>, ground: &Ground) -> Op {
        let at = self.range.start + self.done;
        let start = align_down(at, ground);
        let blocks_end = self.blocks(ground).end;
        let end = blocks_end.min(start + CHUNK_BYTES);
        // A whole chunk is at most CHUNK_BYTES.
        let bounce = spare.unwrap_or_else(|| {
            Bounce::new((blocks_end - start).min(CHUNK_BYTES) as usize, ground.alignment.memory as usize)
        });
        let filling = self.changes() && (start < at || end > self.range.end);
        self.chunk_ready(Chunk { range: start..end, moved: 0, filling }, bounce, ground)
    }

    /// Starts a chunk's next transfer, for a write with the request's bytes in place.
    fn chunk_ready(&mut self, chunk: Chunk, mut bounce: Bounce, ground: &Ground) -> Op {
        if self.changes() && !chunk.filling && chunk.moved == 0 {
            self.copy_in(&chunk, &mut bounce, &ground.ram);
        }
        let offset = chunk.range.start + chunk.moved;
        let size = chunk.range.end - chunk.range.start;
        let buffers = Buffers::bounce(bounce, chunk.moved as usize, size as usize);
        self.step = Step::Bounce(chunk);
        self.transfer(offset, buffers, ground)
    }

    /// Goes on after a transfer between image and bounce buffer.
    fn chunk_moved(&mut self, mut chunk: Chunk, mut bounce: Bounce, ground: &Ground) -> Next {
        if chunk.moved < chunk.range.end - chunk.range.start {
            return Next::Start(self.chunk_ready(chunk, bounce, ground));
        }
        if chunk.filling {
            (chunk.filling, chunk.moved) = (false, 0);
            return Next::Start(self.chunk_ready(chunk, bounce, ground));
        }
        if self.verb == Verb::Read {
            self.copy_out(&chunk, &mut bounce, &ground.ram);
        }
        self.done = self.own(&chunk).end - self.range.start;
        if self.range.start + self.done == self.range.end {
            return self.finish(ground);
        }
        Next::Start(self.next_chunk(Some(bounce), ground))
    }

    /// The request's own bytes in `chunk`.
    fn own(&self, chunk: &Chunk) -> Range<u64> {
        chunk.range.start.max(self.range.start + self.done)..chunk.range.end.min(self.range.end)
    }

    fn copy_in(&self, chunk: &Chunk, bounce: &mut Bounce, ram: &GuestRam) {
        let own = self.own(chunk);
        let mut at = (own.start - chunk.range.start) as usize;
        if let Verb::Zero { .. } = self.verb {
            let end = (own.end - chunk.range.start) as usize;
            bounce.bytes().get_mut(at..end).unwrap_or_default().fill(0);
        }
        for segment in slice(&self.data, self.done, own.end - own.start) {
            let Some(part) = bounce.bytes().get_mut(at..at + segment.length as usize) else { return };
            // Cannot fail: the segment was checked against this RAM.
            let _copied = ram.read_slice(part, segment.address);
            at += segment.length as usize;
        }
    }

    fn copy_out(&self, chunk: &Chunk, bounce: &mut Bounce, ram: &GuestRam) {
        let own = self.own(chunk);
        let mut at = (own.start - chunk.range.start) as usize;
        for segment in slice(&self.data, self.done, own.end - own.start) {
            let Some(part) = bounce.bytes().get(at..at + segment.length as usize) else { return };
            // As above. This also marks the pages dirty.
            let _copied = ram.write_slice(part, segment.address);
            at += segment.length as usize;
        }
    }
}

impl fmt::Display for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.verb {
            Verb::Read => "read",
            Verb::Write => "write",
            Verb::Flush => return write!(f, "flush"),
            Verb::Identify => "identify",
            Verb::Discard => "discard",
            Verb::Zero { .. } => "write-zeroes",
        };
        write!(f, "{verb} of {} bytes at byte {}", self.range.end - self.range.start, self.range.start)
    }
}

/// Whether O_DIRECT takes these buffers at this place as they are. Guest RAM is mapped at page boundaries, so that a
/// guest physical address is aligned as its host address is, up to a page, which is the most an image asks for.
fn is_aligned(data: &[Segment], range: &Range<u64>, ground: &Ground) -> bool {
    let Alignment { memory, offset } = ground.alignment;
    range.start.is_multiple_of(offset)
        && data.iter().all(|segment| segment.address.0 % memory == 0 && u64::from(segment.length) % offset == 0)
}

fn align_down(offset: u64, ground: &Ground) -> u64 {
    offset - offset % ground.alignment.offset
}

/// Cannot overflow: the image's size is a multiple of the alignment, and offsets lie inside.
fn align_up(offset: u64, ground: &Ground) -> u64 {
    offset.next_multiple_of(ground.alignment.offset)
}

/// Notes in the bitmap what the kernel wrote into guest RAM past vm-memory.
fn mark_dirty(ram: &GuestRam, segments: impl Iterator<Item = Segment>) {
    for segment in segments {
        if let Ok(slices) = ram.get_slices(segment.address, segment.length as usize, Permissions::Write) {
            slices.map_while(Result::ok).for_each(|slice| slice.bitmap().mark_dirty(0, slice.len()));
        }
    }
}

#[cfg(test)]
#[path = "flight_tests.rs"]
mod tests;
