//! Descriptor chains, checked whole before a device sees one (virtio 1.2, section 2.7.4).
//!
//! A [`Chain`] is owned and bounded: every segment lies in guest RAM, device-readable segments come before
//! device-writable ones, and the sums of lengths do not overflow. What breaks these rules is a [`Fault`].

use super::GuestRam;
use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress};
use vm_memory::{GuestMemoryBackend as _, GuestMemory as _};

/// Why a device cannot go on with what the driver gave it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The chain refers back to itself, or to more descriptors than the ring has.
    #[error("queue {queue}: descriptor chain at {head} loops or is longer than the ring")]
    Loop {
        /// Queue index.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// A segment lies outside guest RAM.
    #[error("queue {queue}: descriptor chain at {head} names {length} bytes at {address:#x}, outside guest RAM")]
    OutsideRam {
        /// Queue index.
        queue: usize,
        /// First descriptor.
        head: u16,
        /// Guest physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// A device-readable segment follows a device-writable one.
    #[error("queue {queue}: descriptor chain at {head} has a readable segment after a writable one")]
    Order {
        /// Queue index.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// The lengths add up to more than 4 GiB.
    #[error("queue {queue}: descriptor chain at {head} is longer than 4 GiB")]
    TooLong {
        /// Queue index.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// The ring itself is unusable.
    #[error("queue {queue}: the ring is unusable")]
    Ring {
        /// Queue index.
        queue: usize,
        /// What virtio-queue found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A request of the right shape with contents the device cannot follow.
    #[error("queue {queue}: {what}")]
    Malformed {
        /// Queue index.
        queue: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The host side failed in a way no request can be blamed for.
    #[error("{attempt}")]
    Backend {
        /// What was attempted.
        attempt: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// One piece of a chain, inside guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: GuestAddress,
    /// Bytes, may be zero.
    pub length: u32,
}

/// A checked descriptor chain. Give it back with [`super::Io::complete`].
#[derive(Debug)]
pub struct Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    pub head: u16,
    /// Segments the device may read, in order.
    pub readable: SmallVec<[Segment; 4]>,
    /// Segments the device may write, in order.
    pub writable: SmallVec<[Segment; 4]>,
}
