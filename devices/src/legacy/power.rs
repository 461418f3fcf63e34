//! Reset, power-off and the power button of a hardware-reduced ACPI machine (ACPI 6.5, sections 4.8.3.6, 4.8.3.7 and
//! 5.6.9), in one block of ports.
//!
//! | offset | register |
//! | --- | --- |
//! | 0 | reset: 1 restarts the machine |
//! | 4 | sleep control: SLP_TYPx 5 with SLP_EN ends it |
//! | 5 | sleep status: always 0, nothing to wake from |
//! | 8 | generic events: pending bits, cleared by reading; bit 0 is the power button |
//!
//! It refuses to act: it returns an [`Effect`].

use super::registers;
use crate::{BusDevice, Effect, LevelLine};
use log::{debug, warn};
use std::io;
use std::sync::Arc;

const RESET: u64 = 0;
const SLEEP_CONTROL: u64 = 4;
const EVENTS: u64 = 8;

const RESET_VALUE: u8 = 1;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
/// The sleep type that the DSDT's `_S5` names.
const SOFT_OFF: u8 = 5;

/// Pending event: the power button was pressed.
const POWER_BUTTON: u8 = 1 << 0;

/// The power block. See the module.
pub struct Power {
    irq: Arc<dyn LevelLine>,
    pending_events: u8,
}

impl Power {
    /// A block without pending events that announces new ones on `irq`, which is high while one is pending.
    pub fn new(irq: Arc<dyn LevelLine>) -> Self {
        Self { irq, pending_events: 0 }
    }

    /// Presses the power button. Pressed again before the guest has looked, it is one press.
    ///
    /// # Errors
    /// The interrupt could not be raised; the press stays pending.
    pub fn press_power_button(&mut self) -> io::Result<()> {
        self.pending_events |= POWER_BUTTON;
        self.irq.set(true)
    }

    /// Events the guest has not read yet, all of the block's state.
    pub fn pending_events(&self) -> u8 {
        self.pending_events
    }

    /// Reads and clears the pending events.
    fn take_events(&mut self) -> u8 {
        if let Err(error) = self.irq.set(false) {
            warn!("cannot lower the power block's interrupt: {error}");
        }
        std::mem::take(&mut self.pending_events)
    }

    fn write_register(&mut self, register: u64, value: u8) -> Effect {
        match register {
            RESET if value == RESET_VALUE => Effect::Reset,
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => match (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK {
                SOFT_OFF => Effect::PowerOff,
                other => {
                    debug!("the guest asks for sleep type {other}, which this machine does not have");
                    Effect::None
                }
            },
            _ => Effect::None,
        }
    }
}

impl BusDevice for Power {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in registers(offset).zip(data) {
            *byte = if register == EVENTS { self.take_events() } else { 0 };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        registers(offset)
            .zip(data)
            .map(|(register, value)| self.write_register(register, *value))
            .find(|effect| *effect != Effect::None)
            .unwrap_or(Effect::None)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Recorder, inb, touch_everything};
    use super::*;

    fn block() -> (Power, Arc<Recorder>) {
        let irq = Recorder::new();
        (Power::new(irq.clone()), irq)
    }

    #[test]
    fn reset_takes_its_value_only() {
        let (mut power, _) = block();
        assert_eq!(power.write(RESET, &[0]), Effect::None);
        assert_eq!(power.write(RESET, &[6]), Effect::None);
        assert_eq!(power.write(RESET, &[1]), Effect::Reset);
    }

    #[test]
    fn power_off_needs_type_and_enable() {
        let (mut power, _) = block();
        assert_eq!(power.write(SLEEP_CONTROL, &[SOFT_OFF << 2]), Effect::None);
        assert_eq!(power.write(SLEEP_CONTROL, &[(3 << 2) | SLEEP_ENABLE]), Effect::None);
        assert_eq!(power.write(SLEEP_CONTROL, &[(SOFT_OFF << 2) | SLEEP_ENABLE]), Effect::PowerOff);
        assert_eq!(inb(&mut power, SLEEP_CONTROL + 1), 0);
    }

    #[test]
    fn the_power_button_interrupts_and_is_read_once() {
        let (mut power, irq) = block();
        assert_eq!(inb(&mut power, EVENTS), 0);
        power.press_power_button().unwrap();
        assert_eq!((irq.is_high(), power.pending_events()), (true, POWER_BUTTON));
        let mut wide = [0; 4];
        power.read(EVENTS, &mut wide);
        assert_eq!(wide, [POWER_BUTTON, 0, 0, 0]);
        assert!(!irq.is_high(), "the line stays high after the guest has looked");
        assert_eq!(inb(&mut power, EVENTS), 0);
    }

    #[test]
    fn every_access_is_answered() {
        touch_everything(&mut block().0);
    }
}
