//! The most bytes a second that a move may send: one budget for all connections, changeable while they wait.

use crate::pages::PAGE_BYTES;
use crate::wire::frame::MAX_DATA_PAGES;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Least limit, bytes a second: below it a peer would think that nobody is there any more.
pub const MIN_LIMIT: u64 = 64 << 10;
/// What was not used for longer than this, in seconds, is lost; no frame takes longer.
const BURST_S: f64 = 0.05;

/// See the module. Frames are paid when they go out: a balance below zero is waited for by whoever comes next.
#[derive(Debug)]
pub struct Throttle {
    bucket: Mutex<Bucket>,
    changed: Condvar,
}

#[derive(Debug)]
struct Bucket {
    limit: Option<u64>,
    /// Bytes that may be sent now.
    balance: f64,
    /// When that was so.
    at: Instant,
}

impl Throttle {
    /// At most `limit` bytes a second; `None` for as fast as it goes.
    pub fn new(limit: Option<u64>) -> Self {
        let bucket = Bucket { limit: limit.map(at_least), balance: 0.0, at: Instant::now() };
        Self { bucket: Mutex::new(bucket), changed: Condvar::new() }
    }

    /// Another limit, from now on.
    pub fn set(&self, limit: Option<u64>) {
        let mut bucket = self.lock();
        bucket.refill();
        bucket.limit = limit.map(at_least);
        // What is owed was measured by the old limit: no more than the new one pays for in a moment.
        let most = bucket.limit.map_or(0.0, |limit| limit as f64 * BURST_S);
        bucket.balance = bucket.balance.clamp(-most, most);
        self.changed.notify_all();
    }

    /// The limit now, bytes a second.
    pub fn limit(&self) -> Option<u64> {
        self.lock().limit
    }

    /// Most pages of a frame, so that each of `connections` sends often enough.
    pub(super) fn frame_pages(&self, connections: usize) -> u64 {
        let limit = self.lock().limit.map(|limit| limit as f64 * BURST_S / connections as f64);
        limit.map_or(MAX_DATA_PAGES, |bytes| (bytes as u64 / PAGE_BYTES).clamp(1, MAX_DATA_PAGES))
    }

    /// Waits until `bytes` may go out, or `stop` is set and [`Self::wake`] called.
    pub(super) fn take(&self, bytes: u64, stop: &AtomicBool) {
        let mut bucket = self.lock();
        while let Some(limit) = bucket.limit
            && !stop.load(Ordering::Acquire)
        {
            bucket.refill();
            if bucket.balance >= 0.0 {
                bucket.balance -= bytes as f64;
                break;
            }
            let until = Duration::from_secs_f64(-bucket.balance / limit as f64);
            bucket = self.changed.wait_timeout(bucket, until).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Makes whoever waits look at `stop`.
    pub(super) fn wake(&self) {
        let _bucket = self.lock();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Bucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn at_least(limit: u64) -> u64 {
    limit.max(MIN_LIMIT)
}

impl Bucket {
    fn refill(&mut self) {
        let now = Instant::now();
        if let Some(limit) = self.limit.map(|limit| limit as f64) {
            let earned = now.duration_since(self.at).as_secs_f64() * limit;
            self.balance = (self.balance + earned).min(limit * BURST_S);
        }
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    static GO: AtomicBool = AtomicBool::new(false);

    /// Seconds that `frames` of `bytes` take from each of `threads`.
    fn seconds(throttle: &Throttle, threads: usize, frames: usize, bytes: u64) -> f64 {
        let start = Instant::now();
        thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| (0..frames).for_each(|_| throttle.take(bytes, &GO)));
            }
        });
        start.elapsed().as_secs_f64()
    }

    #[test]
    fn the_rate_is_kept_whoever_sends() {
        // 50 MB at 100 MB/s, less the last frame of each, which is not waited for. Never faster; on a busy machine slower.
        for threads in [1, 4] {
            let throttle = Throttle::new(Some(100_000_000));
            let took = seconds(&throttle, threads, 50 / threads, 1_000_000);
            assert!((0.43..2.0).contains(&took), "{threads} threads: {took} s");
        }
    }

    #[test]
    fn what_was_not_used_does_not_pile_up() {
        let throttle = Throttle::new(Some(100_000_000));
        thread::sleep(Duration::from_millis(300));
        assert!(seconds(&throttle, 1, 20, 1_000_000) > 0.13);
    }

    #[test]
    fn a_new_limit_and_a_stop_wake_whoever_waits() {
        let (throttle, stop) = (Throttle::new(Some(0)), AtomicBool::new(false));
        assert_eq!(throttle.limit(), Some(MIN_LIMIT));
        for end in [true, false] {
            let start = Instant::now();
            throttle.set(Some(0));
            throttle.take(1 << 40, &stop);
            thread::scope(|scope| {
                let waits = scope.spawn(|| throttle.take(1, &stop));
                if end {
                    throttle.set(None);
                } else {
                    stop.store(true, Ordering::Release);
                    throttle.wake();
                }
                waits.join().unwrap();
            });
            assert!(start.elapsed() < Duration::from_secs(60));
        }
    }

    #[test]
    fn frames_are_short_where_the_limit_is_low() {
        let pages = |limit, connections| Throttle::new(limit).frame_pages(connections);
        assert_eq!(pages(None, 64), MAX_DATA_PAGES);
        assert_eq!(pages(Some(MIN_LIMIT), 1), 1);
        assert_eq!(pages(Some(100 << 20), 2), 640);
    }
}
