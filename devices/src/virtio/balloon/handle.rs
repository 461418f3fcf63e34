//! The host's side of a balloon: what it asks for, and what the guest last said.

use super::discard::PAGE_BYTES;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Names of the statistics by tag (virtio 1.2, section 5.5.6.4), as QEMU and libvirt print them.
const NAMES: [&str; 10] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free-memory",
    "total-memory",
    "available-memory",
    "disk-caches",
    "hugetlb-allocations",
    "hugetlb-failures",
];

/// What device and handle share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Shared {
    /// Pages the host wants in the balloon (`num_pages`).
    pub target_pages: u32,
    /// Pages the driver says are in it (`actual`).
    pub actual_pages: u32,
    /// Last value of each statistic, by tag.
    pub stats: [Option<u64>; NAMES.len()],
    /// How many times statistics came.
    pub stats_updates: u64,
    /// The host waits for statistics.
    pub stats_wanted: bool,
    /// The target changed and the driver was not told.
    pub target_news: bool,
    /// Bytes given back through free page reporting.
    pub reported_bytes: u64,
}

/// Asks a running balloon for things, from any thread.
#[derive(Clone, Debug)]
pub struct BalloonHandle {
    pub(super) shared: Arc<Mutex<Shared>>,
    pub(super) wake: Arc<EventFd>,
}

/// A reading of the balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Bytes the host wants back.
    pub target_bytes: u64,
    /// Bytes the driver says it gave back.
    pub actual_bytes: u64,
    /// Statistics that the driver keeps, by name: counts, or bytes where the name says memory, caches or swap.
    pub stats: Vec<(&'static str, u64)>,
    /// How many times statistics came: an increase answers [`BalloonHandle::request_stats`], also across a move.
    pub stats_updates: u64,
    /// Bytes given back through free page reporting since the driver started; a page counts every time.
    pub reported_bytes: u64,
}

impl BalloonHandle {
    /// Asks the guest to give `bytes` back, rounded down to pages; it does so as far and as fast as it can.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        let mut shared = lock(&self.shared);
        shared.target_news |= shared.target_pages != pages;
        shared.target_pages = pages;
        drop(shared);
        self.wake();
    }

    /// Asks the guest for fresh statistics; they come when it answers.
    pub fn request_stats(&self) {
        lock(&self.shared).stats_wanted = true;
        self.wake();
    }

    /// What is known now.
    pub fn snapshot(&self) -> BalloonStatus {
        let shared = lock(&self.shared).clone();
        BalloonStatus {
            target_bytes: u64::from(shared.target_pages) * PAGE_BYTES,
            actual_bytes: u64::from(shared.actual_pages) * PAGE_BYTES,
            stats: NAMES.iter().zip(shared.stats).filter_map(|(name, value)| Some((*name, value?))).collect(),
            stats_updates: shared.stats_updates,
            reported_bytes: shared.reported_bytes,
        }
    }

    fn wake(&self) {
        // The counter can only refuse near 2^64, when the event is pending anyway.
        let _pending = self.wake.write(1);
    }
}

/// Plain fields cannot be left half-changed, so a panic elsewhere does not spoil them.
pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
