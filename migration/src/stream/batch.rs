//! A RAM frame in the making: ranges are gathered until it is full, then it goes out with one call.

use super::socket::Socket;
use crate::pages::{PAGE_BYTES, Run};
use crate::ram::Ram;
use crate::wire::frame::{FrameKind, HEADER_BYTES, Header, MAX_RANGES, RANGE_BYTES, Range, RangeKind};
use std::io;

/// See the module. Its buffers are used again for every frame.
#[derive(Default)]
pub(super) struct Batch {
    ranges: Vec<Range>,
    /// Those of kind data.
    data: Vec<Run>,
    data_pages: u64,
    /// Pages that were looked at, those that need not be sent included.
    seen_pages: u64,
    zero_pages: u64,
    head: Vec<u8>,
}

impl Batch {
    /// Starts anew.
    pub(super) fn clear(&mut self) {
        self.ranges.clear();
        self.data.clear();
        (self.data_pages, self.seen_pages, self.zero_pages) = (0, 0, 0);
    }

    /// Whether nothing is to be sent.
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether another page may not fit; `most_pages` carry data at most.
    pub(super) fn is_full(&self, most_pages: u64) -> bool {
        self.data_pages >= most_pages || self.ranges.len() >= MAX_RANGES
    }

    /// A page that need not be sent.
    pub(super) fn skip(&mut self) {
        self.seen_pages += 1;
        self.zero_pages += 1;
    }

    /// Takes `page` in; there is room.
    pub(super) fn push(&mut self, page: u64, kind: RangeKind) {
        self.seen_pages += 1;
        match kind {
            RangeKind::Zero => self.zero_pages += 1,
            RangeKind::Data => {
                self.data_pages += 1;
                match self.data.last_mut() {
                    Some(run) if run.end() == page => run.pages += 1,
                    _ => self.data.push(Run { first: page, pages: 1 }),
                }
            }
        }
        match self.ranges.last_mut() {
            Some(last) if last.kind == kind && last.run.end() == page && last.run.pages < u32::MAX.into() => {
                last.run.pages += 1;
            }
            _ => self.ranges.push(Range { run: Run { first: page, pages: 1 }, kind }),
        }
    }

    /// Pages looked at, and of them zeros, since it was cleared.
    pub(super) fn pages(&self) -> (u64, u64) {
        (self.seen_pages, self.zero_pages)
    }

    /// Bytes of the frame.
    pub(super) fn bytes(&self) -> u64 {
        (HEADER_BYTES + self.ranges.len() * RANGE_BYTES) as u64 + self.data_pages * PAGE_BYTES
    }

    /// Sends the frame.
    pub(super) fn write(&mut self, ram: &Ram, socket: &Socket) -> io::Result<()> {
        let length = self.bytes() - HEADER_BYTES as u64;
        let header = Header { kind: FrameKind::Ram, flags: 0, count: self.ranges.len() as u32, length };
        self.head.clear();
        self.head.extend(header.encode());
        self.ranges.iter().for_each(|range| range.encode(&mut self.head));
        ram.write_to(socket, &self.head, &self.data).map_err(|error| socket.explain_write(error))
    }
}
