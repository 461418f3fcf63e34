//! Serial port, clock, power block and panic port: any register sequence at any time of any clock.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use sterna_devices::legacy::{Power, PvPanic, Rtc, Serial};
use sterna_devices::{BusDevice, Effect, IrqLine, LevelLine};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Debug)]
enum Step {
    Access {
        device: Device,
        offset: Offset,
        data: Data,
    },
    /// Input for the serial port.
    Input(Vec<u8>),
    /// Its output is taken, refused, or taken by half.
    Output(Writing),
    ResetSerial,
    ResetClock,
    /// The host's clock is set: seconds since the epoch and nanoseconds.
    Time(i64, u32),
    PressButton,
    /// Interrupt lines work, or do not.
    Lines(bool),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Device {
    Serial,
    Clock,
    Power,
    Panic,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Offset {
    Register(u8),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Data {
    Read(u8),
    Write1(u8),
    Write2(u16),
    Write4(u32),
    Write8(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Writing {
    Takes,
    Refuses,
    Interrupted,
    TakesNothing,
}

#[derive(Default)]
struct Lines {
    broken: AtomicBool,
    high: AtomicBool,
}

impl Lines {
    fn work(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) { Err(io::Error::other("broken")) } else { Ok(()) }
    }
}

impl IrqLine for Lines {
    fn trigger(&self) -> io::Result<()> {
        self.work()
    }
}

impl LevelLine for Lines {
    fn set(&self, high: bool) -> io::Result<()> {
        self.work()?;
        self.high.store(high, Ordering::Relaxed);
        Ok(())
    }
}

/// How output goes, as the number of a [`Writing`]. `Interrupted` happens once.
struct Out(Arc<AtomicU32>);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(bytes.len()),
            1 => Err(io::ErrorKind::WouldBlock.into()),
            2 => {
                self.0.store(0, Ordering::Relaxed);
                Err(io::ErrorKind::Interrupted.into())
            }
            _ => Ok(0),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

static SECONDS: AtomicI64 = AtomicI64::new(0);
static NANOSECONDS: AtomicU32 = AtomicU32::new(0);

/// The clock of the run; times that the type cannot hold are the epoch.
fn clock() -> SystemTime {
    let (seconds, nanoseconds) = (SECONDS.load(Ordering::Relaxed), NANOSECONDS.load(Ordering::Relaxed));
    let offset = Duration::new(seconds.unsigned_abs(), nanoseconds % 1_000_000_000);
    let time = if seconds < 0 { UNIX_EPOCH.checked_sub(offset) } else { UNIX_EPOCH.checked_add(offset) };
    time.unwrap_or(UNIX_EPOCH)
}

struct Board {
    lines: Arc<Lines>,
    serial: Serial,
    clock: Rtc,
    power: Power,
    panic: PvPanic,
}

impl Board {
    fn access(&mut self, device: Device, offset: Offset, data: Data) {
        let pending = self.power.pending_events();
        let (registers, target): (u64, &mut dyn BusDevice) = match device {
            Device::Serial => (8, &mut self.serial),
            Device::Clock => (2, &mut self.clock),
            Device::Power => (12, &mut self.power),
            Device::Panic => (1, &mut self.panic),
        };
        let offset = match offset {
            Offset::Register(register) => u64::from(register) % (registers + 2),
            Offset::Any(offset) => offset,
        };
        let effect = match data {
            Data::Read(width) => {
                target.read(offset, &mut [0; 8][..1 << (width % 4)]);
                Effect::None
            }
            Data::Write1(value) => target.write(offset, &[value]),
            Data::Write2(value) => target.write(offset, &value.to_le_bytes()),
            Data::Write4(value) => target.write(offset, &value.to_le_bytes()),
            Data::Write8(value) => target.write(offset, &value.to_le_bytes()),
        };
        match device {
            Device::Serial | Device::Clock => assert_eq!(effect, Effect::None),
            Device::Power => assert_ne!(effect, Effect::GuestPanic),
            Device::Panic => assert!(matches!(effect, Effect::None | Effect::GuestPanic)),
        }
        assert!(matches!(device, Device::Power) || self.power.pending_events() == pending);
    }
}

fuzz_target!(|steps: Vec<Step>| {
    sterna_fuzz::format_logs();
    (SECONDS.store(1_700_000_000, Ordering::Relaxed), NANOSECONDS.store(0, Ordering::Relaxed));
    let (lines, writing) = (Arc::<Lines>::default(), Arc::<AtomicU32>::default());
    let mut board = Board {
        serial: Serial::new(lines.clone(), Box::new(Out(writing.clone()))),
        clock: Rtc::with_clock(clock),
        power: Power::new(lines.clone()),
        panic: PvPanic,
        lines,
    };
    if let Ok(event) = EventFd::new(EFD_NONBLOCK) {
        board.serial.set_space_event(event);
    }
    for step in steps.into_iter().take(256) {
        match step {
            Step::Access { device, offset, data } => board.access(device, offset, data),
            Step::Input(bytes) => {
                let room = board.serial.free_space();
                assert_eq!(board.serial.enqueue(&bytes), bytes.len().min(room));
            }
            Step::Output(kind) => writing.store(kind as u32, Ordering::Relaxed),
            Step::ResetSerial => board.serial.reset(),
            Step::ResetClock => board.clock.reset(),
            Step::Time(seconds, nanoseconds) => {
                SECONDS.store(seconds, Ordering::Relaxed);
                NANOSECONDS.store(nanoseconds, Ordering::Relaxed);
            }
            Step::PressButton => {
                let pressed = board.power.press_power_button();
                assert_eq!(pressed.is_ok(), !board.lines.broken.load(Ordering::Relaxed));
                assert_eq!(board.power.pending_events(), 1);
            }
            Step::Lines(work) => board.lines.broken.store(!work, Ordering::Relaxed),
        }
        let (_serial, _clock) = (board.serial.state(), board.clock.state());
    }
});
