//! virtio-net: answers ARP and ICMP echo for one address, so that the guest can be pinged.

use crate::boot::Page;
use crate::pci::Function;
use crate::port::{read, write};
use crate::virtio::{Device, QUEUE_SIZE, Queue, WRITE};
use crate::{fail, line};

const MAC: u64 = 1 << 5;
/// Header ahead of every frame with VERSION_1 (virtio 1.2, 5.1.6).
const HEADER: usize = 12;
const BUFFER: usize = 2048;
const RX_BUFFERS: u16 = 32;

static mut RX: Page<[[u8; BUFFER]; RX_BUFFERS as usize]> = Page([[0; BUFFER]; RX_BUFFERS as usize]);
static mut TX: Page<[[u8; BUFFER]; QUEUE_SIZE as usize]> = Page([[0; BUFFER]; QUEUE_SIZE as usize]);

/// The interface and its counters.
pub struct Net {
    rx: Queue,
    tx: Queue,
    mac: [u8; 6],
    address: [u8; 4],
    sent: u16,
    frames: u64,
    arp: u64,
    echo: u64,
}

fn rx_buffer(index: u16) -> usize {
    &raw const RX as usize + usize::from(index) * BUFFER
}

impl Net {
    /// Starts the first interface.
    pub fn start(address: [u8; 4]) -> Self {
        let Some(function) = Function::find_virtio([0x1041, 0x1000], 0) else { fail!("net: no interface") };
        let device = Device::new(function);
        let features = device.negotiate(MAC);
        let mut mac = [2, 0, 0, 0, 0, 1];
        if features & MAC != 0 {
            mac = core::array::from_fn(|index| read(device.config + index));
        }
        let (mut rx, tx) = (device.queue(0, false), device.queue(1, false));
        device.ready();
        for index in 0..RX_BUFFERS {
            rx.describe(index, rx_buffer(index) as u64, BUFFER as u32, WRITE, 0);
            rx.offer(index);
        }
        rx.notify();
        let [a, b, c, d] = address;
        line!("net ready ip={a}.{b}.{c}.{d} mac={mac:02x?}");
        Self { rx, tx, mac, address, sent: 0, frames: 0, arp: 0, echo: 0 }
    }

    /// Takes what has arrived and answers it.
    pub fn poll(&mut self) {
        while let Some((index, bytes)) = self.rx.take() {
            self.frames += 1;
            let bytes = (bytes as usize).min(BUFFER);
            let index = index % RX_BUFFERS;
            let mut frame: [u8; BUFFER] = read(rx_buffer(index));
            let frame = &mut frame[HEADER..bytes.max(HEADER)];
            if self.answer(frame) {
                self.send(frame);
            }
            self.rx.offer(index);
            self.rx.notify();
        }
    }

    /// Prints the counters.
    pub fn status(&self) {
        line!("net ok frames={} arp={} echo={}", self.frames, self.arp, self.echo);
    }

    /// Turns a request into its reply in place; false if it is none of ours.
    fn answer(&mut self, frame: &mut [u8]) -> bool {
        match frame.get(12..14) {
            Some([0x08, 0x06]) if frame.len() >= 42 && frame[20..22] == [0, 1] && frame[38..42] == self.address => {
                let mut sender = [0; 10];
                sender.copy_from_slice(&frame[22..32]);
                frame[20..22].copy_from_slice(&[0, 2]);
                frame[22..28].copy_from_slice(&self.mac);
                frame[28..32].copy_from_slice(&self.address);
                frame[32..42].copy_from_slice(&sender);
                self.arp += 1;
            }
            Some([0x08, 0x00]) if frame.len() >= 42 && frame[14] == 0x45 && frame[23] == 1 && frame[34] == 8 => {
                if frame[30..34] != self.address {
                    return false;
                }
                frame.copy_within(26..30, 30);
                frame[26..30].copy_from_slice(&self.address);
                frame[34] = 0;
                // The type went from 8 to 0: the checksum grows by 0x0800 (RFC 1624).
                let (sum, carry) = u16::from_be_bytes([frame[36], frame[37]]).overflowing_add(0x0800);
                frame[36..38].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
                self.echo += 1;
                if self.echo == 1 {
                    line!("net ok first echo answered");
                }
            }
            _ => return false,
        }
        frame.copy_within(6..12, 0);
        frame[6..12].copy_from_slice(&self.mac);
        true
    }

    fn send(&mut self, frame: &[u8]) {
        while self.tx.take().is_some() {}
        let slot = self.sent % QUEUE_SIZE;
        let buffer = &raw const TX as usize + usize::from(slot) * BUFFER;
        (0..HEADER).for_each(|offset| write::<u8>(buffer + offset, 0));
        frame.iter().enumerate().for_each(|(offset, &byte)| write(buffer + HEADER + offset, byte));
        self.tx.describe(slot, buffer as u64, (HEADER + frame.len()) as u32, 0, 0);
        self.tx.offer(slot);
        self.tx.notify();
        self.sent = self.sent.wrapping_add(1);
    }
}
