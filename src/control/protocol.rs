//! What is said over a control socket: JSON, one object a line, in both directions. `docs/control.md` has examples.
//!
//! A client sends `{"version":1,"request":...}` and gets one line back for each: `{"version":1,"reply":...}` or
//! `{"version":1,"error":...}`. After `events` the connection carries `{"version":1,"event":...}` lines to the client
//! and nothing else. Unknown requests and versions are refused by name; a client must ignore keys it does not know.

use super::machine::{MachineError, RunState, Status};
use super::movement::{CheckReport, Limits, MigrateOrder, MoveStatus, Resolution, SaveOrder};
use crate::config::VmConfig;
use crate::events::Record;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt::Write;

/// Version of the protocol. It grows when a change would mislead a client of the version before.
pub const VERSION: u32 = 1;
/// Longest line that a VM takes, bytes, with its newline.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Longest line that a client takes, bytes, with its newline.
pub const MAX_ANSWER_BYTES: usize = 1 << 20;

/// One line from a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLine {
    /// [`VERSION`].
    pub version: u32,
    /// What is asked for.
    pub request: Request,
}

/// What a client can ask for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the VM is and does: [`Reply::Show`].
    Show,
    /// Stop vCPUs and devices.
    Pause,
    /// Let them go on.
    Resume,
    /// Press the power button.
    PowerButton,
    /// End the guest without asking it.
    Kill,
    /// Ask the guest to give up so much memory.
    Balloon {
        /// Bytes; 0 gives all of it back.
        target_bytes: u64,
    },
    /// Save it to a file: begins, and is told of in events.
    Save(SaveOrder),
    /// Move it to another host: begins, and is told of in events.
    Migrate(Box<MigrateOrder>),
    /// See whether it could move: [`Reply::Checked`].
    MigrateCheck(Box<MigrateOrder>),
    /// The move under way or the last one: [`Reply::Migration`].
    Migration,
    /// Call the move off.
    MigrationCancel,
    /// Change limits of the move.
    MigrationSet(Limits),
    /// End a move that is in doubt.
    MigrationResolve(Resolution),
    /// Be told of everything that happens from now on.
    Events,
}

/// One line from a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswerLine {
    /// [`VERSION`].
    pub version: u32,
    /// `reply`, `error` or `event`.
    #[serde(flatten)]
    pub answer: Answer,
}

/// What a line from a VM says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The request was carried out.
    Reply(Reply),
    /// It was not.
    Error(Refusal),
    /// Something happened.
    Event(Record),
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// To `show`.
    Show(Box<Show>),
    /// To requests that change something.
    Done {
        /// State before it; where this is already what was asked for, nothing was done.
        was: RunState,
    },
    /// To `migration`; nothing where there was none.
    Migration(Option<Box<MoveStatus>>),
    /// To `migrate-check`.
    Checked(Box<CheckReport>),
    /// To `events`: from here on nothing is missed.
    Listening,
}

/// A VM as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Show {
    /// Its name on this host.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// What it is doing.
    pub status: Status,
    /// What it was built from.
    pub config: VmConfig,
}

/// Why a request was not carried out. The guest runs on as before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// For programs.
    pub kind: RefusalKind,
    /// For people.
    pub text: String,
}

/// The kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// Not a request of this protocol.
    BadRequest,
    /// A version that this VM does not speak.
    Version,
    /// The VM has as many clients as it takes.
    Busy,
    /// The guest has ended.
    Ended,
    /// The guest is paused, and must run for this.
    Paused,
    /// The guest is being moved.
    Moving,
    /// Makes no sense for this VM.
    Refused,
    /// It was tried and did not work.
    Failed,
}

impl Refusal {
    /// A refusal of `kind` that says `text`.
    pub fn new(kind: RefusalKind, text: impl Into<String>) -> Self {
        Refusal { kind, text: text.into() }
    }
}

impl From<MachineError> for Refusal {
    /// Keeps the causes: they do not cross the socket otherwise.
    fn from(error: MachineError) -> Self {
        let kind = match &error {
            MachineError::Ended => RefusalKind::Ended,
            MachineError::Paused => RefusalKind::Paused,
            MachineError::Moving(_) => RefusalKind::Moving,
            MachineError::Refused(_) => RefusalKind::Refused,
            MachineError::Failed { .. } => RefusalKind::Failed,
        };
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let _ = write!(text, ": {error}"); // writing to a String cannot fail
            cause = error.source();
        }
        Refusal { kind, text }
    }
}

impl Request {
    /// Reads a line. What is not a request of this version is refused in words a client's author can act on.
    pub fn parse(line: &[u8]) -> Result<Request, Refusal> {
        #[derive(Deserialize)]
        struct AnyVersion {
            version: u32,
        }
        let bad = |error: serde_json::Error| Refusal::new(RefusalKind::BadRequest, format!("not a request: {error}"));
        let AnyVersion { version } = serde_json::from_slice(line).map_err(bad)?;
        if version != VERSION {
            let text = format!("version {version} of the protocol is not spoken here, only {VERSION}");
            return Err(Refusal::new(RefusalKind::Version, text));
        }
        serde_json::from_slice::<RequestLine>(line).map(|line| line.request).map_err(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_are_those_of_the_documentation() {
        for (request, json) in [
            (Request::Show, r#"{"version":1,"request":"show"}"#),
            (Request::PowerButton, r#"{"version":1,"request":"power-button"}"#),
            (Request::Balloon { target_bytes: 7 }, r#"{"version":1,"request":{"balloon":{"target_bytes":7}}}"#),
        ] {
            let line = RequestLine { version: VERSION, request: request.clone() };
            assert_eq!(serde_json::to_string(&line).unwrap(), json);
            assert_eq!(Request::parse(json.as_bytes()), Ok(request));
        }
        let refusal = Refusal::new(RefusalKind::Paused, "the guest is paused");
        for (answer, json) in [
            (
                Answer::Reply(Reply::Done { was: RunState::Running }),
                r#"{"version":1,"reply":{"done":{"was":"running"}}}"#,
            ),
            (Answer::Reply(Reply::Listening), r#"{"version":1,"reply":"listening"}"#),
            (Answer::Error(refusal), r#"{"version":1,"error":{"kind":"paused","text":"the guest is paused"}}"#),
        ] {
            let line = AnswerLine { version: VERSION, answer };
            assert_eq!(serde_json::to_string(&line).unwrap(), json);
            assert_eq!(serde_json::from_str::<AnswerLine>(json).unwrap(), line);
        }
    }

    #[test]
    fn what_is_no_request_is_refused_in_words() {
        let refusal = |line: &str| Request::parse(line.as_bytes()).unwrap_err();
        assert_eq!(refusal("{}").kind, RefusalKind::BadRequest);
        assert_eq!(refusal("hello\u{0}").kind, RefusalKind::BadRequest);
        let unknown = refusal(r#"{"version":1,"request":"reboot"}"#).text;
        assert!(unknown.contains("unknown variant `reboot`, expected one of `show`"), "{unknown}");
        let extra = refusal(r#"{"version":1,"request":"show","force":true}"#).text;
        assert!(extra.contains("unknown field `force`"), "{extra}");
        let newer = refusal(r#"{"version":2,"request":{"new":1}}"#);
        assert_eq!(newer.kind, RefusalKind::Version);
        assert_eq!(newer.text, "version 2 of the protocol is not spoken here, only 1");
    }

    #[test]
    fn causes_cross_the_socket() {
        let source = std::io::Error::other("KVM says no").into();
        let refusal = Refusal::from(MachineError::Failed { attempted: "stopping vCPU 3".into(), source });
        assert_eq!(refusal, Refusal::new(RefusalKind::Failed, "stopping vCPU 3 failed: KVM says no"));
    }
}
