//! A Linux guest seen through its serial console: the line protocol of `resources/guest/init` with `sterna.job=agent`.

use crate::{Error, Output, Result, Running};
use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// Every line that the guest's init means for us starts so.
const MARK: &str = "STERNA-GUEST";

/// A guest whose serial console is the standard input and output of a running command (`sterna run --serial stdio`, QEMU).
pub struct Guest {
    console: Running,
}

impl Guest {
    /// Waits until the guest on this console takes commands.
    pub fn ready(mut console: Running, limit: Duration) -> Result<Self> {
        console.wait_for(&format!("{MARK} agent ready"), limit)?;
        Ok(Self { console })
    }

    /// Takes over a console of a guest that has taken commands before, as after a move. What it said before is passed over.
    pub fn attach(console: Running, limit: Duration) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mut guest = Self { console };
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        guest.console.write(format!("echo here $(({number}))-{}\n", std::process::id()))?;
        guest.console.wait_for(&format!("here {number}-{}", std::process::id()), limit)?;
        guest.console.wait_for(&format!("{MARK} rc="), limit)?;
        Ok(guest)
    }

    /// Runs one line of shell in the guest. Both its outputs come in `stdout`, with what else the console said meanwhile.
    pub fn run(&mut self, line: &str, limit: Duration) -> Result<Output> {
        self.console.write(format!("{line}\n"))?;
        let marker = format!("{MARK} rc=");
        let mut lines = self.console.take_until(&marker, limit)?;
        let last = lines.pop().unwrap_or_default();
        // Output without a final newline stands before the marker.
        let (rest, status) = last.split_once(&marker).unwrap_or((&last, ""));
        let status = status.trim().parse().unwrap_or(-1);
        if !rest.is_empty() {
            lines.push(rest.to_owned());
        }
        Ok(Output { status, stdout: lines.join("\n"), stderr: String::new() })
    }

    /// Runs one line of shell that must exit with 0; returns what it said, trimmed.
    pub fn check(&mut self, line: &str, limit: Duration) -> Result<String> {
        let output = self.run(line, limit)?;
        if output.status == 0 {
            return Ok(output.stdout.trim().to_owned());
        }
        let who = format!("guest on {}", self.console.who());
        Err(Error::Failed { who, command: line.to_owned(), status: output.status, output: output.stdout })
    }

    /// Sends a line and does not wait for its end: for commands that end the guest or go on for long.
    pub fn start(&mut self, line: &str) -> Result<()> {
        self.console.write(format!("{line}\n"))
    }

    /// The console, to wait for other lines or for the end.
    pub fn console(&mut self) -> &mut Running {
        &mut self.console
    }
}
