//! A move under way, as its mover and those who watch it share it. Refuses to know what a mover does.

use super::machine::lock;
use crate::control::movement::{Limits, MoveStatus, Phase, Resolution};
use crate::events::{Event, EventBus};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use sterna_migration::PAGE_BYTES;
use sterna_migration::stream::Throttle;

/// How often those who watch are told.
const TICK: Duration = Duration::from_millis(200);
/// Share of the percentage that belongs to what is not memory, so that 100 means done.
const MOST_PERCENT: u64 = 99;

/// Why a move is called off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Off {
    /// Somebody asked.
    Cancelled,
    /// Its time is over.
    TimedOut,
    /// The guest did something that a move does not survive; the text says what.
    Guest(String),
    /// The guest has ended; the text says how.
    Ended(String),
}

impl std::fmt::Display for Off {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Off::Cancelled => f.write_str("the move was cancelled"),
            Off::TimedOut => f.write_str("the move has taken longer than it may"),
            Off::Guest(what) | Off::Ended(what) => f.write_str(what),
        }
    }
}

/// See the module.
pub struct Movement {
    began: Instant,
    events: Arc<EventBus>,
    state: Mutex<State>,
    /// Something in `state` was decided.
    decided: Condvar,
    /// Set with `State::off`; read between any two pages.
    called_off: AtomicBool,
    /// Bytes sent so far, all passes together.
    sent_bytes: AtomicU64,
    sent_pages: AtomicU64,
    /// Bytes of this pass that are left.
    left_bytes: AtomicU64,
    /// How fast it may send.
    throttle: Arc<Throttle>,
    /// Wakes a mover that waits for the other side, when it is called off.
    waker: Mutex<Option<Box<dyn Fn() + Send>>>,
}

struct State {
    status: MoveStatus,
    off: Option<Off>,
    /// From here on it cannot be called off.
    committed: bool,
    limits: Limits,
    resolution: Option<Resolution>,
    /// The machine here was ended by force while it was not known whether it runs elsewhere.
    abandoned: bool,
    /// The mover has gone.
    over: bool,
    /// When it was last looked at how much had been sent, and how much that was.
    sampled: (Instant, u64),
}

impl Movement {
    /// A move that begins as `status` says, told of on `events`.
    pub fn begin(status: MoveStatus, limits: Limits, events: Arc<EventBus>) -> Arc<Self> {
        let throttle = Arc::new(Throttle::new(limits.max_bandwidth.filter(|limit| *limit > 0)));
        let state = State {
            status,
            off: None,
            committed: false,
            limits,
            resolution: None,
            abandoned: false,
            over: false,
            sampled: (Instant::now(), 0),
        };
        let movement = Arc::new(Self {
            began: Instant::now(),
            events,
            state: Mutex::new(state),
            decided: Condvar::new(),
            called_off: AtomicBool::new(false),
            sent_bytes: AtomicU64::new(0),
            sent_pages: AtomicU64::new(0),
            left_bytes: AtomicU64::new(0),
            throttle,
            waker: Mutex::new(None),
        });
        movement.tell();
        let watched = Arc::downgrade(&movement);
        // Without the thread only the steps between phases are told.
        let ticker = thread::Builder::new().name("move-ticker".into()).spawn(move || {
            while let Some(movement) = watched.upgrade() {
                if movement.wait(TICK, |state| state.over || state.status.phase.is_over()) {
                    return;
                }
                movement.tell();
            }
        });
        if let Err(error) = ticker {
            log::warn!("a move's progress is not told: {error}");
        }
        movement
    }

    /// As it is now.
    pub fn status(&self) -> MoveStatus {
        let mut state = lock(&self.state);
        self.refresh(&mut state);
        state.status.clone()
    }

    fn refresh(&self, state: &mut State) {
        let status = &mut state.status;
        if state.over {
            return;
        }
        status.total_time = millis(self.began.elapsed());
        if !status.incoming {
            status.ram.transferred = self.sent_bytes.load(Ordering::Relaxed);
            status.ram.normal = self.sent_pages.load(Ordering::Relaxed);
            status.ram.remaining = self.left_bytes.load(Ordering::Relaxed);
            let (at, before) = state.sampled;
            if at.elapsed() >= TICK {
                let rate = status.ram.transferred.saturating_sub(before) as f64 / at.elapsed().as_secs_f64();
                status.ram.bandwidth = rate as u64;
                state.sampled = (Instant::now(), status.ram.transferred);
            }
        }
        let whole = status.ram.transferred + status.ram.remaining;
        let percent = match status.phase {
            Phase::Done => 100,
            _ if status.incoming => {
                (status.ram.transferred * MOST_PERCENT).checked_div(status.ram.present).unwrap_or(0).min(MOST_PERCENT)
                    as u8
            }
            _ => (status.ram.transferred * MOST_PERCENT).checked_div(whole).unwrap_or(0) as u8,
        };
        status.percent = status.percent.max(percent);
    }

    /// Tells those who watch.
    fn tell(&self) {
        self.events.publish(Event::Migration(Box::new(self.status())));
    }

    /// Changes the status, and tells.
    pub fn update(&self, change: impl FnOnce(&mut MoveStatus)) {
        change(&mut lock(&self.state).status);
        self.tell();
    }

    /// Changes the status in the stopped window, where nothing may take time: it is told of with the next tick.
    pub fn note(&self, change: impl FnOnce(&mut MoveStatus)) {
        change(&mut lock(&self.state).status);
    }

    /// Enters `phase`.
    pub fn enter(&self, phase: Phase) {
        self.update(|status| status.phase = phase);
    }

    /// Ends it: nothing is told after this but what is asked for.
    pub fn end(&self, change: impl FnOnce(&mut MoveStatus)) {
        let mut state = lock(&self.state);
        self.refresh(&mut state);
        change(&mut state.status);
        if state.status.phase == Phase::Done {
            (state.status.percent, state.status.ram.remaining) = (100, 0);
        }
        state.over = true;
        drop(state);
        *lock(&self.waker) = None;
        self.tell();
        self.decided.notify_all();
    }

    /// Whether its mover has gone.
    pub fn is_over(&self) -> bool {
        lock(&self.state).over
    }

    /// Waits until the mover has gone; says whether it has within `timeout`.
    pub fn wait_over(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| state.over)
    }

    fn wait(&self, timeout: Duration, until: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = lock(&self.state);
        while !until(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.decided.wait_timeout(state, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        true
    }

    /// Calls it off; says whether that is still possible.
    pub fn call_off(&self, why: Off) -> bool {
        let mut state = lock(&self.state);
        if state.committed || state.over {
            return false;
        }
        state.off.get_or_insert(why);
        self.called_off.store(true, Ordering::Release);
        drop(state);
        self.decided.notify_all();
        if let Some(wake) = &*lock(&self.waker) {
            wake();
        }
        true
    }

    /// Calls `wake` when it is called off.
    pub fn wake_with(&self, wake: impl Fn() + Send + 'static) {
        *lock(&self.waker) = Some(Box::new(wake));
    }

    /// Whether it was called off, for those who look often.
    pub fn is_off(&self) -> &AtomicBool {
        &self.called_off
    }

    /// Why it was called off, if it was.
    pub fn off(&self) -> Option<Off> {
        if !self.called_off.load(Ordering::Acquire) {
            return None;
        }
        lock(&self.state).off.clone()
    }

    /// From here on it cannot be called off; says why where it was.
    ///
    /// # Errors
    /// Why it was called off.
    pub fn commit(&self) -> Result<(), Off> {
        let mut state = lock(&self.state);
        match &state.off {
            Some(off) => Err(off.clone()),
            None => {
                state.committed = true;
                Ok(())
            }
        }
    }

    /// It can be called off again, since it came back.
    pub fn uncommit(&self) {
        lock(&self.state).committed = false;
    }

    /// When it was ordered.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// The limits as they are now.
    pub fn limits(&self) -> Limits {
        lock(&self.state).limits.clone()
    }

    /// Changes those limits that `limits` names.
    pub fn set_limits(&self, limits: Limits) {
        let mut state = lock(&self.state);
        state.limits.max_downtime_us = limits.max_downtime_us.or(state.limits.max_downtime_us);
        state.limits.max_bandwidth = limits.max_bandwidth.or(state.limits.max_bandwidth);
        self.throttle.set(state.limits.max_bandwidth.filter(|limit| *limit > 0));
    }

    /// How fast it may send.
    pub fn throttle(&self) -> &Arc<Throttle> {
        &self.throttle
    }

    /// A person's word on a move in doubt.
    pub fn resolve(&self, resolution: Resolution) {
        lock(&self.state).resolution = Some(resolution);
        self.decided.notify_all();
    }

    /// The machine here is ended whatever became of it there; nothing is decided by that.
    pub fn abandon(&self) {
        lock(&self.state).abandoned = true;
        self.decided.notify_all();
    }

    /// Whether the machine here is ended whatever became of it there.
    pub fn is_abandoned(&self) -> bool {
        lock(&self.state).abandoned
    }

    /// Waits for a person's word, at most `timeout`.
    pub fn resolution(&self, timeout: Duration) -> Option<Resolution> {
        self.wait(timeout, |state| state.resolution.is_some() || state.abandoned);
        lock(&self.state).resolution.take()
    }

    /// So much is to be carried over in this pass.
    pub fn begin_pass(&self, bytes: u64) {
        self.left_bytes.store(bytes, Ordering::Relaxed);
    }

    /// So many pages are dealt with, of all that there are.
    pub fn sent_in_all(&self, pages: u64, all: u64) {
        self.sent_pages.store(pages, Ordering::Relaxed);
        self.sent_bytes.store(pages * PAGE_BYTES, Ordering::Relaxed);
        self.left_bytes.store(all.saturating_sub(pages) * PAGE_BYTES, Ordering::Relaxed);
    }

    /// So much was.
    pub fn sent(&self, pages: u64, bytes: u64) {
        self.sent_pages.fetch_add(pages, Ordering::Relaxed);
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        // A pass may find more zeros than it was told of; nothing is left then.
        let less = |left: u64| Some(left.saturating_sub(pages * PAGE_BYTES));
        let _updated = self.left_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

/// Milliseconds, as far as they go.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Microseconds, as far as they go.
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::movement::Kind;

    #[test]
    fn a_move_that_is_done_has_nothing_left_and_says_100_percent() {
        let status = MoveStatus::begin(uuid::Uuid::from_u128(1), 1, Kind::Save, "file".into(), 8 << 20);
        let movement = Movement::begin(status, Limits::default(), Arc::new(EventBus::new("web")));
        movement.begin_pass(3 * PAGE_BYTES);
        movement.sent(1, 17);
        movement.end(|status| status.phase = Phase::Done);
        let status = movement.status();
        assert_eq!((status.percent, status.ram.remaining), (100, 0));
    }
}
