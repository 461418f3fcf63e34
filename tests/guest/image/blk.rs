//! virtio-blk: writes a pattern, flushes, reads it back.

use crate::boot::{Page, interrupts, wait_for_interrupt};
use crate::pci::Function;
use crate::port::{read, write};
use crate::time::{arm_timer, now_us, wait_until};
use crate::virtio::{Device, NEXT, Queue, WRITE};
use crate::{fail, line};

const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const SECTOR: usize = 512;
/// Sectors of one request, two data descriptors each.
const CHUNK: u64 = 128;
const LIMIT_US: u64 = 4_000_000;
const DISK_VECTOR: u8 = 0x50;

/// Request kinds (virtio 1.2, 5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const SYNC: u32 = 4;

static mut HEADER: Page<[u8; 4096]> = Page([0; 4096]);
static mut DATA: Page<[u8; CHUNK as usize * SECTOR]> = Page([0; CHUNK as usize * SECTOR]);

/// A disk in use.
pub struct Disk {
    pub device: Device,
    pub queue: Queue,
    features: u64,
    irq: bool,
}

/// Physical address of the status byte.
pub fn status_address() -> usize {
    header_address() + 16
}

/// Physical address of the 16-byte request header.
pub fn header_address() -> usize {
    &raw const HEADER as usize
}

/// Physical address of the data.
pub fn data_address() -> usize {
    &raw const DATA as usize
}

impl Disk {
    /// Resets and starts the disk `index`; `irq` waits by MSI-X instead of polling.
    pub fn start(index: u32, irq: bool) -> Self {
        let Some(function) = Function::find_virtio([0x1042, 0x1001], index) else { fail!("disk {index}: none") };
        let device = Device::new(function);
        let features = device.negotiate(FLUSH | READ_ONLY);
        if irq && !function.route_msix(DISK_VECTOR) {
            fail!("disk {index}: no MSI-X");
        }
        let queue = device.queue(0, irq);
        device.ready();
        Self { device, queue, features, irq }
    }

    fn capacity(&self) -> u64 {
        read(self.device.config)
    }

    /// Does one request and returns its status byte.
    fn request(&mut self, kind: u32, sector: u64, sectors: u64) -> u8 {
        write::<u32>(header_address(), kind);
        write::<u64>(header_address() + 8, sector);
        write::<u8>(status_address(), 0xff);
        let data_flags = if kind == IN { NEXT | WRITE } else { NEXT };
        let bytes = sectors as u32 * SECTOR as u32;
        // Split unevenly, so that the device meets buffers of different sizes.
        let first = if sectors > 1 { SECTOR as u32 } else { bytes };
        self.queue.describe(0, header_address() as u64, 16, NEXT, if bytes > 0 { 1 } else { 3 });
        self.queue.describe(1, data_address() as u64, first, data_flags, if bytes > first { 2 } else { 3 });
        self.queue.describe(2, data_address() as u64 + u64::from(first), bytes - first, data_flags, 3);
        self.queue.describe(3, status_address() as u64, 1, WRITE, 0);
        self.queue.offer(0);
        self.queue.notify();
        self.wait(kind, sector);
        if self.queue.take().is_none_or(|(head, _)| head != 0) {
            fail!("disk: request {kind} at sector {sector}: the used ring names another chain");
        }
        read(status_address())
    }

    fn wait(&self, kind: u32, sector: u64) {
        let done = if self.irq {
            let end = now_us() + LIMIT_US;
            while !self.queue.has_used() && now_us() < end {
                arm_timer(LIMIT_US); // a lost interrupt must not become a hang
                wait_for_interrupt();
            }
            arm_timer(0);
            now_us() < end
        } else {
            wait_until(LIMIT_US, || self.queue.has_used())
        };
        if !done {
            let (status, used) = (self.device.status(), self.queue.has_used());
            fail!("disk: request {kind} at sector {sector}: no answer, device status {status:#x} used={used}");
        }
    }

    fn must(&mut self, kind: u32, sector: u64, sectors: u64) {
        let status = self.request(kind, sector, sectors);
        if status != 0 {
            fail!("disk: request {kind} at sector {sector}: status {status}");
        }
    }

    /// Writes, flushes, reads back and compares the first `sectors` of the disk.
    pub fn exercise(&mut self, sectors: u64) {
        let chunks = move || (0..sectors).step_by(CHUNK as usize).map(move |at| (at, CHUNK.min(sectors - at)));
        for (at, count) in chunks() {
            for_each_word(at, count, |address, value| write(address, value));
            self.must(OUT, at, count);
        }
        if self.features & FLUSH != 0 {
            self.must(SYNC, 0, 0);
        }
        for (at, count) in chunks() {
            for_each_word(at, count, |address, _| write::<u64>(address, 0));
            self.must(IN, at, count);
            for_each_word(at, count, |address, value| {
                let found: u64 = read(address);
                if found != value {
                    fail!("disk: sectors from {at}: expected {value:#x}, found {found:#x}");
                }
            });
        }
    }
}

fn for_each_word(sector: u64, sectors: u64, mut visit: impl FnMut(usize, u64)) {
    for word in 0..sectors * SECTOR as u64 / 8 {
        visit(data_address() + word as usize * 8, (sector * 64 + word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
}

/// Exercises disk `index` and prints the outcome.
pub fn check(index: u32, sectors: u64, irq: bool) {
    let began = now_us();
    let mut disk = Disk::start(index, irq);
    let capacity = disk.capacity();
    let sectors = sectors.min(capacity);
    if disk.features & READ_ONLY != 0 {
        disk.must(IN, 0, sectors.min(CHUNK));
        let status = disk.request(OUT, 0, 1);
        return line!("disk read-only sectors={capacity} write-status={status}");
    }
    disk.exercise(sectors);
    let beyond = disk.request(IN, capacity, 1);
    if irq && interrupts(DISK_VECTOR) == 0 {
        // Every request was answered before it was waited for. The interrupt is pending still, or lost.
        arm_timer(LIMIT_US);
        wait_for_interrupt();
        arm_timer(0);
    }
    let interrupts = interrupts(DISK_VECTOR);
    if irq && interrupts == 0 {
        fail!("disk: finished without an interrupt");
    }
    let us = now_us() - began;
    line!("disk ok sectors={sectors} capacity={capacity} beyond-status={beyond} interrupts={interrupts} us={us}");
}
