//! The serial port: output a character at a time, input polled.

use crate::port::{in8, out8};
use core::fmt;
use core::sync::atomic::{AtomicU32, Ordering};

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const FIFO_BYTES: u32 = 16;

/// Characters sent since the transmitter was last seen empty.
static QUEUED: AtomicU32 = AtomicU32::new(FIFO_BYTES);

/// 8n1, FIFOs on, no interrupts.
pub fn init() {
    out8(COM1 + 1, 0);
    out8(COM1 + 2, 0x07);
    out8(COM1 + 3, 0x03);
}

/// A byte that came in, if any.
pub fn input() -> Option<u8> {
    (in8(LINE_STATUS) & 1 != 0).then(|| in8(COM1))
}

/// Formats to the serial port.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if QUEUED.load(Ordering::Relaxed) >= FIFO_BYTES {
                while in8(LINE_STATUS) & 0x20 == 0 {}
                QUEUED.store(0, Ordering::Relaxed);
            }
            QUEUED.fetch_add(1, Ordering::Relaxed);
            out8(COM1, byte);
        }
        Ok(())
    }
}

/// Prints a line.
#[macro_export]
macro_rules! line {
    ($($arg:tt)*) => {{
        use core::fmt::Write;
        _ = writeln!($crate::console::Console, $($arg)*);
    }};
}
