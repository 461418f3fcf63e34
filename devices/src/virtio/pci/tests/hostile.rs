//! Every register, every width, values without sense: nothing panics, and a driver that starts over is served.

use super::machine::{Machine, VERSION_1, WINDOW};
use crate::SharedBusDevice;
use crate::pci::{BarWindow, ConfigPorts, Ecam};
use crate::virtio::rng::Rng;

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

/// A guest that comes to its senses, restarts the driver and gets its random bytes.
fn recovers(machine: &mut Machine) {
    machine.run();
    machine.set_config(4, &[0, 0]);
    machine.move_bar(WINDOW);
    machine.enumerate();
    machine.init(VERSION_1);
    machine.driver.add(0, &[], &[16]);
    machine.notify(0);
    machine.run();
    assert_eq!(machine.driver.used(0).unwrap().length, 16);
    assert_eq!(machine.raised(), [1]);
    machine.set_status(0);
    machine.segment.reset();
    machine.enumerate();
}

#[test]
fn configuration_space_takes_anything() {
    let mut machine = Machine::new(Box::new(Rng));
    let ecam = Ecam(machine.segment.clone());
    let mut noise = Noise(0x5eed_0001);
    for width in WIDTHS {
        for slot in 0..3 {
            for offset in 0..0x1000 {
                noise.access(&ecam, slot << 15 | offset, width);
            }
        }
        recovers(&mut machine);
    }
}

#[test]
fn configuration_ports_take_anything() {
    let mut machine = Machine::new(Box::new(Rng));
    let ports = ConfigPorts(machine.segment.clone());
    let mut noise = Noise(0x5eed_0002);
    for round in 0..20_000_u32 {
        let address = 0x8000_0000 | (round % 3) << 11 | noise.next() as u32 & 0xff;
        ports.write(0, &address.to_le_bytes());
        let (port, width) = (noise.next() % 9, WIDTHS[noise.next() as usize % 8]);
        noise.access(&ports, port, width);
    }
    recovers(&mut machine);
}

#[test]
fn the_bar_takes_anything() {
    let mut machine = Machine::new(Box::new(Rng));
    let window = BarWindow(machine.segment.clone());
    let mut noise = Noise(0x5eed_0003);
    for width in WIDTHS {
        machine.init(VERSION_1);
        for offset in 0..0x8000 {
            noise.access(&window, offset, width);
        }
        recovers(&mut machine);
    }
}

#[test]
fn the_common_structure_and_the_rings_take_anything() {
    let mut machine = Machine::new(Box::new(Rng));
    let window = BarWindow(machine.segment.clone());
    let mut noise = Noise(0x5eed_0004);
    for round in 0..20_000 {
        if round % 16 == 0 {
            machine.init(VERSION_1);
        }
        let (offset, width) = (noise.next() % 0x44, WIDTHS[noise.next() as usize % 8]);
        noise.access(&window, offset, width);
        machine.driver.set_available_index(0, noise.next() as u16 % 80);
        machine.notify(0);
        machine.run();
    }
    recovers(&mut machine);
}
