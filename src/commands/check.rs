//! `sterna migrate --check`: whether a move would work, and how long it would take, without touching the guest.

use super::Output;
use super::progress::millis;
use crate::control::client::Client;
use crate::control::movement::{CheckReport, Failure, MigrateOrder};
use crate::error::Error;
use crate::registry::Registry;
use crate::units::format_size;
use std::fmt::Write;
use std::time::Duration;

/// How long a check may take: it measures the way, which may be slow.
const CHECK_PATIENCE: Duration = Duration::from_secs(120);

/// Checks, and prints what was found. What would refuse the move is an error.
pub fn check(registry: &Registry, name: &str, order: MigrateOrder, output: Output) -> Result<(), Error> {
    let report = Client::connect(registry, name, CHECK_PATIENCE)?.check_move(order, CHECK_PATIENCE)?;
    output.result(&report, |report| text(name, report))?;
    if report.problems.is_empty() {
        return Ok(());
    }
    let unreachable = (report.failure == Some(Failure::Unreachable)).then_some(report.target);
    Err(Error::CheckFailed { name: name.to_owned(), problems: report.problems.len(), unreachable })
}

fn text(name: &str, report: &CheckReport) -> String {
    let CheckReport { target, host, program, bandwidth, present, dirty_rate, clock_skew, .. } = report;
    let mut text = String::new();
    let mut row = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<12}{value}"); // writing to a String cannot fail
    };
    row("machine", format!("{name} to {target}"));
    if let Some(host) = host {
        row("target", format!("{host}, sterna {program}"));
        row("way", format!("{}/s", format_size(*bandwidth)));
        row("clocks", format!("differ by {}", millis(clock_skew.unsigned_abs())));
    }
    row("memory", format!("{} to carry, dirties {}/s", format_size(*present), format_size(*dirty_rate)));
    for (label, foretold) in [("live", &report.live), ("quick", &report.quick)] {
        if let Some(foretold) = foretold {
            let words = match foretold.downtime {
                Some(downtime) => format!("{} in all, {} standstill", millis(foretold.total), millis(downtime)),
                None => "does not converge: the guest dirties memory faster than the way carries it".to_owned(),
            };
            row(label, words);
        }
    }
    for warning in &report.warnings {
        row("warning", warning.clone());
    }
    for problem in &report.problems {
        row("refused", problem.clone());
    }
    if report.problems.is_empty() {
        let ends = report.live.is_none_or(|live| live.downtime.is_some());
        let way = if ends { "" } else { ", with --mode quick, or live with --on-timeout pause" };
        row("verdict", format!("it can move{way}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::movement::Foretold;

    #[test]
    fn a_verdict_names_what_ends_where_a_live_move_would_not() {
        let verdict = |downtime| {
            let report = CheckReport { live: Some(Foretold { total: 9, downtime }), ..CheckReport::default() };
            text("web", &report).lines().last().unwrap_or_default().to_owned()
        };
        assert_eq!(verdict(Some(3)), "verdict     it can move");
        assert_eq!(verdict(None), "verdict     it can move, with --mode quick, or live with --on-timeout pause");
    }
}
