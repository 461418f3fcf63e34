//! The PCI bus with a function of every kind, and what a guest, a hypervisor and the network may do to it: accesses of any
//! width by all three ways in, drivers that start devices on hostile rings, pauses, resets.

use crate::chain::{Chain, Framing};
use crate::guest::{Guest, MAX_QUEUES};
use crate::wiring::Checker;
use arbitrary::Arbitrary;
use event_manager::{EventManager, SubscriberOps};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, OnceLock};
use sterna_devices::SharedBusDevice;
use sterna_devices::pci::{BarWindow, ConfigPorts, Ecam, PciSegment};
use sterna_devices::virtio::VirtioDevice;
use sterna_devices::virtio::balloon::Balloon;
use sterna_devices::virtio::blk::{Blk, Image};
use sterna_devices::virtio::net::{Net, Offload, Port};
use sterna_devices::virtio::pci::VirtioPci;
use sterna_devices::virtio::rng::Rng;
use sterna_devices::virtio::vsock::Vsock;
use tempfile::TempDir;

const WINDOW: u64 = 0xc000_0000;
const VERSION_1: u64 = 1 << 32;
/// Slot of the entropy device.
const RNG: u8 = 1;
/// Names of the functions, from slot 1 on.
const NAMES: [&str; 5] = ["rng", "balloon", "disk0", "net0", "vsock"];
/// Rounds of the event loop after a step. A device that a guest keeps busy is left to the next step.
const MAX_ROUNDS: usize = 32;

/// Something that happens to the bus: a guest's doing, or the host's.
#[derive(Arbitrary, Debug)]
pub struct Step(Kind);

#[derive(Arbitrary, Debug)]
enum Kind {
    Ecam {
        slot: u8,
        offset: u16,
        access: Access,
    },
    /// The address register is set to a register of a slot.
    Address {
        slot: u8,
        register: u8,
    },
    Ports {
        port: u8,
        access: Access,
    },
    Bar {
        slot: u8,
        register: Register,
        access: Access,
    },
    Window {
        offset: u32,
        access: Access,
    },
    /// A driver's whole initialisation.
    Start {
        slot: u8,
        features: u64,
        interrupts: bool,
    },
    Status {
        slot: u8,
        status: u8,
    },
    Offer {
        queue: u8,
        chain: Chain,
    },
    Available {
        queue: u8,
        index: u16,
    },
    Poke {
        at: u32,
        bytes: Vec<u8>,
    },
    Notify {
        slot: u8,
        queue: u8,
    },
    MoveBar {
        slot: u8,
        place: u8,
    },
    Mask {
        slot: u8,
        vector: u8,
        masked: bool,
    },
    Pause(u8),
    Resume(u8),
    Reset,
    /// The hypervisor refuses everything, or nothing.
    Refuse(bool),
    /// A frame comes from the network.
    Frame(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Access {
    Read(u8),
    Write1(u8),
    Write2(u16),
    Write4(u32),
    Write8(u64),
    Write(Vec<u8>),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Register {
    Common(u8),
    Page { page: u8, offset: u8 },
    Any(u16),
}

struct Socket(UnixDatagram);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Port for Socket {
    fn name(&self) -> &str {
        "socket"
    }
    fn mtu(&self) -> u16 {
        1500
    }
    fn set_offload(&self, _offload: Offload) -> io::Result<()> {
        Ok(())
    }
}

/// A driver for all functions of a bus.
pub fn guest() -> Guest {
    Guest::new(&[256; MAX_QUEUES])
}

/// A disk image for all runs, whose name is gone at once.
fn image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 64 << 10]).expect("an image");
        Image::open(&path, false, false).expect("an image")
    })
}

/// See the module.
pub struct Bus {
    /// The driver and its memory.
    pub guest: Guest,
    /// The bus.
    pub segment: Arc<PciSegment>,
    /// By slot, from 1 on.
    pub functions: Vec<Arc<Mutex<VirtioPci>>>,
    events: EventManager<Arc<Mutex<VirtioPci>>>,
    wiring: Arc<Checker>,
    network: UnixDatagram,
    /// Of the socket device.
    _directory: TempDir,
}

impl Bus {
    /// A machine's devices that have never run, on the memory of `guest`.
    pub fn new(guest: Guest) -> Self {
        // In memory, and of this run only: nothing stays behind.
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let (ours, network) = UnixDatagram::pair().expect("sockets");
        ours.set_nonblocking(true).and(network.set_nonblocking(true)).expect("sockets");
        let devices: [Box<dyn VirtioDevice>; 5] = [
            Box::new(Rng),
            Box::new(Balloon::new().expect("a descriptor").0),
            Box::new(Blk::new(image().clone(), "disk0").expect("a good serial number")),
            Box::new(Net::new(Socket(ours), [2, 0, 0, 0, 0, 1])),
            Box::new(Vsock::new(3, &directory.path().join("v")).expect("nobody else listens there")),
        ];
        let wiring = Arc::new(Checker::default());
        let mut segment = PciSegment::new(WINDOW..WINDOW + 0x10_0000);
        let mut events = EventManager::new().expect("a descriptor");
        let functions = NAMES.into_iter().zip(devices).map(|(name, device)| {
            let on_fault = Arc::new(|_: &str, reason: &str| assert!(!reason.is_empty()));
            let function = VirtioPci::new(name, device, guest.ram.clone(), wiring.clone(), on_fault);
            let function = Arc::new(Mutex::new(function.expect("descriptors")));
            segment.add(function.clone()).expect("a slot and room for the BAR");
            events.add_subscriber(function.clone());
            function
        });
        let functions = functions.collect();
        Self { guest, segment: Arc::new(segment), functions, events, wiring, network, _directory: directory }
    }

    /// Brings every function to a stand.
    pub fn pause(&self) {
        for slot in 1..=NAMES.len() as u8 {
            let _fault = self.function(slot).lock().expect("no panic so far").pause();
        }
    }

    /// The functions go on.
    pub fn resume(&mut self) {
        self.functions.iter().for_each(|function| function.lock().expect("no panic so far").resume());
        self.run();
    }

    /// The hypervisor refuses everything, or nothing.
    pub fn set_refuses(&self, refuses: bool) {
        self.wiring.set_refuses(refuses);
    }

    /// The guest, whose machine is gone.
    pub fn into_guest(self) -> Guest {
        self.guest
    }

    fn function(&self, slot: u8) -> &Mutex<VirtioPci> {
        &self.functions[usize::from(slot - 1)]
    }

    fn config(&self, slot: u8, offset: u64) -> u32 {
        let mut data = [0; 4];
        Ecam(self.segment.clone()).read(u64::from(slot) << 15 | offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_config(&self, slot: u8, offset: u64, data: &[u8]) {
        Ecam(self.segment.clone()).write(u64::from(slot) << 15 | offset, data);
    }

    fn bar(&self, slot: u8) -> u64 {
        u64::from(self.config(slot, 0x10) & !0xf).wrapping_sub(WINDOW)
    }

    fn write(&self, slot: u8, offset: u64, data: &[u8]) {
        BarWindow(self.segment.clone()).write(self.bar(slot).wrapping_add(offset), data);
    }

    fn read(&self, slot: u8, offset: u64) -> u32 {
        let mut data = [0; 4];
        BarWindow(self.segment.clone()).read(self.bar(slot).wrapping_add(offset), &mut data);
        u32::from_le_bytes(data)
    }

    /// A driver's initialisation (virtio 1.2, 3.1.1), as far as the device goes along.
    fn start(&mut self, slot: u8, features: u64, interrupts: bool) {
        self.set_config(slot, 4, &6u16.to_le_bytes());
        for status in [0, 1, 3] {
            self.write(slot, 0x14, &[status]);
        }
        for half in 0..2u32 {
            self.write(slot, 0, &half.to_le_bytes());
            self.write(slot, 8, &half.to_le_bytes());
            let offered = self.read(slot, 4);
            let wanted = (features | VERSION_1) >> (32 * half);
            self.write(slot, 0xc, &(offered & wanted as u32).to_le_bytes());
        }
        self.write(slot, 0x14, &[0xb]);
        if interrupts {
            self.set_up_interrupts(slot);
        }
        for queue in 0..MAX_QUEUES {
            self.write(slot, 0x16, &(queue as u16).to_le_bytes());
            self.write(slot, 0x1a, &(queue as u16 + 1).to_le_bytes());
            for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(Guest::ring(queue)) {
                self.write(slot, register, &(address as u32).to_le_bytes());
                self.write(slot, register + 4, &0u32.to_le_bytes());
            }
            self.write(slot, 0x1c, &[1, 0]);
        }
        self.write(slot, 0x14, &[0xf]);
    }

    fn set_up_interrupts(&self, slot: u8) {
        let mut at = u64::from(self.config(slot, 0x34) & 0xfc);
        for _ in 0..48 {
            let head = self.config(slot, at);
            if head & 0xff == 0x11 {
                self.set_config(slot, at + 2, &0x8000u16.to_le_bytes());
            }
            at = u64::from(head >> 8 & 0xfc);
        }
        for vector in 0..=MAX_QUEUES as u64 {
            self.write(slot, 0x4000 + 16 * vector, &0xfee0_0000u64.to_le_bytes());
            self.write(slot, 0x4008 + 16 * vector, &(0x30 + vector as u32).to_le_bytes());
            self.write(slot, 0x400c + 16 * vector, &0u32.to_le_bytes());
        }
        self.write(slot, 0x10, &[0, 0]);
    }

    /// As a guest does: through the binding if there is one, else by a register write.
    fn notify(&self, slot: u8, queue: u8) {
        let offset = 0x3000 + 4 * u64::from(queue % 8);
        if !self.wiring.notify(WINDOW.wrapping_add(self.bar(slot)).wrapping_add(offset)) {
            self.write(slot, offset, &[queue, 0]);
        }
    }

    /// Has the devices do what waits.
    fn run(&mut self) {
        for _ in 0..MAX_ROUNDS {
            if self.events.run_with_timeout(0).expect("an event loop") == 0 {
                break;
            }
        }
    }

    /// Lets `step` happen, and the devices react.
    pub fn step(&mut self, Step(step): Step) {
        let slot = |number: u8| number % 5 + 1;
        match step {
            Kind::Ecam { slot, offset, access } => {
                let offset = u64::from(slot % 8) << 15 | u64::from(offset % 0x1100);
                access.carry_out(&Ecam(self.segment.clone()), offset);
            }
            Kind::Address { slot, register } => {
                let address = 1 << 31 | u32::from(slot % 8) << 11 | u32::from(register);
                ConfigPorts(self.segment.clone()).write(0, &address.to_le_bytes());
            }
            Kind::Ports { port, access } => {
                access.carry_out(&ConfigPorts(self.segment.clone()), (port % 9).into());
            }
            Kind::Bar { slot: number, register, access } => {
                let offset = match register {
                    Register::Common(offset) => u64::from(offset) % 0x48,
                    Register::Page { page, offset } => u64::from(page % 8) << 12 | u64::from(offset),
                    Register::Any(offset) => offset.into(),
                };
                let base = self.bar(slot(number));
                access.carry_out(&BarWindow(self.segment.clone()), base.wrapping_add(offset));
            }
            Kind::Window { offset, access } => {
                access.carry_out(&BarWindow(self.segment.clone()), u64::from(offset) % 0x11_0000);
            }
            Kind::Start { slot: number, features, interrupts } => self.start(slot(number), features, interrupts),
            Kind::Status { slot: number, status } => self.write(slot(number), 0x14, &[status]),
            Kind::Mask { slot: number, vector, masked } => {
                self.write(slot(number), 0x400c + 16 * u64::from(vector % 8), &u32::from(masked).to_le_bytes());
            }
            Kind::Notify { slot: number, queue } => self.notify(slot(number), queue),
            Kind::MoveBar { slot: number, place } => {
                let base = (WINDOW as u32).wrapping_add(u32::from(place) << 14);
                self.set_config(slot(number), 0x10, &base.to_le_bytes());
            }
            Kind::Pause(number) => {
                let _fault = self.function(slot(number)).lock().expect("no panic so far").pause();
            }
            Kind::Resume(number) => self.function(slot(number)).lock().expect("no panic so far").resume(),
            Kind::Offer { queue, chain } => self.guest.offer(usize::from(queue) % MAX_QUEUES, &chain),
            Kind::Available { queue, index } => self.guest.set_available(usize::from(queue) % MAX_QUEUES, index),
            Kind::Poke { at, bytes } => self.guest.poke(at.into(), &bytes),
            Kind::Reset => self.segment.reset(),
            Kind::Refuse(refuse) => self.wiring.set_refuses(refuse),
            Kind::Frame(bytes) => drop(self.network.send(&bytes)),
        }
        self.run();
    }

    /// Whatever was done: a machine that restarts has no doorbell bound, and its entropy device serves a driver.
    pub fn recovers(&mut self) {
        self.wiring.set_refuses(false);
        self.functions.iter().for_each(|function| function.lock().expect("no panic so far").resume());
        self.segment.reset();
        assert_eq!(self.wiring.bound(), 0, "doorbells stay bound after a reset");
        self.run();
        self.guest.restart(0);
        self.start(RNG, VERSION_1, true);
        assert_eq!(self.wiring.bound(), 1, "the doorbell of the entropy device");
        self.guest.offer(0, &Chain::request(Vec::new(), 0, [16], Framing::Direct));
        self.notify(RNG, 0);
        self.run();
        assert_eq!(self.guest.used(0), 1, "the entropy device answers");
    }
}

impl Access {
    fn carry_out(self, device: &impl SharedBusDevice, offset: u64) {
        let effect = match self {
            Access::Read(width) => return device.read(offset, &mut [0; 16][..usize::from(width % 17)]),
            Access::Write1(value) => device.write(offset, &[value]),
            Access::Write2(value) => device.write(offset, &value.to_le_bytes()),
            Access::Write4(value) => device.write(offset, &value.to_le_bytes()),
            Access::Write8(value) => device.write(offset, &value.to_le_bytes()),
            Access::Write(bytes) => device.write(offset, &bytes),
        };
        assert_eq!(effect, sterna_devices::Effect::None);
    }
}
