//! Runs the testbed's commands in a host: `host-agent PORT`. Whoever can reach the port can do anything: for the testbed's
//! closed network only, and started only when the kernel command line says so.

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{Sender, channel},
    },
    thread,
    time::Duration,
};
use sterna_testbed::protocol::Frame;

/// How long output of a command that ended may still come: what it left in the background may hold the pipe for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

type Writer = Arc<Mutex<TcpStream>>;

fn main() -> io::Result<()> {
    let port = std::env::args().nth(1).and_then(|port| port.parse().ok());
    let port: u16 = port.ok_or_else(|| io::Error::other("usage: host-agent PORT"))?;
    for stream in TcpListener::bind(("0.0.0.0", port))?.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(error) = serve(stream) {
                eprintln!("host-agent: {error}");
            }
        });
    }
    Ok(())
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    Frame::Hello.write(&mut stream)?;
    let command = match Frame::read(&mut stream) {
        Ok(Frame::Exec(command)) => command,
        Ok(frame) => return Err(io::Error::other(format!("expected a command, not {frame:?}"))),
        // Whoever only looked whether the agent is there goes away without a word.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        Err(error) => return Err(error),
    };
    let writer = Arc::new(Mutex::new(stream.try_clone()?));
    let status = match start(&command) {
        Ok(mut child) => drive(&mut child, &stream, &writer)?,
        Err(error) => {
            send(&writer, &Frame::Stderr(format!("host-agent: {error}\n").into_bytes()))?;
            127
        }
    };
    send(&writer, &Frame::Exit(status))?;
    stream.shutdown(Shutdown::Both)
}

fn start(command: &str) -> io::Result<Child> {
    let mut shell = Command::new("/bin/sh");
    // The profile puts iproute2 before the applets that busybox's shell would run without looking at PATH.
    shell.args(["-c", ". /etc/profile; eval \"$1\"", "sh", command]).current_dir("/root").process_group(0);
    shell.env("HOME", "/root").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
}

/// Moves input and output until the command ends; returns its status.
fn drive(child: &mut Child, stream: &TcpStream, writer: &Writer) -> io::Result<i32> {
    let (done, finished) = channel();
    if let Some(stdout) = child.stdout.take() {
        pump(stdout, Frame::Stdout, writer, done.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        pump(stderr, Frame::Stderr, writer, done);
    }
    let (reader, stdin) = (stream.try_clone()?, child.stdin.take());
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let alive = Arc::new(Mutex::new(true));
    let seen_alive = Arc::clone(&alive);
    thread::spawn(move || {
        feed(reader, stdin);
        // Under the lock the child is not reaped yet, so its number is still its own.
        if let (Ok(true), Some(group)) = (seen_alive.lock().as_deref().copied(), group) {
            let _ = kill_process_group(group, Signal::KILL);
        }
    });
    // Waits without reaping: until the lock is held, the number stays the child's own and may be killed.
    if let Some(pid) = group {
        waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)?;
    }
    let status = {
        let mut alive = alive.lock().map_err(|_| io::Error::other("poisoned lock"))?;
        *alive = false;
        child.wait()?
    };
    // Nothing is ever sent: it ends when both pumps have.
    let _ = finished.recv_timeout(DRAIN_LIMIT);
    Ok(code(status))
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Sends what a command writes, as it comes. `done` is dropped at the end.
fn pump(mut from: impl Read + Send + 'static, frame: fn(Vec<u8>) -> Frame, writer: &Writer, done: Sender<()>) {
    let writer = Arc::clone(writer);
    thread::spawn(move || {
        let mut buffer = vec![0u8; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let bytes = buffer.get(..count).unwrap_or_default().to_vec();
            if send(&writer, &frame(bytes)).is_err() {
                break;
            }
        }
        drop(done);
    });
}

/// Gives the command its input; returns when the connection has ended.
fn feed(mut reader: TcpStream, mut stdin: Option<ChildStdin>) {
    loop {
        match Frame::read(&mut reader) {
            Ok(Frame::Stdin(bytes)) => {
                if stdin.as_mut().is_some_and(|pipe| pipe.write_all(&bytes).is_err()) {
                    stdin = None;
                }
            }
            Ok(Frame::StdinEnd) => stdin = None,
            Ok(_) | Err(_) => return,
        }
    }
}

fn send(writer: &Writer, frame: &Frame) -> io::Result<()> {
    let mut stream = writer.lock().map_err(|_| io::Error::other("poisoned lock"))?;
    frame.write(&mut *stream)
}
