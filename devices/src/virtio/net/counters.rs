//! What went through an interface, readable while the device runs.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// One direction, since the device was built. Bytes are Ethernet frames without the virtio-net header.
#[derive(Debug, Default)]
pub struct Direction {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

/// Both directions, seen from the guest.
#[derive(Debug, Default)]
pub struct Counters {
    /// To the guest.
    pub received: Direction,
    /// From the guest.
    pub sent: Direction,
}

/// A reading of one [`Direction`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that arrived.
    pub frames: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that did not.
    pub dropped: u64,
}

impl Direction {
    /// Reads the three counters, each by itself.
    pub fn get(&self) -> Traffic {
        Traffic {
            frames: self.frames.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            dropped: self.dropped.load(Relaxed),
        }
    }

    pub(super) fn count(&self, bytes: u64) {
        self.frames.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn count_dropped(&self) {
        self.dropped.fetch_add(1, Relaxed);
    }
}
