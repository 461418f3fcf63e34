//! A saved machine that was found whole: what it is, and its RAM, loaded or mapped.

use super::Error;
use super::claim::{self, Claim};
use super::head::{self, Contents, Form, Saved};
use super::lazy::Lazy;
use super::store::Store;
use super::table::{self, Chunk};
use super::work::{self, Hooks};
use crate::pages::{PageSet, Run};
use crate::ram::Ram;
use crate::section::Sections;
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// See the module.
#[derive(Debug)]
pub struct SavedFile {
    version: u16,
    contents: Contents,
    store: Arc<Store>,
}

/// How much of a machine's RAM is in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Pages of RAM.
    pub ram_pages: u64,
    /// Pages in the file.
    pub pages: u64,
    /// Pages that existed, but were all zeros.
    pub zero_pages: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// What it occupies on the disk.
    pub disk_bytes: u64,
}

impl SavedFile {
    /// Opens `path` and sees that everything but RAM is as it was saved.
    ///
    /// # Errors
    /// What is no saved machine, not whole, damaged, or of a version or architecture that is not read here.
    pub fn open(path: &Path) -> Result<Self, Error> {
        // Not waiting: a pipe has nobody who writes.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(Error::io("opening the file"))?;
        let head = head::decode(&file)?;
        let (end, chunks) = table::read(&file, &head)?;
        let store = Store::new(file, &head, end, chunks);
        Ok(Self { version: head.version, contents: head.contents, store: Arc::new(store) })
    }

    /// Format version that it has.
    pub fn format_version(&self) -> u16 {
        self.version
    }

    /// Id and epoch, description and sections, and who saved it.
    pub fn contents(&self) -> &Contents {
        &self.contents
    }

    /// Who saved which machine.
    pub fn saved(&self) -> &Saved {
        &self.contents.saved
    }

    /// The machine's state.
    pub fn sections(&self) -> &Sections {
        &self.contents.sections
    }

    /// Guest physical address and bytes of each region of RAM.
    pub fn layout(&self) -> &[(u64, u64)] {
        &self.store.layout
    }

    /// How RAM lies in the file.
    pub fn form(&self) -> Form {
        self.store.form
    }

    /// How much of RAM is in the file.
    ///
    /// # Errors
    /// The system's.
    pub fn statistics(&self) -> Result<Statistics, Error> {
        let file = self.store.file.metadata().map_err(Error::io("reading the file"))?;
        Ok(Statistics {
            ram_pages: self.store.ram_pages(),
            pages: self.store.end.pages,
            zero_pages: self.store.end.zero_pages,
            file_bytes: file.len(),
            disk_bytes: file.blocks() * 512,
        })
    }

    /// The pages in the file. Where RAM is mapped from it they exist without being in this process's page table.
    pub fn pages(&self) -> PageSet {
        let mut pages = PageSet::none(self.store.ram_pages());
        for chunk in &self.store.chunks {
            pages.insert_bitmap(chunk.span().first, &chunk.bits);
        }
        pages
    }

    /// When and where the machine was restored from this file, if it was.
    ///
    /// # Errors
    /// The system's.
    pub fn restored_before(&self) -> Result<Option<String>, Error> {
        claim::read(&self.store.file)
    }

    /// Takes the right to restore. A mapping made from now on holds it too.
    ///
    /// # Errors
    /// [`Error::Claimed`] when another process has it, and the system's.
    pub fn claim(&mut self) -> Result<Claim, Error> {
        let claim = Claim::new(&self.store.file)?;
        Arc::make_mut(&mut self.store).file = claim.file();
        Ok(claim)
    }

    /// Reads all pages into `ram`, which is private anonymous memory and whose other pages become zeros, and compares them with
    /// their checksums.
    ///
    /// # Errors
    /// A machine with other RAM, [`Error::Pages`] where they are damaged, [`Error::Cancelled`], and the system's. What is in
    /// `ram` then is of no use.
    pub fn load(&self, ram: &Ram, threads: usize, hooks: Hooks<'_>) -> Result<(), Error> {
        self.store.check_layout(ram)?;
        ram.discard(Run { first: 0, pages: ram.pages() }).map_err(Error::io("emptying RAM"))?;
        let direct = self.store.direct();
        let load = |chunk: &Chunk| self.store.load(chunk, ram, direct.as_ref());
        work::each(threads, &self.store.chunks, Chunk::pages, hooks, load).map(drop)
    }

    /// Reads all pages into `ram`, which is private anonymous memory, in the background; whoever touches a page that is not there yet waits for it. `on_error` is told
    /// each piece of RAM that cannot be read, from any thread: its pages stay missing, and who touches one stays blocked.
    ///
    /// Begins before the guest runs. Afterwards the file is free to go.
    ///
    /// # Errors
    /// [`Error::FaultsNotAllowed`], a machine with other RAM, and the system's.
    pub fn load_lazily(
        &self,
        ram: &Ram,
        threads: usize,
        on_error: impl Fn(&Error) + Send + Sync + 'static,
    ) -> Result<Lazy, Error> {
        Lazy::start(&self.store, ram, threads, Box::new(on_error))
    }

    /// Maps the file privately over `ram`: pages come when they are touched, and what the guest writes stays in memory.
    ///
    /// The file must stay as it is while the machine runs, and its pages are not compared with their checksums. A page that is
    /// merely let go shows the file again, not zeros: whoever lets go (balloon, reboot) maps anonymous memory in its place.
    ///
    /// # Errors
    /// [`Error::Compressed`]: load it; a machine with other RAM, and the system's.
    pub fn map(&self, ram: &Ram) -> Result<(), Error> {
        self.store.check_layout(ram)?;
        self.store.map(ram)
    }

    /// Compares all pages with their checksums, and sees that nothing is where no page was saved.
    ///
    /// # Errors
    /// As for [`Self::load`].
    pub fn verify(&self, threads: usize, hooks: Hooks<'_>) -> Result<(), Error> {
        work::each(threads, &self.store.chunks, Chunk::pages, hooks, |chunk| self.store.fetch(chunk).map(drop))?;
        self.store.check_holes()
    }
}
