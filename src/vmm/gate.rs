//! Where vCPU threads stand still: a rendezvous that one side closes, waits at, and opens.
//!
//! It refuses to know KVM. Whoever closes the gate must then make the threads look (see [`super::kick`]).

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Run the guest.
    Run,
    /// Stand still.
    Pause,
    /// End the thread.
    Exit,
}

/// The rendezvous of one machine's vCPU threads.
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    wanted: Wanted,
    /// Threads that stand still now.
    parked: u32,
    /// Threads that cannot go on.
    ended: u32,
}

impl Gate {
    /// A gate in the state `wanted`, with no thread at it.
    pub fn new(wanted: Wanted) -> Self {
        Self { state: Mutex::new(State { wanted, parked: 0, ended: 0 }), changed: Condvar::new() }
    }

    /// Says what is wanted from now on.
    pub fn set(&self, wanted: Wanted) {
        self.lock().wanted = wanted;
        self.changed.notify_all();
    }

    /// What is wanted now.
    pub fn wanted(&self) -> Wanted {
        self.lock().wanted
    }

    /// Called by a vCPU thread: stands still while a pause is wanted, then says what is wanted instead.
    pub fn pass(&self) -> Wanted {
        self.park_while(|wanted| wanted == Wanted::Pause)
    }

    /// Called by a vCPU thread that cannot go on: stands still until the thread is to end.
    pub fn park_for_good(&self) {
        self.lock().ended += 1;
        self.park_while(|wanted| wanted != Wanted::Exit);
    }

    /// Whether a thread cannot go on: the guest has reset or powered off the machine, or has died.
    pub fn has_ended(&self) -> bool {
        self.lock().ended > 0
    }

    fn park_while(&self, still: impl Fn(Wanted) -> bool) -> Wanted {
        let mut state = self.lock();
        if !still(state.wanted) {
            return state.wanted;
        }
        state.parked += 1;
        self.changed.notify_all();
        while still(state.wanted) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        state.wanted
    }

    /// Waits until `threads` threads stand still; says whether they do within `timeout`.
    pub fn wait_parked(&self, threads: u32, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        while state.parked < threads {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The state stays whole whatever happens to a holder: each change is one assignment.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn threads_park_and_go_on() {
        let gate = Arc::new(Gate::new(Wanted::Pause));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let gate = Arc::clone(&gate);
                thread::spawn(move || gate.pass())
            })
            .collect();
        assert!(gate.wait_parked(3, LONG));
        gate.set(Wanted::Run);
        for thread in threads {
            assert_eq!(thread.join().unwrap(), Wanted::Run);
        }
        assert_eq!(gate.pass(), Wanted::Run);
        assert!(!gate.wait_parked(1, Duration::from_millis(1)));
    }

    #[test]
    fn a_thread_that_cannot_go_on_counts_as_parked_until_it_may_end() {
        let gate = Arc::new(Gate::new(Wanted::Run));
        let thread = thread::spawn({
            let gate = Arc::clone(&gate);
            move || gate.park_for_good()
        });
        assert!(gate.wait_parked(1, LONG));
        assert!(gate.has_ended());
        gate.set(Wanted::Pause);
        assert!(gate.wait_parked(1, LONG));
        gate.set(Wanted::Exit);
        thread.join().unwrap();
    }
}
