//! How fast this machine's time stamp counter runs: what QEMU's software CPU shows to its guests as theirs.
#![expect(unsafe_code, reason = "no safe wrapper of RDTSC")]

use std::{
    arch::x86_64::_rdtsc,
    thread,
    time::{Duration, Instant},
};

/// Long against what reading two clocks one after the other takes.
const SPAN: Duration = Duration::from_millis(100);
const TRIES: u32 = 5;

/// Its frequency, kHz: of several tries the one whose readings lay closest together.
pub(crate) fn khz() -> u64 {
    let tries = (0..TRIES).map(|_| {
        let (first, last) = (reading(), {
            thread::sleep(SPAN);
            reading()
        });
        let elapsed = last.at.duration_since(first.at).as_nanos().max(1);
        let ticks = u128::from(last.ticks.wrapping_sub(first.ticks));
        (first.took + last.took, u64::try_from(ticks * 1_000_000 / elapsed).unwrap_or(u64::MAX))
    });
    tries.min().map_or(0, |(_, khz)| khz)
}

struct Reading {
    ticks: u64,
    at: Instant,
    took: Duration,
}

fn reading() -> Reading {
    let at = Instant::now();
    // SAFETY: RDTSC reads a counter, and every x86-64 CPU has it.
    let ticks = unsafe { _rdtsc() };
    Reading { ticks, at, took: at.elapsed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (one, other) = (khz(), khz());
        assert!(one > 100_000 && one.abs_diff(other) < one / 100, "{one} and {other} kHz");
    }
}
