//! Messages of the program to standard error, each with its time and level.

use crate::clock;
use log::{LevelFilter, Log, Metadata, Record};
use std::io::{IsTerminal, Write, stderr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

/// Environment variable that sets the level: off, error, warn, info, debug or trace.
pub const VARIABLE: &str = "STERNA_LOG";

struct StandardError;

/// Standard error is a terminal. It may be in raw mode, where a newline does not return the carriage.
static TERMINAL: AtomicBool = AtomicBool::new(false);

impl Log for StandardError {
    /// virtio-queue logs what a guest does wrong each time it does it, so that a guest could fill the host's log; the
    /// transport says it once.
    fn enabled(&self, metadata: &Metadata) -> bool {
        !metadata.target().starts_with("virtio_queue")
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let time = clock::rfc3339(SystemTime::now());
        let end_of_line = if TERMINAL.load(Ordering::Relaxed) { "\r\n" } else { "\n" };
        let line = format!("{time} {:5} {}{end_of_line}", record.level(), record.args());
        let _ = stderr().lock().write_all(line.as_bytes()); // there is nowhere left to complain
    }

    fn flush(&self) {}
}

/// Logs from here on at `default`, or at what `STERNA_LOG` says, raised by each of `verbose`. Called before threads, and again where
/// standard error has become another file.
pub fn start(default: LevelFilter, verbose: u8) {
    let asked = std::env::var(VARIABLE).ok();
    let level = level(asked.as_deref(), default, verbose);
    TERMINAL.store(stderr().is_terminal(), Ordering::Relaxed);
    let first = log::set_logger(&StandardError).is_ok();
    log::set_max_level(level);
    if first && let Some(text) = asked.filter(|text| text.parse::<LevelFilter>().is_err()) {
        log::warn!("{VARIABLE} is '{text}'; it must be off, error, warn, info, debug or trace");
    }
}

fn level(asked: Option<&str>, default: LevelFilter, verbose: u8) -> LevelFilter {
    let base = asked.and_then(|text| text.parse().ok()).unwrap_or(default);
    (0..verbose).fold(base, |level, _| level.increment_severity())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_fill_the_log_through_virtio_queue() {
        let enabled = |target| StandardError.enabled(&Metadata::builder().target(target).build());
        assert!(!enabled("virtio_queue::queue"));
        assert!(enabled("sterna::vmm"));
    }

    #[test]
    fn the_variable_sets_the_level_and_each_v_raises_it() {
        assert_eq!(level(None, LevelFilter::Warn, 0), LevelFilter::Warn);
        assert_eq!(level(None, LevelFilter::Warn, 1), LevelFilter::Info);
        assert_eq!(level(Some("error"), LevelFilter::Warn, 2), LevelFilter::Info);
        assert_eq!(level(Some("nonsense"), LevelFilter::Warn, 0), LevelFilter::Warn);
        assert_eq!(level(Some("off"), LevelFilter::Info, 0), LevelFilter::Off);
        assert_eq!(level(None, LevelFilter::Warn, 9), LevelFilter::Trace);
    }
}
