//! PCI configuration by ports 0xCF8 and 0xCFC, BARs as the firmware or VMM assigned them, capabilities.

use crate::memory;
use crate::port::{in32, out8, out16, out32, write};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const MSIX: u8 = 0x11;

/// A function on bus 0.
#[derive(Clone, Copy, PartialEq)]
pub struct Function {
    pub slot: u8,
}

impl Function {
    /// The `index`th function with one of the device ids of virtio's vendor.
    pub fn find_virtio(ids: [u16; 2], index: u32) -> Option<Self> {
        let of_kind = |function: &Self| {
            let id = function.read32(0);
            id & 0xffff == 0x1af4 && ids.contains(&((id >> 16) as u16))
        };
        Self::all().filter(of_kind).nth(index as usize)
    }

    /// Every function that answers.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..32).map(|slot| Self { slot }).filter(|function| function.read32(0) != u32::MAX)
    }

    fn select(self, offset: u8) {
        out32(ADDRESS, 1 << 31 | u32::from(self.slot) << 11 | u32::from(offset & 0xfc));
    }

    /// The dword that holds `offset`.
    pub fn read32(self, offset: u8) -> u32 {
        self.select(offset);
        in32(DATA)
    }

    pub fn read16(self, offset: u8) -> u16 {
        (self.read32(offset) >> ((offset & 2) * 8)) as u16
    }

    pub fn read8(self, offset: u8) -> u8 {
        (self.read32(offset) >> ((offset & 3) * 8)) as u8
    }

    pub fn write8(self, offset: u8, value: u8) {
        self.select(offset);
        out8(DATA + u16::from(offset & 3), value);
    }

    pub fn write16(self, offset: u8, value: u16) {
        self.select(offset);
        out16(DATA + u16::from(offset & 2), value);
    }

    pub fn write32(self, offset: u8, value: u32) {
        self.select(offset);
        out32(DATA, value);
    }

    /// Decodes memory, may master the bus.
    pub fn enable(self) {
        self.write16(4, self.read16(4) | 6);
    }

    /// Mapped address of memory BAR `index`.
    pub fn bar(self, index: u8) -> usize {
        let low = self.read32(0x10 + 4 * index);
        let high = if low & 6 == 4 { self.read32(0x14 + 4 * index) } else { 0 };
        let address = (high as usize) << 32 | (low & !15) as usize;
        memory::map(address);
        address
    }

    /// Configuration offsets of the capabilities with `id`.
    pub fn capabilities(self, id: u8) -> impl Iterator<Item = u8> {
        let mut at = self.read8(0x34) & 0xfc;
        let mut left = 48;
        core::iter::from_fn(move || {
            let here = (at != 0 && left > 0).then_some(at)?;
            left -= 1;
            at = self.read8(here + 1) & 0xfc;
            Some(here)
        })
        .filter(move |&here| self.read8(here) == id)
    }

    /// Address of the MSI-X table and its number of entries.
    pub fn msix_table(self) -> Option<(usize, u16)> {
        let at = self.capabilities(MSIX).next()?;
        let place = self.read32(at + 4);
        Some((self.bar((place & 7) as u8) + (place & !7) as usize, (self.read16(at + 2) & 0x7ff) + 1))
    }

    /// Points MSI-X entry 0 at this processor's `vector` and enables MSI-X. False if the function has none.
    pub fn route_msix(self, vector: u8) -> bool {
        let (Some(at), Some((table, _))) = (self.capabilities(MSIX).next(), self.msix_table()) else { return false };
        write::<u32>(table, 0xfee0_0000);
        write::<u32>(table + 4, 0);
        write::<u32>(table + 8, u32::from(vector));
        write::<u32>(table + 12, 0);
        self.write16(at + 2, self.read16(at + 2) & 0x3fff | 0x8000);
        true
    }
}
