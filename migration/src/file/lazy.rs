//! Loading in the background: the machine runs at once, and a page that is not there yet is brought when it is touched.
//!
//! Worker threads walk through the file chunk by chunk, and before each next one look whether somebody waits for a page; its chunk
//! comes first then. **A chunk of 4 MiB comes as a whole**: only so can it be compared with its checksum before anybody sees a byte
//! of it, and the pages around one that is touched are touched next. Who waits, waits for the chunks that are being read and then
//! its own, milliseconds.
//!
//! A chunk that cannot be read is told at once, and the rest goes on. **Its pages never become zeros**: a vCPU that touches one
//! stays blocked in KVM until the process ends. What to do with the machine then is the caller's to say.

use super::Error;
use super::store::Store;
use super::table::{CHUNK_PAGES, Chunk};
use super::uffd::Faults;
use crate::pages::{PAGE_BYTES, Run};
use crate::ram::Ram;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Most threads that load.
const MAX_THREADS: usize = 16;

/// A load in the background. It must be kept as long as the machine: when it is dropped before all pages are there, it stops, and
/// who waits for a page stays blocked for ever.
pub struct Lazy {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// Where guest RAM is in this process.
struct Place {
    run: Run,
    address: u64,
}

struct Shared {
    store: Arc<Store>,
    /// Keeps it mapped.
    _ram: Ram,
    places: Vec<Place>,
    faults: Faults,
    /// By index in the store's chunks: somebody has taken it up.
    taken: Vec<AtomicBool>,
    /// The walk's next index.
    next: AtomicUsize,
    /// Pages that are there.
    loaded: AtomicU64,
    /// Workers that are not through.
    active: AtomicUsize,
    /// Dropped before the end.
    stop: AtomicBool,
    /// The chunks that could not be read, and why the first could not.
    failed: Mutex<(Vec<usize>, Option<Error>)>,
    on_error: Box<dyn Fn(&Error) + Send + Sync>,
}

impl Lazy {
    /// Empties `ram`, and begins.
    pub(super) fn start(
        store: &Arc<Store>,
        ram: &Ram,
        threads: usize,
        on_error: Box<dyn Fn(&Error) + Send + Sync>,
    ) -> Result<Self, Error> {
        store.check_layout(ram)?;
        let all = Run { first: 0, pages: ram.pages() };
        let faults = Faults::new()?;
        ram.discard(all).map_err(Error::io("emptying RAM"))?;
        let places: Vec<_> = ram.pieces(all).map(|(run, address)| Place { run, address: address as u64 }).collect();
        for place in &places {
            faults.register(place.address, place.run.bytes()).map_err(Error::io("registering RAM with userfaultfd"))?;
        }
        let threads = threads.clamp(1, MAX_THREADS);
        let shared = Arc::new(Shared {
            store: Arc::clone(store),
            _ram: ram.clone(),
            places,
            faults,
            taken: store.chunks.iter().map(|_| AtomicBool::new(false)).collect(),
            next: AtomicUsize::new(0),
            loaded: AtomicU64::new(0),
            active: AtomicUsize::new(threads),
            stop: AtomicBool::new(false),
            failed: Mutex::default(),
            on_error,
        });
        let mut lazy = Self { shared: Arc::clone(&shared), workers: Vec::new() };
        for _ in 0..threads {
            let shared = Arc::clone(&shared);
            let worker = thread::Builder::new().name("lazy load".into()).spawn(move || shared.work());
            lazy.workers.push(worker.map_err(Error::io("starting a thread"))?);
        }
        Ok(lazy)
    }

    /// Pages that are there, and pages there will be.
    pub fn progress(&self) -> (u64, u64) {
        (self.shared.loaded.load(Ordering::Relaxed), self.shared.store.end.pages)
    }

    /// Whether all pages are there: nothing is brought any more.
    pub fn is_done(&self) -> bool {
        !self.shared.is_missing()
    }

    /// Waits until all pages are there and RAM is as any other.
    ///
    /// # Errors
    /// The first that was told; then pages are missing for ever.
    pub fn wait(mut self) -> Result<(), Error> {
        self.join();
        let error = self.shared.failed().1.take();
        error.map_or(Ok(()), Err)
    }

    fn join(&mut self) {
        for worker in self.workers.drain(..) {
            // A worker that panicked has left its chunk out, and nothing was let go.
            let _ = worker.join();
        }
    }
}

impl Drop for Lazy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.join();
        if self.shared.is_missing() {
            // The descriptor stays open until the process ends, so that no page that is missing becomes zeros.
            std::mem::forget(Arc::clone(&self.shared));
        }
    }
}

impl Shared {
    fn work(&self) {
        self.walk();
        let last = self.active.fetch_sub(1, Ordering::AcqRel) == 1;
        if last && !self.stop.load(Ordering::Relaxed) {
            // Refused only when the RAM is going away.
            let _ = self.let_go();
        }
    }

    fn walk(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            while let Some(address) = self.faults.next() {
                self.serve(address);
            }
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.taken.len() {
                return;
            }
            self.take_up(index);
        }
    }

    /// Somebody waits for the page at `address`.
    fn serve(&self, address: u64) {
        let inside = |place: &&Place| (place.address..place.address + place.run.bytes()).contains(&address);
        let Some(place) = self.places.iter().find(inside) else { return };
        let page = place.run.first + (address - place.address) / PAGE_BYTES;
        let number = (page / CHUNK_PAGES) as u32; // of a page of RAM
        match self.store.chunks.binary_search_by_key(&number, |chunk| chunk.number) {
            // Whoever has taken the chunk up wakes them as it comes.
            Ok(index) if self.store.chunks[index].contains(page) => self.take_up(index),
            _ => {
                // Refused only when the RAM is going away.
                let _ = self.faults.zero(address - address % PAGE_BYTES, PAGE_BYTES);
            }
        }
    }

    fn take_up(&self, index: usize) {
        if self.taken[index].swap(true, Ordering::Relaxed) {
            return;
        }
        let chunk = &self.store.chunks[index];
        match self.bring(chunk) {
            Ok(()) => {
                self.loaded.fetch_add(chunk.pages(), Ordering::Relaxed);
            }
            Err(error) => {
                (self.on_error)(&error);
                let mut failed = self.failed();
                failed.0.push(index);
                failed.1.get_or_insert(error);
            }
        }
    }

    fn bring(&self, chunk: &Chunk) -> Result<(), Error> {
        let pages = self.store.fetch(chunk)?;
        let mut rest = pages.as_slice();
        for piece in chunk.runs().into_iter().flat_map(|run| self.pieces(run)) {
            let (part, behind) = rest.split_at_checked(piece.1 as usize).unwrap_or_default();
            self.faults.copy(piece.0, part).map_err(Error::io("bringing pages into RAM"))?;
            rest = behind;
        }
        Ok(())
    }

    /// `run` as addresses and lengths.
    fn pieces(&self, run: Run) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.places.iter().filter_map(move |place| {
            let (first, end) = (run.first.max(place.run.first), run.end().min(place.run.end()));
            let pages = end.checked_sub(first).filter(|pages| *pages > 0)?;
            Some((place.address + (first - place.run.first) * PAGE_BYTES, pages * PAGE_BYTES))
        })
    }

    fn failed(&self) -> MutexGuard<'_, (Vec<usize>, Option<Error>)> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_missing(&self) -> bool {
        self.loaded.load(Ordering::Relaxed) < self.store.end.pages
    }

    /// All is there that will come: makes RAM as any other, but for the chunks that are missing. Who waits for a page there that
    /// nobody looked at any more goes on.
    fn let_go(&self) -> io::Result<()> {
        let mut missing: Vec<Run> = self.failed().0.iter().map(|index| self.store.chunks[*index].span()).collect();
        missing.sort_unstable_by_key(|span| span.first);
        missing.push(Run { first: self.store.ram_pages(), pages: 0 });
        let mut from = 0;
        for span in missing {
            for (address, bytes) in self.pieces(Run { first: from, pages: span.first.saturating_sub(from) }) {
                self.faults.unregister(address, bytes)?;
            }
            from = span.end();
        }
        Ok(())
    }
}
