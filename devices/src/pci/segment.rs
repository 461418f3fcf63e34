//! The one PCI bus of a machine: who sits in which slot, and the three ways in.
//!
//! Built once, then shared: [`Ecam`], [`ConfigPorts`] and [`BarWindow`] are views without a lock of their own. A
//! function's lock is held while that function is called, and no other.

use super::PciFunction;
use super::config::Decoded;
use super::host_bridge::HostBridge;
use crate::state::{Saved, StateError};
use crate::{Effect, SharedBusDevice};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const SLOTS: usize = 32;
const FUNCTION_BYTES: u64 = 0x1000;

/// Why a function cannot be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PciError {
    /// All slots are taken.
    #[error("the PCI bus has no free slot for another device (limit {})", SLOTS - 1)]
    NoSlot,
    /// The window has no room left.
    #[error("the PCI memory window has no room for a BAR of {size:#x} bytes")]
    WindowFull {
        /// Bytes wanted.
        size: u32,
    },
}

struct Slot {
    function: Arc<Mutex<dyn PciFunction>>,
    /// Where the BAR answers. Written under the function's lock; read without it, so that looking for one function waits
    /// for no other.
    decoded: Arc<Decoded>,
}

/// What the bus itself remembers; the functions are parts of their own.
#[derive(Serialize, Deserialize)]
struct State {
    config_address: u32,
    /// Configuration space of the host bridge.
    host_bridge: Vec<u8>,
}

/// Bits of the address register that read as zero.
const CONFIG_ADDRESS_RESERVED: u32 = 0x7f00_0003;

/// The bus.
pub struct PciSegment {
    slots: Vec<Slot>,
    /// Guest physical addresses for BARs.
    window: Range<u64>,
    /// First address not yet given to a BAR.
    free: u64,
    /// What the guest last wrote to port 0xCF8.
    config_address: AtomicU32,
}

impl PciSegment {
    /// A bus with a host bridge in slot 0 and BARs in `window`, guest physical addresses below 4 GiB.
    pub fn new(window: Range<u64>) -> Self {
        let free = window.start;
        let host_bridge = Slot::new(Arc::new(Mutex::new(HostBridge::new())));
        Self { slots: vec![host_bridge], window, free, config_address: AtomicU32::new(0) }
    }

    /// Puts `function` into the next slot, which is returned, and its BAR into the window.
    ///
    /// # Errors
    /// No slot, or no room for the BAR.
    pub fn add(&mut self, function: Arc<Mutex<dyn PciFunction>>) -> Result<u8, PciError> {
        if self.slots.len() == SLOTS {
            return Err(PciError::NoSlot);
        }
        let size = lock(&function).config().bar_size();
        if size != 0 {
            let base = self.free.next_multiple_of(u64::from(size));
            let end = base + u64::from(size);
            let (true, Ok(base)) = (end <= self.window.end, u32::try_from(base)) else {
                return Err(PciError::WindowFull { size });
            };
            lock(&function).config_mut().assign(base, self.window.clone());
            self.free = end;
        }
        self.slots.push(Slot::new(function));
        Ok((self.slots.len() - 1) as u8)
    }

    /// Puts every function back to the state of power-on, for a machine that restarts.
    pub fn reset(&self) {
        self.config_address.store(0, Ordering::Relaxed);
        for slot in &self.slots {
            lock(&slot.function).reset();
        }
    }

    /// The bus's own state: the address register and the host bridge.
    pub fn save(&self) -> Saved {
        let bridge = self.slots.first().map(|slot| lock(&slot.function).config().save());
        let config_address = self.config_address.load(Ordering::Relaxed);
        Saved::of(1, &State { config_address, host_bridge: bridge.unwrap_or_default() })
    }

    /// Takes over a state. May be repeated.
    ///
    /// # Errors
    /// A state that is not one of this bus, which is then as it was.
    pub fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let State { config_address, host_bridge } = saved.decode(1)?;
        if config_address & CONFIG_ADDRESS_RESERVED != 0 {
            return Err(StateError::Value(format!("its address register holds {config_address:#010x}")));
        }
        if let Some(slot) = self.slots.first() {
            let mut bridge = lock(&slot.function);
            bridge.config().check(&host_bridge)?;
            bridge.config_mut().restore(&host_bridge);
        }
        self.config_address.store(config_address, Ordering::Relaxed);
        Ok(())
    }

    fn read_config(&self, slot: u64, offset: usize, data: &mut [u8]) {
        match usize::try_from(slot).ok().and_then(|slot| self.slots.get(slot)) {
            Some(slot) => lock(&slot.function).read_config(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write_config(&self, slot: u64, offset: usize, data: &[u8]) {
        if let Some(slot) = usize::try_from(slot).ok().and_then(|slot| self.slots.get(slot)) {
            lock(&slot.function).write_config(offset, data);
        }
    }

    /// Calls `access` with the function whose BAR holds all of an access at `address`, and the offset in the BAR. Where
    /// the guest laid BARs over each other, the lowest slot answers.
    fn with_bar(&self, address: u64, length: usize, access: impl FnOnce(&mut dyn PciFunction, u64)) {
        let Some(end) = address.checked_add(length as u64) else { return };
        let holds = |bar: &Range<u64>| bar.start <= address && end <= bar.end;
        let Some(slot) = self.slots.iter().find(|slot| holds(&slot.decoded.range())) else { return };
        let mut function = lock(&slot.function);
        // Another vCPU may have moved the BAR since; then nobody answers.
        if let Some(bar) = function.config().bar().filter(holds) {
            access(&mut *function, address - bar.start);
        }
    }
}

impl Slot {
    fn new(function: Arc<Mutex<dyn PciFunction>>) -> Self {
        let decoded = lock(&function).config().decoded();
        Self { function, decoded }
    }
}

/// A function is only touched under its lock; where a thread died holding it, what it left is as good as a hostile
/// guest could make it.
fn lock<T: ?Sized>(function: &Mutex<T>) -> MutexGuard<'_, T> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Configuration space in memory: 4 KiB a function, 1 MiB for the bus (PCI Express 7.2.2).
#[derive(Clone)]
pub struct Ecam(pub Arc<PciSegment>);

/// Slot and offset of an ECAM access, if it stays in function 0 of a slot.
fn ecam_target(offset: u64, length: usize) -> Option<(u64, usize)> {
    let register = offset % FUNCTION_BYTES;
    let (slot, function) = (offset >> 15, offset >> 12 & 7);
    (function == 0 && register + length as u64 <= FUNCTION_BYTES).then_some((slot, register as usize))
}

impl SharedBusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match ecam_target(offset, data.len()) {
            Some((slot, register)) => self.0.read_config(slot, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if let Some((slot, register)) = ecam_target(offset, data.len()) {
            self.0.write_config(slot, register, data);
        }
        Effect::None
    }
}

/// Configuration space through ports 0xCF8 (address) and 0xCFC (data): 8 ports (PCI 3.0, 3.2.2.3.2).
#[derive(Clone)]
pub struct ConfigPorts(pub Arc<PciSegment>);

impl ConfigPorts {
    /// Slot and offset of an access to the data ports, if the address register allows one.
    fn target(&self, port: u64, length: usize) -> Option<(u64, usize)> {
        let address = self.0.config_address.load(Ordering::Relaxed);
        let (enabled, bus, function) = (address >> 31 == 1, address >> 16 & 0xff, address >> 8 & 7);
        let in_data = (4..8).contains(&port) && port + length as u64 <= 8;
        let register = (address & 0xfc) as usize + (port & 3) as usize;
        (enabled && bus == 0 && function == 0 && in_data).then_some((u64::from(address >> 11 & 0x1f), register))
    }
}

impl SharedBusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.0.config_address.load(Ordering::Relaxed).to_le_bytes());
        } else if let Some((slot, register)) = self.target(offset, data.len()) {
            self.0.read_config(slot, register, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        // Only a whole address is latched; a byte written here means a chipset register that is not there.
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0.config_address.store(u32::from_le_bytes(address) & !CONFIG_ADDRESS_RESERVED, Ordering::Relaxed);
        } else if let Some((slot, register)) = self.target(offset, data.len()) {
            self.0.write_config(slot, register, data);
        }
        Effect::None
    }
}

/// The window of BARs; put it at the start of the range given to [`PciSegment::new`].
#[derive(Clone)]
pub struct BarWindow(pub Arc<PciSegment>);

impl SharedBusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let address = self.0.window.start.saturating_add(offset);
        self.0.with_bar(address, data.len(), |function, offset| function.read_bar(offset, data));
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let address = self.0.window.start.saturating_add(offset);
        self.0.with_bar(address, data.len(), |function, offset| function.write_bar(offset, data));
        Effect::None
    }
}

#[cfg(test)]
#[path = "segment_tests.rs"]
mod tests;
