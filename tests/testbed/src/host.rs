//! One host of the testbed as its operator sees it: a place that runs commands.

use crate::{
    Error, Result, Running,
    protocol::Frame,
    running::{Event, Handle},
};
use std::{
    io,
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream},
    path::Path,
    sync::mpsc::channel,
    thread,
    time::Duration,
};

/// How long [`Host::run`] waits; generous, since a software CPU is slow and several hosts may share it.
const RUN_LIMIT: Duration = Duration::from_secs(300);
/// How long the agent has for its greeting once a connection stands.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// What a command that ended has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit status; 128 + the signal's number if one ended it.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A host that runs, reached through its agent. Cheap to clone; does not own the host.
#[derive(Clone, Debug)]
pub struct Host {
    name: String,
    address: SocketAddrV4,
}

impl Host {
    pub(crate) fn new(name: &str, port: u16) -> Self {
        Self { name: name.to_owned(), address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, port) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a shell command to its end, within five minutes. A status other than 0 is not an error here.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_for(command, RUN_LIMIT)
    }

    /// Runs a shell command to its end.
    pub fn run_for(&self, command: &str, limit: Duration) -> Result<Output> {
        let mut running = self.spawn(command)?;
        running.close_stdin()?;
        running.wait(limit)
    }

    /// Runs a shell command that must exit with 0; returns its standard output, trimmed.
    pub fn check(&self, command: &str) -> Result<String> {
        let Output { status, stdout, stderr } = self.run(command)?;
        if status == 0 {
            return Ok(stdout.trim().to_owned());
        }
        let output = format!("{}{}", stdout.trim(), stderr.trim());
        Err(Error::Failed { who: self.who(), command: command.to_owned(), status, output })
    }

    /// Starts a shell command. What it leaves in the background when it ends goes on.
    pub fn spawn(&self, command: &str) -> Result<Running> {
        let doing = || format!("start `{command}` on host {}", self.name);
        let mut stream = self.connect().map_err(Error::io(doing()))?;
        Frame::Exec(command.to_owned()).write(&mut stream).map_err(Error::io(doing()))?;
        let mut reader = stream.try_clone().map_err(Error::io(doing()))?;
        let (sender, events) = channel();
        thread::spawn(move || {
            loop {
                let event = match Frame::read(&mut reader) {
                    Ok(Frame::Stdout(bytes)) => Event::Stdout(bytes),
                    Ok(Frame::Stderr(bytes)) => Event::Stderr(bytes),
                    Ok(Frame::Exit(status)) => Event::Exit(status),
                    Ok(frame) => Event::Lost(io::Error::other(format!("unexpected frame {frame:?}"))),
                    Err(error) => Event::Lost(error),
                };
                let last = matches!(event, Event::Exit(_) | Event::Lost(_));
                if sender.send(event).is_err() || last {
                    break;
                }
            }
        });
        Ok(Running::new(self.who(), command.to_owned(), events, Box::new(Remote(stream))))
    }

    /// Writes a file on the host, complete or not at all.
    pub fn put(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let command = format!("cat >'{path}.part' && mv '{path}.part' '{path}'");
        let mut running = self.spawn(&command)?;
        for chunk in bytes.chunks(64 << 10) {
            running.write(chunk)?;
        }
        running.close_stdin()?;
        match running.wait(RUN_LIMIT)? {
            Output { status: 0, .. } => Ok(()),
            Output { status, stderr, .. } => Err(Error::Failed { who: self.who(), command, status, output: stderr }),
        }
    }

    /// Copies a file of this machine to the host.
    pub fn put_file(&self, from: &Path, to: &str) -> Result<()> {
        self.put(to, &std::fs::read(from).map_err(Error::io(format!("read {}", from.display())))?)
    }

    /// Reads a file on the host.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let command = format!("cat '{path}'");
        let mut running = self.spawn(&command)?;
        match running.wait_bytes(RUN_LIMIT)? {
            (0, bytes) => Ok(bytes),
            (status, _) => {
                Err(Error::Failed { who: self.who(), command, status, output: running.wait(RUN_LIMIT)?.stderr })
            }
        }
    }

    /// A connection to the agent that has greeted: QEMU's forwarding accepts before the host does.
    pub(crate) fn connect(&self) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(GREETING_LIMIT))?;
        match Frame::read(&mut stream)? {
            Frame::Hello => stream.set_read_timeout(None).map(|()| stream),
            frame => Err(io::Error::other(format!("the agent's greeting was {frame:?}"))),
        }
    }

    fn who(&self) -> String {
        format!("host {}", self.name)
    }
}

/// A command behind an agent's connection.
struct Remote(TcpStream);

impl Handle for Remote {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        bytes.chunks(64 << 10).try_for_each(|chunk| Frame::Stdin(chunk.to_vec()).write(&mut self.0))
    }

    fn close_stdin(&mut self) -> io::Result<()> {
        Frame::StdinEnd.write(&mut self.0)
    }

    fn kill(&mut self) {
        // Fails only if the connection is gone already, and the agent kills on that too.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
