//! One connection's incoming frames: a RAM frame's table is checked as a whole before a byte of it lands in RAM.

use super::socket::Socket;
use super::{StreamError, peer_text};
use crate::pages::{PAGE_BYTES, PageSet, Run};
use crate::ram::Ram;
use crate::wire::WireError;
use crate::wire::frame::{
    self, Frame, HEADER_BYTES, Header, MAX_DATA_PAGES, MAX_RANGES, RANGE_BYTES, Range, RangeKind,
};
use std::io::{self, Read};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What came in so far, for whoever watches.
#[derive(Debug, Default)]
pub struct Counters {
    /// Passes that have ended.
    pub passes: AtomicU32,
    /// Bytes of RAM frames.
    pub bytes: AtomicU64,
    /// Pages with contents.
    pub pages: AtomicU64,
    /// Pages said to be zeros.
    pub zero_pages: AtomicU64,
}

/// Where pages land; all connections share it.
pub(super) struct Landing {
    pub(super) ram: Ram,
    received: Mutex<PageSet>,
    pub(super) counters: Counters,
}

impl Landing {
    pub(super) fn new(ram: Ram) -> Self {
        let received = Mutex::new(PageSet::none(ram.pages()));
        Self { ram, received, counters: Counters::default() }
    }

    /// Pages that have contents.
    pub(super) fn received(&self) -> MutexGuard<'_, PageSet> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes pages zeros. Those that never came are already, and stay absent.
    fn clear(&self, run: Run) -> Result<(), StreamError> {
        let mut received = self.received();
        for part in received.runs_in(run) {
            self.ram.discard(part).map_err(|source| StreamError::Memory {
                attempt: "letting go",
                first: part.first,
                pages: part.pages,
                source,
            })?;
        }
        received.remove(run);
        Ok(())
    }
}

/// How a wait for the next frame ended.
pub(super) enum Opening {
    /// With a header.
    Header(Header),
    /// The connection ended between two frames.
    Closed,
    /// Nothing came in its time.
    Silent(io::Error),
}

/// See the module. Its buffers are used again for every frame.
pub(super) struct Inbox {
    pub(super) number: usize,
    pub(super) socket: Socket,
    table: Vec<u8>,
    ranges: Vec<Range>,
    data: Vec<Run>,
}

impl Inbox {
    pub(super) fn new(number: usize, socket: Socket) -> Self {
        let table = vec![0; MAX_RANGES * RANGE_BYTES];
        Self { number, socket, table, ranges: Vec::with_capacity(MAX_RANGES), data: Vec::with_capacity(MAX_RANGES) }
    }

    /// An error on this connection.
    pub(super) fn error(&self, source: WireError) -> StreamError {
        StreamError::Connection { number: self.number, source }
    }

    /// Waits for a frame.
    pub(super) fn open(&self) -> Result<Opening, StreamError> {
        let mut bytes = [0; HEADER_BYTES];
        let mut socket = &self.socket;
        let done = loop {
            match socket.read(&mut bytes) {
                Ok(0) => return Ok(Opening::Closed),
                Ok(done) => break done,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(Opening::Silent(error)),
                Err(error) => return Err(self.error(WireError::io("reading a frame")(error))),
            }
        };
        let rest = socket.read_exact(&mut bytes[done..]).map_err(WireError::io("reading a frame"));
        let header = rest.and_then(|()| Header::decode(&bytes)).map_err(|source| self.error(source))?;
        Ok(Opening::Header(header))
    }

    /// The rest of a frame that is not one of RAM; a failure is an error.
    pub(super) fn rest(&self, header: Header) -> Result<Frame, StreamError> {
        let frame = frame::read_contents(&mut &self.socket, header).map_err(|source| self.error(source))?;
        match header.kind {
            frame::FrameKind::Failure => Err(peer_text(&frame.contents)),
            _ => Ok(frame),
        }
    }

    /// The rest of a RAM frame.
    pub(super) fn land(&mut self, header: Header, landing: &Landing) -> Result<(), StreamError> {
        let table = &mut self.table[..header.count as usize * RANGE_BYTES]; // within its limit
        let read = (&self.socket).read_exact(table).map_err(WireError::io("reading a table of pages"));
        read.map_err(|source| StreamError::Connection { number: self.number, source })?;
        let data_pages = self.check(header, landing.ram.pages()).map_err(|source| self.error(source))?;
        let zeros = self.ranges.iter().filter(|range| range.kind == RangeKind::Zero);
        let mut zero_pages = 0;
        for range in zeros {
            zero_pages += range.run.pages;
            landing.clear(range.run)?;
        }
        let read = landing.ram.read_from(&self.socket, &self.data).map_err(|error| self.socket.explain_read(error));
        read.map_err(WireError::io("reading pages")).map_err(|source| self.error(source))?;
        if data_pages > 0 {
            let mut received = landing.received();
            self.data.iter().for_each(|run| received.insert(*run));
        }
        landing.counters.bytes.fetch_add(HEADER_BYTES as u64 + header.length, Ordering::Relaxed);
        landing.counters.pages.fetch_add(data_pages, Ordering::Relaxed);
        landing.counters.zero_pages.fetch_add(zero_pages, Ordering::Relaxed);
        Ok(())
    }

    /// Decodes the table and holds it against the header and RAM. Says how many pages follow.
    fn check(&mut self, header: Header, ram_pages: u64) -> Result<u64, WireError> {
        if header.flags != 0 {
            return Err(WireError::Unexpected { what: "flags of a frame of pages", found: header.flags.into() });
        }
        let (entries, _) = self.table[..header.count as usize * RANGE_BYTES].as_chunks::<RANGE_BYTES>();
        self.ranges.clear();
        for entry in entries {
            self.ranges.push(Range::decode(entry, ram_pages)?);
        }
        self.data.clear();
        self.data.extend(self.ranges.iter().filter(|range| range.kind == RangeKind::Data).map(|range| range.run));
        // At most 512 numbers of 32 bits.
        let pages: u64 = self.data.iter().map(|run| run.pages).sum();
        if pages > MAX_DATA_PAGES {
            return Err(WireError::Limit {
                what: "the number of pages in a frame",
                found: pages,
                limit: MAX_DATA_PAGES,
            });
        }
        if header.length != u64::from(header.count) * RANGE_BYTES as u64 + pages * PAGE_BYTES {
            return Err(WireError::Unexpected { what: "length of a frame of pages", found: header.length });
        }
        Ok(pages)
    }
}
