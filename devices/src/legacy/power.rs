//! Reset, power-off and the power button of a hardware-reduced ACPI machine (ACPI 6.5, sections 4.8.3.6, 4.8.3.7 and
//! 5.6.9), in one block of ports.
//!
//! | offset | register |
//! | --- | --- |
//! | 0 | reset: 1 restarts the machine |
//! | 4 | sleep control: SLP_TYPx 5 with SLP_EN ends it |
//! | 5 | sleep status: always 0, nothing to wake from |
//! | 8 | generic events: pending bits, cleared by reading; bit 0 is the power button, bit 1 a new generation id |
//!
//! It refuses to act: it returns an [`Effect`].

use super::registers;
use crate::state::{Saved, StateError};
use crate::{BusDevice, Effect, LevelLine};
use log::{debug, warn};
use serde::{Deserialize, Serialize};
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
/// Pending event: the machine's generation id is another.
const GENERATION: u8 = 1 << 1;

/// Events there are.
const KNOWN_EVENTS: u8 = POWER_BUTTON | GENERATION;

/// What is saved of it.
#[derive(Serialize, Deserialize)]
struct State {
    pending_events: u8,
}

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
        self.announce(POWER_BUTTON)
    }

    /// Tells the guest that its generation id is another, which [`super::VmGenId`] has put into its memory before.
    ///
    /// # Errors
    /// The interrupt could not be raised; the event stays pending.
    pub fn notify_generation(&mut self) -> io::Result<()> {
        self.announce(GENERATION)
    }

    fn announce(&mut self, event: u8) -> io::Result<()> {
        self.pending_events |= event;
        self.irq.set(true)
    }

    /// Events the guest has not read yet, all of the block's state.
    pub fn pending_events(&self) -> u8 {
        self.pending_events
    }

    /// Its state. The level of its line follows from it.
    pub fn save(&self) -> Saved {
        Saved::of(1, &State { pending_events: self.pending_events })
    }

    /// Takes over a state and drives the line as it says. Restore the interrupt controllers before it: KVM forgets what is
    /// pending at a pin when these are set, and takes it from their state, while the line's own level is in nobody's.
    /// Where they are set again afterwards, do this again, too. May be repeated.
    ///
    /// # Errors
    /// A state that is not one of this block, or a line that cannot be driven; the block is as it was.
    pub fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        let State { pending_events } = saved.decode(1)?;
        if pending_events & !KNOWN_EVENTS != 0 {
            return Err(StateError::Value(format!("its pending events {pending_events:#04x} are not all known")));
        }
        let driven = self.irq.set(pending_events != 0);
        driven.map_err(|error| StateError::Value(format!("its interrupt line cannot be driven: {error}")))?;
        self.pending_events = pending_events;
        Ok(())
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
    use crate::state::testing::to_hex;

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
    fn a_new_generation_is_an_event_beside_the_button() {
        let (mut power, irq) = block();
        power.notify_generation().unwrap();
        assert_eq!((irq.is_high(), inb(&mut power, EVENTS)), (true, GENERATION));
        power.press_power_button().unwrap();
        power.notify_generation().unwrap();
        assert_eq!(inb(&mut power, EVENTS), POWER_BUTTON | GENERATION);
        assert_eq!((irq.is_high(), inb(&mut power, EVENTS)), (false, 0));
    }

    #[test]
    fn a_press_that_the_guest_has_not_seen_comes_along_with_its_line() {
        let (mut power, _) = block();
        let fresh = power.save();
        power.press_power_button().unwrap();
        assert_eq!((to_hex(&fresh), to_hex(&power.save())), ("00".into(), "01".into()), "version 1, for ever");
        let (mut there, irq) = block();
        there.restore(&power.save()).unwrap();
        assert!(irq.is_high());
        for wrong in [vec![4], vec![0x81], vec![], vec![1, 0]] {
            there.restore(&Saved { version: 1, contents: wrong }).unwrap_err();
            assert!(irq.is_high() && there.save() == power.save());
        }
        assert_eq!((inb(&mut there, EVENTS), irq.is_high()), (POWER_BUTTON, false));
        there.restore(&power.save()).unwrap();
        there.restore(&fresh).unwrap();
        assert_eq!((there.pending_events(), irq.is_high()), (0, false));
    }

    #[test]
    fn every_access_is_answered() {
        touch_everything(&mut block().0);
    }
}
