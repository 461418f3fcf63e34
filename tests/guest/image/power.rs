//! Ways for the machine to end.

use crate::boot::{halt, triple_fault};
use crate::line;
use crate::port::{in8, out8};
use crate::time::wait_until;

const RESET: u16 = 0x600;
const SLEEP_CONTROL: u16 = 0x604;
const POWER_EVENTS: u16 = 0x608;
const PVPANIC: u16 = 0x505;

/// Powers off by the ACPI sleep control register: S5 and sleep enable.
pub fn off() -> ! {
    out8(SLEEP_CONTROL, (5 << 2) | 0x20);
    still_here("power off")
}

/// Resets by the ACPI reset register.
pub fn reset() -> ! {
    out8(RESET, 1);
    still_here("reset")
}

/// Reports a panic to the host and stops.
pub fn panicked() -> ! {
    out8(PVPANIC, 1);
    halt()
}

/// Ends by a triple fault.
pub fn fault() -> ! {
    triple_fault()
}

/// Whether the power button has been pressed since the last call.
pub fn button_pressed() -> bool {
    in8(POWER_EVENTS) & 1 != 0
}

/// Says what failed, tells the host, stops.
pub fn fail(what: core::fmt::Arguments) -> ! {
    line!("FAIL {what}");
    panicked()
}

fn still_here(what: &str) -> ! {
    wait_until(1_000_000, || false);
    fail(format_args!("{what}: the machine still runs after a second"))
}

/// Ends the run with a reason.
#[macro_export]
macro_rules! fail {
    ($($arg:tt)*) => { $crate::power::fail(format_args!($($arg)*)) };
}
