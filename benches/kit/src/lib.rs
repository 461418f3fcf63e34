//! What the benchmarks share: medians, the table, warm memory, a guest watched from outside, Sterna and QEMU driven as their users do.
//!
//! A benchmark is blocks in which each side does everything once, in an order that changes; what is compared is compared within a
//! block, because the machine is another one a minute later.
#![expect(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a benchmark that cannot measure has failed")]

mod console;
mod cpu;
mod probe;
mod qemu;
mod report;
mod statistics;
mod sterna;
mod warm;

pub use console::{Console, Line, Tick, longest_gap_ms, sign_of_life};
pub use probe::{Network, write_direct};
pub use qemu::Qemu;
pub use report::{Goal, Report};
pub use statistics::Summary;
pub use sterna::{Guest, Host, MoveOutcome};
pub use warm::WarmMemory;

use std::time::Duration;

/// Longest wait for anything that is measured or prepared.
pub const LIMIT: Duration = Duration::from_secs(180);

/// Milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Blocks that the command line asks for: cargo passes `--bench`; a number is how many.
pub fn blocks(default: usize) -> usize {
    std::env::args().filter_map(|argument| argument.parse().ok()).next().unwrap_or(default)
}
