//! A program on this machine as a [`Running`].

use crate::{
    Error, Result, Running, keeper,
    running::{Event, Handle},
};
use std::{
    io::{self, Read, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{Sender, channel},
    },
    thread,
    time::Duration,
};

/// How often a program that has closed its output is asked whether it has ended.
const REAP_INTERVAL: Duration = Duration::from_millis(10);

/// Starts a shell command on this machine.
pub fn run_here(command: &str) -> Result<Running> {
    let mut shell = keeper::command("sh");
    shell.args(["-c", command]);
    run("this machine", shell)
}

/// Starts a program with all three standard streams connected.
pub(crate) fn run(who: &str, mut command: Command) -> Result<Running> {
    let shown = command.get_args().nth(2).unwrap_or(command.get_program()).to_string_lossy().into_owned();
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = keeper::spawn(command).map_err(Error::io(format!("start {shown}")))?;
    let (sender, events) = channel();
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let child = Arc::new(Mutex::new(child));
    let reaped = Arc::clone(&child);
    thread::spawn(move || {
        let other = sender.clone();
        let errors = thread::spawn(move || stderr.map(|from| pump(from, Event::Stderr, &other)));
        if let Some(from) = stdout {
            pump(from, Event::Stdout, &sender);
        }
        let _ = errors.join();
        let end = loop {
            match reaped.lock().map_err(|_| io::Error::other("poisoned lock")).and_then(|mut child| child.try_wait()) {
                Ok(Some(status)) => {
                    break Event::Exit(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
                }
                Ok(None) => thread::sleep(REAP_INTERVAL),
                Err(error) => break Event::Lost(error),
            }
        };
        let _ = sender.send(end);
    });
    Ok(Running::new(who.to_owned(), shown, events, Box::new(Local { child, stdin })))
}

fn pump(mut from: impl Read, event: fn(Vec<u8>) -> Event, to: &Sender<Event>) {
    let mut buffer = vec![0u8; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.send(event(buffer.get(..count).unwrap_or_default().to_vec())).is_err() {
            break;
        }
    }
}

struct Local {
    child: Arc<Mutex<Child>>,
    stdin: Option<ChildStdin>,
}

impl Handle for Local {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(bytes)
    }

    fn close_stdin(&mut self) -> io::Result<()> {
        self.stdin = None;
        Ok(())
    }

    fn kill(&mut self) {
        if let Ok(mut child) = self.child.lock() {
            // Fails only for one that has ended.
            let _ = child.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Running {
        let mut command = keeper::command("sh");
        command.args(["-c", script]);
        run("test", command).unwrap()
    }

    #[test]
    fn output_input_and_status_come_through() {
        let mut running = shell("echo first; read word; echo \"got $word\"; echo bad >&2; exit 3");
        assert_eq!(running.wait_for("first", Duration::from_secs(10)).unwrap(), "first");
        running.write("it\n").unwrap();
        let output = running.wait(Duration::from_secs(10)).unwrap();
        assert_eq!((output.status, output.stderr.as_str()), (3, "bad\n"));
        assert_eq!(output.stdout, "first\ngot it\n");
    }

    #[test]
    fn a_deadline_says_what_was_waited_for_and_what_was_seen() {
        let mut running = shell("echo half; sleep 60");
        let error = running.wait_for("whole", Duration::from_millis(300)).err().unwrap().to_string();
        assert!(
            error.contains("waited 300ms for a line with \"whole\"") && error.ends_with("last seen: half"),
            "{error}"
        );
    }

    #[test]
    fn an_early_end_is_told_from_a_deadline() {
        let mut running = shell("echo half; exit 7");
        let error = running.wait_for("whole", Duration::from_secs(10)).err().unwrap().to_string();
        assert!(error.contains("ended (status 7) while waiting for a line"), "{error}");
    }

    #[test]
    fn children_outlive_the_thread_that_asked_for_them() {
        let mut running = thread::spawn(|| shell("read word; echo \"got $word\"")).join().unwrap();
        running.write("it\n").unwrap();
        assert_eq!(running.wait_for("got", Duration::from_secs(10)).unwrap(), "got it");
    }
}
