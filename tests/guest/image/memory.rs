//! Guest memory: the map, and pages that carry their number and generation so that a lost or torn write shows.
//!
//! Word 0 of a page is its number, word 1 its generation (1 when filled, one more with each write), word 511 a mix of
//! both; with `full` the words between are filled too. A table ahead of the pages holds every page's generation again,
//! and each vCPU counts its writes, so a page, a piece of the table or a vCPU's state that is out of step is found.

use crate::boot::{CPU_COUNT, Entry, LARGE, MAX_CPUS, PDPT, Page, TABLE, large_pages};
use crate::cpus::WORK;
use crate::options::{Options, Pattern};
use crate::port::{read, write};
use crate::random::Random;
use crate::time::now_us;
use crate::{fail, line};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

const PAGE: usize = 4096;
const MAX_RANGES: usize = 8;
/// Pages between two looks at the clock.
const BATCH: u64 = 64;

type Ranges = [(usize, usize); MAX_RANGES];

/// The usable ranges of the machine's memory map: start and length, bytes.
pub struct Ram(Ranges);

impl Ram {
    /// Reads the map that the start info points at.
    pub fn from_start_info(info: usize) -> Self {
        let (map, entries) = (read::<u64>(info + 40) as usize, read::<u32>(info + 48) as usize);
        let mut ranges = [(0, 0); MAX_RANGES];
        let usable = (0..entries).map(|index| map + index * 24).filter(|&entry| read::<u32>(entry + 16) == 1);
        for (range, entry) in ranges.iter_mut().zip(usable) {
            *range = (read::<u64>(entry) as usize, read::<u64>(entry + 8) as usize);
        }
        Self(ranges)
    }

    /// Usable RAM, bytes.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|range| range.1).sum()
    }

    /// Whole pages from `start` up.
    fn above(&self, start: usize) -> Ranges {
        self.0.map(|(from, bytes)| {
            let end = (from + bytes) / PAGE * PAGE;
            let from = from.max(start).next_multiple_of(PAGE);
            (from, end.saturating_sub(from))
        })
    }
}

/// Maps the GiB around `address` onto itself, if it is not yet mapped.
pub fn map(address: usize) {
    const MOST: usize = 64;
    static mut DIRECTORIES: Page<[[u64; 512]; MOST]> = Page([[0; 512]; MOST]);
    static USED: AtomicU32 = AtomicU32::new(0);
    let gib = address >> 30;
    let entry = &raw const PDPT as usize + gib * size_of::<Entry>();
    if gib >= 512 {
        fail!("address {address:#x} is above the page tables");
    }
    if read::<u64>(entry) != 0 {
        return;
    }
    let index = USED.fetch_add(1, Ordering::Relaxed) as usize;
    if index >= MOST {
        fail!("address {address:#x}: out of page directories");
    }
    // SAFETY: each directory is written once, here, before it is reachable.
    let directory = unsafe {
        let directory = &raw mut DIRECTORIES.0[index];
        directory.write(large_pages((gib as u64) << 30, LARGE));
        directory
    };
    write(entry, directory as u64 | TABLE);
}

/// What all vCPUs know about the pages; written before `WORK` is set, then only read.
struct Plan {
    ranges: Ranges,
    table: usize,
    pages: u64,
    dirty_pages: u64,
    pages_per_s: u64,
    pattern: Pattern,
    full: bool,
    cpus: u64,
}

static mut PLAN: Plan = Plan {
    ranges: [(0, 0); MAX_RANGES],
    table: 0,
    pages: 0,
    dirty_pages: 0,
    pages_per_s: 0,
    pattern: Pattern::Sequential,
    full: false,
    cpus: 1,
};
static FILLED: AtomicU32 = AtomicU32::new(0);
static PAUSE: AtomicBool = AtomicBool::new(false);
static PAUSED: AtomicU32 = AtomicU32::new(0);
static WRITES: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

fn plan() -> &'static Plan {
    // SAFETY: read only after it has been written, see `WORK`.
    unsafe { &*&raw const PLAN }
}

impl Plan {
    /// Address of page `number`; the generation table comes first.
    fn address(&self, number: u64) -> usize {
        let mut offset = self.table_bytes() + number as usize * PAGE;
        for (start, bytes) in self.ranges {
            if offset < bytes {
                return start + offset;
            }
            offset -= bytes;
        }
        fail!("page {number} is outside memory")
    }

    fn table_bytes(&self) -> usize {
        (self.pages as usize * 4).next_multiple_of(PAGE)
    }

    fn generation(&self, number: u64) -> usize {
        self.table + number as usize * 4
    }

    fn write_page(&self, number: u64) {
        let generation = read::<u32>(self.generation(number)).wrapping_add(1);
        write(self.generation(number), generation);
        let address = self.address(number);
        write(address, number);
        write(address + 8, u64::from(generation));
        if self.full {
            (2..511).for_each(|word| write(address + word * 8, filler(number, word)));
        }
        write(address + PAGE - 8, mix(number, generation));
    }

    fn page_is_right(&self, number: u64, generation: u32) -> bool {
        let address = self.address(number);
        read::<u64>(address) == number
            && read::<u64>(address + 8) == u64::from(generation)
            && read::<u64>(address + PAGE - 8) == mix(number, generation)
            && (!self.full || (2..511).all(|word| read::<u64>(address + word * 8) == filler(number, word)))
    }
}

fn mix(number: u64, generation: u32) -> u64 {
    (number ^ u64::from(generation) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn filler(number: u64, word: usize) -> u64 {
    mix(number, word as u32)
}

/// Lays the pages out, lets every vCPU fill its stripe, and returns this vCPU's worker.
pub fn begin(options: &Options, ram: &Ram) -> Option<Worker> {
    unsafe extern "C" {
        static image_end: u8;
    }
    let start = (options.at_mib as usize).saturating_mul(1 << 20).max(&raw const image_end as usize);
    let ranges = ram.above(start);
    let pages = options.touch_mib * 256;
    let (first, have) = *ranges.iter().find(|range| range.1 > 0).unwrap_or(&(0, 0));
    let total: usize = ranges.iter().map(|range| range.1).sum();
    let table_bytes = (pages as usize * 4).next_multiple_of(PAGE);
    if pages as usize * PAGE + table_bytes > total || table_bytes > have {
        fail!("touch={}: only {} MiB usable from {start:#x}", options.touch_mib, total >> 20);
    }
    for (from, bytes) in ranges.into_iter().filter(|range| range.1 > 0) {
        (from >> 30..=(from + bytes - 1) >> 30).for_each(|gib| map(gib << 30));
    }
    let cpus = CPU_COUNT.load(Ordering::Acquire);
    let plan = Plan {
        ranges,
        table: first,
        pages,
        dirty_pages: options.dirty_mib * 256,
        pages_per_s: options.rate_mib * 256,
        pattern: options.pattern,
        full: options.full_pages,
        cpus: u64::from(cpus),
    };
    // SAFETY: the other vCPUs read it only after `WORK` is set.
    unsafe { (&raw mut PLAN).write(plan) };
    WORK.store(true, Ordering::Release);
    let began = now_us();
    let worker = Worker::new(0);
    while FILLED.load(Ordering::Acquire) < cpus {
        core::hint::spin_loop();
    }
    if pages > 0 {
        let us = (now_us() - began).max(1);
        line!("touched pages={pages} us={us} mib_per_s={}", options.touch_mib * 1_000_000 / us);
    }
    worker
}

/// One vCPU's share of the work.
pub struct Worker {
    cpu: usize,
    first: u64,
    count: u64,
    cursor: u64,
    random: Random,
    pages_per_s: u64,
    since_us: u64,
    since_writes: u64,
}

impl Worker {
    /// Fills the vCPU's stripe. `None` if there is nothing to dirty afterwards.
    pub fn new(cpu: u32) -> Option<Self> {
        let plan = plan();
        let stripe = |pages: u64| {
            let first = pages * u64::from(cpu) / plan.cpus;
            (first, pages * (u64::from(cpu) + 1) / plan.cpus - first)
        };
        let (first, count) = stripe(plan.pages);
        (first..first + count).for_each(|page| {
            write(plan.generation(page), 0u32);
            plan.write_page(page);
        });
        WRITES[cpu as usize].store(count, Ordering::Release);
        FILLED.fetch_add(1, Ordering::AcqRel);
        while FILLED.load(Ordering::Acquire) < plan.cpus as u32 {
            core::hint::spin_loop();
        }
        let (first, count) = stripe(plan.dirty_pages);
        let pages_per_s = if plan.pages_per_s > 0 { (plan.pages_per_s / plan.cpus).max(1) } else { 0 };
        let random = Random::new(u64::from(cpu) + 1);
        let worker = Self {
            cpu: cpu as usize,
            first,
            count,
            cursor: 0,
            random,
            pages_per_s,
            since_us: now_us(),
            since_writes: 0,
        };
        (count > 0).then_some(worker)
    }

    /// Dirties a batch of pages if the rate allows it now.
    pub fn step(&mut self) {
        if self.cpu != 0 && PAUSE.load(Ordering::Acquire) {
            PAUSED.fetch_add(1, Ordering::AcqRel);
            while PAUSE.load(Ordering::Acquire) {
                core::hint::spin_loop();
            }
            PAUSED.fetch_sub(1, Ordering::AcqRel);
        }
        if !self.allowed() {
            return core::hint::spin_loop();
        }
        for _ in 0..BATCH {
            let page = self.choose();
            plan().write_page(page);
        }
        self.since_writes += BATCH;
        WRITES[self.cpu].fetch_add(BATCH, Ordering::Release);
    }

    /// Whether the rate leaves room for a batch. A tenth of a second is the most that is caught up after a stop.
    fn allowed(&mut self) -> bool {
        if self.pages_per_s == 0 {
            return true;
        }
        let now = now_us();
        let due = (now - self.since_us) * self.pages_per_s / 1_000_000;
        if due > self.since_writes + self.pages_per_s / 10 + 2 * BATCH {
            (self.since_us, self.since_writes) = (now, 0);
            return true;
        }
        due >= self.since_writes + BATCH
    }

    fn choose(&mut self) -> u64 {
        let hot = (self.count / 10).max(1);
        let offset = match plan().pattern {
            Pattern::Sequential => {
                self.cursor = (self.cursor + 1) % self.count;
                self.cursor
            }
            Pattern::Random => self.random.below(self.count),
            Pattern::Hot if self.random.below(10) > 0 => self.random.below(hot),
            Pattern::Hot => self.random.below(self.count),
        };
        self.first + offset
    }
}

/// Pages written so far, by all vCPUs.
pub fn writes() -> u64 {
    WRITES.iter().map(|writes| writes.load(Ordering::Acquire)).sum()
}

/// Stops the other writers, checks every page, prints what it found, lets them go on.
pub fn verify() {
    let plan = plan();
    let others = if plan.dirty_pages >= plan.cpus { plan.cpus as u32 - 1 } else { 0 };
    PAUSE.store(true, Ordering::Release);
    while PAUSED.load(Ordering::Acquire) < others {
        core::hint::spin_loop();
    }
    let began = now_us();
    let (mut wrong, mut newest, mut sum) = (0, 0, 0u64);
    for page in 0..plan.pages {
        let generation = read::<u32>(plan.generation(page));
        newest = newest.max(generation);
        sum = sum.wrapping_add(u64::from(generation));
        if !plan.page_is_right(page, generation) {
            wrong += 1;
            if wrong <= 8 {
                let address = plan.address(page);
                let (number, found) = (read::<u64>(address), read::<u64>(address + 8));
                line!("MISMATCH page={page} at={address:#x} generation={generation} holds={number}/{found}");
            }
        }
    }
    if sum != writes() {
        wrong += 1;
        line!("MISMATCH writes={} but generations sum up to {sum}", writes());
    }
    PAUSE.store(false, Ordering::Release);
    while PAUSED.load(Ordering::Acquire) > 0 {
        core::hint::spin_loop();
    }
    if wrong == 0 {
        line!("verified pages={} generation={newest} writes={sum} us={}", plan.pages, now_us() - began);
    } else {
        line!("MISMATCH count={wrong}");
    }
}

/// Prints how much has been written.
pub fn status() {
    line!("memory pages={} writes={} us={}", plan().pages, writes(), now_us());
}
