//! Ways for the machine to end.

use crate::boot::{halt, triple_fault, wait_for_interrupt};
use crate::line;
use crate::port::{in8, out8, write};
use crate::time::wait_until;

const RESET: u16 = 0x600;
const SLEEP_CONTROL: u16 = 0x604;
const POWER_EVENTS: u16 = 0x608;
const PVPANIC: u16 = 0x505;
const IO_APIC: usize = 0xfec0_0000;
/// Where the generic event device raises its line.
const BUTTON_PIN: u32 = 9;
const BUTTON_VECTOR: u32 = 0x41;

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
    let events = in8(POWER_EVENTS);
    events != 0xff && events & 1 != 0 // all ones: no such register here
}

/// Halts without timers. With `button` the power button's interrupt wakes this vCPU and powers off.
pub fn halt_for_good(button: bool) -> ! {
    if !button {
        halt();
    }
    for (register, value) in [(0x11 + 2 * BUTTON_PIN, 0), (0x10 + 2 * BUTTON_PIN, BUTTON_VECTOR)] {
        write::<u32>(IO_APIC, register);
        write::<u32>(IO_APIC + 0x10, value);
    }
    while !button_pressed() {
        wait_for_interrupt();
    }
    line!("power button");
    off()
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
