//! A driver's side of the rings, for tests of device models without a guest.

use super::io::Interrupts;
use super::{GuestRam, Io};
use std::sync::Arc;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RING_BYTES: u64 = 0x10000;
const BUFFERS: u64 = 0x10_0000;
const RAM_BYTES: usize = 16 << 20;

/// Rings and buffers in 16 MiB of RAM; queue q has its ring at (q + 1) * 64 KiB, buffers start at 1 MiB.
pub struct Driver {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// Interrupts seen, by queue.
    pub interrupts: Vec<u32>,
    /// Configuration interrupts seen.
    pub config_interrupts: u32,
    /// Negotiated features.
    pub features: u64,
    /// Notification events, by queue.
    pub doorbells: Vec<EventFd>,
    queues: Vec<Queue>,
    rings: Vec<Ring>,
    next_buffer: u64,
}

#[derive(Default)]
struct Ring {
    next_descriptor: u16,
    available: u16,
    seen_used: u16,
}

/// One entry of a used ring.
pub struct Used {
    /// Which chain.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub length: u32,
    /// The first `length` bytes of the chain's writable part.
    pub bytes: Vec<u8>,
}

struct Counter<'a>(&'a mut Vec<u32>, &'a mut u32);

impl Interrupts for Counter<'_> {
    fn queue(&mut self, queue: usize) {
        self.0[queue] += 1;
    }
    fn config(&mut self) {
        *self.1 += 1;
    }
}

impl Driver {
    /// Descriptor flag: another follows.
    pub const NEXT: u16 = 1;
    /// Descriptor flag: the device writes.
    pub const WRITE: u16 = 2;
    /// Descriptor flag: a table of descriptors.
    pub const INDIRECT: u16 = 4;

    /// Enabled queues of these sizes.
    pub fn new(sizes: &[u16]) -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap();
        let mut queues = Vec::new();
        for (index, size) in sizes.iter().enumerate() {
            let base = u32::try_from((index as u64 + 1) * RING_BYTES).unwrap();
            let mut queue = Queue::new(*size).unwrap();
            queue.set_desc_table_address(Some(base), Some(0));
            queue.set_avail_ring_address(Some(base + 0x8000), Some(0));
            queue.set_used_ring_address(Some(base + 0xc000), Some(0));
            queue.set_ready(true);
            queues.push(queue);
        }
        Self {
            ram: Arc::new(ram),
            interrupts: vec![0; sizes.len()],
            config_interrupts: 0,
            features: 0,
            doorbells: sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
            queues,
            rings: sizes.iter().map(|_| Ring::default()).collect(),
            next_buffer: BUFFERS,
        }
    }

    /// The loan a device is given.
    pub fn io(&mut self) -> Io<'_> {
        // The counter borrows two fields, the loan borrows the counter: it lives as long as `self` by being leaked,
        // which a test can afford.
        let counter = Box::leak(Box::new(Counter(&mut self.interrupts, &mut self.config_interrupts)));
        Io::new(&self.ram, &mut self.queues, &self.doorbells, self.features, counter)
    }

    /// Guest physical addresses of descriptor table, available ring and used ring.
    pub fn ring(queue: usize) -> [u64; 3] {
        let base = Self::base(queue);
        [base, base + 0x8000, base + 0xc000]
    }

    /// Starts over with empty rings, as a driver does after a reset.
    pub fn restart(&mut self) {
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            *ring = Ring::default();
            self.ram.write_slice(&[0; RING_BYTES as usize], GuestAddress(Self::base(queue))).unwrap();
        }
    }

    fn base(queue: usize) -> u64 {
        (queue as u64 + 1) * RING_BYTES
    }

    /// Writes one descriptor.
    pub fn descriptor(&mut self, queue: usize, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = Self::base(queue) + 16 * u64::from(index);
        self.write_descriptor(at, address, length, flags, next);
    }

    /// Writes a descriptor at a guest physical address of one's own, as for an indirect table.
    pub fn write_descriptor(&mut self, at: u64, address: u64, length: u32, flags: u16, next: u16) {
        self.ram.write_obj(address, GuestAddress(at)).unwrap();
        self.ram.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain at `head` available.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let size = self.queues[queue].size();
        let ring = &mut self.rings[queue];
        let slot = Self::base(queue) + 0x8000 + 4 + 2 * u64::from(ring.available % size);
        ring.available = ring.available.wrapping_add(1);
        let index = ring.available;
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available_index(queue, index);
    }

    /// Sets the available ring's index to anything.
    pub fn set_available_index(&mut self, queue: usize, index: u16) {
        self.ram.write_obj(index, GuestAddress(Self::base(queue) + 0x8000 + 2)).unwrap();
    }

    /// A fresh buffer of `length` bytes.
    pub fn buffer(&mut self, length: usize) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += (length as u64).next_multiple_of(16);
        if self.next_buffer > RAM_BYTES as u64 {
            self.next_buffer = BUFFERS + (length as u64).next_multiple_of(16);
            return BUFFERS;
        }
        at
    }

    /// Builds a chain with these readable contents and writable lengths, offers it, and returns its head.
    pub fn add(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let size = self.queues[queue].size();
        let total = readable.len() + writable.len();
        let head = self.rings[queue].next_descriptor;
        for position in 0..total {
            let index = self.rings[queue].next_descriptor;
            let next = (index + 1) % size;
            let more = if position + 1 < total { Self::NEXT } else { 0 };
            if let Some(bytes) = readable.get(position) {
                let at = self.buffer(bytes.len());
                self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
                self.descriptor(queue, index, at, bytes.len() as u32, more, next);
            } else {
                let length = writable[position - readable.len()];
                let at = self.buffer(length as usize);
                self.descriptor(queue, index, at, length, more | Self::WRITE, next);
            }
            self.rings[queue].next_descriptor = next;
        }
        self.offer(queue, head);
        head
    }

    /// Takes the next used entry.
    pub fn used(&mut self, queue: usize) -> Option<Used> {
        let used_ring = Self::base(queue) + 0xc000;
        let index: u16 = self.ram.read_obj(GuestAddress(used_ring + 2)).unwrap();
        let ring = &mut self.rings[queue];
        if index == ring.seen_used {
            return None;
        }
        let entry = used_ring + 4 + 8 * u64::from(ring.seen_used % self.queues[queue].size());
        ring.seen_used = ring.seen_used.wrapping_add(1);
        let head: u32 = self.ram.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = self.ram.read_obj(GuestAddress(entry + 4)).unwrap();
        let head = u16::try_from(head).unwrap();
        let bytes = self.written(queue, head, length);
        Some(Used { head, length, bytes })
    }

    fn written(&self, queue: usize, head: u16, length: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut index = head;
        loop {
            let at = Self::base(queue) + 16 * u64::from(index);
            let address: u64 = self.ram.read_obj(GuestAddress(at)).unwrap();
            let size: u32 = self.ram.read_obj(GuestAddress(at + 8)).unwrap();
            let flags: u16 = self.ram.read_obj(GuestAddress(at + 12)).unwrap();
            if flags & Self::WRITE != 0 {
                let mut part = vec![0; size as usize];
                self.ram.read_slice(&mut part, GuestAddress(address)).unwrap();
                bytes.extend(part);
            }
            if flags & Self::NEXT == 0 || bytes.len() >= length as usize {
                bytes.truncate(length as usize);
                return bytes;
            }
            index = self.ram.read_obj(GuestAddress(at + 14)).unwrap();
        }
    }
}
