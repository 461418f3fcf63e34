//! Every register of every model, every width, values without sense: nothing panics, and a driver that starts over is served.

use super::machine::{Machine, VERSION_1, WINDOW};
use crate::SharedBusDevice;
use crate::pci::{BarWindow, ConfigPorts, Ecam};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, Image};
use crate::virtio::net::{Net, Offload, Port};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::any::Any;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

const WIDTHS: [usize; 8] = [1, 2, 4, 8, 3, 5, 7, 16];

/// Numbers without sense, the same ones each time (xorshift64).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Half of all values are the small or extreme ones that registers act on.
    fn bytes(&mut self) -> [u8; 16] {
        let value = match self.next() % 8 {
            0 => 0,
            1 => u128::MAX,
            2 => 1,
            3 => u128::from(self.next() % 16),
            _ => u128::from(self.next()) << 64 | u128::from(self.next()),
        };
        value.to_le_bytes()
    }

    fn access(&mut self, device: &impl SharedBusDevice, offset: u64, width: usize) {
        let mut data = self.bytes();
        device.write(offset, &data[..width]);
        device.read(offset, &mut data[..width]);
    }
}

/// A model on its bus.
struct Subject {
    name: &'static str,
    machine: Machine,
    request: Request,
    /// What the model has on the host.
    _host: Box<dyn Any>,
}

/// What its driver asks of a model, to see whether it is served.
struct Request {
    queue: usize,
    reads: Vec<u8>,
    writes: &'static [u32],
    written: u32,
}

/// A tap without a host.
struct Cable(OwnedFd);

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Port for Cable {
    fn name(&self) -> &str {
        "cable"
    }
    fn mtu(&self) -> u16 {
        1500
    }
    fn set_offload(&self, _: Offload) -> io::Result<()> {
        Ok(())
    }
}

/// Every model there is.
fn subjects() -> Vec<Subject> {
    let subject = |name, device: Box<dyn VirtioDevice>, request, host| {
        let machine = Machine::new(device);
        Subject { name, machine, request, _host: host }
    };
    let request = |queue, reads: &[u8], writes, written| Request { queue, reads: reads.to_vec(), writes, written };
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let blk = Blk::new(Image::open(disk.path(), false, false).unwrap(), "tern-1").unwrap();
    let (end, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    let net = Net::new(Cable(end), [2, 0, 0, 0, 0, 1]);
    let directory = tempfile::tempdir().unwrap();
    let vsock = Vsock::new(3, &directory.path().join("vsock")).unwrap();
    let (balloon, handle) = Balloon::new().unwrap();
    vec![
        subject("rng", Box::new(Rng), request(0, &[], &[16], 16), Box::new(())),
        // A read of the first sector.
        subject("blk", Box::new(blk), request(0, &[0; 16], &[512, 1], 513), Box::new(disk)),
        // A header and a frame.
        subject("net", Box::new(net), request(1, &[0; 12 + 60], &[], 0), Box::new(far)),
        // A packet that is for nobody.
        subject("vsock", Box::new(vsock), request(1, &[0; 44], &[], 0), Box::new(directory)),
        // One page frame.
        subject("balloon", Box::new(balloon), request(0, &2048_u32.to_le_bytes(), &[], 0), Box::new(handle)),
    ]
}

/// Does `what` to every model, which must then serve a guest that comes to its senses and restarts the driver.
fn each_survives(mut what: impl FnMut(&mut Machine)) {
    for Subject { name, mut machine, request, _host } in subjects() {
        eprintln!("model {name}");
        what(&mut machine);
        recovers(&mut machine, &request);
    }
}

fn recovers(machine: &mut Machine, request: &Request) {
    machine.run();
    machine.set_config(4, &[0, 0]);
    machine.move_bar(WINDOW);
    machine.enumerate();
    machine.init(VERSION_1);
    let readable: &[&[u8]] = if request.reads.is_empty() { &[] } else { &[&request.reads] };
    machine.driver.add(request.queue, readable, request.writes);
    machine.notify(request.queue);
    let deadline = Instant::now() + Duration::from_secs(10);
    let used = loop {
        machine.run();
        match machine.driver.used(request.queue) {
            Some(used) => break used,
            None => assert!(Instant::now() < deadline, "a request is not answered; faults: {:?}", machine.faults),
        }
    };
    assert_eq!(used.length, request.written);
    assert!(machine.raised().contains(&(request.queue + 1)));
    machine.set_status(0);
    machine.segment.reset();
    machine.enumerate();
}

#[test]
fn configuration_space_takes_anything() {
    for width in WIDTHS {
        let mut noise = Noise(0x5eed_0001 + width as u64);
        each_survives(|machine| {
            let ecam = Ecam(machine.segment.clone());
            for offset in (0..3).flat_map(|slot| (0..0x1000).map(move |register| slot << 15 | register)) {
                noise.access(&ecam, offset, width);
            }
        });
    }
}

#[test]
fn configuration_ports_take_anything() {
    let mut noise = Noise(0x5eed_0002);
    each_survives(|machine| {
        let ports = ConfigPorts(machine.segment.clone());
        for round in 0..20_000_u32 {
            let address = 0x8000_0000 | (round % 3) << 11 | noise.next() as u32 & 0xff;
            ports.write(0, &address.to_le_bytes());
            let (port, width) = (noise.next() % 9, WIDTHS[noise.next() as usize % 8]);
            noise.access(&ports, port, width);
        }
    });
}

#[test]
fn the_bar_takes_anything() {
    for width in WIDTHS {
        let mut noise = Noise(0x5eed_0003 + width as u64);
        each_survives(|machine| {
            let window = BarWindow(machine.segment.clone());
            machine.init(VERSION_1);
            for offset in 0..0x8000 {
                noise.access(&window, offset, width);
            }
        });
    }
}

#[test]
fn the_common_structure_and_the_rings_take_anything() {
    let mut noise = Noise(0x5eed_0004);
    each_survives(|machine| {
        let window = BarWindow(machine.segment.clone());
        for round in 0..20_000 {
            if round % 16 == 0 {
                machine.init(VERSION_1);
            }
            let (offset, width) = (noise.next() % 0x44, WIDTHS[noise.next() as usize % 8]);
            noise.access(&window, offset, width);
            let queue = noise.next() as usize % machine.driver.doorbells.len();
            machine.driver.set_available_index(queue, noise.next() as u16 % 80);
            machine.notify(queue);
            machine.run();
        }
    });
}

#[test]
fn a_models_own_registers_take_anything_while_it_works() {
    let mut noise = Noise(0x5eed_0005);
    each_survives(|machine| {
        let window = BarWindow(machine.segment.clone());
        machine.init(VERSION_1);
        for _ in 0..20_000 {
            let (offset, width) = (machine.found.device + noise.next() % 0x100, WIDTHS[noise.next() as usize % 8]);
            noise.access(&window, offset, width);
        }
        machine.run();
        assert_eq!(machine.status(), 0xf, "still at work");
    });
}
