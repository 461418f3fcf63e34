//! The contract between a bus and a device with registers.

use std::sync::{Mutex, PoisonError};

/// What a register write asks of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing beyond the device.
    None,
    /// Restart the machine from its kernel.
    Reset,
    /// End the machine.
    PowerOff,
    /// The guest's kernel reports that it has panicked.
    GuestPanic,
}

/// A device with registers in port or memory space.
///
/// `offset` counts bytes from the start of the range the device was put at; `data` is 1, 2, 4 or 8 bytes long in
/// guest (little-endian) order. Both come from the guest: every combination must be answered, unknown reads with
/// all ones or zeros as the real device has it.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

/// A device that vCPUs may call at the same time, because it locks what it needs itself: behind one lock for all of
/// the PCI bus, a function that takes its time would hold up every other.
pub trait SharedBusDevice: Send + Sync {
    /// As [`BusDevice::read`].
    fn read(&self, offset: u64, data: &mut [u8]);
    /// As [`BusDevice::write`].
    fn write(&self, offset: u64, data: &[u8]) -> Effect;
}

impl<T: BusDevice + ?Sized> SharedBusDevice for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // A device that panicked has ended the process, so a poisoned lock is not seen.
        self.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        self.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data)
    }
}
