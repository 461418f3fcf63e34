//! What a command can fail with, and what a person is told then: the sentence, its causes, where the guest is, and what
//! to type next.

use crate::config::{Problems, SerialConfig};
use crate::control::client;
use crate::control::machine::Ended;
use crate::control::movement::{Failure, Kind, MoveStatus, Phase};
use crate::control::protocol::RefusalKind;
use crate::{exit, registry, sandbox, vmm};
use std::error::Error as _;
use std::fmt::Write;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;
use sterna_migration::handover::Found;
use sterna_migration::stream::StreamError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine as described cannot be.
    #[error(transparent)]
    Config(#[from] Problems),
    /// The name or its directory cannot be used.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The VM could not be asked, or has refused.
    #[error(transparent)]
    Client(#[from] client::Error),
    /// The process of the VM cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// The machine could not be built.
    #[error("the VM '{name}' cannot start")]
    Start {
        /// Name of the VM.
        name: String,
        /// Why.
        #[source]
        source: vmm::Error,
    },
    /// Something that this process needs.
    #[error("cannot {attempt}")]
    Process {
        /// What was tried: "watch for signals".
        attempt: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of this program's own.
    #[error("cannot {attempt} {}", path.display())]
    File {
        /// What was tried: "open the log".
        attempt: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A move came to nothing; where the guest is then, it says itself.
    #[error("the {} of '{name}' to {} came to nothing", status.kind, status.peer)]
    Move {
        /// Name of the VM.
        name: String,
        /// How it ended.
        status: Box<MoveStatus>,
    },
    /// A move's target was told to start and has not said that it did.
    #[error("it is not known whether '{name}' runs at {}", status.peer)]
    InDoubt {
        /// Name of the VM.
        name: String,
        /// How it stands.
        status: Box<MoveStatus>,
    },
    /// A move was told to end and goes on.
    #[error("the move of '{name}' has not ended within {} s", after.as_secs_f32())]
    MoveNotEnding {
        /// Name of the VM.
        name: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// A move was to be called off and was done before it could be.
    #[error("the move of '{name}' was done before it could be called off")]
    MovedBefore {
        /// Name of the VM.
        name: String,
        /// How it ended.
        status: Box<MoveStatus>,
    },
    /// A record on this host says that the machine may run elsewhere.
    #[error("'{name}' is not started: a record of its last move stands against it")]
    Recorded {
        /// Name of the VM.
        name: String,
        /// What the record means.
        found: Box<Found>,
    },
    /// A record is there and cannot be read: the machine may run elsewhere.
    #[error("'{name}' may run elsewhere: the record of its last move in {} cannot be read", path.display())]
    UnreadableRecord {
        /// Name of the VM.
        name: String,
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no move.
    #[error("the VM '{name}' is not moving and has not moved")]
    NotMoving {
        /// Name of the VM.
        name: String,
    },
    /// A trial found what would refuse the move.
    #[error("'{name}' cannot move so: {problems} thing{} in the way", if *problems == 1 { " is" } else { "s are" })]
    CheckFailed {
        /// Name of the VM.
        name: String,
        /// How many.
        problems: usize,
        /// The target, where it cannot be reached.
        unreachable: Option<String>,
    },
    /// A name that leads nowhere.
    #[error("no host is called '{host}'")]
    UnknownHost {
        /// The name.
        host: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No connections can be taken.
    #[error("cannot receive machines")]
    Receive {
        /// Why.
        #[source]
        source: StreamError,
    },
    /// A machine that was on its way has not arrived.
    #[error("a machine that was on its way to here has not arrived")]
    NothingArrived,
    /// A machine that was announced cannot come.
    #[error("a machine that was announced cannot come")]
    Arrival {
        /// Why.
        #[source]
        source: vmm::MoveError,
    },
    /// The guest has ended and should not have.
    #[error("VM '{name}': {ended}")]
    Ended {
        /// Name of the VM.
        name: String,
        /// How.
        ended: Ended,
    },
    /// The power button was pressed to no effect.
    #[error("the guest of '{name}' has not powered off within {} s of its power button", after.as_secs_f32())]
    NotReacting {
        /// Name of the VM.
        name: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The VM was killed and its process is still there.
    #[error("the VM '{name}' was killed and has not ended within {} s", after.as_secs_f32())]
    NotEnding {
        /// Name of the VM.
        name: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The detached process reported its own failure, all of it.
    #[error("{report}")]
    Detached {
        /// Its exit code.
        code: u8,
        /// Its error as it would have been printed.
        report: String,
    },
    /// The detached process ended without a word.
    #[error("the process of the VM '{name}' ended before its guest ran ({status})")]
    DetachedDied {
        /// Name of the VM.
        name: String,
        /// How it ended.
        status: ExitStatus,
        /// Where it logged to.
        log: PathBuf,
    },
    /// The serial port is not a socket.
    #[error("the serial port of '{name}' is not a socket, it goes to {serial}")]
    NoConsole {
        /// Name of the VM.
        name: String,
        /// Where it goes.
        serial: SerialConfig,
    },
    /// The console's socket does not take this terminal.
    #[error("cannot join the console of '{name}'")]
    Console {
        /// Name of the VM.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something that every VM needs is not there.
    #[error("this host lacks something that every VM needs; the table names it with a remedy")]
    HostUnusable,
    /// Nobody takes the results.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
}

impl Error {
    /// The exit code for it.
    pub fn exit_code(&self) -> u8 {
        use registry::Error as Registry;
        match self {
            Error::Config(_) | Error::Sandbox(sandbox::Error::Mode(_)) => exit::USAGE,
            Error::Sandbox(_) => exit::REFUSED,
            Error::Registry(Registry::BadName(_) | Registry::PathTooLong { .. } | Registry::InUse { .. }) => {
                exit::USAGE
            }
            Error::Registry(Registry::NoDirectory | Registry::Directory { .. } | Registry::Lock { .. }) => {
                exit::UNREACHABLE
            }
            Error::Client(client::Error::BadName(_)) => exit::USAGE,
            Error::Client(client::Error::Refused { source, .. }) => match source.kind {
                RefusalKind::Ended => exit::GUEST_LOST,
                RefusalKind::Busy => exit::UNREACHABLE,
                _ => exit::FAILED,
            },
            Error::Client(_) => exit::UNREACHABLE,
            Error::Start { source, .. } => source.exit_code(),
            Error::CheckFailed { unreachable: Some(_), .. } => exit::UNREACHABLE,
            Error::HostUnusable
            | Error::CheckFailed { .. }
            | Error::Recorded { .. }
            | Error::UnreadableRecord { .. } => exit::REFUSED,
            Error::Move { status, .. } => match (status.phase, status.failure) {
                (Phase::Cancelled, _) => exit::CANCELLED,
                (Phase::TimedOut, _) => exit::TIMED_OUT,
                (_, Some(Failure::Refused)) => exit::REFUSED,
                (_, Some(Failure::Unreachable)) => exit::UNREACHABLE,
                (_, Some(Failure::Ended)) => exit::GUEST_LOST,
                _ => exit::FAILED,
            },
            Error::InDoubt { .. } => exit::IN_DOUBT,
            Error::Receive { .. } | Error::UnknownHost { .. } => exit::UNREACHABLE,
            Error::Ended { .. } => exit::GUEST_LOST,
            Error::NotReacting { .. } | Error::NotEnding { .. } | Error::MoveNotEnding { .. } => exit::TIMED_OUT,
            Error::Detached { code, .. } => *code,
            Error::Process { .. }
            | Error::File { .. }
            | Error::DetachedDied { .. }
            | Error::NoConsole { .. }
            | Error::Console { .. }
            | Error::NotMoving { .. }
            | Error::MovedBefore { .. }
            | Error::NothingArrived
            | Error::Arrival { .. }
            | Error::Output(_) => exit::FAILED,
        }
    }

    /// Where the guest is now; empty where that is no question.
    fn guest(&self) -> &str {
        match self {
            Error::Config(_) | Error::Sandbox(_) | Error::Start { .. } | Error::DetachedDied { .. } => {
                "none was started"
            }
            Error::Registry(registry::Error::InUse { .. }) => "the one of that name runs on, a new one was not started",
            Error::Registry(_) => "none was started or touched",
            Error::Client(client::Error::Refused { source, .. }) => match source.kind {
                RefusalKind::Ended => "it is gone",
                RefusalKind::Paused => "it is paused, in memory",
                _ => "as it was before",
            },
            Error::Client(client::Error::NotAnswering { .. } | client::Error::Broken { .. }) => {
                "unknown: its process is there but does not say"
            }
            Error::Client(client::Error::Gone { .. }) => "it is gone with its process; its disks are as it left them",
            Error::Client(client::Error::Denied { .. }) => "as it was before",
            Error::Move { status, .. } | Error::InDoubt { status, .. } | Error::MovedBefore { status, .. } => {
                &status.guest
            }
            Error::CheckFailed { .. } | Error::NotMoving { .. } | Error::UnknownHost { .. } => "it was not touched",
            Error::NothingArrived | Error::Arrival { .. } | Error::Ended { ended: Ended::NotArrived(_), .. } => {
                "it is at its source, where it was"
            }
            Error::Recorded { found, .. } => &found.truth,
            Error::UnreadableRecord { .. } => "none was started",
            Error::Ended { .. } => "it is gone; its disks are as it left them",
            Error::NotReacting { .. } => "it runs on",
            Error::NotEnding { .. } | Error::MoveNotEnding { .. } => "unknown: its process is still there",
            Error::NoConsole { .. } | Error::Console { .. } => "it runs on, untouched",
            Error::Client(client::Error::BadName(_) | client::Error::NoSuchVm { .. })
            | Error::Process { .. }
            | Error::File { .. }
            | Error::Detached { .. }
            | Error::HostUnusable
            | Error::Receive { .. }
            | Error::Output(_) => "",
        }
    }

    /// What to type next; empty where nothing helps.
    fn next(&self) -> String {
        match self {
            Error::Config(_) => "sterna run --help".into(),
            Error::Registry(registry::Error::InUse { name, .. }) => format!("sterna show {name}, or another --name"),
            Error::Registry(registry::Error::NoDirectory | registry::Error::Directory { .. }) => {
                "export STERNA_DIR=/path/of/a/directory".into()
            }
            Error::Client(error) => match error {
                client::Error::BadName(_) | client::Error::NoSuchVm { .. } | client::Error::Broken { .. } => {
                    "sterna list".into()
                }
                client::Error::Gone { name } => {
                    format!("sterna run --name {name} ... (what is left of it is removed then)")
                }
                client::Error::Denied { name, .. } => format!("sudo sterna show {name}"),
                client::Error::NotAnswering { name, .. } => {
                    format!("sterna list; sterna stop {name} --force ends it without asking")
                }
                client::Error::Refused { name, source } => match source.kind {
                    RefusalKind::Paused => format!("sterna resume {name}"),
                    RefusalKind::Ended => "sterna list".into(),
                    _ => format!("sterna show {name}"),
                },
            },
            Error::Move { name, status } => match (status.kind, status.failure) {
                (_, Some(Failure::Ended)) => "sterna list".into(),
                (Kind::Save, _) => format!("mend it and save again, or sterna show {name}"),
                (_, Some(Failure::Unreachable)) => listen(&status.peer),
                _ => format!("sterna migrate {name} {} --check", status.peer),
            },
            Error::CheckFailed { unreachable: Some(target), .. } => listen(target),
            Error::InDoubt { name, status } => format!(
                "look for {name} at {} with sterna list; if it runs there: sterna migration resolve {name} --there; if it \
                 does not and cannot start there any more: sterna migration resolve {name} --here",
                status.peer
            ),
            Error::Recorded { found, .. } => found.next.clone(),
            Error::UnreadableRecord { name, path, .. } => format!(
                "look into {}; if {name} runs nowhere else: sterna migration resolve {name} --here",
                path.display()
            ),
            Error::MoveNotEnding { name, .. } => format!("sterna migration watch {name}"),
            Error::NotMoving { name } => format!("sterna migrate {name} tcp:HOST:PORT"),
            Error::Start { source: vmm::Error::RestoredBefore { path, .. }, .. } => {
                format!("sterna inspect {0}; for a second copy: sterna restore {0} --again", path.display())
            }
            Error::Start { source, .. } if source.exit_code() == exit::REFUSED => "sterna run --help".into(),
            Error::Start { .. } => "sterna host check".into(),
            Error::NotReacting { name, .. } => format!("sterna stop {name} --force, or sterna console {name}"),
            Error::NotEnding { name, .. } => format!("sterna list; sterna show {name}"),
            Error::DetachedDied { log, .. } => format!("cat {}", log.display()),
            Error::NoConsole { name, .. } | Error::Console { name, .. } => format!("sterna show {name}"),
            Error::Registry(_)
            | Error::Sandbox(_)
            | Error::Process { .. }
            | Error::File { .. }
            | Error::Ended { .. }
            | Error::Detached { .. }
            | Error::HostUnusable
            | Error::CheckFailed { .. }
            | Error::UnknownHost { .. }
            | Error::Receive { .. }
            | Error::MovedBefore { .. }
            | Error::NothingArrived
            | Error::Arrival { .. }
            | Error::Output(_) => String::new(),
        }
    }

    /// All that a person is told.
    pub fn report(&self) -> String {
        if let Error::Detached { report, .. } = self {
            return report.clone();
        }
        let mut text = format!("error: {self}");
        for cause in self.causes() {
            let _ = write!(text, "\n  cause: {cause}"); // writing to a String cannot fail
        }
        for (label, words) in [("guest", self.guest()), ("next", &self.next())] {
            if !words.is_empty() {
                let _ = write!(text, "\n  {label}: {words}");
            }
        }
        text
    }

    fn causes(&self) -> Vec<String> {
        if let Error::Move { status, .. } = self {
            return status.error.iter().cloned().collect();
        }
        let mut causes = Vec::new();
        let mut cause = self.source();
        while let Some(error) = cause {
            causes.push(error.to_string());
            cause = error.source();
        }
        causes
    }

    /// The sentence and its causes in one line, for another host.
    pub fn line(&self) -> String {
        let causes = self.causes().into_iter();
        causes.fold(self.to_string(), |line, cause| format!("{line}: {cause}"))
    }

    /// Whether the reader of standard output has left, which is no failure.
    pub fn is_closed_output(&self) -> bool {
        matches!(self, Error::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

fn listen(address: &str) -> String {
    format!("sterna receive --listen {address} on the target")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::Refusal;

    #[test]
    fn a_report_has_the_sentence_causes_guest_and_next_step() {
        let source = Refusal::new(RefusalKind::Paused, "the guest is paused");
        let error = Error::from(client::Error::Refused { name: "web".into(), source });
        assert_eq!(
            error.report(),
            "error: the VM 'web' has refused\n  cause: the guest is paused\n  guest: it is paused, in memory\n  \
             next: sterna resume web"
        );
        assert_eq!(error.exit_code(), exit::FAILED);
    }

    #[test]
    fn nothing_is_said_twice() {
        let mut problems = Problems::default();
        problems.add("cpus is 0");
        let report = Error::from(problems).report();
        assert_eq!(report, "error: cpus is 0\n  guest: none was started\n  next: sterna run --help");
    }

    #[test]
    fn exit_codes_are_those_of_the_contract() {
        let name = || "web".to_owned();
        let second = Duration::from_secs(1);
        for (error, code) in [
            (Error::Config(Problems::default()), 2),
            (Error::from(registry::Error::InUse { name: name(), pid: None }), 2),
            (Error::NotReacting { name: name(), after: second }, 5),
            (Error::from(client::Error::NoSuchVm { name: name(), dir: "/run".into() }), 7),
            (Error::from(client::Error::NotAnswering { name: name(), pid: None, after: second }), 7),
            (Error::Ended { name: name(), ended: Ended::TripleFault }, 8),
            (Error::Detached { code: 3, report: String::new() }, 3),
        ] {
            assert_eq!(error.exit_code(), code, "{error}");
        }
    }
}
