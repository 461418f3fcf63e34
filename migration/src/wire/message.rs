//! What the two sides of a move say to each other.
//!
//! ```text
//! source                                    target
//! preamble (Move) ── Machine ─────────────>  builds the machine, opens disks and taps
//!                 <──────────────── Ready ─  or a failure with its reason
//! preambles (Join) on further connections
//! ── state frame (rehearsal) ─────────────>  restores it: what cannot be taken is refused before the guest stops
//!                 <──────────── Rehearsed ─
//! ── Make ────────────────────────────────>  quick: makes the pages that are to come
//!                 <───────────────── Made ─
//! ── ram frames, pass end ── ... ─────────>  straight into the mapping, on every connection
//! (the guest stops)
//! ── last ram frames, state frame (final)─>
//!                 <─────────────── Loaded ─
//! ── Go ──────────────────────────────────>  takes the disk locks, starts
//!                 <────────────── Running ─  or NotStarted
//! ── Report ──────────────────────────────>  the figures, to be kept there
//! preamble (Ask)  ── Ask ─────────────────>  what became of it (see `handover`)
//! ```

use super::WireError;
use super::frame::{self, Frame, FrameKind};
use crate::handover::{Answer, Order};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};

/// Flag of a state frame: this is what the machine goes on from. Without it, a rehearsal.
pub const FINAL_STATE: u8 = 1;
/// Most connections of one move.
pub const MAX_CONNECTIONS: u16 = 64;
/// Most runs of pages that one message asks to be made.
pub const MAX_MAKE_RUNS: usize = 1024;
/// Most bytes of one probe.
pub const MAX_PROBE_BYTES: u64 = 256 << 20;

/// How a machine moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Memory is copied while the guest runs.
    Live,
    /// The guest stops, then memory is copied.
    Quick,
}

/// From the source to the target. Which move it is about, the preamble of its connection says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToTarget {
    /// The machine that is to be built, and how it will come.
    Machine(Machine),
    /// A word of the hand-over.
    Order(Order),
    /// So many bytes of nothing follow, to measure the way. Answered with `Probed` when they are read.
    Probe {
        /// Bytes, at most [`MAX_PROBE_BYTES`].
        bytes: u64,
    },
    /// The figures of a move that is done; a report that this crate does not look into.
    Report(Vec<u8>),
    /// Pages that will come while the guest stands still, by first page and count, at most [`MAX_MAKE_RUNS`]: the target
    /// makes them now, as zeros. Answered with `Made`.
    Make(Vec<(u64, u64)>),
}

/// What the target needs to build a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The machine's description, which this crate does not look into.
    pub description: Vec<u8>,
    /// Guest physical address and bytes of each region of RAM.
    pub layout: Vec<(u64, u64)>,
    /// How it will come.
    pub mode: Mode,
    /// Connections there will be, this one included.
    pub connections: u16,
    /// Both sides shall hash all of RAM.
    pub verify: bool,
}

/// From the target to the source. A reason to give up comes as a failure frame instead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// The machine is built and waits.
    Ready(Ready),
    /// The rehearsal's state was restored.
    Rehearsed {
        /// How long that took, nanoseconds.
        restore_ns: u64,
    },
    /// Everything is there.
    Loaded(Loaded),
    /// The guest runs there.
    Running(Started),
    /// It could not start and never will, for this reason.
    NotStarted(String),
    /// It was never started, and from now on never will be.
    Discarded,
    /// It waits for Go.
    Pending,
    /// It was started there, and its process has ended.
    Ended,
    /// Nothing is known of this move.
    Unknown,
    /// The answer to a trial; a report that this crate does not look into.
    Checked(Vec<u8>),
    /// The bytes of a probe were read.
    Probed,
    /// The pages are made.
    Made,
}

impl ToSource {
    /// What it says of the hand-over, if it does.
    pub fn answer(&self) -> Option<Answer> {
        Some(match self {
            Self::Ready(_) => Answer::Ready,
            Self::Loaded(_) => Answer::Loaded,
            Self::Running(_) => Answer::Running,
            Self::NotStarted(reason) => Answer::NotStarted(reason.clone()),
            Self::Discarded => Answer::Discarded,
            Self::Pending => Answer::Pending,
            Self::Ended => Answer::Ended,
            Self::Unknown => Answer::Unknown,
            Self::Rehearsed { .. } | Self::Checked(_) | Self::Probed | Self::Made => return None,
        })
    }
}

impl From<Answer> for ToSource {
    /// An answer without figures: one that a keeper gives.
    fn from(answer: Answer) -> Self {
        match answer {
            Answer::Discarded => Self::Discarded,
            Answer::Pending => Self::Pending,
            Answer::Ended => Self::Ended,
            Answer::NotStarted(reason) => Self::NotStarted(reason),
            Answer::Ready | Answer::Loaded | Answer::Running | Answer::Unknown | Answer::Fail(_) => Self::Unknown,
        }
    }
}

/// What a target reports of a machine that it has built.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// How long building took, nanoseconds.
    pub build_ns: u64,
    /// What a person should know, and nothing is refused for.
    pub warnings: Vec<String>,
    /// MSRs of the machine's state that this host does not have: a guest that uses one cannot come.
    pub unknown_msrs: Vec<u32>,
}

/// What a target reports of what it has loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    /// From the state frame's arrival to the end of its restoring, nanoseconds.
    pub restore_ns: u64,
    /// Hash of all of RAM, where one was asked for.
    pub ram_hash: Option<u64>,
}

/// What a target reports of a start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Taking the disk locks, nanoseconds.
    pub locks_ns: u64,
    /// From Go's arrival to vCPUs that run, nanoseconds.
    pub start_ns: u64,
    /// From Go's arrival to this answer, nanoseconds: what the source waits beyond it was on the way.
    pub answered_ns: u64,
}

/// Writes a message.
///
/// # Errors
/// The writer's, and a message beyond its limit.
pub fn send<T: Serialize>(output: &mut impl Write, message: &T) -> Result<(), WireError> {
    let contents = postcard::to_stdvec(message).map_err(|source| WireError::Decode { what: "message", source })?;
    frame::write_summed(output, FrameKind::Message, 0, &contents)
}

/// Decodes a message frame; nothing may follow the message.
///
/// # Errors
/// Another kind of frame, or contents that are not exactly one message.
pub fn decode<T: DeserializeOwned>(frame: &Frame) -> Result<T, WireError> {
    if frame.header.kind != FrameKind::Message {
        return Err(WireError::Unexpected { what: "frame", found: frame.header.encode()[0].into() });
    }
    let decoded = postcard::take_from_bytes(&frame.contents);
    let (message, rest) = decoded.map_err(|source| WireError::Decode { what: "message", source })?;
    if rest.is_empty() {
        return Ok(message);
    }
    Err(WireError::Unexpected { what: "number of bytes behind a message", found: rest.len() as u64 })
}

/// Reads a frame that is not one of RAM.
///
/// # Errors
/// The reader's, and whatever is malformed.
pub fn read_frame(input: &mut impl Read) -> Result<Frame, WireError> {
    let header = frame::read_header(input)?;
    if header.kind == FrameKind::Ram {
        return Err(WireError::Unexpected { what: "frame", found: header.encode()[0].into() });
    }
    frame::read_contents(input, header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_behind_a_message_are_refused() {
        let mut bytes = Vec::new();
        frame::write_summed(&mut bytes, FrameKind::Message, 0, b"\x01\x01\x00").unwrap();
        let frame = read_frame(&mut bytes.as_slice()).unwrap();
        assert!(matches!(decode::<ToTarget>(&frame), Err(WireError::Unexpected { .. })));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(contents in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut bytes = Vec::new();
            frame::write_summed(&mut bytes, FrameKind::Message, 0, &contents).unwrap();
            let frame = read_frame(&mut bytes.as_slice()).unwrap();
            let _ = decode::<ToTarget>(&frame);
            let _ = decode::<ToSource>(&frame);
        }
    }
}
