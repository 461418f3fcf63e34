//! Guests of every kind against the policy: a table of rounds each, with what must follow from them.

use super::*;

const MB: u64 = 1_000_000;
const FIXED: Duration = Duration::from_millis(10);
const LIMITS: Limits = Limits { max_downtime: Duration::from_millis(50), timeout: Some(Duration::from_secs(600)) };

/// A guest that has `dirty(round)` MB left after each round, on a link of `link` MB/s; RAM of 1000 MB. One letter a verdict:
/// Another, Press, Stop, a number of stalled rounds, Timed out.
fn run(link: u64, rounds: u32, limits: &Limits, dirty: impl Fn(u32) -> u64) -> (String, Outlook) {
    let (mut policy, mut verdicts, mut sent, mut since_start) =
        (Policy::default(), String::new(), 1000, Duration::ZERO);
    for number in 1.. {
        let elapsed = Duration::from_secs_f64(sent as f64 / link as f64);
        since_start += elapsed;
        let remaining = dirty(number);
        let round =
            Round { sent_bytes: sent * MB, elapsed, remaining_bytes: remaining * MB, fixed: FIXED, since_start };
        let (verdict, outlook) = policy.judge(&round, limits);
        match verdict {
            Verdict::Another => verdicts.push('A'),
            Verdict::Press => verdicts.push('P'),
            Verdict::StopNow { .. } => verdicts.push('S'),
            Verdict::Stalled { rounds } => verdicts.push_str(&rounds.to_string()),
            Verdict::TimedOut => verdicts.push('T'),
        }
        if number == rounds || verdicts.ends_with(['S', 'T']) {
            return (verdicts, outlook);
        }
        sent = remaining;
    }
    unreachable!()
}

#[test]
fn guests_of_every_kind() {
    let by_round = |table: &'static [u64]| move |round: u32| table[(round as usize - 1).min(table.len() - 1)];
    // The budget is 40 ms of sending: 40 MB at 1000 MB/s.
    for (name, link, dirty, verdicts) in [
        ("converging", 1000, by_round(&[400, 160, 64, 26, 10, 4]), "AAAAAS"),
        ("a working set that is dirty again at once", 1000, by_round(&[30]), "AS"),
        ("a slow writer", 1000, by_round(&[30, 1]), "AS"),
        ("idle", 1000, by_round(&[1]), "S"),
        ("nothing dirty", 1000, by_round(&[0]), "S"),
        ("exploding", 1000, by_round(&[300, 600, 900, 1000]), "AAP123"),
        ("as fast as the link", 1000, by_round(&[500]), "AAP123"),
        ("a little closer each time is not closer", 1000, by_round(&[500, 490, 480, 475, 470]), "AAP123"),
        ("bursty", 1000, by_round(&[200, 100, 300, 80, 39, 39]), "AAPAAS"),
        ("worse in the second round, which is free", 1000, by_round(&[100, 300, 90, 39]), "AAAAS"),
        ("slow link", 10, by_round(&[400, 160, 64, 26, 10, 4]), "AAAAAA"),
    ] {
        assert_eq!(run(link, 6, &LIMITS, dirty).0, verdicts, "{name}");
    }
}

#[test]
fn the_users_time_has_an_end_and_a_fitting_stop_comes_first() {
    let limits = Limits { timeout: Some(Duration::from_millis(2100)), ..LIMITS };
    // 1 s, then half a second each: the fourth round ends after 2.5 s.
    assert_eq!(run(1000, 9, &limits, |_| 500).0, "AAPT");
    assert_eq!(run(1000, 9, &limits, |round| if round == 4 { 39 } else { 500 }).0, "AAPS");
    assert_eq!(run(1000, 6, &Limits { timeout: None, ..LIMITS }, |_| 500).0, "AAP123");
}

#[test]
fn without_a_bandwidth_only_nothing_left_is_a_reason_to_stop() {
    let round = |remaining_bytes| Round {
        sent_bytes: 0,
        elapsed: Duration::ZERO,
        remaining_bytes,
        fixed: FIXED,
        since_start: FIXED,
    };
    let (verdict, outlook) = Policy::default().judge(&round(1), &LIMITS);
    assert_eq!((verdict, outlook.expected, outlook.bandwidth_bytes_per_s), (Verdict::Another, None, None));
    assert_eq!(outlook.to_string(), "how long stopping would take is not known yet");
    assert_eq!(Policy::default().judge(&round(0), &LIMITS).0, Verdict::StopNow { expected: FIXED });
}

#[test]
fn a_budget_that_changes_counts_at_once() {
    let mut policy = Policy::default();
    let second = Duration::from_secs(1);
    let round =
        Round { sent_bytes: 1000 * MB, elapsed: second, remaining_bytes: 500 * MB, fixed: FIXED, since_start: second };
    for verdict in [Verdict::Another, Verdict::Another, Verdict::Press] {
        assert_eq!(policy.judge(&round, &LIMITS).0, verdict);
    }
    assert_eq!(policy.judge(&round, &LIMITS).0, Verdict::Stalled { rounds: 1 });
    let wide = Limits { max_downtime: Duration::from_millis(510), ..LIMITS };
    assert_eq!(policy.judge(&round, &wide).0, Verdict::StopNow { expected: wide.max_downtime });
    let narrow = Limits { max_downtime: Duration::from_millis(509), ..LIMITS };
    assert_eq!(policy.judge(&round, &narrow).0, Verdict::Stalled { rounds: 3 });
}

#[test]
fn a_stall_is_told_with_figures() {
    let (_, outlook) = run(1000, 3, &LIMITS, |_| 1300);
    let text = "the guest dirties 1.0 GB/s, the link carries 1.0 GB/s; stopping now would take about 1310 ms, and 50 ms are allowed";
    assert_eq!(outlook.to_string(), text);
    let tight = Limits { max_downtime: Duration::from_millis(5), ..LIMITS };
    let (verdicts, outlook) = run(1000, 4, &tight, |_| 0);
    assert_eq!(verdicts, "AAP1");
    assert_eq!(outlook.to_string(), "stopping and starting alone takes about 10 ms, and 5 ms are allowed");
}

#[test]
fn a_short_round_hardly_moves_the_bandwidth() {
    let mut policy = Policy::default();
    let second = Duration::from_secs(1);
    let long =
        Round { sent_bytes: 1000 * MB, elapsed: second, remaining_bytes: 500 * MB, fixed: FIXED, since_start: second };
    policy.judge(&long, &LIMITS);
    // A thousandth of the bandwidth, for a moment.
    let short = Round { sent_bytes: 1000, elapsed: Duration::from_millis(1), ..long };
    let bandwidth = policy.judge(&short, &LIMITS).1.bandwidth_bytes_per_s.unwrap();
    assert!((0.99e9..1.01e9).contains(&bandwidth), "{bandwidth}");
}

#[test]
fn numbers_out_of_this_world_do_no_harm() {
    let mut policy = Policy::default();
    let huge = Duration::MAX;
    let round = Round { sent_bytes: 1, elapsed: huge, remaining_bytes: u64::MAX, fixed: huge, since_start: huge };
    assert_eq!(policy.judge(&round, &LIMITS).0, Verdict::TimedOut);
    assert_eq!(policy.judge(&round, &LIMITS).1.expected, Some(huge));
    assert_eq!(Progress::default().update(u64::MAX, u64::MAX), 50);
}

#[test]
fn the_percentage_never_falls_and_ends_only_at_the_end() {
    let mut progress = Progress::default();
    let steps = [(0, 0, 0), (0, 100, 0), (50, 50, 50), (100, 400, 50), (300, 200, 60), (500, 0, 99), (500, 500, 99)];
    for (sent, remaining, percent) in steps {
        assert_eq!(progress.update(sent, remaining), percent);
    }
    assert_eq!(progress.finish(), 100);
    assert_eq!(progress.update(0, 1), 100);
}
