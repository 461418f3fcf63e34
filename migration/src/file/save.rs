//! Saving: RAM goes from guest memory to the disk, with no copy in between, on several threads.
//!
//! A thread takes 4 MiB of RAM, finds which of its pages are not zeros and their checksum in one look, and writes them while the
//! next thread looks at its own. The guest does not run meanwhile.

use super::Error;
use super::head::{self, Contents, Form};
use super::partial::Partial;
use super::store;
use super::table::{CHUNK_BYTES, CHUNK_PAGES, Chunk, END_BYTES, ENTRY_BYTES, End};
use super::work::{self, Hooks};
use crate::pages::{PAGE_BYTES, PageSet, Run};
use crate::ram::Ram;
use crate::wire::checksum;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Pages between two runs that are written with them rather than left out: a request costs more than 64 KiB.
const BRIDGE_PAGES: u64 = 16;
/// Compression for slow volumes, not for archives.
const ZSTD_LEVEL: i32 = 1;

/// How to save.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Threads that write: more than CPUs, so that the disk has requests while others look at RAM.
    pub threads: usize,
    /// Compress RAM: it can then be loaded, not mapped.
    pub compress: bool,
    /// Write past the page cache where the file system can.
    pub direct: bool,
    /// Take the place of a file that is there.
    pub overwrite: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { threads: 4, compress: false, direct: true, overwrite: false }
    }
}

/// What was saved.
#[derive(Clone, Copy, Debug)]
pub struct Figures {
    /// Pages in the file.
    pub pages: u64,
    /// Pages that existed, but were all zeros: holes.
    pub zero_pages: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// What it occupies on the disk.
    pub disk_bytes: u64,
    /// Whether RAM went past the page cache.
    pub direct: bool,
    /// Writing RAM.
    pub ram: Duration,
    /// Getting the rest onto the disk, and naming the file.
    pub sync: Duration,
}

/// Saves a machine, whose guest does not run, as `path`. `pages` are those of `ram` that exist.
///
/// # Errors
/// A file that is there already, a file system without room, [`Error::Cancelled`], and the system's. Nothing is left behind then.
pub fn save(
    path: &Path,
    contents: &Contents,
    ram: &Ram,
    pages: &PageSet,
    options: &Options,
    hooks: Hooks<'_>,
) -> Result<Figures, Error> {
    let form = if options.compress { Form::Zstd } else { Form::InPlace };
    let head = head::encode(contents, &ram.layout(), form)?;
    let partial = Partial::create(path, options.overwrite)?;
    let tail_bytes = (pages.ram_pages().div_ceil(CHUNK_PAGES) as usize * ENTRY_BYTES + END_BYTES) as u64;
    let needed_bytes = head.len() as u64 + pages.count() * PAGE_BYTES + tail_bytes;
    let no_space = |free_bytes| Error::NoSpace { path: path.to_owned(), needed_bytes, free_bytes };
    // How well RAM compresses is known afterwards.
    if let Some(free) = partial.free_bytes().filter(|free| *free < needed_bytes && form == Form::InPlace) {
        return Err(no_space(free));
    }
    let free_bytes = partial.free_bytes().unwrap_or(0);
    let saved = write(partial, &head, ram, pages, options, hooks);
    saved.map_err(|error| if error.is_no_space() { no_space(free_bytes) } else { error })
}

fn write(
    partial: Partial,
    head: &[u8],
    ram: &Ram,
    pages: &PageSet,
    options: &Options,
    hooks: Hooks<'_>,
) -> Result<Figures, Error> {
    let begin = Instant::now();
    let failed = Error::io("writing the file");
    partial.file.write_all_at(head, 0).map_err(failed)?;
    let data_at = head::data_at(head.len() as u64);
    let direct = if options.direct && !options.compress { partial.direct() } else { None };
    let writer = Writer {
        file: &partial.file,
        is_direct: AtomicBool::new(direct.is_some()),
        direct,
        ram,
        pages,
        data_at,
        next_at: AtomicU64::new(data_at),
        zero_pages: AtomicU64::new(0),
    };
    let spans: Vec<Run> = spans(pages).collect();
    let weight = |span: &Run| pages.runs_in(*span).map(|run| run.pages).sum();
    let chunks = work::each(options.threads, &spans, weight, hooks, |span| writer.chunk(*span, options.compress))?;
    let mut chunks: Vec<Chunk> = chunks.into_iter().flatten().collect();
    chunks.sort_unstable_by_key(|chunk| chunk.number);
    let ram_time = begin.elapsed();

    let mut table = Vec::with_capacity(chunks.len() * ENTRY_BYTES + END_BYTES);
    chunks.iter().for_each(|chunk| chunk.encode(&mut table));
    let end = End {
        table_at: if options.compress { writer.next_at.into_inner() } else { data_at + ram.pages() * PAGE_BYTES },
        entries: chunks.len() as u64,
        pages: chunks.iter().map(Chunk::pages).sum(),
        zero_pages: writer.zero_pages.into_inner(),
        head_sum: head::sum(head),
        table_sum: checksum(&table),
    };
    table.extend(end.encode());
    partial.file.write_all_at(&table, end.table_at).map_err(Error::io("writing the file"))?;
    partial.publish()?;
    let written = partial.file.metadata().map_err(Error::io("reading the file"))?;
    Ok(Figures {
        pages: end.pages,
        zero_pages: end.zero_pages,
        file_bytes: written.len(),
        disk_bytes: written.blocks() * 512,
        direct: writer.is_direct.into_inner(),
        ram: ram_time,
        sync: begin.elapsed() - ram_time,
    })
}

/// The chunks of RAM with pages that exist.
fn spans(pages: &PageSet) -> impl Iterator<Item = Run> + '_ {
    let starts = (0..pages.ram_pages()).step_by(CHUNK_PAGES as usize);
    let spans = starts.map(|first| Run { first, pages: CHUNK_PAGES });
    spans.filter(|span| pages.words(span.first, span.pages).iter().any(|word| *word != 0))
}

/// What the threads share.
struct Writer<'a> {
    file: &'a File,
    /// The file again, past the page cache.
    direct: Option<File>,
    /// Cleared once the file system has refused such a write.
    is_direct: AtomicBool,
    ram: &'a Ram,
    pages: &'a PageSet,
    data_at: u64,
    /// Where the next compressed chunk goes.
    next_at: AtomicU64,
    zero_pages: AtomicU64,
}

impl Writer<'_> {
    /// Writes the pages of `span`; `None` if all were zeros.
    fn chunk(&self, span: Run, compress: bool) -> Result<Option<Chunk>, Error> {
        let mut found = PageSet::none(CHUNK_PAGES);
        let mut zero_pages = 0;
        for page in self.pages.runs_in(span).flat_map(|run| run.first..run.end()) {
            if self.ram.is_zero(page) {
                zero_pages += 1;
            } else {
                found.insert(Run { first: page - span.first, pages: 1 });
            }
        }
        self.zero_pages.fetch_add(zero_pages, Ordering::Relaxed);
        if found.is_empty() {
            return Ok(None);
        }
        let mut chunk = Chunk { number: (span.first / CHUNK_PAGES) as u32, stored: 0, at: 0, sum: 0, bits: [0; 16] };
        chunk.bits.copy_from_slice(found.words(0, CHUNK_PAGES));
        let runs = chunk.runs();
        if compress {
            self.compressed(&mut chunk, &runs)?;
        } else {
            chunk.sum = store::sum(self.ram, &runs);
            for run in bridged(&runs) {
                self.in_place(run).map_err(Error::io("writing the file"))?;
            }
        }
        Ok(Some(chunk))
    }

    fn in_place(&self, run: Run) -> io::Result<()> {
        let offset = self.data_at + run.first * PAGE_BYTES;
        if let Some(direct) = self.direct.as_ref().filter(|_| self.is_direct.load(Ordering::Relaxed)) {
            match self.ram.write_at(direct, run, offset) {
                // Pages are aligned to 4096 bytes: a file system that wants more, or cannot after all.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    self.is_direct.store(false, Ordering::Relaxed)
                }
                result => return result,
            }
        }
        self.ram.write_at(self.file, run, offset)
    }

    fn compressed(&self, chunk: &mut Chunk, runs: &[Run]) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(CHUNK_BYTES);
        let mut page = [0; PAGE_BYTES as usize];
        for number in runs.iter().flat_map(|run| run.first..run.end()) {
            self.ram.copy_page(number, &mut page);
            bytes.extend_from_slice(&page);
        }
        chunk.sum = checksum(&bytes);
        let stored = zstd::bulk::compress(&bytes, ZSTD_LEVEL).map_err(Error::io("compressing RAM"))?;
        chunk.stored = stored.len() as u32; // at most a little more than a chunk
        chunk.at = self.next_at.fetch_add(stored.len() as u64, Ordering::Relaxed);
        self.file.write_all_at(&stored, chunk.at).map_err(Error::io("writing the file"))
    }
}

/// `runs`, those joined that are close to each other.
fn bridged(runs: &[Run]) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut().filter(|last| run.first - last.end() <= BRIDGE_PAGES) {
            Some(last) => last.pages = run.end() - last.first,
            None => joined.push(*run),
        }
    }
    joined
}
