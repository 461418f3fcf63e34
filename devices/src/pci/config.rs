//! Configuration space of one function: header type 0, a chain of capabilities, one memory BAR (PCI 3.0, 6.1 and 6.2).
//!
//! Bytes and a mask of the bits the guest may write; whoever owns the space looks at what a write changed. The BAR
//! sizing protocol falls out of the mask. After reset memory decoding is off, as the specification has it, while the
//! BAR is already placed: a guest only has to set the enable bit, and Linux keeps the address.

use crate::state::StateError;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Command register.
pub const COMMAND: usize = 0x04;
/// Command bit: the function answers at its BAR.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command bit: the function may write memory. Recorded only: a virtio function is stopped by its own reset.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command bit: no INTx, which these functions do not have anyway.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// First base address register.
pub const BAR0: usize = 0x10;
/// Capability id of MSI-X.
pub const CAPABILITY_MSIX: u8 = 0x11;
/// Capability id of vendor-specific data.
pub const CAPABILITY_VENDOR: u8 = 0x09;

/// Bytes of a conventional configuration space. The rest of the 4 KiB that ECAM gives a function reads as zero,
/// which says "no extended capability".
const SIZE: usize = 256;
const PARITY_AND_SERR: u16 = 1 << 6 | 1 << 8;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass, programming interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// Configuration space.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// Bits the guest may write.
    writable: [u8; SIZE],
    /// Bytes of BAR 0, a power of two; 0 if there is none.
    bar_size: u32,
    /// Address the BAR has after reset.
    assigned: u32,
    /// Where the bus can see a BAR.
    window: Range<u64>,
    /// [`Self::bar`] for who does not hold the function's lock.
    decoded: Arc<Decoded>,
    /// Where the link to the next capability goes.
    link: usize,
    /// Where the next capability goes.
    free: usize,
}

impl ConfigSpace {
    /// A header without BAR and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
            assigned: 0,
            window: 0..0,
            decoded: Arc::default(),
            link: CAPABILITIES_POINTER,
            free: FIRST_CAPABILITY,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE | PARITY_AND_SERR;
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(0x0c, &[0xff, 0xff]); // cache line size, latency timer
        space.allow(0x3c, &[0xff]); // interrupt line
        space
    }

    /// Gives the function a memory BAR of `size` bytes, a power of two of at least 4 KiB.
    #[must_use]
    pub fn with_bar(mut self, size: u32) -> Self {
        assert!(size.is_power_of_two() && size >= 0x1000, "a BAR of {size:#x} bytes");
        self.bar_size = size;
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
        self
    }

    /// Appends a capability and returns where it starts. `body` is what follows id and link; `writable` are the bits
    /// of the body that the guest may write, short or empty for none.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.free;
        assert!(at + 2 + body.len() <= SIZE && writable.len() <= body.len(), "capabilities fill configuration space");
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.bytes[self.link] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Reads any number of bytes anywhere.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (position, byte) in data.iter_mut().enumerate() {
            *byte = offset.checked_add(position).and_then(|at| self.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes any number of bytes anywhere, as far as they may be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let targets = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, mask), new) in targets.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
        self.publish();
    }

    /// Replaces bytes whatever the guest may write; past the end nothing happens.
    pub fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *new;
        }
    }

    /// Two bytes.
    pub fn u16(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Four bytes.
    pub fn u32(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Bytes of the BAR, 0 if there is none.
    pub fn bar_size(&self) -> u32 {
        self.bar_size
    }

    /// Places the BAR at `base` in the bus's `window`.
    pub fn assign(&mut self, base: u32, window: Range<u64>) {
        self.assigned = base;
        self.window = window;
        self.set(BAR0, &base.to_le_bytes());
        self.publish();
    }

    /// Guest physical addresses at which the function answers: none while decoding is off or the BAR points out of
    /// the bus's window, as it does in the middle of sizing.
    pub fn bar(&self) -> Option<Range<u64>> {
        if self.bar_size == 0 || self.u16(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let base = u64::from(self.u32(BAR0) & !0xf);
        let end = base + u64::from(self.bar_size);
        (self.window.start <= base && end <= self.window.end).then_some(base..end)
    }

    /// Back to power-on: what the guest wrote is gone, the BAR is where [`Self::assign`] put it.
    pub fn reset(&mut self) {
        for (byte, mask) in self.bytes.iter_mut().zip(&self.writable) {
            *byte &= !mask;
        }
        self.set(BAR0, &self.assigned.to_le_bytes());
        self.publish();
    }

    /// All of it. What the guest may not write says which function this is.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Whether [`Self::restore`] may be called with `saved`.
    ///
    /// # Errors
    /// When it is not the space of a function like this one: what the guest may not write differs. A BAR that points out
    /// of the window is no error: nothing answers there, and a guest that is about to size it has one.
    pub fn check(&self, saved: &[u8]) -> Result<(), StateError> {
        if saved.len() != SIZE {
            return Err(StateError::Value(format!("its configuration space has {} bytes, not {SIZE}", saved.len())));
        }
        let pairs = self.bytes.iter().zip(saved).zip(&self.writable);
        let differs = pairs.enumerate().find(|(_, ((ours, theirs), mask))| (*ours ^ *theirs) & !*mask != 0);
        differs.map_or(Ok(()), |(at, ((ours, theirs), _))| {
            Err(StateError::Value(format!(
                "it is of another PCI function: {theirs:#04x} at {at:#04x} of configuration space, {ours:#04x} here"
            )))
        })
    }

    /// Takes over what was saved, as far as the guest may write it.
    pub fn restore(&mut self, saved: &[u8]) {
        self.write(0, saved);
    }

    /// Where the BAR answers, for the bus to see without the function's lock.
    pub(super) fn decoded(&self) -> Arc<Decoded> {
        Arc::clone(&self.decoded)
    }

    fn publish(&self) {
        let bar = self.bar().unwrap_or(0..0);
        self.decoded.0.store(bar.start | (bar.end - bar.start) << 32, Ordering::Relaxed);
    }
}

/// Where a BAR answers: base in the low half, size in the high half, 0 while it does not.
#[derive(Debug, Default)]
pub(super) struct Decoded(AtomicU64);

impl Decoded {
    /// The guest physical addresses, which may be others a moment later.
    pub(super) fn range(&self) -> Range<u64> {
        let bar = self.0.load(Ordering::Relaxed);
        let base = bar & 0xffff_ffff;
        base..base + (bar >> 32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1044,
            class: 0x01_02_03,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1044,
        };
        let mut space = ConfigSpace::new(&identity).with_bar(0x8000);
        space.assign(0xc000_0000, 0xc000_0000..0xe800_0000);
        space
    }

    #[test]
    fn the_header_says_who_it_is() {
        let space = space();
        assert_eq!(space.u32(0), 0x1044_1af4);
        assert_eq!(space.u32(8), 0x0102_0301);
        assert_eq!(space.u32(0x2c), 0x1044_1af4);
        assert_eq!((space.u32(0x0c) >> 16) & 0xff, 0, "header type 0, one function");
    }

    #[test]
    fn a_bar_is_sized_as_the_specification_has_it() {
        let mut space = space();
        assert_eq!(space.bar(), None, "decoding is off after reset");
        space.write(BAR0, &u32::MAX.to_le_bytes());
        assert_eq!(space.u32(BAR0), 0xffff_8000);
        space.write(COMMAND, &COMMAND_MEMORY.to_le_bytes());
        assert_eq!(space.bar(), None, "a BAR out of the window is not decoded");
        space.write(BAR0, &0xd000_0000_u32.to_le_bytes());
        assert_eq!(space.bar(), Some(0xd000_0000..0xd000_8000));
        space.write(BAR0 + 4, &u32::MAX.to_le_bytes());
        assert_eq!(space.u32(BAR0 + 4), 0, "no second BAR");
        space.reset();
        assert_eq!((space.u32(BAR0), space.u16(COMMAND)), (0xc000_0000, 0));
    }

    #[test]
    fn a_bar_moves_a_byte_at_a_time() {
        let mut space = space();
        space.write(COMMAND, &[COMMAND_MEMORY as u8]);
        space.write(BAR0 + 3, &[0xc1]);
        space.write(BAR0 + 1, &[0x83, 0x01]);
        assert_eq!(space.bar(), Some(0xc101_8000..0xc102_0000));
    }

    #[test]
    fn capabilities_are_chained() {
        let mut space = space();
        assert_eq!(space.u16(STATUS), 0);
        let first = space.add_capability(CAPABILITY_VENDOR, &[1; 5], &[]);
        let second = space.add_capability(CAPABILITY_MSIX, &[0; 10], &[0x00, 0xc0]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.u16(STATUS), 0x10);
        assert_eq!(space.u32(CAPABILITIES_POINTER), 0x40);
        assert_eq!(space.u16(0x40), 0x4809);
        assert_eq!(space.u16(0x48), 0x0011);
        space.write(0x40, &[0xff; 20]);
        assert_eq!((space.u16(0x40), space.u32(0x48)), (0x4809, 0xc000_0011));
    }

    #[test]
    fn reads_beyond_the_space_are_zero_and_writes_nothing() {
        let mut space = space();
        let mut data = [0xaa; 8];
        for offset in [252, 256, 0xffc, usize::MAX - 3] {
            space.write(offset, &[0xff; 8]);
            space.read(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
    }
}
