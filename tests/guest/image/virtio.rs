//! A modern virtio-pci function and its split virtqueues (virtio 1.2, 4.1 and 2.7), polled or by MSI-X.

use crate::boot::Page;
use crate::fail;
use crate::pci::Function;
use crate::port::{read, write};
use crate::time::wait_until;
use core::sync::atomic::{AtomicUsize, Ordering, fence};

const VENDOR_CAPABILITY: u8 = 9;
const VERSION_1: u64 = 1 << 32;
pub const NEEDS_RESET: u8 = 0x40;
const NO_VECTOR: u16 = 0xffff;
/// Entries of every queue here.
pub const QUEUE_SIZE: u16 = 64;
/// The device writes this descriptor's buffer.
pub const WRITE: u16 = 2;
/// The chain goes on.
pub const NEXT: u16 = 1;

/// Register blocks of a function.
pub struct Device {
    pub function: Function,
    pub common: usize,
    pub config: usize,
    notify: usize,
    notify_multiplier: u32,
}

impl Device {
    /// Finds the register blocks.
    pub fn new(function: Function) -> Self {
        function.enable();
        let mut device = Self { function, common: 0, config: 0, notify: 0, notify_multiplier: 0 };
        for at in function.capabilities(VENDOR_CAPABILITY) {
            let kind = function.read8(at + 3);
            let bar = function.read8(at + 4);
            if !matches!(kind, 1 | 2 | 4) || bar > 5 {
                continue;
            }
            let address = function.bar(bar) + function.read32(at + 8) as usize;
            match kind {
                1 => device.common = address,
                2 => (device.notify, device.notify_multiplier) = (address, function.read32(at + 16)),
                _ => device.config = address,
            }
        }
        if device.common == 0 || device.notify == 0 {
            fail!("slot {}: not a modern virtio function", function.slot);
        }
        device
    }

    pub fn status(&self) -> u8 {
        read(self.common + 20)
    }

    fn add_status(&self, bits: u8) {
        write::<u8>(self.common + 20, self.status() | bits);
    }

    /// Features the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            write::<u32>(self.common, select);
            u64::from(read::<u32>(self.common + 4))
        };
        half(0) | half(1) << 32
    }

    /// Resets, then acknowledges and agrees on VERSION_1 and those of `wanted` that are offered. Returns what was agreed.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        write::<u8>(self.common + 20, 0);
        if !wait_until(1_000_000, || self.status() == 0) {
            fail!("slot {}: status {:#x} a second after the reset", self.function.slot, self.status());
        }
        self.add_status(1);
        self.add_status(2);
        let offered = self.offered();
        if offered & VERSION_1 == 0 {
            fail!("slot {}: does not offer VERSION_1", self.function.slot);
        }
        let agreed = offered & (wanted | VERSION_1);
        for select in 0..2_u32 {
            write::<u32>(self.common + 8, select);
            write::<u32>(self.common + 12, (agreed >> (32 * select)) as u32);
        }
        self.add_status(8);
        if self.status() & 8 == 0 {
            fail!("slot {}: refused features {agreed:#x}", self.function.slot);
        }
        agreed
    }

    /// Gives the device queue `index`; `msix` routes its interrupts to MSI-X entry 0.
    pub fn queue(&self, index: u16, msix: bool) -> Queue {
        write::<u16>(self.common + 22, index);
        let most: u16 = read(self.common + 24);
        if most < QUEUE_SIZE {
            fail!("slot {}: queue {index} has only {most} entries", self.function.slot);
        }
        write::<u16>(self.common + 24, QUEUE_SIZE);
        write::<u16>(self.common + 26, if msix { 0 } else { NO_VECTOR });
        if msix && read::<u16>(self.common + 26) != 0 {
            fail!("slot {}: no MSI-X vector for queue {index}", self.function.slot);
        }
        let offset = usize::from(read::<u16>(self.common + 30));
        let queue = Queue::new(index, self.notify + offset * self.notify_multiplier as usize);
        for (register, address) in [(32, queue.memory), (40, queue.memory + AVAIL), (48, queue.memory + USED)] {
            write::<u32>(self.common + register, address as u32);
            write::<u32>(self.common + register + 4, (address >> 32) as u32);
        }
        write::<u16>(self.common + 28, 1);
        queue
    }

    /// Tells the device that the driver is ready.
    pub fn ready(&self) {
        self.add_status(4);
    }
}

const AVAIL: usize = QUEUE_SIZE as usize * 16;
const USED: usize = 2048;
const _: () = assert!(AVAIL + 6 + 2 * QUEUE_SIZE as usize <= USED && USED + 6 + 8 * QUEUE_SIZE as usize <= 4096);

/// A split virtqueue in one page.
pub struct Queue {
    pub index: u16,
    memory: usize,
    notify: usize,
    avail: u16,
    used: u16,
}

impl Queue {
    fn new(index: u16, notify: usize) -> Self {
        const MOST: usize = 32;
        static mut PAGES: Page<[[u8; 4096]; MOST]> = Page([[0; 4096]; MOST]);
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        // Queues are given out in turn: an old one's page is used again long after its device was reset.
        let memory = &raw const PAGES as usize + NEXT.fetch_add(1, Ordering::Relaxed) % MOST * 4096;
        (0..4096).step_by(8).for_each(|offset| write::<u64>(memory + offset, 0));
        Self { index, memory, notify, avail: 0, used: 0 }
    }

    /// Writes descriptor `index`.
    pub fn describe(&self, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        let at = self.memory + usize::from(index) * 16;
        write::<u64>(at, address);
        write::<u32>(at + 8, bytes);
        write::<u16>(at + 12, flags);
        write::<u16>(at + 14, next);
    }

    /// Makes the chain from `head` available.
    pub fn offer(&mut self, head: u16) {
        write::<u16>(self.memory + AVAIL + 4 + usize::from(self.avail % QUEUE_SIZE) * 2, head);
        self.set_available(self.avail.wrapping_add(1));
    }

    /// Sets the available index, right or wrong.
    pub fn set_available(&mut self, index: u16) {
        self.avail = index;
        fence(Ordering::SeqCst);
        write::<u16>(self.memory + AVAIL + 2, index);
        fence(Ordering::SeqCst);
    }

    /// Rings the doorbell.
    pub fn notify(&self) {
        write::<u16>(self.notify, self.index);
    }

    /// Whether the device has used a chain that was not taken yet.
    pub fn has_used(&self) -> bool {
        read::<u16>(self.memory + USED + 2) != self.used
    }

    /// The next used chain: its head and the bytes written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let at = self.memory + USED + 4 + usize::from(self.used % QUEUE_SIZE) * 8;
        self.used = self.used.wrapping_add(1);
        Some((read::<u32>(at) as u16, read(at + 4)))
    }
}
