//! The data path of a move: RAM over one or more connections, from mapping to mapping, pass by pass.
//!
//! ```text
//! Sender: chunk of RAM -> before() (dirty log) -> ranges -> one writev a frame ->  socket 0..n
//! Receiver: header -> table, checked whole -> one readv into the mapping; the end of a pass waits for all connections
//! ```
//!
//! Refuses to know what the pages are of, and what is said on connection 0 besides RAM.

pub mod address;
mod batch;
pub mod hash;
mod inbox;
pub mod receiver;
pub mod sender;
pub mod socket;
pub mod throttle;

pub use address::{Address, AddressError};
pub use hash::hash;
pub use inbox::Counters;
pub use receiver::{Event, Receiver};
pub use sender::{Hooks, Pace, PassFigures, Sender};
pub use socket::{Listener, Socket, connect};
pub use throttle::Throttle;

use crate::wire::WireError;
use crate::wire::message::MAX_CONNECTIONS;
use std::io;
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long a peer that broke a connection has to say why.
const REASON: Duration = Duration::from_millis(500);
/// The niceness of threads that copy beside a running guest (sched(7): a weight of 110 beside its vCPUs' 1024).
const NICE: i32 = 10;
/// Number of the first pass.
pub const FIRST_PASS: u32 = 1;

/// Why a stream came to nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// There is no way to the peer.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where it should be.
        address: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nobody can come.
    #[error("cannot accept connections on {address}")]
    Listen {
        /// Where.
        address: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A connection broke, or carried what it must not.
    #[error("connection {number} of the move failed")]
    Connection {
        /// Which; 0 is the first.
        number: usize,
        /// Why.
        #[source]
        source: WireError,
    },
    /// A connection ended while the others went on.
    #[error("connection {number} closed before pass {pass} had ended")]
    Closed {
        /// Which.
        number: usize,
        /// The pass.
        pass: u32,
    },
    /// The end of a pass that is not under way.
    #[error("connection {number} ended pass {found} where pass {expected} is under way")]
    Pass {
        /// Which.
        number: usize,
        /// What it ended.
        found: u32,
        /// What is under way.
        expected: u32,
    },
    /// The peer said why it gives up; in its words, control characters replaced.
    #[error("the other side gave up: {0}")]
    Peer(String),
    /// As it was asked to.
    #[error("the move was cancelled")]
    Cancelled,
    /// The dirty log, or letting pages go.
    #[error("{attempt} for {pages} pages from page {first}")]
    Memory {
        /// What was tried: "clearing the dirty log".
        attempt: &'static str,
        /// First page.
        first: u64,
        /// Pages.
        pages: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// None, or too many.
    #[error("{found} connections; a move has 1 to {most}")]
    Connections {
        /// How many.
        found: usize,
        /// The most there may be.
        most: usize,
    },
    /// RAM that cannot be cut as a dirty log is.
    #[error("a region of RAM begins at page {first}, which is not a multiple of 64")]
    Layout {
        /// Its first page.
        first: u64,
    },
    /// No thread.
    #[error("cannot start a thread for the move")]
    Thread(#[source] io::Error),
    /// Of no use after an error that was reported before.
    #[error("this stream has failed before")]
    Failed,
}

impl StreamError {
    /// Whether the peer, or the way to it, ended a connection: then it may have said why.
    fn is_broken(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Connection { source: WireError::Io { .. }, .. })
    }
}

/// Whether a move may have `found` connections.
fn connections(found: usize) -> Result<(), StreamError> {
    let most = usize::from(MAX_CONNECTIONS);
    if (1..=most).contains(&found) { Ok(()) } else { Err(StreamError::Connections { found, most }) }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StreamError> {
    thread::Builder::new().name(name.to_owned()).spawn(body).map_err(StreamError::Thread)
}

/// From here on this thread's work counts a tenth of a vCPU's beside it (setpriority(2); it cannot be taken back without a
/// privilege). A guest on a host whose processors are all busy goes on at nearly its speed, and its vCPUs do not wait for a
/// thread that copies: 40 to 70 ms at a time were seen with 5 such threads on 2 processors.
fn step_back() {
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        log::debug!("memory is copied at the priority of everything else: {error}");
    }
}

/// The peer's reason, fit to be shown on a terminal.
fn peer_text(text: &[u8]) -> StreamError {
    let text = String::from_utf8_lossy(text);
    StreamError::Peer(text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect())
}

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
pub(crate) mod rig;
#[cfg(test)]
mod tests;
