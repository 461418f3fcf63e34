//! Entropy device (virtio 1.2, 5.4): fills the driver's buffers from the host's getrandom(2).
//!
//! The worked example of a model: one queue, no configuration, no state.

use super::{BUDGET, Backend, Fault, Io, VirtioDevice};
use crate::state::{Saved, StateError};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

/// Bytes given for one buffer, whatever its size; a driver that wants more asks again.
const BYTES_A_BUFFER: usize = 4096;

/// The device.
#[derive(Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn pci_class(&self) -> u32 {
        0xff_00_00 // in no class
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, _io: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    fn queue_notified(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault> {
        let mut random = [0; BYTES_A_BUFFER];
        for served in 0..BUDGET {
            let Some(chain) = io.pop(queue)? else {
                return if served > 0 { io.signal(queue) } else { Ok(()) };
            };
            let wanted = usize::try_from(chain.writable_bytes()).unwrap_or(usize::MAX).min(BYTES_A_BUFFER);
            // Up to 256 bytes come whole, more may come short; any number is good for the driver.
            let got = getrandom(&mut random[..wanted], GetRandomFlags::empty())
                .map_err(|error| Fault::Backend { attempt: "reading random bytes", source: error.into() })?;
            let written = chain.write_at(io.ram, 0, random.get(..got).unwrap_or_default());
            io.complete(queue, chain.head, written as u32)?;
        }
        io.again(queue);
        io.signal(queue)
    }

    fn backend(&self) -> Option<Backend> {
        None
    }

    fn backend_ready(&mut self, _io: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    fn quiesce(&mut self, _io: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    fn moved(&mut self, _io: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn save(&self) -> Saved {
        Saved::nothing()
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        saved.expect_nothing()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Driver;
    use super::*;

    const QUEUE: usize = 0;

    #[test]
    fn buffers_are_filled() {
        let mut driver = Driver::new(&[64]);
        driver.add(QUEUE, &[], &[20, 44]);
        driver.add(QUEUE, &[b"ignored"], &[64]);
        Rng.queue_notified(QUEUE, &mut driver.io()).unwrap();
        let (first, second) = (driver.used(QUEUE).unwrap(), driver.used(QUEUE).unwrap());
        assert_eq!((first.length, second.length), (64, 64));
        assert_ne!(first.bytes, second.bytes, "64 bytes of entropy do not repeat");
        assert_ne!(first.bytes[20..], [0; 44], "the second segment is filled too");
        assert_eq!(driver.interrupts, [1]);
    }

    #[test]
    fn a_buffer_that_cannot_be_written_comes_back_empty() {
        let mut driver = Driver::new(&[64]);
        driver.add(QUEUE, &[b"read only"], &[]);
        Rng.queue_notified(QUEUE, &mut driver.io()).unwrap();
        assert_eq!(driver.used(QUEUE).unwrap().length, 0);
    }

    #[test]
    fn one_request_takes_a_bounded_part_of_a_huge_buffer() {
        let mut driver = Driver::new(&[64]);
        driver.add(QUEUE, &[], &[8 << 20]);
        Rng.queue_notified(QUEUE, &mut driver.io()).unwrap();
        let length = driver.used(QUEUE).unwrap().length as usize;
        assert!((1..=BYTES_A_BUFFER).contains(&length), "{length}");
    }
}
