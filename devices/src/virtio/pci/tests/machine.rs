//! One virtio function on a bus with its event loop, and a driver that goes through the registers only.

use crate::pci::config::{BAR0, COMMAND, COMMAND_MEMORY};
use crate::pci::msix::{CONTROL_ENABLE, ENTRY_BYTES};
use crate::pci::testing::{Call, Recorder};
use crate::pci::{BarWindow, Ecam, PciSegment};
use crate::virtio::pci::VirtioPci;
use crate::virtio::testing::Driver;
use crate::virtio::{Backend, Fault, Io, VirtioDevice};
use crate::{MsiMessage, Saved, SharedBusDevice, StateError};
use event_manager::{EventManager, SubscriberOps};
use std::sync::{Arc, Mutex};

pub const WINDOW: u64 = 0xc000_0000;
pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
const SLOT: u64 = 1 << 15;

/// Where a driver found the structures, by walking the capabilities.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    pub common: u64,
    pub notify: u64,
    pub multiplier: u64,
    pub isr: u64,
    pub device: u64,
    pub access: u64,
    pub msix: u64,
    pub table: u64,
    pub pending: u64,
    pub vectors: usize,
}

pub struct Machine {
    pub driver: Driver,
    pub wiring: Arc<Recorder>,
    pub function: Arc<Mutex<VirtioPci>>,
    pub segment: Arc<PciSegment>,
    pub faults: Arc<Mutex<Vec<(String, String)>>>,
    pub found: Found,
    /// Address of the BAR.
    pub bar: u64,
    events: EventManager<Arc<Mutex<VirtioPci>>>,
}

/// The message that vector `vector` is programmed to send.
pub fn message(vector: usize) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000, data: 0x30 + vector as u32 }
}

impl Machine {
    /// A function that its driver has found, and nothing more.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let driver = Driver::new(device.queue_sizes());
        let mut machine = Self::never_run(device, driver);
        machine.enumerate();
        machine
    }

    /// Stops this machine and fills another with what it is, whose device is `device` and which stands still.
    pub fn moved_to(self, device: Box<dyn VirtioDevice>) -> Self {
        self.lock().pause().unwrap();
        let (transport, bus) = (self.lock().save(), self.segment.save());
        let model = self.lock().save_model();
        let there = Self { found: self.found, bar: self.bar, ..Self::never_run(device, self.driver) };
        there.segment.restore(&bus).unwrap();
        there.lock().restore(&transport, &model).unwrap();
        there
    }

    /// A function that nobody has touched, and a driver that may be from elsewhere.
    pub fn never_run(device: Box<dyn VirtioDevice>, driver: Driver) -> Self {
        let wiring = Arc::new(Recorder::default());
        let faults: Arc<Mutex<Vec<_>>> = Arc::default();
        let log = faults.clone();
        let on_fault = Arc::new(move |name: &str, reason: &str| {
            log.lock().unwrap().push((name.to_owned(), reason.to_owned()));
        });
        let function = VirtioPci::new("test0", device, driver.ram.clone(), wiring.clone(), on_fault).unwrap();
        let function = Arc::new(Mutex::new(function));
        let mut segment = PciSegment::new(WINDOW..WINDOW + 0x10_0000);
        assert_eq!(segment.add(function.clone()), Ok(1));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(function.clone());
        let segment = Arc::new(segment);
        Self { driver, wiring, function, segment, faults, found: Found::default(), bar: 0, events }
    }

    /// Sizes the BAR, switches decoding on and walks the capabilities.
    pub fn enumerate(&mut self) {
        let base = self.config(BAR0 as u64);
        self.set_config(BAR0 as u64, &u32::MAX.to_le_bytes());
        assert_eq!(self.config(BAR0 as u64), 0xffff_8000);
        self.move_bar(u64::from(base));
        self.set_config(COMMAND as u64, &(COMMAND_MEMORY | 4).to_le_bytes());
        let mut at = u64::from(self.config(0x34) & 0xff);
        let mut seen = 0;
        while at != 0 {
            let head = self.config(at);
            let (offset, length) = (u64::from(self.config(at + 8)), self.config(at + 12));
            if head & 0xff == 0x11 {
                let (table, pending) = (self.config(at + 4).into(), self.config(at + 8).into());
                let vectors = (head >> 16 & 0x7ff) as usize + 1;
                self.found = Found { msix: at, table, pending, vectors, ..self.found };
            } else {
                match head >> 24 {
                    1 => (self.found.common, seen) = (offset, seen | length),
                    2 => (self.found.notify, self.found.multiplier) = (offset, self.config(at + 16).into()),
                    3 => self.found.isr = offset,
                    4 => self.found.device = offset,
                    5 => self.found.access = at,
                    kind => panic!("capability of kind {kind}"),
                }
            }
            at = u64::from(head >> 8 & 0xff);
        }
        assert_eq!(seen, 0x40, "a common configuration structure");
    }

    pub fn move_bar(&mut self, base: u64) {
        self.bar = base;
        self.set_config(BAR0 as u64, &(base as u32).to_le_bytes());
    }

    pub fn config(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        Ecam(self.segment.clone()).read(SLOT | offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn set_config(&self, offset: u64, data: &[u8]) {
        Ecam(self.segment.clone()).write(SLOT | offset, data);
    }

    pub fn read(&self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        BarWindow(self.segment.clone()).read(self.bar - WINDOW + offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, width: usize, value: u64) {
        BarWindow(self.segment.clone()).write(self.bar - WINDOW + offset, &value.to_le_bytes()[..width]);
    }

    /// A register of the common configuration structure.
    pub fn common(&self, offset: u64, width: usize) -> u64 {
        self.read(self.found.common + offset, width)
    }

    pub fn set_common(&self, offset: u64, width: usize, value: u64) {
        self.write(self.found.common + offset, width, value);
    }

    pub fn status(&self) -> u64 {
        self.common(0x14, 1)
    }

    pub fn set_status(&self, status: u64) {
        self.set_common(0x14, 1, status);
    }

    pub fn set_vector_mask(&self, vector: usize, masked: bool) {
        self.write(self.found.table + (vector * ENTRY_BYTES) as u64 + 12, 4, masked.into());
    }

    /// Takes the device up to FEATURES_OK.
    pub fn negotiate(&self, features: u64) {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        for half in 0..2 {
            self.set_common(0x08, 4, half);
            self.set_common(0x0c, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.set_status(0xb);
    }

    /// Vector 0 for the configuration, vector 1 + q for queue q, all unmasked.
    pub fn set_up_interrupts(&self) {
        self.set_config(self.found.msix + 2, &CONTROL_ENABLE.to_le_bytes());
        for vector in 0..self.found.vectors {
            let at = self.found.table + (vector * ENTRY_BYTES) as u64;
            self.write(at, 8, message(vector).address);
            self.write(at + 8, 4, message(vector).data.into());
            self.set_vector_mask(vector, false);
        }
        self.set_common(0x10, 2, 0);
        assert_eq!(self.common(0x10, 2), 0);
    }

    /// Selects a queue and writes its vector and addresses.
    pub fn set_rings(&self, queue: usize) {
        self.set_common(0x16, 2, queue as u64);
        self.set_common(0x1a, 2, queue as u64 + 1);
        for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(Driver::ring(queue)) {
            self.set_common(register, 4, address & 0xffff_ffff);
            self.set_common(register + 4, 4, address >> 32);
        }
    }

    /// A driver's whole initialisation (virtio 1.2, 3.1.1), with empty rings.
    pub fn init(&mut self, features: u64) {
        self.driver.restart();
        self.negotiate(features);
        assert_eq!(self.status(), 0xb);
        self.set_up_interrupts();
        for queue in 0..self.common(0x12, 2) as usize {
            self.set_rings(queue);
            self.set_common(0x1c, 2, 1);
        }
        self.set_status(0xf);
        assert_eq!(self.status(), 0xf);
        self.run();
        self.wiring.calls();
    }

    pub fn notify_address(&self, queue: usize) -> u64 {
        self.bar + self.found.notify + queue as u64 * self.found.multiplier
    }

    /// Notifies as a guest does: through the binding if there is one, else by a register write.
    pub fn notify(&self, queue: usize) {
        let address = self.notify_address(queue);
        if !self.wiring.notify(address) {
            self.write(address - self.bar, 2, queue as u64);
        }
    }

    /// Runs the event loop until it has nothing to do.
    pub fn run(&mut self) {
        for _ in 0..100 {
            if self.events.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop spins");
    }

    /// Runs the event loop once over what is ready.
    pub fn round(&mut self) {
        self.events.run_with_timeout(0).unwrap();
    }

    /// Vectors that were raised since the last time.
    pub fn raised(&self) -> Vec<usize> {
        let vector = |call| match call {
            Call::Signal(message) => Some(message.data as usize - 0x30),
            _ => None,
        };
        self.wiring.calls().into_iter().filter_map(vector).collect()
    }

    pub fn lock(&self) -> std::sync::MutexGuard<'_, VirtioPci> {
        self.function.lock().unwrap()
    }
}

/// A device that remembers what it was asked, and does as it was told.
#[derive(Default)]
pub struct Probe {
    pub calls: Vec<String>,
    pub backend: Option<Backend>,
    /// The next reaction fails.
    pub fails: bool,
    /// The configuration changes at the next reaction.
    pub config_changes: bool,
    pub config: [u8; 16],
}

/// The [`Probe`] on the bus: two queues of 8 and 16.
#[derive(Clone, Default)]
pub struct Shared(pub Arc<Mutex<Probe>>);

impl Shared {
    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }

    fn call(&self, name: &str, io: Option<&mut Io>) -> Result<(), Fault> {
        let mut probe = self.0.lock().unwrap();
        probe.calls.push(name.to_owned());
        if let Some(io) = io.filter(|_| std::mem::take(&mut probe.config_changes)) {
            io.config_changed();
        }
        let source = std::io::Error::other("told to");
        if std::mem::take(&mut probe.fails) { Err(Fault::Backend { attempt: "probing", source }) } else { Ok(()) }
    }
}

impl VirtioDevice for Shared {
    fn device_type(&self) -> u32 {
        42
    }
    fn pci_class(&self) -> u32 {
        0xff_00_00
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 16]
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let probe = self.0.lock().unwrap();
        let bytes = probe.config.iter().copied().chain(std::iter::repeat(0)).skip(offset as usize);
        data.iter_mut().zip(bytes).for_each(|(byte, config)| *byte = config);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut probe = self.0.lock().unwrap();
        probe.config.iter_mut().skip(offset as usize).zip(data).for_each(|(byte, new)| *byte = *new);
    }
    fn activate(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.call("activate", Some(io))
    }
    fn queue_notified(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault> {
        self.call(&format!("queue {queue}"), Some(io))
    }
    fn backend(&self) -> Option<Backend> {
        self.0.lock().unwrap().backend
    }
    fn backend_ready(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.call("backend", Some(io))
    }
    fn quiesce(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.call("quiesce", Some(io))
    }
    fn moved(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.call("moved", Some(io))
    }
    fn reset(&mut self) {
        let _told = self.call("reset", None);
    }

    fn save(&self) -> Saved {
        Saved::of(1, &self.0.lock().unwrap().config)
    }
    fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        self.0.lock().unwrap().config = saved.decode(1)?;
        Ok(())
    }
}
