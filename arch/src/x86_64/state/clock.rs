//! The machine's clock: kvmclock's nanoseconds beside the host's wall clock, and how much time a machine slept through.
//!
//! A guest sleeps through its move or its time in a file, and its clocks then show that: kvmclock and all TSCs go on by as much
//! real time as has passed, so that the guest's wall clock is right, and never back. Both hosts' wall clocks decide how much
//! that is. Refuses to know vCPUs: [`Elapsed`] carries to them what they need.

use super::{StateError, read, set};
use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{Cap, VmFd};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The machine's clock at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// kvmclock, nanoseconds.
    pub clock_ns: u64,
    /// The host's wall clock at the same moment, nanoseconds since 1970.
    pub realtime_ns: u64,
}

impl ClockState {
    /// Of the layout above.
    pub const VERSION: u16 = 1;
}

/// How much time a machine did not run, as its clock was told, and what its vCPUs need to be told the same.
#[derive(Debug)]
pub struct Elapsed {
    /// By how much kvmclock was advanced, nanoseconds.
    pub advance_ns: u64,
    /// By how much this host's wall clock is behind the one that the state was saved with, nanoseconds; 0 when it is not. The
    /// guest then sees no time pass instead of time that goes back.
    pub skew_clamped_ns: u64,
    saved_realtime_ns: u64,
    restored: Instant,
    tsc: Mutex<Option<TscMove>>,
}

/// How the TSCs of a machine were moved. The first vCPU decides, so that the others keep their distance to it to the cycle.
#[derive(Clone, Copy, Debug)]
pub(super) struct TscMove {
    /// What was added to each vCPU's saved offset.
    pub shift: u64,
    /// How far the first TSC is behind what it should be.
    pub behind_cycles: u64,
}

/// Saves the clock of a machine that stands still.
///
/// # Errors
/// What KVM refuses.
pub fn save_clock(vm: &VmFd) -> Result<ClockState, StateError> {
    let (realtime_ns, clock) = together(realtime_ns, || vm.get_clock().map_err(read("the machine's clock")))?;
    // KVM reads both at one moment, but only while all TSCs agree.
    let together = clock.flags & KVM_CLOCK_REALTIME != 0;
    Ok(ClockState { clock_ns: clock.clock, realtime_ns: if together { clock.realtime } else { realtime_ns } })
}

/// Sets the clock of a machine that has never run, advanced by the real time that has passed since it was saved.
///
/// # Errors
/// What KVM refuses.
pub fn restore_clock(vm: &VmFd, state: &ClockState) -> Result<Elapsed, StateError> {
    let now_ns = realtime_ns();
    let mut clock = kvm_clock_data { clock: state.clock_ns, ..Default::default() };
    // From Linux 5.16 on KVM itself advances the clock, and only forward, so that nothing can come between looking at the wall
    // clock and setting.
    if vm.check_extension_int(Cap::AdjustClock) & KVM_CLOCK_REALTIME.cast_signed() != 0 {
        (clock.flags, clock.realtime) = (KVM_CLOCK_REALTIME, state.realtime_ns);
    } else {
        clock.clock = state.clock_ns.saturating_add(now_ns.saturating_sub(state.realtime_ns));
    }
    vm.set_clock(&clock).map_err(set("the machine's clock"))?;
    let (restored, set_to) = together(Instant::now, || vm.get_clock().map_err(read("the machine's clock")))?;
    Ok(Elapsed {
        advance_ns: set_to.clock.saturating_sub(state.clock_ns),
        skew_clamped_ns: state.realtime_ns.saturating_sub(now_ns),
        saved_realtime_ns: state.realtime_ns,
        restored,
        tsc: Mutex::new(None),
    })
}

impl Elapsed {
    /// How far the vCPUs' TSCs, once restored, are behind what they should be, cycles: more than some thousand where KVM gives its
    /// guests the host's TSC and nothing else (kvm_pvm), and that is younger. A guest that has kvmclock does not mind.
    pub fn tsc_behind_cycles(&self) -> u64 {
        self.tsc.lock().unwrap_or_else(PoisonError::into_inner).map_or(0, |moved| moved.behind_cycles)
    }

    /// How the machine's TSCs are moved: as the first vCPU to ask has worked it out.
    pub(super) fn tsc_move<E>(&self, first: impl FnOnce() -> Result<TscMove, E>) -> Result<TscMove, E> {
        let mut known = self.tsc.lock().unwrap_or_else(PoisonError::into_inner);
        match *known {
            Some(moved) => Ok(moved),
            None => Ok(*known.insert(first()?)),
        }
    }

    /// Nanoseconds of guest time from the moment at which the source's wall clock was `realtime_ns` to now.
    pub(super) fn since(&self, realtime_ns: u64) -> u64 {
        let here_ns = u64::try_from(self.restored.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let guest_now_ns = self.saved_realtime_ns.saturating_add(self.advance_ns).saturating_add(here_ns);
        guest_now_ns.saturating_sub(realtime_ns)
    }
}

/// Attempts to read two clocks together.
const ATTEMPTS: usize = 8;
/// Together enough: as long as KVM takes where nothing comes between.
const TOGETHER: Duration = Duration::from_micros(20);

/// Two clocks as close together as a few attempts get them: a thread may lose its CPU in between, for long on a busy host, and a guest's
/// clock would be wrong by that for ever. `first` is the earlier: the other way round what is saved would leave out the time in
/// between, and go back.
pub(super) fn together<A, B, E>(first: impl Fn() -> A, second: impl Fn() -> Result<B, E>) -> Result<(A, B), E> {
    let attempt = || {
        let began = Instant::now();
        let both = (first(), second()?);
        Ok((began.elapsed(), both))
    };
    let mut best = attempt()?;
    for _ in 1..ATTEMPTS {
        if best.0 <= TOGETHER {
            break;
        }
        let next = attempt()?;
        if next.0 < best.0 {
            best = next;
        }
    }
    Ok(best.1)
}

/// The host's wall clock, nanoseconds since 1970.
pub(super) fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn clocks_that_were_read_apart_are_read_again() {
        let calls = Cell::new(0);
        let second = || {
            calls.set(calls.get() + 1);
            if calls.get() == 1 {
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok::<_, StateError>(Instant::now())
        };
        let (first, second) = together(Instant::now, second).unwrap();
        assert!(calls.get() > 1 && second - first < Duration::from_millis(50), "{:?} apart", second - first);
    }
}
