//! The first serial port: a 16550A UART over vm-superio, behind our bus.
//!
//! It refuses to know where its output goes and where its input comes from. Output never stalls or kills the guest:
//! a byte that the writer does not take at once is dropped and counted, and the guest's transmitter is always empty.
//! Input is bounded by the 64-byte FIFO; the caller keeps what did not fit and is woken when there is room again.

use super::registers;
use crate::state::{Saved, StateError};
use crate::{BusDevice, Effect, IrqLine};
use log::{debug, warn};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::sync::Arc;
use vm_superio::Trigger;
use vm_superio::serial::{Error, NoEvents, SerialState};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of input it holds.
const FIFO_BYTES: usize = 64;
/// Registers, in ports from the base (16550D data sheet, section 8).
const REGISTERS: u64 = 8;
const MODEM_CONTROL: u8 = 4;
const LOOPBACK: u8 = 1 << 4;
/// Interrupts that can be enabled.
const INTERRUPTS: u8 = 0x0f;
/// Interrupt identification: none, the transmitter is empty, there is input, both.
const IDENTIFICATIONS: [u8; 4] = [1, 2, 4, 6];
/// Line status: there is input.
const DATA_READY: u8 = 1;

/// The layout of [`SerialState`] as it is saved; a register more there does not compile here.
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct Layout {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// What is saved.
#[derive(Serialize, Deserialize)]
struct State(#[serde(with = "Layout")] SerialState);

/// The UART. See the module.
pub struct Serial {
    uart: Uart,
    irq: Arc<dyn IrqLine>,
    /// Wakes who feeds us; `None` until someone does.
    space_event: Option<EventFd>,
    /// A byte was refused since the last wake-up, so someone waits for room.
    starved: bool,
}

type Uart = vm_superio::Serial<Line, NoEvents, Output>;

impl Serial {
    /// An idle port that raises `irq` and writes to `out`, which must not block.
    pub fn new(irq: Arc<dyn IrqLine>, out: Box<dyn Write + Send>) -> Self {
        let uart = Uart::new(Line(Arc::clone(&irq)), Output { out, dropped_bytes: 0 });
        Self { uart, irq, space_event: None, starved: false }
    }

    /// Offers input to the guest and returns how many bytes the FIFO took: the caller keeps the rest and offers it
    /// again when the event of [`Self::set_space_event`] fires.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.free_space());
        if let Err(error) = self.uart.enqueue_raw_bytes(&bytes[..taken]) {
            // The bytes are in the FIFO nevertheless, and the driver finds them with its next interrupt.
            debug!("serial input: {error}");
        }
        self.starved |= taken < bytes.len();
        taken
    }

    /// Bytes [`Self::enqueue`] would take now; none while the guest has the port in loopback mode.
    pub fn free_space(&mut self) -> usize {
        if self.uart.read(MODEM_CONTROL) & LOOPBACK != 0 { 0 } else { self.uart.fifo_capacity() }
    }

    /// Sets the event written when there is room again after [`Self::enqueue`] refused a byte.
    pub fn set_space_event(&mut self, event: EventFd) {
        self.space_event = Some(event);
    }

    /// Output bytes the writer refused so far.
    pub fn dropped_bytes(&self) -> u64 {
        self.uart.writer().dropped_bytes
    }

    /// All registers and the FIFO.
    pub fn state(&self) -> SerialState {
        self.uart.state()
    }

    /// Its state: all registers, and input that the guest has not read.
    pub fn save(&self) -> Saved {
        Saved::of(1, &State(self.uart.state()))
    }

    /// Takes over a state, with the same connections; input that is here already is lost. An interrupt that the guest has
    /// not identified is raised once more: one too many does no harm, and where the interrupt controllers are restored
    /// later, they bring theirs. May be repeated; the same state again does nothing.
    ///
    /// # Errors
    /// A state that is not one of this port, which is then as it was.
    pub fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        let State(state) = saved.decode(1)?;
        check(&state)?;
        if state == self.uart.state() {
            return Ok(());
        }
        let none = Output { out: Box::new(io::sink()), dropped_bytes: 0 };
        let uart = Uart::from_state(&state, Line(Arc::clone(&self.irq)), NoEvents, none);
        let mut uart = uart.map_err(|error| StateError::Value(format!("its interrupt cannot be raised: {error}")))?;
        std::mem::swap(uart.writer_mut(), self.uart.writer_mut());
        self.uart = uart;
        self.wake_feeder();
        Ok(())
    }

    /// Back to the state after construction, with the same connections. Who waits for room is woken.
    pub fn reset(&mut self) {
        let none = Output { out: Box::new(io::sink()), dropped_bytes: 0 };
        let out = std::mem::replace(self.uart.writer_mut(), none);
        self.uart = Uart::new(Line(Arc::clone(&self.irq)), out);
        self.wake_feeder();
    }

    fn wake_feeder(&mut self) {
        if self.starved && self.free_space() > 0 {
            self.starved = false;
            if let Some(event) = &self.space_event {
                // The counter can only refuse near 2^64, when the event is pending anyway.
                let _pending = event.write(1);
            }
        }
    }

    fn write_register(&mut self, register: u8, value: u8) {
        match self.uart.write(register, value) {
            Ok(()) => {}
            // Counted by the writer.
            Err(Error::IOError(_) | Error::FullFifo) => {}
            Err(Error::Trigger(error)) => warn!("serial interrupt: {error}"),
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in registers(offset).zip(data) {
            *byte = register_number(register).map_or(0xff, |register| self.uart.read(register));
        }
        self.wake_feeder();
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        for (register, value) in registers(offset).zip(data) {
            if let Some(register) = register_number(register) {
                self.write_register(register, *value);
            }
        }
        // Leaving loopback makes room too.
        self.wake_feeder();
        Effect::None
    }
}

/// Whether a port can be in `state`.
fn check(state: &SerialState) -> Result<(), StateError> {
    let idle = SerialState::default();
    let input = if state.in_buffer.is_empty() { 0 } else { DATA_READY };
    let registers = [
        ("interrupt enable", state.interrupt_enable, state.interrupt_enable & !INTERRUPTS == 0),
        (
            "interrupt identification",
            state.interrupt_identification,
            IDENTIFICATIONS.contains(&state.interrupt_identification),
        ),
        ("line status", state.line_status, state.line_status == idle.line_status | input),
        ("modem status", state.modem_status, state.modem_status == idle.modem_status),
    ];
    if let Some((name, value, _)) = registers.iter().find(|(_, _, good)| !good) {
        return Err(StateError::Value(format!("its {name} register holds {value:#04x}")));
    }
    if state.in_buffer.len() > FIFO_BYTES {
        let length = state.in_buffer.len();
        return Err(StateError::Value(format!("it has {length} bytes of input, more than its {FIFO_BYTES}")));
    }
    Ok(())
}

fn register_number(offset: u64) -> Option<u8> {
    u8::try_from(offset).ok().filter(|offset| u64::from(*offset) < REGISTERS)
}

/// The port's interrupt as vm-superio wants it.
struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// The writer, and what it refused.
struct Output {
    out: Box<dyn Write + Send>,
    dropped_bytes: u64,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.out.write(bytes);
        match &result {
            Ok(taken) if *taken > 0 => {}
            // `write_all` tries again by itself.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            refused => {
                if self.dropped_bytes == 0 {
                    warn!("serial output is being dropped: {refused:?}");
                }
                self.dropped_bytes = self.dropped_bytes.saturating_add(bytes.len() as u64);
            }
        }
        result
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Recorder, inb, touch_everything};
    use super::*;
    use crate::state::testing::{from_hex, to_hex};
    use proptest::prelude::*;
    use std::sync::Mutex;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Refuses(io::ErrorKind);

    impl Write for Refuses {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Serial, Arc<Recorder>, Captured) {
        let (irq, out) = (Recorder::new(), Captured::default());
        (Serial::new(irq.clone(), Box::new(out.clone())), irq, out)
    }

    #[test]
    fn what_the_guest_writes_comes_out() {
        let (mut serial, irq, out) = port();
        for byte in b"tern" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(out.0.lock().unwrap().as_slice(), b"tern");
        assert_eq!(irq.edges(), 0);
        serial.write(INTERRUPT_ENABLE, &[0b11]);
        assert_eq!(irq.edges(), 1, "the transmitter is empty");
    }

    #[test]
    fn input_interrupts_and_is_read_back() {
        let (mut serial, irq, _) = port();
        serial.write(INTERRUPT_ENABLE, &[0b01]);
        assert_eq!(serial.enqueue(b"hi"), 2);
        assert_eq!(irq.edges(), 1);
        assert_eq!(inb(&mut serial, LINE_STATUS) & DATA_READY, DATA_READY);
        assert_eq!([inb(&mut serial, DATA), inb(&mut serial, DATA)], *b"hi");
        assert_eq!(inb(&mut serial, LINE_STATUS) & DATA_READY, 0);
    }

    #[test]
    fn a_full_fifo_refuses_and_wakes_its_feeder_once() {
        let (mut serial, _, _) = port();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        serial.set_space_event(event.try_clone().unwrap());
        let free = serial.free_space();
        assert_eq!(serial.enqueue(&[b'x'; 1000]), free);
        assert_eq!((serial.enqueue(b"y"), serial.free_space()), (0, 0));
        assert!(event.read().is_err(), "woken although still full");
        inb(&mut serial, DATA);
        inb(&mut serial, DATA);
        assert_eq!(event.read().unwrap(), 1);
        assert_eq!(serial.enqueue(b"yz"), 2);
        inb(&mut serial, DATA);
        assert!(event.read().is_err(), "nobody was refused");
    }

    #[test]
    fn loopback_holds_input_back_until_it_ends() {
        let (mut serial, _, _) = port();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        serial.set_space_event(event.try_clone().unwrap());
        serial.write(MODEM_CONTROL.into(), &[LOOPBACK]);
        assert_eq!(serial.enqueue(b"a"), 0);
        serial.write(MODEM_CONTROL.into(), &[0]);
        assert_eq!(event.read().unwrap(), 1);
    }

    #[test]
    fn refused_output_is_dropped_and_counted_and_the_transmitter_stays_ready() {
        for kind in [io::ErrorKind::WouldBlock, io::ErrorKind::BrokenPipe, io::ErrorKind::StorageFull] {
            let irq = Recorder::new();
            let mut serial = Serial::new(irq.clone(), Box::new(Refuses(kind)));
            serial.write(INTERRUPT_ENABLE, &[0b10]);
            inb(&mut serial, 2);
            irq.edges();
            serial.write(DATA, b"a");
            assert_eq!(serial.dropped_bytes(), 1, "{kind}");
            assert_eq!(irq.edges(), 1, "the driver waits for this interrupt to go on");
            assert_eq!(inb(&mut serial, LINE_STATUS) & 0x60, 0x60);
        }
    }

    #[test]
    fn reset_forgets_input_and_keeps_the_connections() {
        let (mut serial, _, out) = port();
        serial.enqueue(b"stale");
        serial.write(7, &[0x5a]);
        serial.reset();
        assert_eq!(serial.state(), SerialState::default());
        serial.write(DATA, b"a");
        assert_eq!(out.0.lock().unwrap().as_slice(), b"a");
    }

    #[test]
    fn every_access_is_answered() {
        touch_everything(&mut port().0);
    }

    /// A port that is set up, with input waiting.
    fn in_use() -> (Serial, Arc<Recorder>) {
        let (mut serial, irq, _) = port();
        serial.write(3, &[0x80]);
        serial.write(0, &[0x01]);
        serial.write(1, &[0x02]);
        serial.write(3, &[0x1b]);
        serial.write(INTERRUPT_ENABLE, &[0x0d]);
        serial.write(4, &[0x0b]);
        serial.write(7, &[0x5a]);
        serial.enqueue(b"waits");
        (serial, irq)
    }

    /// Version 1, which must be read for ever.
    const GOLDEN: &str = "01020d041b610bb05a057761697473";

    #[test]
    fn a_state_of_version_1_is_read() {
        let (from, _) = in_use();
        assert_eq!(to_hex(&from.save()), to_hex(&from_hex(1, GOLDEN)));
        let (mut to, irq, out) = port();
        assert_ne!(to.save(), from.save());
        to.restore(&from_hex(1, GOLDEN)).unwrap();
        assert_eq!((to.state(), irq.edges()), (from.state(), 1));
        let mut input = [0; 5];
        input.fill_with(|| inb(&mut to, DATA));
        assert_eq!((&input, inb(&mut to, LINE_STATUS)), (b"waits", 0x60));
        to.write(DATA, b"x");
        assert_eq!(out.0.lock().unwrap().as_slice(), b"x", "output goes where it went");
    }

    #[test]
    fn each_register_comes_along() {
        for (register, value) in [(0, 7), (1, 3), (3, 0x1b), (4, 0x1f), (7, 0xa5)] {
            for latch in [0, 0x80] {
                let (mut from, _, _) = port();
                from.write(3, &[latch]);
                let before = from.save();
                from.write(register, &[value]);
                assert!(before != from.save() || (register, latch) == (0, 0), "{register}");
                let (mut to, _, _) = port();
                to.restore(&from.save()).unwrap();
                for register in 0..8 {
                    assert_eq!(inb(&mut to, register), inb(&mut from, register), "{register}");
                }
            }
        }
    }

    #[test]
    fn the_same_state_again_raises_nothing_and_a_feeder_is_woken_when_there_is_room() {
        let (from, _) = in_use();
        let (mut to, irq, _) = port();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        to.set_space_event(event.try_clone().unwrap());
        to.enqueue(&[b'x'; 100]);
        to.restore(&from.save()).unwrap();
        assert_eq!((irq.edges(), event.read().unwrap(), to.free_space()), (1, 1, 64 - 5));
        to.restore(&from.save()).unwrap();
        assert_eq!(irq.edges(), 0);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let (mut to, irq) = in_use();
        irq.edges();
        let before = to.save();
        let with = |damage: fn(&mut SerialState)| {
            let mut state = SerialState::default();
            damage(&mut state);
            Saved::of(1, &State(state))
        };
        for (saved, expected) in [
            (with(|state| state.interrupt_enable = 0x10), "its interrupt enable register holds 0x10"),
            (with(|state| state.interrupt_identification = 0), "its interrupt identification register holds 0x00"),
            (with(|state| state.interrupt_identification = 3), "its interrupt identification register holds 0x03"),
            (with(|state| state.line_status = 0x61), "its line status register holds 0x61"),
            (with(|state| state.in_buffer = vec![1]), "its line status register holds 0x60"),
            (with(|state| state.modem_status = 0), "its modem status register holds 0x00"),
            (
                with(|state| (state.line_status, state.in_buffer) = (0x61, vec![0; 65])),
                "it has 65 bytes of input, more than its 64",
            ),
            (Saved { version: 2, ..before.clone() }, "it has version 2, and this program reads up to 1"),
        ] {
            assert_eq!(to.restore(&saved).unwrap_err().to_string(), expected);
            assert_eq!((to.save() == before, irq.edges()), (true, 0));
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(contents in prop::collection::vec(any::<u8>(), 0..90), cut in 0..15usize) {
            let (mut to, _, _) = port();
            let part = Saved { version: 1, contents: in_use().0.save().contents[..cut].to_vec() };
            prop_assert!(to.restore(&part).is_err());
            if to.restore(&Saved { version: 1, contents }).is_ok() {
                touch_everything(&mut to);
            }
        }
    }
}
