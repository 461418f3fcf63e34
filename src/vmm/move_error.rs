//! Why a move came to nothing.

use super::movement::Off;
use super::parts::PartError;
use crate::control::machine::MachineError;
use crate::control::movement::Failure;
use std::io;
use std::time::Duration;
use sterna_devices::virtio::blk::ImageError;
use sterna_migration::SectionError;
use sterna_migration::file::Error as FileError;
use sterna_migration::stream::{AddressError, StreamError};
use sterna_migration::wire::WireError;

/// What went wrong. Where the guest is then, the move's status says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MoveError {
    /// Not the address of a receiver.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The way to the other side.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// What was said on it.
    #[error("what {peer} sends cannot be understood")]
    Wire {
        /// The other side.
        peer: &'static str,
        /// Why.
        #[source]
        source: WireError,
    },
    /// The other side gave its reason.
    #[error("{peer} says: {reason}")]
    Peer {
        /// The other side.
        peer: &'static str,
        /// In its words.
        reason: String,
    },
    /// It answered something else.
    #[error("{peer} answered something else than {wanted}")]
    Unexpected {
        /// The other side.
        peer: &'static str,
        /// What should have come.
        wanted: &'static str,
    },
    /// Nothing came.
    #[error("no answer from {peer} within {} s: waited for {wanted}", after.as_secs_f32())]
    NoAnswer {
        /// The other side.
        peer: &'static str,
        /// What should have come.
        wanted: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The machine's state.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The list of states.
    #[error("the list of states is malformed")]
    Sections(#[from] SectionError),
    /// The machine does not stop, or is gone.
    #[error("the guest cannot be stopped")]
    Stop(#[source] MachineError),
    /// It was called off.
    #[error("{0}")]
    Off(Off),
    /// A disk's last writes may still be in this host's page cache.
    #[error(
        "disk {id} is writable and goes through the host's page cache (direct=off): another host may not see its last \
         writes; --unsafe-cache moves it all the same"
    )]
    UnsafeCache {
        /// Its id.
        id: String,
    },
    /// A disk.
    #[error("cannot {attempt} a disk")]
    Disk {
        /// What was tried: "flush".
        attempt: &'static str,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// KVM or the host.
    #[error("cannot {attempt}")]
    Host {
        /// What was tried: "read the dirty log".
        attempt: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The description.
    #[error("the description of the machine cannot be {done}")]
    Description {
        /// Written or read.
        done: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// This host cannot take the machine; a sentence each.
    #[error("{}", .0.join("; "))]
    Refused(Vec<String>),
    /// The memory that arrived is not the memory that was sent.
    #[error("memory differs at the target: hash {there:#018x}, here {here:#018x}")]
    Differs {
        /// Hash here.
        here: u64,
        /// Hash there.
        there: u64,
    },
    /// The guest writes faster than the way carries.
    #[error("the guest cannot be moved within its limits: {0}")]
    Stalled(String),
}

impl MoveError {
    /// Wraps the cause of a failed `attempt` at something of the host's.
    pub fn host(attempt: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { attempt, source }
    }

    /// What kind of failure it is, for programs.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Refused(_) | Self::Peer { .. } | Self::UnsafeCache { .. } | Self::Address(_) => Failure::Refused,
            Self::Stream(StreamError::Connect { .. }) => Failure::Unreachable,
            Self::Off(Off::Ended(_)) => Failure::Ended,
            _ => Failure::Broken,
        }
    }

    /// With its causes, in one line.
    pub fn line(&self) -> String {
        super::chain(self)
    }
}
