//! Devices at fixed places: serial port, clock, power block, panic report, generation id.
//!
//! Each but the last, which has none, is a [`crate::BusDevice`] over plain registers. They refuse to know where a console's bytes go and who acts
//! on a power-off.

pub mod power;
pub mod pvpanic;
pub mod rtc;
pub mod serial;
pub mod vmgenid;

pub use power::Power;
pub use pvpanic::PvPanic;
pub use rtc::Rtc;
pub use serial::Serial;
pub use vmgenid::VmGenId;

/// Offsets of the bytes of an access that starts at `offset`, one byte register each; the end of the space repeats.
fn registers(offset: u64) -> impl Iterator<Item = u64> {
    (0..).map(move |byte| offset.saturating_add(byte))
}

#[cfg(test)]
mod testing {
    //! An interrupt line that counts edges and knows its level.

    use crate::{BusDevice, IrqLine, LevelLine};
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    #[derive(Default)]
    pub struct Recorder {
        edges: AtomicUsize,
        high: AtomicBool,
    }

    impl Recorder {
        pub fn new() -> Arc<Self> {
            Arc::default()
        }

        /// Edges since the last call.
        pub fn edges(&self) -> usize {
            self.edges.swap(0, Ordering::Relaxed)
        }

        /// Whether the level is high.
        pub fn is_high(&self) -> bool {
            self.high.load(Ordering::Relaxed)
        }
    }

    impl IrqLine for Recorder {
        fn trigger(&self) -> io::Result<()> {
            self.edges.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    impl LevelLine for Recorder {
        fn set(&self, high: bool) -> io::Result<()> {
            self.high.store(high, Ordering::Relaxed);
            Ok(())
        }
    }

    /// Reads one byte register.
    pub fn inb(device: &mut impl BusDevice, offset: u64) -> u8 {
        let mut data = [0xaa];
        device.read(offset, &mut data);
        data[0]
    }

    /// Touches every offset with every width and with wild offsets: nothing may panic.
    pub fn touch_everything(device: &mut impl BusDevice) {
        for offset in (0..256).chain([u64::MAX, u64::MAX - 3, 1 << 32]) {
            for width in [1, 2, 4, 8] {
                device.read(offset, &mut [0; 8][..width]);
                device.write(offset, &[0xff; 8][..width]);
                device.write(offset, &[0; 8][..width]);
            }
        }
    }
}
