//! Paravirtual panic report (QEMU's pvpanic interface, ACPI id QEMU0001): one port.
//!
//! A read says which reports are understood; a write is a report. It refuses to know what is done about one.

use crate::state::{Saved, StateError};
use crate::{BusDevice, Effect};
use log::debug;

/// The kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked and now runs its crash kernel, which must be left alone.
const CRASH_LOADED: u8 = 1 << 1;

/// The port. It has no state.
#[derive(Debug, Default)]
pub struct PvPanic;

impl PvPanic {
    /// Its state: none.
    pub fn save(&self) -> Saved {
        Saved::nothing()
    }

    /// Takes over that.
    ///
    /// # Errors
    /// Anything else.
    pub fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        saved.expect_nothing()
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(byte)) = (offset, data.first_mut()) {
            *byte = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let report = if offset == 0 { data.first().copied().unwrap_or(0) } else { 0 };
        if report & CRASH_LOADED != 0 {
            debug!("the guest's kernel has panicked and starts its crash kernel");
        }
        if report & PANICKED != 0 { Effect::GuestPanic } else { Effect::None }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{inb, touch_everything};
    use super::*;

    #[test]
    fn only_a_panic_without_a_crash_kernel_is_an_effect() {
        let mut device = PvPanic;
        assert_eq!(inb(&mut device, 0), 0b11);
        assert_eq!(device.write(0, &[0b01]), Effect::GuestPanic);
        assert_eq!(device.write(0, &[0b10]), Effect::None);
        assert_eq!(device.write(0, &[0b100]), Effect::None);
        assert_eq!(device.write(1, &[0b01]), Effect::None);
    }

    #[test]
    fn it_has_no_state() {
        PvPanic.restore(&PvPanic.save()).unwrap();
        PvPanic.restore(&Saved { version: 1, contents: vec![0] }).unwrap_err();
    }

    #[test]
    fn every_access_is_answered() {
        touch_everything(&mut PvPanic);
    }
}
