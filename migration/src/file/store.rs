//! The pages of a saved machine: where in the file they are, and how they come out of it, never unchecked.

use super::head::{Form, Head};
use super::table::{CHUNK_BYTES, Chunk, End};
use super::{Error, sys};
use crate::pages::{PAGE_BYTES, Run};
use crate::ram::Ram;
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::{File, OpenOptions};
use std::io::IoSliceMut;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use vm_memory::Bytes;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Store {
    pub file: Arc<File>,
    pub form: Form,
    /// Where RAM begins in the file.
    pub data_at: u64,
    pub chunks: Vec<Chunk>,
    pub end: End,
    pub layout: Vec<(u64, u64)>,
}

impl Store {
    pub fn new(file: File, head: &Head, end: End, chunks: Vec<Chunk>) -> Self {
        let (form, data_at, layout) = (head.form, head.data_at, head.layout.clone());
        Self { file: Arc::new(file), form, data_at, chunks, end, layout }
    }

    /// Pages of RAM.
    pub fn ram_pages(&self) -> u64 {
        self.layout.iter().map(|(_, bytes)| bytes / PAGE_BYTES).sum()
    }

    /// Refuses a machine with another RAM.
    pub fn check_layout(&self, ram: &Ram) -> Result<(), Error> {
        if ram.layout() == self.layout { Ok(()) } else { Err(Error::Layout) }
    }

    /// Offset of `page` in a file whose RAM is in place.
    fn offset(&self, page: u64) -> u64 {
        self.data_at + page * PAGE_BYTES
    }

    /// The pages of `chunk` that are in the file, one after the other.
    pub fn fetch(&self, chunk: &Chunk) -> Result<Vec<u8>, Error> {
        let length = (chunk.pages() * PAGE_BYTES) as usize; // at most a chunk
        let pages = match self.form {
            Form::InPlace => {
                let mut pages = vec![0; length];
                let mut rest = pages.as_mut_slice();
                for run in chunk.runs() {
                    let (part, behind) = rest.split_at_mut_checked(run.bytes() as usize).unwrap_or_default();
                    self.file.read_exact_at(part, self.offset(run.first)).map_err(Error::io("reading the file"))?;
                    rest = behind;
                }
                pages
            }
            Form::Zstd => {
                let mut stored = vec![0; chunk.stored as usize];
                self.file.read_exact_at(&mut stored, chunk.at).map_err(Error::io("reading the file"))?;
                zstd::bulk::decompress(&stored, CHUNK_BYTES.min(length)).map_err(|_| chunk.damaged())?
            }
        };
        if pages.len() != length || xxh3_64(&pages) != chunk.sum {
            return Err(chunk.damaged());
        }
        Ok(pages)
    }

    /// The file opened once more, for reading past the page cache; `None` where that cannot be.
    pub fn direct(&self) -> Option<File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).ok()
    }

    /// Whether `page` can be read without waiting for the disk.
    fn is_cached(&self, page: u64) -> bool {
        let mut byte = [0];
        let mut to = [IoSliceMut::new(&mut byte)];
        preadv2(&self.file, &mut to, self.offset(page), ReadWriteFlags::NOWAIT).is_ok()
    }

    /// Brings the pages of `chunk` into `ram`: straight from the file where they are in place. What is not in the page cache is
    /// read past it, from `direct`: at the disk's speed instead of half of it.
    pub fn load(&self, chunk: &Chunk, ram: &Ram, direct: Option<&File>) -> Result<(), Error> {
        let runs = chunk.runs();
        if self.form == Form::Zstd {
            return self.load_compressed(chunk, &runs, ram);
        }
        let cached = runs.first().is_some_and(|run| self.is_cached(run.first));
        let mut direct = direct.filter(|_| !cached);
        for run in &runs {
            let read = match direct.map(|file| ram.read_at(file, *run, self.offset(run.first))) {
                // Pages are aligned to 4096 bytes: a file system that wants more, or cannot after all.
                Some(Err(error)) if error.raw_os_error() == Some(libc::EINVAL) => {
                    direct = None;
                    None
                }
                read => read,
            };
            let read = read.unwrap_or_else(|| ram.read_at(&self.file, *run, self.offset(run.first)));
            read.map_err(Error::io("reading the file"))?;
        }
        if sum(ram, &runs) == chunk.sum { Ok(()) } else { Err(chunk.damaged()) }
    }

    fn load_compressed(&self, chunk: &Chunk, runs: &[Run], ram: &Ram) -> Result<(), Error> {
        let pages = self.fetch(chunk)?;
        let (pages, _) = pages.as_chunks::<{ PAGE_BYTES as usize }>();
        for (number, page) in runs.iter().flat_map(|run| run.first..run.end()).zip(pages) {
            let address = ram.address(number).ok_or(Error::Layout)?;
            ram.memory().write_slice(page, address).map_err(|_| Error::Layout)?;
        }
        Ok(())
    }

    /// Maps the file over `ram`.
    pub fn map(&self, ram: &Ram) -> Result<(), Error> {
        if self.form == Form::Zstd {
            return Err(Error::Compressed);
        }
        for (run, address) in ram.pieces(Run { first: 0, pages: ram.pages() }) {
            sys::map_over(address, run.bytes(), &self.file, self.offset(run.first))
                .map_err(Error::io("mapping the file"))?;
        }
        Ok(())
    }

    /// Sees that what is in place between the pages in the file is zeros: it would be mapped.
    pub fn check_holes(&self) -> Result<(), Error> {
        let mut at = self.data_at;
        if self.form == Form::Zstd {
            return Ok(());
        }
        for run in self.chunks.iter().flat_map(Chunk::runs) {
            check_zeros(&self.file, at, self.offset(run.first), "there is something where no page was saved")?;
            at = self.offset(run.end());
        }
        check_zeros(&self.file, at, self.end.table_at, "there is something where no page was saved")
    }
}

/// XXH3 of the pages of `runs`, one after the other.
pub(super) fn sum(ram: &Ram, runs: &[Run]) -> u64 {
    let mut sum = Xxh3::new();
    let mut bytes = [0; PAGE_BYTES as usize];
    for page in runs.iter().flat_map(|run| run.first..run.end()) {
        ram.copy_page(page, &mut bytes);
        sum.update(&bytes);
    }
    sum.digest()
}

/// Sees that `file` has only zeros from `from` to `to`; holes are not read. `what` is said if not.
pub(super) fn check_zeros(file: &File, from: u64, to: u64, what: &'static str) -> Result<(), Error> {
    const STEP: usize = 64 << 10;
    static ZEROS: [u8; STEP] = [0; STEP];
    let mut buffer = [0; STEP];
    let mut at = from;
    while at < to {
        at = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(()),
            // A file system that knows no holes.
            Err(_) => at,
        };
        let step = to.saturating_sub(at).min(STEP as u64);
        let part = &mut buffer[..step as usize];
        file.read_exact_at(part, at).map_err(Error::io("reading the file"))?;
        if *part != ZEROS[..part.len()] {
            return Err(Error::Damaged { what });
        }
        at += step;
    }
    Ok(())
}
