//! Descriptor chains, checked whole before a device sees one (virtio 1.2, section 2.7.4).
//!
//! A [`Chain`] is owned and bounded: every segment lies in guest RAM, device-readable segments come before
//! device-writable ones, and the sums of lengths do not overflow. What breaks these rules is a [`Fault`].

use super::GuestRam;
use smallvec::SmallVec;
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

/// Longest chain accepted, in segments. Linux may put more segments in an indirect table than the ring has entries.
pub const MAX_SEGMENTS: usize = 1024;

/// Why a device cannot go on with what the driver gave it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The chain refers back to itself, to descriptors that do not exist, is too long, or adds up to 4 GiB or more.
    #[error("queue {queue}: descriptor chain at {head} loops, is too long, or names a descriptor that does not exist")]
    Broken {
        /// Queue index.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// A segment lies outside guest RAM.
    #[error("queue {queue}: descriptor chain at {head} names {length} bytes at {address:#x}, outside guest RAM")]
    OutsideRam {
        /// Queue index.
        queue: usize,
        /// First descriptor.
        head: u16,
        /// Guest physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// A device-readable segment follows a device-writable one.
    #[error("queue {queue}: descriptor chain at {head} has a readable segment after a writable one")]
    Order {
        /// Queue index.
        queue: usize,
        /// First descriptor.
        head: u16,
    },
    /// The ring itself is unusable.
    #[error("queue {queue}: the ring is unusable")]
    Ring {
        /// Queue index.
        queue: usize,
        /// What virtio-queue found.
        #[source]
        source: virtio_queue::Error,
    },
    /// A request of the right shape with contents the device cannot follow.
    #[error("queue {queue}: {what}")]
    Malformed {
        /// Queue index.
        queue: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The host side failed in a way no request can be blamed for.
    #[error("{attempt}")]
    Backend {
        /// What was attempted.
        attempt: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// One piece of a chain, inside guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: GuestAddress,
    /// Bytes, may be zero.
    pub length: u32,
}

/// A checked descriptor chain. Give it back with [`super::Io::complete`].
#[derive(Debug)]
pub struct Chain {
    /// Index of the first descriptor, which names the chain in the used ring.
    pub head: u16,
    /// Segments the device may read, in order.
    pub readable: SmallVec<[Segment; 4]>,
    /// Segments the device may write, in order.
    pub writable: SmallVec<[Segment; 4]>,
}

impl Chain {
    /// Walks and checks a chain of `queue`.
    pub(super) fn collect(
        ram: &GuestRam,
        queue: usize,
        descriptors: DescriptorChain<&GuestRam>,
    ) -> Result<Self, Fault> {
        let head = descriptors.head_index();
        let mut chain = Self { head, readable: SmallVec::new(), writable: SmallVec::new() };
        let mut ended = false;
        for descriptor in descriptors {
            let segment = Segment { address: descriptor.addr(), length: descriptor.len() };
            let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
            if segment.length != 0 && !ram.check_range(segment.address, segment.length as usize, access) {
                return Err(Fault::OutsideRam { queue, head, address: segment.address.0, length: segment.length });
            }
            if descriptor.is_write_only() {
                chain.writable.push(segment);
            } else if chain.writable.is_empty() {
                chain.readable.push(segment);
            } else {
                return Err(Fault::Order { queue, head });
            }
            if chain.readable.len() + chain.writable.len() > MAX_SEGMENTS {
                return Err(Fault::Broken { queue, head });
            }
            ended = !descriptor.has_next();
        }
        if ended { Ok(chain) } else { Err(Fault::Broken { queue, head }) }
    }

    /// Bytes the device may read.
    pub fn readable_bytes(&self) -> u64 {
        self.readable.iter().map(|segment| u64::from(segment.length)).sum()
    }

    /// Bytes the device may write.
    pub fn writable_bytes(&self) -> u64 {
        self.writable.iter().map(|segment| u64::from(segment.length)).sum()
    }

    /// Copies from the readable part, `offset` bytes in, and returns how many bytes there were, at most `buffer.len()`.
    pub fn read_at(&self, ram: &GuestRam, offset: u64, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for segment in slice(&self.readable, offset, buffer.len() as u64) {
            let Some(target) = buffer.get_mut(done..done + segment.length as usize) else { break };
            if ram.read_slice(target, segment.address).is_err() {
                break;
            }
            done += segment.length as usize;
        }
        done
    }

    /// Copies into the writable part, `offset` bytes in, and returns how many bytes fitted.
    pub fn write_at(&self, ram: &GuestRam, offset: u64, bytes: &[u8]) -> usize {
        let mut done = 0;
        for segment in slice(&self.writable, offset, bytes.len() as u64) {
            let Some(source) = bytes.get(done..done + segment.length as usize) else { break };
            if ram.write_slice(source, segment.address).is_err() {
                break;
            }
            done += segment.length as usize;
        }
        done
    }
}

/// The part of `segments` that starts `offset` bytes in and is at most `length` bytes long.
pub fn slice(segments: &[Segment], offset: u64, length: u64) -> impl Iterator<Item = Segment> + '_ {
    let mut skip = offset;
    let mut left = length;
    segments.iter().filter_map(move |segment| {
        let skipped = skip.min(u64::from(segment.length));
        skip -= skipped;
        let taken = (u64::from(segment.length) - skipped).min(left);
        left -= taken;
        // Both are at most the segment's own 32-bit length; the address stays inside a range that was checked.
        let length = u32::try_from(taken).ok().filter(|length| *length != 0)?;
        Some(Segment { address: GuestAddress(segment.address.0 + skipped), length })
    })
}

#[cfg(test)]
mod tests {
    use super::super::testing::Driver;
    use super::*;

    #[test]
    fn segments_are_sliced_by_bytes() {
        let segment = |address, length| Segment { address: GuestAddress(address), length };
        let segments = [segment(0x1000, 10), segment(0x2000, 0), segment(0x3000, 5)];
        let cut = |offset, length| slice(&segments, offset, length).collect::<Vec<_>>();
        assert_eq!(cut(0, 100), [segment(0x1000, 10), segment(0x3000, 5)]);
        assert_eq!(cut(4, 8), [segment(0x1004, 6), segment(0x3000, 2)]);
        assert_eq!(cut(10, 1), [segment(0x3000, 1)]);
        assert_eq!(cut(15, 1), []);
    }

    #[test]
    fn a_looping_chain_is_a_fault() {
        let mut driver = Driver::new(&[8]);
        driver.descriptor(0, 0, 0x1000, 4, Driver::NEXT, 1);
        driver.descriptor(0, 1, 0x1000, 4, Driver::NEXT, 0);
        driver.offer(0, 0);
        assert!(matches!(driver.io().pop(0), Err(Fault::Broken { queue: 0, head: 0 })));
    }

    #[test]
    fn a_head_or_next_that_does_not_exist_is_a_fault() {
        let mut driver = Driver::new(&[8]);
        driver.offer(0, 8);
        assert!(matches!(driver.io().pop(0), Err(Fault::Broken { queue: 0, head: 8 })));
        driver.descriptor(0, 0, 0x1000, 4, Driver::NEXT, 9);
        driver.offer(0, 0);
        assert!(matches!(driver.io().pop(0), Err(Fault::Broken { queue: 0, head: 0 })));
    }

    #[test]
    fn an_address_outside_ram_is_a_fault() {
        for (address, length) in [(0xffff_ffff_0000_0000, 16), (u64::MAX - 4, 8), (0, u32::MAX)] {
            let mut driver = Driver::new(&[8]);
            driver.descriptor(0, 0, address, length, 0, 0);
            driver.offer(0, 0);
            assert!(matches!(driver.io().pop(0), Err(Fault::OutsideRam { .. })), "{address:#x}+{length:#x}");
        }
    }

    #[test]
    fn readable_after_writable_is_a_fault() {
        let mut driver = Driver::new(&[8]);
        driver.descriptor(0, 0, 0x1000, 4, Driver::NEXT | Driver::WRITE, 1);
        driver.descriptor(0, 1, 0x1000, 4, 0, 0);
        driver.offer(0, 0);
        assert!(matches!(driver.io().pop(0), Err(Fault::Order { .. })));
    }

    #[test]
    fn an_available_index_that_jumps_is_a_fault() {
        let mut driver = Driver::new(&[8]);
        driver.set_available_index(0, 100);
        assert!(matches!(driver.io().pop(0), Err(Fault::Ring { queue: 0, .. })));
    }

    /// A chain of one indirect descriptor for `entries` descriptors of 16 bytes each, where each has these flags.
    fn indirect(entries: &[(u16, u16)], table_bytes: u32) -> Driver {
        const TABLE: u64 = 0x20_0000;
        let mut driver = Driver::new(&[8]);
        for (index, (flags, next)) in entries.iter().enumerate() {
            driver.write_descriptor(TABLE + 16 * index as u64, 0x30_0000, 16, *flags, *next);
        }
        driver.descriptor(0, 3, TABLE, table_bytes, Driver::INDIRECT, 0);
        driver.offer(0, 3);
        driver
    }

    #[test]
    fn an_indirect_table_may_be_longer_than_the_ring() {
        let entries: Vec<_> = (0..20).map(|index| (if index < 19 { Driver::NEXT } else { 0 }, index + 1)).collect();
        let chain = indirect(&entries, 320).io().pop(0).unwrap().unwrap();
        assert_eq!((chain.head, chain.readable.len(), chain.readable_bytes()), (3, 20, 320));
    }

    #[test]
    fn an_indirect_table_that_breaks_the_rules_is_a_fault() {
        let last = (0, 0);
        for (what, entries, bytes) in [
            ("nested", [(Driver::INDIRECT, 0), last], 16),
            ("loops", [(Driver::NEXT, 1), (Driver::NEXT, 0)], 32),
            ("leaves the table", [(Driver::NEXT, 2), last], 32),
            ("no whole number of descriptors", [last, last], 17),
            ("empty", [last, last], 0),
            ("too long to count", [last, last], 0x10_0000),
        ] {
            let popped = indirect(&entries, bytes).io().pop(0);
            assert!(matches!(popped, Err(Fault::Broken { queue: 0, head: 3 })), "{what}: {popped:?}");
        }
    }

    #[test]
    fn a_chain_of_too_many_segments_is_a_fault() {
        let entries: Vec<_> = (0..=MAX_SEGMENTS as u16).map(|index| (Driver::NEXT, index + 1)).collect();
        let popped = indirect(&entries, 16 * entries.len() as u32).io().pop(0);
        assert!(matches!(popped, Err(Fault::Broken { .. })), "{popped:?}");
    }

    #[test]
    fn bytes_go_both_ways_across_segments() {
        let mut driver = Driver::new(&[8]);
        let head = driver.add(0, &[b"hello ", b"tern"], &[3, 5]);
        let ram = driver.ram.clone();
        let chain = driver.io().pop(0).unwrap().unwrap();
        let mut text = [0; 16];
        assert_eq!(chain.read_at(&ram, 4, &mut text), 6);
        assert_eq!(&text[..6], b"o tern");
        assert_eq!(chain.write_at(&ram, 1, b"abcdefghij"), 7);
        driver.io().complete(0, chain.head, 8).unwrap();
        driver.io().signal(0).unwrap();
        let used = driver.used(0).unwrap();
        assert_eq!((used.head, used.length, used.bytes.as_slice()), (head, 8, b"\0abcdefg".as_slice()));
        assert_eq!(driver.interrupts, [1]);
    }
}
