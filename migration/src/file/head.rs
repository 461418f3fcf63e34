//! What stands before RAM: who saved what, and the machine's state. Read whole, with every length checked before it is believed.

use super::{Error, store};
use crate::pages::PAGE_BYTES;
use crate::section::Sections;
use crate::wire::frame::{self, FrameKind};
use crate::wire::message::{self, FINAL_STATE};
use crate::wire::{Preamble, Purpose, WireError, preamble};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use uuid::Uuid;
use xxhash_rust::xxh3::Xxh3;

/// Where the claim block is: not part of the head, it is written when a machine is restored.
pub(super) const CLAIM_AT: u64 = 4096;
/// Where the frames begin.
const FRAMES_AT: u64 = 8192;
/// RAM begins at a multiple of this, so that a huge page of the file can be one of the mapping.
const DATA_ALIGN: u64 = 2 << 20;
/// Most RAM of a saved machine, pages: 16 TiB.
const MAX_PAGES: u64 = 1 << 32;
/// Most regions of RAM.
const MAX_REGIONS: usize = 64;

/// Who saved which machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Version of the program.
    pub program: String,
    /// Name of the host.
    pub host: String,
    /// When, for people.
    pub time: String,
    /// When, nanoseconds since 1970.
    pub time_unix_ns: u64,
    /// Name of the machine.
    pub machine: String,
    /// Its UUID.
    pub uuid: Uuid,
}

/// How RAM lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Form {
    /// Page by page where it can be mapped.
    InPlace,
    /// As zstd frames.
    Zstd,
}

/// All of a machine but its RAM.
#[derive(Clone, Debug)]
pub struct Contents {
    /// Id of this save.
    pub id: Uuid,
    /// Epoch of the machine.
    pub epoch: u64,
    /// Who saved it.
    pub saved: Saved,
    /// The machine's description, which this crate does not look into.
    pub description: Vec<u8>,
    /// Its state.
    pub sections: Sections,
}

/// The first message of a file.
#[derive(Debug, Serialize, Deserialize)]
struct First {
    saved: Saved,
    /// Guest physical address and bytes of each region.
    layout: Vec<(u64, u64)>,
    form: Form,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Head {
    /// Format version that the file has.
    pub version: u16,
    pub contents: Contents,
    pub layout: Vec<(u64, u64)>,
    pub form: Form,
    /// Where RAM begins.
    pub data_at: u64,
    /// XXH3 of all before, the claim block left out.
    pub sum: u64,
}

impl Head {
    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.layout.iter().map(|(_, bytes)| bytes / PAGE_BYTES).sum()
    }
}

/// The head as bytes, the claim block zeros.
pub(super) fn encode(contents: &Contents, layout: &[(u64, u64)], form: Form) -> Result<Vec<u8>, Error> {
    let first = First { saved: contents.saved.clone(), layout: layout.to_vec(), form };
    check_layout(layout)?;
    let mut bytes = Preamble::new(Purpose::File, 0, contents.id, contents.epoch).encode().to_vec();
    bytes.resize(FRAMES_AT as usize, 0);
    message::send(&mut bytes, &first)?;
    frame::write_summed(&mut bytes, FrameKind::Message, 0, &contents.description)?;
    frame::write_summed(&mut bytes, FrameKind::State, FINAL_STATE, &contents.sections.encode())?;
    Ok(bytes)
}

/// Where RAM begins behind a head of `bytes`.
pub(super) fn data_at(bytes: u64) -> u64 {
    bytes.next_multiple_of(DATA_ALIGN)
}

/// Checksum of a head, its claim block left out.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    let mut sum = Xxh3::new();
    sum.update(bytes.get(..CLAIM_AT as usize).unwrap_or_default());
    sum.update(bytes.get(FRAMES_AT as usize..).unwrap_or_default());
    sum.digest()
}

fn check_layout(layout: &[(u64, u64)]) -> Result<(), Error> {
    let mut end = 0;
    let mut pages = 0u64;
    let good = layout.iter().all(|&(start, bytes)| {
        let fits = bytes > 0 && start >= end && (start | bytes) % PAGE_BYTES == 0;
        end = start.saturating_add(bytes);
        pages = pages.saturating_add(bytes / PAGE_BYTES);
        fits && end < u64::MAX
    });
    if good && layout.len() <= MAX_REGIONS && pages <= MAX_PAGES {
        return Ok(());
    }
    Err(Error::Damaged { what: "its layout of RAM is not one that a machine can have" })
}

/// Reads `file` from a place on, and keeps the checksum of what was read.
pub(super) struct Summed<'a> {
    pub file: &'a File,
    pub at: u64,
    pub sum: Xxh3,
}

impl<'a> Summed<'a> {
    /// Begins at `at`.
    pub fn new(file: &'a File, at: u64) -> Self {
        Self { file, at, sum: Xxh3::new() }
    }
}

impl Read for Summed<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let done = self.file.read_at(to, self.at)?;
        self.at += done as u64;
        self.sum.update(to.get(..done).unwrap_or_default());
        Ok(done)
    }
}

/// Reads the head. That its checksum is what the end record says is for the caller to see.
pub(super) fn decode(file: &File) -> Result<Head, Error> {
    let mut input = Summed::new(file, 0);
    let mut start = [0; preamble::BYTES];
    input.read_exact(&mut start).map_err(Error::io("reading the file"))?;
    let preamble = Preamble::decode(&start)?;
    if preamble.purpose != Purpose::File {
        return Err(Error::Damaged { what: "it is a recorded stream, not a saved machine" });
    }
    let mut rest = [0; CLAIM_AT as usize - preamble::BYTES];
    input.read_exact(&mut rest).map_err(Error::io("reading the file"))?;
    input.at = FRAMES_AT;
    let first: First = message::decode(&message::read_frame(&mut input)?)?;
    check_layout(&first.layout)?;
    let description = message::read_frame(&mut input)?;
    let state = message::read_frame(&mut input)?;
    if description.header.kind != FrameKind::Message || state.header.kind != FrameKind::State {
        return Err(Error::Damaged { what: "its frames are not those of a saved machine" });
    }
    let sections = Sections::decode(&state.contents).map_err(WireError::from)?;
    let (data_at, sum) = (data_at(input.at), input.sum.digest());
    store::check_zeros(file, input.at, data_at, "the gap before RAM is not empty")?;
    let contents = Contents {
        id: preamble.id,
        epoch: preamble.epoch,
        saved: first.saved,
        description: description.contents,
        sections,
    };
    Ok(Head { version: preamble.version, contents, layout: first.layout, form: first.form, data_at, sum })
}
