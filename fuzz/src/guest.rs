//! A driver's memory and rings, and the oracle over them.
//!
//! The oracle knows what it gave away: bytes that the device may write, chains that it has not had back. It judges a
//! device only at rest (after `quiesce`). What pages changed must be noted in the bitmap, always; everything else is
//! held against a driver that keeps to the rules (`honest`), since one that points a buffer at its own rings proves
//! nothing.

use crate::chain::{Chain, Framing, Part};
use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;
use sterna_devices::virtio::{GuestRam, Interrupts, Io};
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of RAM, from address 0.
pub const RAM_BYTES: usize = 0x4_0000;
/// Most queues.
pub const MAX_QUEUES: usize = 5;

const PAGE: usize = 4096;
/// RAM is two regions that meet here, in the middle of the writable buffers.
const REGION_END: usize = 0x3_0000;
/// Each queue has a page for descriptors, one for the available and one for the used ring.
const QUEUE_BYTES: u64 = 0x3000;
const TABLES: Range<u64> = 0x1_0000..0x1_8000;
const READABLE: Range<u64> = 0x1_8000..0x2_8000;
const WRITABLE: Range<u64> = 0x2_8000..RAM_BYTES as u64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Most descriptors of one chain.
const MAX_PARTS: usize = 40;
const EVENT_IDX: u64 = 1 << 29;

/// See the module.
pub struct Guest {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// Negotiated features.
    pub features: u64,
    /// Memory holds only what was put there by the rules.
    pub honest: bool,
    /// The device found a fault, so it owes nothing.
    pub faulted: bool,
    queues: Vec<Queue>,
    /// Notification events, by queue.
    pub doorbells: Vec<EventFd>,
    rings: Vec<Ring>,
    raised: Raised,
    /// RAM as the driver wrote it and the device left it at the last check.
    shadow: Vec<u8>,
    /// Room for RAM as it is now.
    now: Vec<u8>,
    /// What the device may write.
    writable: Vec<Range<u64>>,
    tables: u64,
    next_readable: u64,
    next_writable: u64,
}

#[derive(Default)]
struct Ring {
    size: u16,
    free: Vec<u16>,
    available: u16,
    used: u16,
    out: Vec<Offered>,
}

/// A chain with the device.
struct Offered {
    head: u16,
    descriptors: Vec<u16>,
    writable_bytes: u64,
}

#[derive(Default)]
struct Raised([u32; MAX_QUEUES]);

impl Interrupts for Raised {
    fn queue(&mut self, queue: usize) {
        self.0[queue] += 1;
    }
    fn config(&mut self) {}
}

/// RAM and the two copies of it, which go from run to run: fresh memory would cost more than a run does.
type Memory = (Arc<GuestRam>, Vec<u8>, Vec<u8>);

thread_local! {
    static MEMORY: Cell<Option<Memory>> = const { Cell::new(None) };
}

fn memory() -> Memory {
    MEMORY.take().unwrap_or_else(|| {
        let regions = [(GuestAddress(0), REGION_END), (GuestAddress(REGION_END as u64), RAM_BYTES - REGION_END)];
        let ram = GuestRam::from_ranges(&regions).expect("256 KiB of memory");
        (Arc::new(ram), vec![0; RAM_BYTES], vec![0; RAM_BYTES])
    })
}

impl Drop for Guest {
    fn drop(&mut self) {
        let (shadow, now) = (std::mem::take(&mut self.shadow), std::mem::take(&mut self.now));
        MEMORY.set(Some((self.ram.clone(), shadow, now)));
    }
}

impl Guest {
    /// A driver with enabled queues of these sizes, at most [`MAX_QUEUES`] of at most 256.
    pub fn new(sizes: &[u16]) -> Self {
        let (ram, shadow, now) = memory();
        let mut guest = Self {
            ram,
            features: 0,
            honest: true,
            faulted: false,
            queues: sizes.iter().map(|size| Queue::new(*size).expect("a size that a device may have")).collect(),
            doorbells: sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).expect("a descriptor")).collect(),
            rings: sizes.iter().map(|size| Ring { size: *size, ..Ring::default() }).collect(),
            raised: Raised::default(),
            shadow,
            now,
            writable: Vec::new(),
            tables: TABLES.start,
            next_readable: READABLE.start,
            next_writable: WRITABLE.start,
        };
        guest.restart(0);
        guest
    }

    /// Starts over, as a driver after a reset of the device.
    pub fn restart(&mut self, features: u64) {
        self.features = features;
        (self.honest, self.faulted, self.raised) = (true, false, Raised::default());
        self.shadow.fill(0);
        self.ram.write_slice(&self.shadow, GuestAddress(0)).expect("all of RAM");
        self.ram.iter().for_each(|region| (**region).bitmap().reset());
        self.writable.clear();
        for (index, (queue, ring)) in self.queues.iter_mut().zip(&mut self.rings).enumerate() {
            queue.reset();
            let [table, available, used] = Self::ring(index);
            queue.set_size(ring.size);
            queue.set_desc_table_address(Some(table as u32), Some(0));
            queue.set_avail_ring_address(Some(available as u32), Some(0));
            queue.set_used_ring_address(Some(used as u32), Some(0));
            queue.set_event_idx(features & EVENT_IDX != 0);
            queue.set_ready(true);
            *ring = Ring { size: ring.size, free: (0..ring.size).rev().collect(), ..Ring::default() };
            let end = used + 6 + 8 * u64::from(ring.size);
            self.writable.push(used..end);
        }
        for doorbell in &self.doorbells {
            let _drained = doorbell.read();
        }
    }

    /// Guest physical addresses of descriptor table, available ring and used ring.
    pub fn ring(queue: usize) -> [u64; 3] {
        let base = queue as u64 * QUEUE_BYTES;
        [base, base + 0x1000, base + 0x2000]
    }

    /// The loan.
    pub fn io(&mut self) -> Io<'_> {
        Io::new(&self.ram, &mut self.queues, &self.doorbells, self.features, &mut self.raised)
    }

    /// Queues whose doorbell has rung since the last time.
    pub fn rung(&self) -> Vec<usize> {
        (0..self.doorbells.len()).filter(|queue| self.doorbells[*queue].read().is_ok()).collect()
    }

    /// Writes anything anywhere, after which the rings prove nothing.
    pub fn poke(&mut self, at: u64, bytes: &[u8]) {
        self.honest = false;
        self.put(at % RAM_BYTES as u64, bytes);
    }

    /// Sets the index of the available ring to anything.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        let at = Self::ring(queue)[1] + 2;
        self.poke(at, &index.to_le_bytes());
    }

    /// Sets `used_event`: the entry after which the driver wants to be told. Any value keeps to the rules.
    pub fn set_used_event(&mut self, queue: usize, index: u16) {
        let at = Self::ring(queue)[1] + 4 + 2 * u64::from(self.rings[queue].size);
        self.put(at, &index.to_le_bytes());
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let length = bytes.len().min(RAM_BYTES - at as usize);
        self.ram.write_slice(&bytes[..length], GuestAddress(at)).expect("inside RAM");
        self.shadow[at as usize..at as usize + length].copy_from_slice(&bytes[..length]);
    }

    /// Makes `chain` available on `queue`, if the ring has room for it.
    pub fn offer(&mut self, queue: usize, chain: &Chain) {
        let parts = &chain.parts[..chain.parts.len().min(MAX_PARTS)];
        let indirect = matches!(chain.framing, Framing::Indirect | Framing::Cut { .. });
        let needed = if indirect { 1 } else { parts.len() };
        if parts.is_empty() || self.rings[queue].free.len() < needed {
            return;
        }
        let at = self.rings[queue].free.len() - needed;
        let descriptors = self.rings[queue].free.split_off(at);
        let head = descriptors[0];
        let mut writable_bytes = 0;
        let mut entries: Vec<[u8; 16]> = Vec::new();
        for (position, part) in parts.iter().enumerate() {
            let (address, length, flags) = self.place(part);
            writable_bytes += if flags & WRITE != 0 { u64::from(length) } else { 0 };
            let next = if indirect { Some(position as u16 + 1) } else { descriptors.get(position + 1).copied() };
            let more = if position + 1 < parts.len() { NEXT } else { 0 };
            entries.push(entry(address, length, flags | more, next.unwrap_or(0)));
        }
        if let Framing::Spoiled { which, flags, next } = chain.framing {
            self.honest = false;
            let which = usize::from(which) % entries.len();
            entries[which][12..14].copy_from_slice(&flags.to_le_bytes());
            entries[which][14..].copy_from_slice(&next.to_le_bytes());
        }
        let [table, ..] = Self::ring(queue);
        if indirect {
            let mut bytes = 16 * entries.len() as u32;
            if let Framing::Cut { table_bytes } = chain.framing {
                (bytes, self.honest) = (table_bytes, false);
            }
            let at = allocate(&mut self.tables, 16 * entries.len() as u64, &TABLES);
            self.put(at, entries.as_flattened());
            self.put(table + 16 * u64::from(head), &entry(at, bytes, INDIRECT, 0));
        } else {
            for (descriptor, entry) in descriptors.iter().zip(&entries) {
                self.put(table + 16 * u64::from(*descriptor), entry);
            }
        }
        self.rings[queue].out.push(Offered { head, descriptors, writable_bytes });
        self.publish(queue, head);
    }

    fn publish(&mut self, queue: usize, head: u16) {
        let [_, available, _] = Self::ring(queue);
        let ring = &mut self.rings[queue];
        let slot = available + 4 + 2 * u64::from(ring.available % ring.size);
        ring.available = ring.available.wrapping_add(1);
        let index = ring.available;
        self.put(slot, &head.to_le_bytes());
        self.put(available + 2, &index.to_le_bytes());
    }

    /// Address, length and flags of a part, with its contents in place.
    fn place(&mut self, part: &Part) -> (u64, u32, u16) {
        match part {
            Part::Readable(bytes) => {
                let at = allocate(&mut self.next_readable, bytes.len() as u64, &READABLE);
                self.put(at, bytes);
                (at, bytes.len() as u32, 0)
            }
            Part::Writable(length) => {
                let at = allocate(&mut self.next_writable, u64::from(*length), &WRITABLE);
                self.writable.push(at..at + u64::from(*length));
                (at, u32::from(*length), WRITE)
            }
            Part::Near { at, length, flags } => {
                self.honest = false;
                (u64::from(*at) % (RAM_BYTES as u64 * 5 / 4), *length, *flags & !NEXT)
            }
            Part::Far { at, length, flags } => {
                self.honest = false;
                (*at, *length, *flags & !NEXT)
            }
        }
    }

    /// How many chains of `queue` came back, modulo 2^16.
    pub fn used(&self, queue: usize) -> u16 {
        self.ram.read_obj(GuestAddress(Self::ring(queue)[2] + 2)).expect("inside RAM")
    }

    /// Judges a device at rest.
    pub fn check(&mut self) {
        self.ram.read_slice(&mut self.now, GuestAddress(0)).expect("all of RAM");
        for (page, (now, before)) in self.now.chunks(PAGE).zip(self.shadow.chunks(PAGE)).enumerate() {
            if now != before {
                self.check_page((page * PAGE) as u64, now, before);
            }
        }
        std::mem::swap(&mut self.shadow, &mut self.now);
        for queue in 0..self.rings.len() {
            self.check_used(queue);
        }
    }

    /// Judges a device that may not touch RAM: nothing has changed since the last check.
    pub fn check_untouched(&mut self) {
        self.ram.read_slice(&mut self.now, GuestAddress(0)).expect("all of RAM");
        assert!(self.now == self.shadow, "RAM has changed after the device was at rest");
    }

    fn check_page(&self, page: u64, now: &[u8], before: &[u8]) {
        let region = self.ram.find_region(GuestAddress(page)).expect("inside RAM");
        let noted = region.bitmap().dirty_at((page - region.start_addr().0) as usize);
        assert!(noted, "the page at {page:#x} changed and is not in the bitmap");
        for at in (0..PAGE).filter(|at| self.honest && now[*at] != before[*at]) {
            let address = page + at as u64;
            let allowed = self.writable.iter().any(|range| range.contains(&address));
            assert!(allowed, "the byte at {address:#x} is none that the device may write");
        }
    }

    /// Takes the chains that came back: each was offered, comes once, and says no more than it has room for.
    fn check_used(&mut self, queue: usize) {
        if !self.honest {
            return;
        }
        let [_, _, used] = Self::ring(queue);
        let index = self.used(queue);
        let ring = &mut self.rings[queue];
        let news = index != ring.used;
        while ring.used != index {
            let entry = used + 4 + 8 * u64::from(ring.used % ring.size);
            let [head, length]: [u32; 2] =
                [0, 4].map(|at| self.ram.read_obj(GuestAddress(entry + at)).expect("in RAM"));
            let position = ring.out.iter().position(|offered| u32::from(offered.head) == head);
            let position =
                position.unwrap_or_else(|| panic!("queue {queue}: chain {head} came back, which is not out"));
            let offered = ring.out.swap_remove(position);
            assert!(
                u64::from(length) <= offered.writable_bytes,
                "queue {queue}: {length} bytes written to a chain with room for {}",
                offered.writable_bytes
            );
            ring.free.extend(offered.descriptors);
            ring.used = ring.used.wrapping_add(1);
        }
        let told = std::mem::take(&mut self.raised.0[queue]) > 0;
        let owed = news && !self.faulted && self.features & EVENT_IDX == 0;
        assert!(told || !owed, "queue {queue}: chains came back without an interrupt");
    }
}

fn entry(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut entry = [0; 16];
    entry[..8].copy_from_slice(&address.to_le_bytes());
    entry[8..12].copy_from_slice(&length.to_le_bytes());
    entry[12..14].copy_from_slice(&flags.to_le_bytes());
    entry[14..].copy_from_slice(&next.to_le_bytes());
    entry
}

/// The next `bytes` of `arena`, from its start again when it is used up; sectors are aligned to sectors.
fn allocate(next: &mut u64, bytes: u64, arena: &Range<u64>) -> u64 {
    let bytes = bytes.min(arena.end - arena.start);
    let alignment = if bytes != 0 && bytes.is_multiple_of(512) { 512 } else { 16 };
    let mut at = next.next_multiple_of(alignment);
    if at + bytes > arena.end {
        at = arena.start;
    }
    *next = at + bytes;
    at
}
