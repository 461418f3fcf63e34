//! For tests: a machine without a machine. RAM whose pages a thread writes at random, and its dirty log.

use super::{Hooks, Pace, PassFigures, Sender, Socket, StreamError, Throttle};
use crate::pages::{PageSet, Run};
use crate::ram::{GuestRam, Ram};
use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use vm_memory::{Bytes, GuestAddress};

/// Longest that anything here may take.
pub(crate) const LONG: Duration = Duration::from_secs(20);

/// Numbers as they come; the seed is told where a test fails.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// From `STERNA_SEED`, or the clock.
    pub(crate) fn new() -> Self {
        let given = std::env::var("STERNA_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64);
        let seed = given.unwrap_or_else(clock) | 1;
        eprintln!("STERNA_SEED={seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }
}

/// RAM of two regions of `low` and `high` pages.
pub(crate) fn ram(low: u64, high: u64) -> Ram {
    let regions = [(GuestAddress(0), low as usize * 4096), (GuestAddress(1 << 32), high as usize * 4096)];
    let memory = GuestRam::from_ranges(&regions[..if high > 0 { 2 } else { 1 }]).unwrap();
    Ram::new(Arc::new(memory))
}

/// Fills `page` with `value`.
pub(crate) fn fill(ram: &Ram, page: u64, value: u64) {
    ram.memory().write_slice(&value.to_le_bytes().repeat(512), ram.address(page).unwrap()).unwrap();
}

/// All pages of `pages` below `ram`'s end.
pub(crate) fn set(ram: &Ram, pages: impl IntoIterator<Item = u64>) -> Arc<PageSet> {
    let mut set = PageSet::none(ram.pages());
    pages.into_iter().for_each(|first| set.insert(Run { first, pages: 1 }));
    Arc::new(set)
}

/// Pages in which two RAMs differ.
pub(crate) fn differences(one: &Ram, other: &Ram) -> Vec<u64> {
    let (mut a, mut b) = ([0; 4096], [0; 4096]);
    let differ = |page: &u64| {
        one.copy_page(*page, &mut a);
        other.copy_page(*page, &mut b);
        a != b
    };
    (0..one.pages()).filter(differ).collect()
}

/// The machine: what it wrote since its pages were last cleared.
pub(crate) struct Rig {
    pub(crate) ram: Ram,
    pub(crate) dirty: Mutex<PageSet>,
    pub(crate) cancel: AtomicBool,
    pub(crate) seen_pages: AtomicU64,
    pub(crate) sent_bytes: AtomicU64,
    /// The dirty log breaks.
    pub(crate) broken: AtomicBool,
    /// Of the threads that took pages.
    pub(crate) niceness: Mutex<BTreeSet<i32>>,
}

impl Rig {
    pub(crate) fn new(ram: Ram) -> Arc<Self> {
        let dirty = Mutex::new(PageSet::none(ram.pages()));
        let (cancel, broken) = (AtomicBool::new(false), AtomicBool::new(false));
        let niceness = Mutex::default();
        Arc::new(Self { ram, dirty, cancel, seen_pages: 0.into(), sent_bytes: 0.into(), broken, niceness })
    }

    pub(crate) fn sender(self: &Arc<Self>, sockets: Vec<Socket>, limit: Option<u64>) -> Sender {
        let hooks = Arc::clone(self) as Arc<dyn Hooks>;
        Sender::new(self.ram.clone(), sockets, Arc::new(Throttle::new(limit)), hooks).unwrap()
    }

    /// The guest writes a page: zeros every now and then.
    pub(crate) fn write(&self, random: &mut Random) {
        let page = random.below(self.ram.pages());
        match random.below(4) {
            0 => fill(&self.ram, page, 0),
            1 => self.ram.memory().write_obj(random.next(), self.ram.address(page).unwrap()).unwrap(),
            _ => fill(&self.ram, page, random.next()),
        }
        self.dirty.lock().unwrap().insert(Run { first: page, pages: 1 });
    }

    /// The log as it stands; pages are taken off it chunk by chunk.
    pub(crate) fn log(&self) -> Arc<PageSet> {
        Arc::new(self.dirty.lock().unwrap().clone())
    }

    /// A pass of what is dirty.
    pub(crate) fn pass(&self, sender: &mut Sender, pace: Pace) -> Result<PassFigures, StreamError> {
        sender.send_pass(&self.log(), pace)
    }
}

impl Hooks for Rig {
    fn before(&self, chunk: Run, words: &[u64]) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("no log"));
        }
        self.niceness.lock().unwrap().insert(rustix::process::getpriority_process(None)?);
        let mut clear = PageSet::none(self.ram.pages());
        clear.insert_bitmap(chunk.first, words);
        self.dirty.lock().unwrap().remove_all(&clear);
        Ok(())
    }

    fn sent(&self, pages: u64, bytes: u64) {
        self.seen_pages.fetch_add(pages, Ordering::Relaxed);
        self.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

/// Both ends of `number` connections: over loopback TCP, or within the process.
pub(crate) fn connections(number: usize, tcp: bool) -> (Vec<Socket>, Vec<Socket>) {
    let listener = tcp.then(|| super::Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap());
    let pair = |_| match &listener {
        Some(listener) => (super::connect(listener.address(), LONG).unwrap(), listener.accept(Some(LONG)).unwrap()),
        None => Socket::pair().unwrap(),
    };
    (0..number).map(pair).unzip()
}
