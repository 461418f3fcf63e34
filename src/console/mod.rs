//! The far end of the guest's serial port: standard input and output, a file, a Unix socket, or nothing.
//!
//! [`Console`] is the input side, run by the event loop; the writer that [`Console::open`] returns with it is the
//! output side, held by the serial port. Nothing here makes the guest wait: output that nobody takes is kept up to a
//! bound and then lost, oldest first, and input waits here, unread, while the guest's FIFO is full. It refuses to
//! know the machine: a wish to stop it is only noted.

pub mod client;
pub mod escape;
pub mod output;
pub mod terminal;

mod input;
mod last_words;

use crate::config::SerialConfig;
use escape::{Escape, Key};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use input::{Got, Input, Pending};
use log::{debug, warn};
use output::{Output, Shared, duplicate};
use rustix::fs::{Mode, OFlags};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use sterna_devices::legacy::Serial;
use sterna_devices::listener::{ListenError, Listener};
use terminal::{Kind, RawTerminal};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What a client of the socket sees first: the end of what was said before.
const REPLAY_BYTES: usize = 64 << 10;
/// What may wait for a slow reader of standard output.
const BACKLOG_BYTES: usize = 1 << 20;
/// How long the end waits for that reader.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

const NOTICE: &str = "The guest's console. Ctrl-] q stops the machine, Ctrl-] h shows the keys.\n";
const HELP: &str = "\r\nCtrl-] q       press the machine's power button; once more: end the guest without asking\r\nCtrl-] h       this help\r\n\
                    Ctrl-] Ctrl-]  send Ctrl-] to the guest\r\n";
const BUSY: &[u8] = b"The console is in use by another client.\r\n";

/// Why a console cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file for the output.
    #[error("cannot open {} for the console's output", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket.
    #[error("cannot offer the console")]
    Listen(#[source] ListenError),
    /// The terminal's mode.
    #[error("cannot put the terminal into raw mode")]
    Terminal(#[source] io::Error),
    /// A descriptor for ourselves.
    #[error("cannot make a descriptor for the console")]
    Descriptor(#[source] io::Error),
}

/// The input side of a console. See the module.
pub struct Console {
    /// Restored when the console is closed.
    terminal: Option<RawTerminal>,
    /// Only a terminal has keys for us.
    escape: Option<Escape>,
    listener: Option<Listener>,
    input: Option<Input>,
    /// Read but not yet in the FIFO.
    pending: Pending,
    serial: Option<Arc<Mutex<Serial>>>,
    output: Shared,
    /// The sink's descriptor while the event loop polls it.
    polled_sink: Option<RawFd>,
    stop_requested: bool,
    /// Written by the output side when its sink blocks or is gone.
    wake: EventFd,
    /// Written by the serial port when it has room again.
    space: EventFd,
}

impl Console {
    /// Opens what `config` names. Give the writer to the serial port, then the port to [`Self::attach`].
    ///
    /// # Errors
    /// See [`Error`]. Nothing is left behind.
    pub fn open(config: &SerialConfig) -> Result<(Self, Box<dyn Write + Send>), Error> {
        match config {
            SerialConfig::Stdio => Self::stdio(),
            SerialConfig::Null => {
                let console = Self::new(0, false)?;
                Ok((console, Box::new(io::sink())))
            }
            SerialConfig::File(path) => {
                let console = Self::new(BACKLOG_BYTES, false)?;
                let file = open_to_append(path).map_err(|source| Error::Open { path: path.into(), source })?;
                console.output.lock().set_sink(file);
                Ok(console.with_writer())
            }
            SerialConfig::Socket(path) => {
                let mut console = Self::new(REPLAY_BYTES, true)?;
                console.listener = Some(Listener::bind(path).map_err(Error::Listen)?);
                Ok(console.with_writer())
            }
        }
    }

    /// Whether [`Self::open`] would work; no file and no socket is there afterwards that was not before.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn try_open(config: &SerialConfig) -> Result<(), Error> {
        match config {
            // A terminal is left alone.
            SerialConfig::Stdio | SerialConfig::Null => Ok(()),
            SerialConfig::Socket(path) => Listener::bind(path).map(drop).map_err(Error::Listen),
            SerialConfig::File(path) => {
                let is_new = !path.exists();
                open_to_append(path).map_err(|source| Error::Open { path: path.into(), source })?;
                if is_new {
                    let _gone_already = fs::remove_file(path);
                }
                Ok(())
            }
        }
    }

    fn new(kept_bytes: usize, replay: bool) -> Result<Self, Error> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::Descriptor);
        let wake = event()?;
        let output = Output::new(kept_bytes, replay, wake.try_clone().map_err(Error::Descriptor)?);
        Ok(Self {
            terminal: None,
            escape: None,
            listener: None,
            input: None,
            pending: Pending::default(),
            serial: None,
            output: Shared::new(output),
            polled_sink: None,
            stop_requested: false,
            wake,
            space: event()?,
        })
    }

    fn with_writer(self) -> (Self, Box<dyn Write + Send>) {
        let writer = self.output.clone();
        (self, Box::new(writer))
    }

    fn stdio() -> Result<(Self, Box<dyn Write + Send>), Error> {
        let mut console = Self::new(BACKLOG_BYTES, false)?;
        let stdout = duplicate(io::stdout()).map_err(Error::Descriptor)?;
        console.output.lock().set_sink(stdout);
        match terminal::kind(io::stdin()) {
            Kind::Background => warn!("started in the background: the guest's console has no input"),
            kind => {
                console.input = Some(Input::new(duplicate(io::stdin()).map_err(Error::Descriptor)?));
                if kind == Kind::Foreground {
                    // Nobody may be there to read the notice.
                    let _closed = io::stderr().write_all(NOTICE.as_bytes());
                    console.terminal = Some(RawTerminal::enter(io::stdin()).map_err(Error::Terminal)?);
                    console.escape = Some(Escape::default());
                }
            }
        }
        Ok(console.with_writer())
    }

    /// Connects input to `serial`, in place of a former port.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn attach(&mut self, serial: Arc<Mutex<Serial>>) -> io::Result<()> {
        let space = self.space.try_clone()?;
        serial.lock().unwrap_or_else(PoisonError::into_inner).set_space_event(space);
        self.serial = Some(serial);
        self.space.write(1)
    }

    /// Whether the user asked to stop the machine since the last call: ask after each round of the event loop, and do
    /// as for SIGTERM.
    pub fn take_stop_request(&mut self) -> bool {
        std::mem::take(&mut self.stop_requested)
    }

    /// Ends it: what the guest said goes out, the terminal is as it was before, the socket is gone.
    pub fn close(&mut self) {
        let mut output = self.output.lock();
        output.drain(DRAIN_LIMIT);
        // A reader that takes nothing is waited for once.
        output.clear_sink();
        drop(output);
        (self.terminal, self.input, self.listener) = (None, None, None);
    }

    /// Bytes of output that were lost so far because nobody took them in time.
    pub fn dropped_bytes(&self) -> u64 {
        self.output.lock().dropped_bytes()
    }

    /// Moves input to the FIFO as far as it has room, and reads on only when it has.
    fn feed(&mut self, ops: &mut EventOps) {
        let Some(serial) = &self.serial else { return };
        loop {
            let moved = {
                let mut serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
                self.pending.consume(|bytes| serial.enqueue(bytes))
            };
            if !moved {
                // The FIFO is full: the port writes `space` when it is not.
                return self.pause_input(ops);
            }
            let Some(input) = &mut self.input else { return };
            if !input.always_ready() {
                return input.watch(ops);
            }
            match input.read() {
                Got::Bytes(bytes) => self.pending.push(bytes),
                Got::Nothing => return,
                Got::End => return self.end_input(ops),
            }
        }
    }

    fn pause_input(&mut self, ops: &mut EventOps) {
        if let Some(input) = &mut self.input {
            input.unwatch(ops);
        }
    }

    fn input_ready(&mut self, ops: &mut EventOps) {
        let Some(input) = &mut self.input else { return };
        match input.read() {
            Got::Bytes(bytes) => {
                let bytes = bytes.to_vec();
                self.take_keys(&bytes);
                self.feed(ops);
            }
            Got::Nothing => {}
            Got::End => self.end_input(ops),
        }
    }

    /// Sorts what a terminal sent into input and commands.
    fn take_keys(&mut self, bytes: &[u8]) {
        let Some(escape) = &mut self.escape else { return self.pending.push(bytes) };
        for byte in bytes {
            match escape.feed(*byte) {
                Key::Pass(byte) => self.pending.push(&[byte]),
                Key::Pending => {}
                Key::Quit => self.stop_requested = true,
                Key::Help => {
                    let _closed = io::stderr().write_all(HELP.as_bytes());
                }
            }
        }
    }

    /// No more input from here. A socket's client may still be listening: it stays until it hangs up.
    fn end_input(&mut self, ops: &mut EventOps) {
        self.pause_input(ops);
        if let Some(input) = &mut self.input {
            input.end();
        }
        if self.listener.is_none() || self.input.as_ref().is_some_and(Input::hung_up) {
            self.drop_client(ops);
        }
    }

    /// Forgets the input, and with it the sink if both are one client.
    fn drop_client(&mut self, ops: &mut EventOps) {
        self.pause_input(ops);
        self.input = None;
        if self.listener.is_some() {
            self.poll_sink(None, ops);
            self.output.lock().clear_sink();
        }
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let client = match self.listener.as_ref().map(Listener::accept) {
            Some(Ok(Some(client))) => client,
            Some(Err(error)) => return warn!("cannot accept a console client: {error}"),
            Some(Ok(None)) | None => return,
        };
        if let Some(input) = &self.input {
            if !input.hung_up() {
                // It may have left already.
                let _left = (&client).write_all(BUSY);
                return;
            }
            self.drop_client(ops);
        }
        match client.try_clone() {
            Ok(reader) => self.welcome(client, reader, ops),
            Err(error) => warn!("cannot serve a console client: {error}"),
        }
    }

    fn welcome(&mut self, client: UnixStream, reader: UnixStream, ops: &mut EventOps) {
        debug!("console client connected");
        self.input = Some(Input::new(reader.into()));
        self.output.lock().set_sink(client.into());
        self.feed(ops);
    }

    /// The sink blocked, became writable, or is gone.
    fn service_output(&mut self, ops: &mut EventOps) {
        let (blocked, alive) = {
            let output = self.output.lock();
            (output.blocked_fd(), output.has_sink())
        };
        self.poll_sink(blocked, ops);
        if !alive && self.listener.is_some() && self.input.is_some() {
            self.drop_client(ops);
        }
    }

    fn sink_ready(&mut self, ops: &mut EventOps) {
        // Before the sink may be closed: a closed descriptor cannot be removed.
        self.poll_sink(None, ops);
        self.output.lock().resume();
        self.service_output(ops);
    }

    fn poll_sink(&mut self, fd: Option<RawFd>, ops: &mut EventOps) {
        if self.polled_sink == fd {
            return;
        }
        if let Some(old) = self.polled_sink.take() {
            let _closed_already = ops.remove(Events::empty_raw(old));
        }
        if let Some(new) = fd {
            match ops.add(Events::new_raw(new, EventSet::OUT)) {
                Ok(()) => self.polled_sink = Some(new),
                Err(error) => warn!("cannot wait for the console's reader: {error}"),
            }
        }
    }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        // The loop is new: a guest's reboot starts another.
        self.polled_sink = None;
        if let Some(input) = &mut self.input {
            input.forget_loop();
        }
        let listener = self.listener.as_ref().map(AsRawFd::as_raw_fd);
        for fd in [Some(self.wake.as_raw_fd()), Some(self.space.as_raw_fd()), listener].into_iter().flatten() {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                warn!("cannot wait for the console: {error}");
            }
        }
        self.feed(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if fd == self.wake.as_raw_fd() {
            let _spurious = self.wake.read();
            self.service_output(ops);
        } else if fd == self.space.as_raw_fd() {
            let _spurious = self.space.read();
            self.feed(ops);
        } else if Some(fd) == self.polled_sink {
            self.sink_ready(ops);
        } else if self.listener.as_ref().is_some_and(|listener| fd == listener.as_raw_fd()) {
            self.accept(ops);
        } else if self.input.as_ref().is_some_and(|input| fd == input.as_raw_fd()) {
            self.input_ready(ops);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.close();
    }
}

fn open_to_append(path: &Path) -> io::Result<OwnedFd> {
    // Non-blocking for what is no regular file after all: a FIFO without a reader is an error and not a wait.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?)
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
