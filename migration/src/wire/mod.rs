//! The wire format: a plain preamble, then frames. The same in a stream and in a file.
//!
//! The preamble can be read before any codec runs, by a program of any version; a [`frame`] says how long it is before
//! anything of it is looked at; a [`message`] is what the two sides say to each other.

pub mod frame;
#[cfg(test)]
mod golden_tests;
pub mod message;
pub mod preamble;

pub use frame::{Frame, FrameKind, Header, Range, RangeKind};
pub use message::{ToSource, ToTarget};
pub use preamble::{Preamble, Purpose};

use std::io;

/// Why bytes are not what they should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Not from this program at all.
    #[error("this is not a Sterna stream or file: it does not begin with Sterna's magic number")]
    Magic,
    /// The first bytes were changed on the way.
    #[error("the first 48 bytes are damaged")]
    Preamble,
    /// A format that this program does not read.
    #[error("it has format version {found}; this program reads {oldest} to {newest}")]
    Version {
        /// What it has.
        found: u16,
        /// Oldest that is read here.
        oldest: u16,
        /// Newest that is read here.
        newest: u16,
    },
    /// A machine of another kind.
    #[error("it is of a machine of architecture {found} (ELF numbers); this host has {here}")]
    Architecture {
        /// What it is.
        found: u16,
        /// What this host is.
        here: u16,
    },
    /// A purpose or frame that is not known, or not at this place.
    #[error("unexpected {what} {found}")]
    Unexpected {
        /// What was looked at: "frame kind".
        what: &'static str,
        /// What was there.
        found: u64,
    },
    /// A number beyond its limit.
    #[error("{what} is {found}, more than {limit}")]
    Limit {
        /// What was looked at.
        what: &'static str,
        /// What was there.
        found: u64,
        /// The most there may be.
        limit: u64,
    },
    /// The contents do not match their checksum.
    #[error("the {what} is damaged: its checksum does not match")]
    Checksum {
        /// What was looked at: "state".
        what: &'static str,
    },
    /// The contents are not what the frame is for.
    #[error("the {what} cannot be decoded")]
    Decode {
        /// What was looked at.
        what: &'static str,
        /// Why.
        #[source]
        source: postcard::Error,
    },
    /// A range of pages outside RAM, empty or out of order.
    #[error("{pages} pages from page {first} do not lie in the machine's RAM of {ram_pages} pages")]
    Range {
        /// First page.
        first: u64,
        /// Pages.
        pages: u64,
        /// Pages there are.
        ram_pages: u64,
    },
    /// The section list.
    #[error("the state is malformed")]
    Sections(#[from] crate::section::SectionError),
    /// Reading or writing.
    #[error("{attempt}")]
    Io {
        /// What was tried: "reading from the peer".
        attempt: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl WireError {
    /// Wraps the cause of a failed `attempt`.
    pub fn io(attempt: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { attempt, source }
    }
}

/// Checksum of everything but RAM in a stream: XXH3, 64 bits.
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
