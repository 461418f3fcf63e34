//! A command that is running somewhere: its output as it comes, its input, its end.

use crate::{Error, Output, Result, error::tail};
use std::{
    io,
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::{Duration, Instant},
};

/// What a running command says, in order.
pub(crate) enum Event {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Exit(i32),
    Lost(io::Error),
}

/// How a running command is reached.
pub(crate) trait Handle: Send {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn close_stdin(&mut self) -> io::Result<()>;
    /// Kills it with whatever it started; must not fail for one that has ended.
    fn kill(&mut self);
}

/// A running command, on a host or on this machine. Dropping it kills it.
pub struct Running {
    who: String,
    command: String,
    events: Receiver<Event>,
    handle: Box<dyn Handle>,
    stdout: Vec<u8>,
    /// Standard output up to here was returned by `wait_for`.
    consumed: usize,
    stderr: Vec<u8>,
    status: Option<i32>,
}

impl Running {
    pub(crate) fn new(who: String, command: String, events: Receiver<Event>, handle: Box<dyn Handle>) -> Self {
        Self { who, command, events, handle, stdout: Vec::new(), consumed: 0, stderr: Vec::new(), status: None }
    }

    /// Waits until standard output has a line that contains `marker`; returns that line. The next wait starts after it.
    pub fn wait_for(&mut self, marker: &str, limit: Duration) -> Result<String> {
        self.take_until(marker, limit).map(|mut lines| lines.pop().unwrap_or_default())
    }

    /// As [`Self::wait_for`], but returns all lines up to and with the one that contains `marker`.
    pub fn take_until(&mut self, marker: &str, limit: Duration) -> Result<Vec<String>> {
        let deadline = Instant::now() + limit;
        let mut lines = Vec::new();
        loop {
            while let Some(line) = self.next_line() {
                lines.push(line);
                if lines.last().is_some_and(|line| line.contains(marker)) {
                    return Ok(lines);
                }
            }
            if let Some(status) = self.status {
                return Err(self.ended(format!("status {status}"), &format!("a line with {marker:?}")));
            }
            self.pump(deadline, limit, &format!("a line with {marker:?}"))?;
        }
    }

    /// Waits for the next line of standard output; none once the command has ended.
    pub fn line(&mut self, limit: Duration) -> Result<Option<String>> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(line) = self.next_line() {
                return Ok(Some(line));
            }
            if self.status.is_some() {
                return Ok(None);
            }
            self.pump(deadline, limit, "a line")?;
        }
    }

    /// Everything on standard output so far.
    pub fn stdout(&mut self) -> String {
        while let Ok(event) = self.events.try_recv() {
            if self.note(event).is_err() {
                break;
            }
        }
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Writes to its standard input.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) -> Result<()> {
        self.handle.write(bytes.as_ref()).map_err(Error::io(format!("write to `{}` on {}", self.command, self.who)))
    }

    /// Ends its standard input.
    pub fn close_stdin(&mut self) -> Result<()> {
        self.handle.close_stdin().map_err(Error::io(format!("close the input of `{}` on {}", self.command, self.who)))
    }

    /// Waits for its end; returns all that it said.
    pub fn wait(&mut self, limit: Duration) -> Result<Output> {
        self.wait_bytes(limit).map(|(status, stdout)| Output {
            status,
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
        })
    }

    pub(crate) fn wait_bytes(&mut self, limit: Duration) -> Result<(i32, Vec<u8>)> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.status {
                return Ok((status, std::mem::take(&mut self.stdout)));
            }
            self.pump(deadline, limit, "its end")?;
        }
    }

    /// Kills it (SIGKILL) with what it started.
    pub fn kill(&mut self) {
        self.handle.kill();
    }

    /// Host or program, for messages.
    pub fn who(&self) -> &str {
        &self.who
    }

    fn next_line(&mut self) -> Option<String> {
        let rest = self.stdout.get(self.consumed..)?;
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let line = String::from_utf8_lossy(rest.get(..end)?).trim_end_matches('\r').to_owned();
        self.consumed += end + 1;
        Some(line)
    }

    /// Takes one event, or fails at the deadline.
    fn pump(&mut self, deadline: Instant, limit: Duration, what: &str) -> Result<()> {
        match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(event) => self.note(event).map_err(|lost| self.ended(lost.to_string(), what)),
            Err(RecvTimeoutError::Timeout) => {
                Err(Error::Timeout { who: self.program(), what: what.to_owned(), limit, seen: self.seen() })
            }
            Err(RecvTimeoutError::Disconnected) => Err(self.ended("connection lost".into(), what)),
        }
    }

    fn note(&mut self, event: Event) -> io::Result<()> {
        match event {
            Event::Stdout(bytes) => self.stdout.extend(bytes),
            Event::Stderr(bytes) => self.stderr.extend(bytes),
            Event::Exit(status) => self.status = Some(status),
            Event::Lost(error) => return Err(error),
        }
        Ok(())
    }

    fn ended(&self, how: String, what: &str) -> Error {
        Error::Ended { who: self.program(), how, what: what.to_owned(), seen: self.seen() }
    }

    fn program(&self) -> String {
        format!("`{}` on {}", self.command, self.who)
    }

    fn seen(&self) -> String {
        tail(&format!("{}{}", String::from_utf8_lossy(&self.stdout), String::from_utf8_lossy(&self.stderr)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.handle.kill();
        }
    }
}
