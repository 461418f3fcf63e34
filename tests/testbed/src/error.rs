//! What can go wrong with the testbed.

use std::{io, path::PathBuf, time::Duration};

/// Result of a testbed operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A testbed operation that failed, and where.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that the build makes is not there.
    #[error("{} is missing; run `make {target}`", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The make target that makes it.
        target: &'static str,
    },
    /// An operation on this machine.
    #[error("cannot {doing}")]
    Io {
        /// What was attempted.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A deadline passed.
    #[error("{who}: waited {limit:?} for {what}; last seen: {seen}")]
    Timeout {
        /// Host or program.
        who: String,
        /// What did not come.
        what: String,
        /// How long it was waited for.
        limit: Duration,
        /// End of the output until then.
        seen: String,
    },
    /// A host or program ended while something was expected of it.
    #[error("{who} ended ({how}) while waiting for {what}; last seen: {seen}")]
    Ended {
        /// Host or program.
        who: String,
        /// Exit status or lost connection.
        how: String,
        /// What did not come.
        what: String,
        /// End of the output until then.
        seen: String,
    },
    /// A command that must succeed did not.
    #[error("{who}: `{command}` exited with {status}: {output}")]
    Failed {
        /// Host or guest.
        who: String,
        /// The command.
        command: String,
        /// Its exit status.
        status: i32,
        /// What it said.
        output: String,
    },
    /// The host was killed or never started.
    #[error("host {0} is not running")]
    Down(String),
}

impl Error {
    /// Wraps an I/O error with what was attempted.
    pub fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

/// The last lines of `text`, at most about 1 KiB, for an error message.
pub(crate) fn tail(text: &str) -> String {
    let text = text.trim_end();
    let mut start = text.len().saturating_sub(1024);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    match text.get(start..) {
        None | Some("") => "nothing".into(),
        Some(end) => end.to_owned(),
    }
}
