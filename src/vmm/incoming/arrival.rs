//! A machine that was announced on a connection: what it is, before anything of it is here.

use super::super::build::NewMachine;
use super::super::description::{Description, unix_ns};
use super::super::move_error::MoveError;
use super::super::receive::TargetReport;
use super::nanos;
use std::io::{self, Read};
use std::time::{Duration, Instant};
use sterna_migration::handover::Move;
use sterna_migration::stream::Socket;
use sterna_migration::wire::frame::{Frame, FrameKind, write_failure};
use sterna_migration::wire::message::{
    MAX_CONNECTIONS, MAX_PROBE_BYTES, Machine as MachineMessage, Mode, decode, read_frame, send,
};
use sterna_migration::wire::{Preamble, ToSource, ToTarget, WireError};
use sterna_migration::{SectionError, Sections};

/// The other side, in messages.
pub const SOURCE: &str = "the source";

/// A machine that was announced on a connection, and nothing more yet.
pub struct Arrival {
    pub(in crate::vmm) main: Socket,
    pub(in crate::vmm) this_move: Move,
    pub(in crate::vmm) message: MachineMessage,
    /// What it is, with its paths as they are here.
    pub description: Description,
    /// When it was announced.
    pub(super) began: Instant,
    /// The same by this host's clock.
    pub(in crate::vmm) heard_unix_ns: u64,
}

/// How long the description of a machine may take to come: some KiB.
const MACHINE_PATIENCE: Duration = Duration::from_secs(20);

impl Arrival {
    /// Reads what is to come over `main`, whose preamble was read.
    ///
    /// # Errors
    /// Whatever is not a machine; the source is told.
    pub fn read(main: Socket, preamble: &Preamble) -> Result<Self, MoveError> {
        let (began, heard_unix_ns) = (Instant::now(), unix_ns());
        let read = || {
            let frame = read_frame(&mut main.until(began + MACHINE_PATIENCE)).map_err(wire)?;
            let ToTarget::Machine(message) = decode(&frame).map_err(wire)? else {
                return Err(MoveError::Unexpected { peer: SOURCE, wanted: "the description of a machine" });
            };
            if !(1..=MAX_CONNECTIONS).contains(&message.connections) {
                let text = format!("{} connections; a move has 1 to {MAX_CONNECTIONS}", message.connections);
                return Err(MoveError::Refused(vec![text]));
            }
            let read = Description::decode(&message.description);
            let description = read.map_err(|source| MoveError::Description { done: "read", source })?;
            match description.inconsistency() {
                Some(text) => Err(MoveError::Refused(vec![text])),
                None => Ok((message, description)),
            }
        };
        let this_move = Move { id: preamble.id, epoch: preamble.epoch };
        match read() {
            Ok((message, description)) => Ok(Self { main, this_move, message, description, began, heard_unix_ns }),
            Err(error) => {
                refuse(&main, &error.line());
                Err(error)
            }
        }
    }

    /// Tells the source why the machine cannot come.
    pub fn refuse(&self, reason: &str) {
        refuse(&self.main, reason);
    }

    /// Tells the source what a trial found, then helps it to measure the way until it has had enough.
    ///
    /// # Errors
    /// The connection's, before the answer is out.
    pub fn answer_check(&self, report: &TargetReport, built: Option<&NewMachine>) -> Result<(), MoveError> {
        let bytes = serde_json::to_vec(report).map_err(|source| MoveError::Description { done: "written", source })?;
        send(&mut &self.main, &ToSource::Checked(bytes)).map_err(wire)?;
        while let Ok(frame) = read_frame(&mut &self.main) {
            match (frame.header.kind, built) {
                (FrameKind::State, Some(new)) => {
                    let began = Instant::now();
                    if let Err(error) = sections(&frame).and_then(|sections| Ok(new.rehearse(sections)?)) {
                        self.refuse(&error.line());
                        return Err(error);
                    }
                    rehearsed(&self.main, began)?;
                }
                _ => match decode(&frame).map_err(wire)? {
                    ToTarget::Probe { bytes } => take_probe(&self.main, bytes)?,
                    _ => return Err(MoveError::Unexpected { peer: SOURCE, wanted: "a rehearsal or a probe" }),
                },
            }
        }
        Ok(())
    }

    /// How long ago it was announced, nanoseconds.
    pub fn age_ns(&self) -> u64 {
        nanos(self.began.elapsed())
    }

    /// Whether the guest stops before its memory is copied.
    pub fn is_quick(&self) -> bool {
        self.message.mode == Mode::Quick
    }

    /// Id and epoch.
    pub fn this_move(&self) -> Move {
        self.this_move
    }
}

/// Tells the source why this side gives up.
pub fn refuse(main: &Socket, reason: &str) {
    if let Err(error) = write_failure(&mut &*main, reason) {
        log::debug!("the source does not hear why: {error}");
    }
}

/// What the source sends cannot be understood.
pub fn wire(source: WireError) -> MoveError {
    MoveError::Wire { peer: SOURCE, source }
}

/// The machine's states in a frame.
pub fn sections(frame: &Frame) -> Result<Sections, MoveError> {
    let decoded: Result<_, SectionError> = Sections::decode(&frame.contents);
    decoded.map_err(|source| wire(source.into()))
}

/// Says that a rehearsal that began at `began` is over.
pub fn rehearsed(main: &Socket, began: Instant) -> Result<(), MoveError> {
    send(&mut &*main, &ToSource::Rehearsed { restore_ns: nanos(began.elapsed()) }).map_err(wire)
}

/// Reads so many bytes of nothing and says so.
pub fn take_probe(main: &Socket, bytes: u64) -> Result<(), MoveError> {
    if bytes > MAX_PROBE_BYTES {
        return Err(MoveError::Unexpected { peer: SOURCE, wanted: "a probe of a bounded length" });
    }
    io::copy(&mut main.take(bytes), &mut io::sink()).map_err(MoveError::host("read a probe"))?;
    send(&mut &*main, &ToSource::Probed).map_err(wire)
}
