//! When to stop the guest: a pure function of the figures of each round. It knows neither clock nor stream.
//!
//! Stopping now takes a fixed part, measured or estimated, and the time to send what is still dirty at the bandwidth seen so
//! far. As soon as that fits the budget, it is time, unless another round, as short as the stop would be, would leave less than
//! half of it. A guest that dirties memory as fast as it is sent never gets there: then the rounds bring no less. The copy went behind
//! the guest so far, which a busy host makes slow: from there on it no longer steps back. Where that brings no less either, the
//! verdict says so with figures. What follows from that is the user's choice.

use std::fmt;
use std::time::Duration;

/// What a round must bring to count as progress: this part of the best so far, or less.
const PROGRESS: f64 = 0.96;
/// Rounds before which no stall is found: the first sends all of RAM, the second what was dirtied during that long one.
const FREE_ROUNDS: u32 = 2;
/// Rounds that are added to a stop that fits, for a shorter standstill, in a whole move.
const FREE_EXTRAS: u32 = 2;
/// Sending that takes less is not worth one.
const SHORT: Duration = Duration::from_millis(2);
/// What earlier rounds weigh against the latest, by bytes and time: short ones hardly move the bandwidth.
const SMOOTHING: f64 = 0.5;

/// What the user asked for. May change from round to round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest time that the guest may stand still.
    pub max_downtime: Duration,
    /// Longest time before it stops; `None` for any.
    pub timeout: Option<Duration>,
}

/// Figures of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Bytes sent in it.
    pub sent_bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// Bytes that were dirtied meanwhile and are not sent yet.
    pub remaining_bytes: u64,
    /// Downtime that does not depend on them: stopping, state, starting there.
    pub fixed: Duration,
    /// Since the move began.
    pub since_start: Duration,
}

/// Where a move stands after a round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outlook {
    /// What the connections carry; `None` before anything was sent.
    pub bandwidth_bytes_per_s: Option<f64>,
    /// What the guest dirtied in the last round, each page once.
    pub dirty_bytes_per_s: Option<f64>,
    /// Bytes not sent yet.
    pub remaining_bytes: u64,
    /// Downtime if the guest stopped now; `None` where nothing is known of the bandwidth.
    pub expected: Option<Duration>,
    /// Its part that does not depend on what remains.
    pub fixed: Duration,
    /// The longest that it may be.
    pub max_downtime: Duration,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// Another round brings it closer.
    Another,
    /// Stop the guest: it will stand still for about so long.
    StopNow {
        /// How long.
        expected: Duration,
    },
    /// Another round, and all that follow, at ordinary priority: behind the guest it got no closer.
    Press,
    /// So many rounds in a row brought it no closer.
    Stalled {
        /// How many.
        rounds: u32,
    },
    /// The time that the user gave is over.
    TimedOut,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    rounds: u32,
    /// Smoothed: bytes, and the seconds in which they were sent.
    sent: f64,
    seconds: f64,
    best: Option<u64>,
    stalled: u32,
    /// The copy no longer goes behind the guest.
    pressed: bool,
    /// Rounds added although a stop fitted.
    extras: u32,
}

impl Policy {
    /// What follows from `round` under `limits`, and why.
    pub fn judge(&mut self, round: &Round, limits: &Limits) -> (Verdict, Outlook) {
        self.rounds = self.rounds.saturating_add(1);
        let seconds = round.elapsed.as_secs_f64();
        if round.sent_bytes > 0 && seconds > 0.0 {
            self.sent = self.sent * SMOOTHING + round.sent_bytes as f64;
            self.seconds = self.seconds * SMOOTHING + seconds;
        }
        let bandwidth = (self.seconds > 0.0).then(|| self.sent / self.seconds);
        let outlook = Outlook {
            bandwidth_bytes_per_s: bandwidth,
            dirty_bytes_per_s: (seconds > 0.0).then(|| round.remaining_bytes as f64 / seconds),
            remaining_bytes: round.remaining_bytes,
            expected: expected(round.fixed, round.remaining_bytes, bandwidth),
            fixed: round.fixed,
            max_downtime: limits.max_downtime,
        };
        (self.verdict(round, limits, &outlook), outlook)
    }

    fn verdict(&mut self, round: &Round, limits: &Limits, outlook: &Outlook) -> Verdict {
        let closer = self.best.is_none_or(|best| (round.remaining_bytes as f64) < best as f64 * PROGRESS);
        self.best = Some(self.best.unwrap_or(u64::MAX).min(round.remaining_bytes));
        self.stalled = if closer || self.rounds <= FREE_ROUNDS { 0 } else { self.stalled.saturating_add(1) };
        let late = limits.timeout.is_some_and(|timeout| round.since_start >= timeout);
        match outlook.expected {
            Some(expected) if expected <= limits.max_downtime => {
                if late || self.extras == FREE_EXTRAS || !outlook.another_would_halve() {
                    return Verdict::StopNow { expected };
                }
                self.extras += 1;
                Verdict::Another
            }
            _ if late => Verdict::TimedOut,
            _ if self.stalled > 0 && !self.pressed => {
                // What the way carried behind the guest says nothing of what it will carry.
                (self.pressed, self.stalled, self.sent, self.seconds) = (true, 0, 0.0, 0.0);
                Verdict::Press
            }
            _ if self.stalled > 0 => Verdict::Stalled { rounds: self.stalled },
            _ => Verdict::Another,
        }
    }
}

impl Outlook {
    /// Whether a guest that goes on as it did would leave less than half when what remains has been sent, and that is worth it.
    fn another_would_halve(&self) -> bool {
        let (Some(bandwidth), Some(dirty)) = (self.bandwidth_bytes_per_s, self.dirty_bytes_per_s) else { return false };
        let sending = self.remaining_bytes as f64 / bandwidth;
        sending > SHORT.as_secs_f64() && dirty < bandwidth / 2.0
    }
}

/// Downtime if the guest stopped with so much left.
fn expected(fixed: Duration, remaining_bytes: u64, bandwidth: Option<f64>) -> Option<Duration> {
    if remaining_bytes == 0 {
        return Some(fixed);
    }
    let seconds = remaining_bytes as f64 / bandwidth.filter(|bandwidth| *bandwidth > 0.0)?;
    Some(fixed.saturating_add(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)))
}

/// Why it does not get closer: a sentence for people.
impl fmt::Display for Outlook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (allowed, fixed) = (Millis(self.max_downtime), Millis(self.fixed));
        if self.fixed > self.max_downtime {
            return write!(f, "stopping and starting alone takes about {fixed}, and {allowed} are allowed");
        }
        if let (Some(dirty), Some(bandwidth)) = (self.dirty_bytes_per_s, self.bandwidth_bytes_per_s) {
            write!(f, "the guest dirties {}, the link carries {}; ", Rate(dirty), Rate(bandwidth))?;
        }
        match self.expected {
            Some(expected) => {
                write!(f, "stopping now would take about {}, and {allowed} are allowed", Millis(expected))
            }
            None => write!(f, "how long stopping would take is not known yet"),
        }
    }
}

struct Rate(f64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")];
        match units.iter().find(|(factor, _)| self.0 >= *factor * 0.9995) {
            Some((factor, unit)) => write!(f, "{:.1} {unit}", self.0 / factor),
            None => write!(f, "{:.0} B/s", self.0),
        }
    }
}

struct Millis(Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", self.0.as_millis())
    }
}

/// How much of a move is done, for people: never less than it was, and all only when it is over.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    percent: u8,
}

impl Progress {
    /// After `sent_bytes` in all, with so many that are known to remain.
    pub fn update(&mut self, sent_bytes: u64, remaining_bytes: u64) -> u8 {
        let all = u128::from(sent_bytes) + u128::from(remaining_bytes);
        let percent = (u128::from(sent_bytes) * 100).checked_div(all).unwrap_or(0);
        self.percent = self.percent.max(percent.min(99) as u8);
        self.percent
    }

    /// It is over.
    pub fn finish(&mut self) -> u8 {
        self.percent = 100;
        self.percent
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
