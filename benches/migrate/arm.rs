//! One move of one guest by one monitor.

use super::Case;
use serde_json::Value;
use std::thread;
use std::time::{Duration, Instant};
use sterna_bench::{Console, Guest, Host, Qemu, Tick, WarmMemory, longest_gap_ms, ms};

/// What moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The program of this tree.
    Sterna,
    /// QEMU's smallest machine.
    Qemu,
}

/// What one move showed.
#[derive(Debug)]
pub struct Sample {
    /// From the order to its end.
    pub total_ms: f64,
    /// Standstill, by the monitor.
    pub reported_ms: f64,
    /// By the guest's clock.
    pub guest_gap_ms: f64,
    /// By the host's.
    pub outside_gap_ms: f64,
    /// The longest gap in the guest's ticks in as long a time before the move: what of the above is noise.
    pub quiet_gap_ms: f64,
    /// Bandwidth of the first pass; Sterna only.
    pub first_pass_mib_per_s: f64,
    /// How much less the guest wrote while it was copied; only of one that tells.
    pub slowed_percent: f64,
    /// CPU time of both processes from the order to its end, the guest's included.
    pub cpu_ms: f64,
}

/// How long the guest ticks before it is moved.
const SETTLE: Duration = Duration::from_millis(500);

impl Sample {
    /// Between the monitor's word and the guest's.
    pub fn disagreement_ms(&self) -> f64 {
        (self.reported_ms - self.guest_gap_ms).abs()
    }

    fn of(began: Instant, ended: Instant, ticks: &[Tick]) -> Self {
        let (guest_gap_ms, outside_gap_ms) = longest_gap_ms(ticks, began, ended);
        let (quiet_gap_ms, _) = longest_gap_ms(ticks, began - (ended - began).min(SETTLE), began);
        Self {
            total_ms: ms(ended - began),
            reported_ms: f64::NAN,
            guest_gap_ms,
            outside_gap_ms,
            quiet_gap_ms,
            first_pass_mib_per_s: f64::NAN,
            slowed_percent: slowed_percent(ticks, began, ended),
            cpu_ms: f64::NAN,
        }
    }
}

/// Moves the guest of `case` once. `None` where the guest verified its memory, after `verify_s`, before the move was over.
pub fn measure(kind: Kind, case: &Case, verify_s: u64) -> Option<Sample> {
    let dir = tempfile::TempDir::with_prefix("sterna-bench-").unwrap();
    let console = Console::follow(dir.path().join("serial"));
    match kind {
        Kind::Sterna => sterna(case, &case.guest(verify_s), &console),
        Kind::Qemu => qemu(case, &case.guest(verify_s), &console),
    }
}

fn sterna(case: &Case, guest: &Guest, console: &Console) -> Option<Sample> {
    let program = env!("CARGO_BIN_EXE_sterna");
    let (mut source, mut target) = (Host::new(program), Host::new(program));
    let address = target.receive();
    source.boot(guest, console);
    let warm = settle(case, console);
    let before = source.booted_cpu_ms();
    let budget = format!("{}ms", case.budget_ms);
    drop(warm);
    let moved = source.migrate(&address, &["--max-downtime", &budget, "--timeout", "30s", "--on-timeout", "pause"]);
    let cpu_ms = target.arrived_cpu_ms() + source.last_cpu_ms() - before;
    let ticks = after(console, moved.ended)?;
    let sample = Sample::of(moved.began, moved.ended, &ticks);
    let (reported_ms, first_pass_mib_per_s) = (moved.downtime_ms(), moved.first_pass_mib_per_s());
    Some(Sample { reported_ms, first_pass_mib_per_s, cpu_ms, ..sample })
}

fn qemu(case: &Case, guest: &Guest, console: &Console) -> Option<Sample> {
    let mut source = Qemu::start(guest, console, None);
    let address = Qemu::free_address();
    let mut target = Qemu::start(guest, console, Some(&address));
    target.wait_ready();
    source.prepare_move(case.budget_ms);
    let warm = settle(case, console);
    let before = source.cpu_ms() + target.cpu_ms();
    drop(warm);
    let (began, ended, told) = source.migrate(&address);
    let cpu_ms = source.cpu_ms() + target.cpu_ms() - before;
    let ticks = after(console, ended)?;
    let reported_ms = told["downtime"].as_f64().unwrap_or(f64::NAN);
    assert_eq!(told["status"], Value::from("completed"));
    Some(Sample { reported_ms, cpu_ms, ..Sample::of(began, ended, &ticks) })
}

/// Waits until the guest has touched its memory and ticked for a while. Gives as much warm memory as the target will touch, to be let go
/// just before the move.
fn settle(case: &Case, console: &Console) -> WarmMemory {
    console.wait_for(&["tick "]);
    let warm = WarmMemory::touch(case.touched_mib + 64);
    thread::sleep(SETTLE);
    warm
}

/// The ticks, once the guest has verified its memory after a move that was over at `ended`.
fn after(console: &Console, ended: Instant) -> Option<Vec<Tick>> {
    let word = console.wait_for(&["verified ", "MISMATCH ", "FAIL "]);
    assert!(word.text.starts_with("verified "), "the guest's memory is wrong after the move: {}", word.text);
    thread::sleep(Duration::from_millis(50)); // the tick after
    (word.at > ended).then(|| console.ticks())
}

/// How much less the guest wrote between the order and the longest gap than just before.
fn slowed_percent(ticks: &[Tick], began: Instant, ended: Instant) -> f64 {
    let window: Vec<_> = ticks.iter().filter(|tick| tick.at >= began && tick.at <= ended).collect();
    let longest = window.iter().zip(window.iter().skip(1)).max_by_key(|(a, b)| b.guest_us.saturating_sub(a.guest_us));
    let earlier = ticks.iter().find(|tick| tick.at + SETTLE >= began);
    let (Some(first), Some((last, _)), Some(earlier)) = (window.first(), longest, earlier) else { return f64::NAN };
    let rate =
        |from: &Tick, to: &Tick| (to.writes - from.writes) as f64 / to.guest_us.saturating_sub(from.guest_us) as f64;
    (1.0 - rate(first, last) / rate(earlier, first)) * 100.0
}
