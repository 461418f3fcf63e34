//! The disk does what a well-behaved driver asks, by io_uring with and without O_DIRECT and by the thread.

use super::testing::{DATA, DISK_BYTES, Guest, MODES, Mode, open, pattern, scratch};
use super::*;
use crate::virtio::testing::Driver;
use std::fs::{self, File};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// An image that asks for whole blocks of 4 KiB.
fn coarse(image: Image) -> Image {
    image.with_alignment(Alignment { memory: 4096, offset: 4096 })
}

#[test]
fn what_is_written_is_read_back() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        let bytes: Vec<u8> = (0..16384u32).map(|byte| ((byte * 7) >> 3) as u8).collect();
        assert_eq!(guest.write(9, DATA, &bytes), 0, "{mode:?}");
        assert_eq!(guest.run(VIRTIO_BLK_T_FLUSH, 0, &[], &[]), 0, "{mode:?}");
        let file = fs::read(&path).unwrap();
        assert!(file[9 * 512..][..16384] == bytes, "{mode:?}");
        assert_eq!(file[8 * 512..9 * 512], pattern(8), "{mode:?}");
        assert_eq!(file[41 * 512..42 * 512], pattern(41), "{mode:?}");
        let (status, back) = guest.read(9, DATA + 0x10_0000, 16384);
        assert!(status == 0 && back == bytes, "{mode:?}");
    }
}

#[test]
fn a_request_may_have_many_segments() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        // Pages in reverse order, so that one long transfer would not do.
        let parts: Vec<_> = (0..32u64).map(|page| (DATA + (31 - page) * 4096, 4096)).collect();
        let request = guest.offer(VIRTIO_BLK_T_IN, 0, &[], &parts);
        guest.notify();
        assert_eq!(guest.wait(&[request]), [(0, 32 * 4096 + 1)], "{mode:?}");
        let file = fs::read(&path).unwrap();
        for (index, (address, length)) in parts.iter().enumerate() {
            assert!(guest.memory(*address, *length) == file[index * 4096..][..4096], "{mode:?}: page {index}");
        }
        assert_eq!(guest.run(VIRTIO_BLK_T_OUT, 1024, &parts, &[]), 0, "{mode:?}");
        let after = fs::read(&path).unwrap();
        assert!(after[1024 * 512..][..32 * 4096] == file[..32 * 4096], "{mode:?}");
        assert_eq!(guest.driver.interrupts, [2], "{mode:?}");
    }
}

#[test]
fn buffers_that_o_direct_refuses_are_bounced() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        // Odd addresses and lengths; more than two chunks of the bounce buffer.
        let parts = [(DATA + 1, 511), (DATA + 0x1003, 1), (DATA + 0x2001, 600 * 1024), (DATA + 0x10_0007, 512)];
        let total: u32 = parts.iter().map(|part| part.1).sum();
        let request = guest.offer(VIRTIO_BLK_T_IN, 3, &[], &parts);
        guest.notify();
        assert_eq!(guest.wait(&[request]), [(0, total + 1)], "{mode:?}");
        let read: Vec<u8> = parts.iter().flat_map(|part| guest.memory(part.0, part.1)).collect();
        let file = fs::read(&path).unwrap();
        assert!(read == file[3 * 512..][..total as usize], "{mode:?}");
        assert_eq!(guest.run(VIRTIO_BLK_T_OUT, 4000, &parts, &[]), 0, "{mode:?}");
        let after = fs::read(&path).unwrap();
        assert!(after[4000 * 512..][..total as usize] == read, "{mode:?}");
        assert!(after[..4000 * 512] == file[..4000 * 512], "{mode:?}");
        let end = 4000 * 512 + total as usize;
        assert!(after[end..] == file[end..], "{mode:?}");
    }
}

#[test]
fn parts_of_o_direct_blocks_are_written_without_harm_to_the_rest() {
    for mode in [Mode::Direct, Mode::Thread] {
        let path = scratch();
        let mut guest = Guest::new(coarse(open(&path, mode)), mode);
        let before = fs::read(&path).unwrap();
        // Sectors 5..=26 one by one, all in flight at once: blocks of eight are shared.
        let mut requests = Vec::new();
        for sector in 5..27u64 {
            let address = DATA + sector * 0x1000;
            guest.driver.ram.write_slice(&[sector as u8; 512], GuestAddress(address)).unwrap();
            requests.push(guest.offer(VIRTIO_BLK_T_OUT, sector, &[(address, 512)], &[]));
        }
        guest.notify();
        assert!(guest.wait(&requests).iter().all(|answer| *answer == (0, 1)), "{mode:?}");
        let after = fs::read(&path).unwrap();
        assert!((5..27).all(|sector| after[sector * 512..][..512] == [sector as u8; 512]), "{mode:?}");
        assert!(after[..5 * 512] == before[..5 * 512] && after[27 * 512..] == before[27 * 512..], "{mode:?}");
        let (status, read) = guest.read(6, DATA, 1024);
        assert!(status == 0 && read == after[6 * 512..8 * 512], "{mode:?}");
    }
}

#[test]
fn a_full_queue_is_answered_once_each() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        // Three descriptors each: 85 requests fill the queue.
        for round in 0..4u64 {
            let sectors = (0..85).map(|index| round * 85 + index);
            let place = |sector: u64| DATA + (sector % 85) * 512;
            let requests: Vec<_> = sectors
                .clone()
                .map(|sector| guest.offer(VIRTIO_BLK_T_IN, sector, &[], &[(place(sector), 512)]))
                .collect();
            guest.notify();
            assert!(guest.wait(&requests).iter().all(|answer| *answer == (0, 513)), "{mode:?}");
            for sector in sectors {
                assert_eq!(guest.memory(place(sector), 512), pattern(sector), "{mode:?}");
            }
        }
    }
}

#[test]
fn an_indirect_chain_is_a_request() {
    let path = scratch();
    let mut guest = Guest::new(open(&path, Mode::Direct), Mode::Direct);
    let table = 0x4_0000;
    guest.driver.ram.write_slice(&[0; 16], GuestAddress(0x5_0000)).unwrap();
    guest.driver.write_descriptor(table, 0x5_0000, 16, Driver::NEXT, 1);
    for index in 1..=300u16 {
        let address = DATA + u64::from(index) * 512;
        guest.driver.write_descriptor(
            table + 16 * u64::from(index),
            address,
            512,
            Driver::NEXT | Driver::WRITE,
            index + 1,
        );
    }
    guest.driver.ram.write_obj(0xffu8, GuestAddress(0x5_0010)).unwrap();
    guest.driver.write_descriptor(table + 16 * 301, 0x5_0010, 1, Driver::WRITE, 0);
    guest.driver.descriptor(0, 0, table, 302 * 16, Driver::INDIRECT, 0);
    guest.driver.offer(0, 0);
    guest.notify();
    guest.blk.quiesce(&mut guest.driver.io()).unwrap();
    assert_eq!(guest.driver.used(0).unwrap().length, 300 * 512 + 1);
    assert_eq!(guest.driver.ram.read_obj::<u8>(GuestAddress(0x5_0010)).unwrap(), 0);
    assert_eq!(guest.memory(DATA + 300 * 512, 512), pattern(299));
}

/// Bytes of the file that are not holes.
fn data_bytes(path: &std::path::Path) -> u64 {
    let file = File::open(path).unwrap();
    let (mut at, mut bytes) = (0, 0);
    while let Ok(start) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(start)).unwrap();
        bytes += at - start;
    }
    bytes
}

#[test]
fn a_discard_gives_the_space_back() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        assert_eq!(data_bytes(&path), DISK_BYTES);
        assert_eq!(guest.range(VIRTIO_BLK_T_DISCARD, 2048, 2048, 0), 0, "{mode:?}");
        assert_eq!(data_bytes(&path), DISK_BYTES - (1 << 20), "{mode:?}");
        assert_eq!(fs::read(&path).unwrap()[2047 * 512..2048 * 512], pattern(2047), "{mode:?}");
    }
}

#[test]
fn zeroes_are_written_with_and_without_unmap() {
    for mode in MODES {
        for (flags, given_back) in [(0, 0), (1, 1 << 20)] {
            let path = scratch();
            let mut guest = Guest::new(open(&path, mode), mode);
            assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 2048, 2048, flags), 0, "{mode:?}");
            let file = fs::read(&path).unwrap();
            assert!(file[1 << 20..2 << 20].iter().all(|byte| *byte == 0), "{mode:?}");
            assert_eq!(file[2047 * 512..2048 * 512], pattern(2047), "{mode:?}");
            assert_eq!(file[4096 * 512..4097 * 512], pattern(4096), "{mode:?}");
            // Zeroes without unmap stay allocated, though SEEK_DATA does not always count unwritten extents.
            let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap()) * 512;
            assert_eq!(blocks, DISK_BYTES - given_back, "{mode:?}");
        }
    }
}

#[test]
fn the_serial_number_is_told() {
    let path = scratch();
    let mut guest = Guest::new(open(&path, Mode::Cached), Mode::Cached);
    // In one piece, in two, and too short.
    for (parts, told) in [(&[(DATA, 20)][..], 21), (&[(DATA, 3), (DATA + 3, 17)], 21), (&[(DATA, 4)], 5)] {
        guest.driver.ram.write_slice(&[0xee; 20], GuestAddress(DATA)).unwrap();
        let request = guest.offer(VIRTIO_BLK_T_GET_ID, 0, &[], parts);
        guest.notify();
        assert_eq!(guest.wait(&[request]), [(0, told)]);
        let length = told as usize - 1;
        assert_eq!(guest.memory(DATA, 20)[..length], b"tern-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..length]);
    }
    assert_eq!(guest.run(VIRTIO_BLK_T_GET_ID, 0, &[], &[(DATA, 512)]), 0);
}

#[test]
fn a_driver_that_cannot_flush_gets_durable_zeroes_and_writes() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::with_features(open(&path, mode), mode, 0);
        assert_eq!(guest.write(0, DATA, &[1; 512]), 0, "{mode:?}");
        assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 1, 1, 0), 0, "{mode:?}");
        let file = fs::read(&path).unwrap();
        assert!(file[..512] == [1; 512] && file[512..1024] == [0; 512] && file[1024..1536] == pattern(2), "{mode:?}");
    }
}

fn dirty(guest: &Guest, address: u64) -> bool {
    guest.driver.ram.find_region(GuestAddress(address)).unwrap().bitmap().dirty_at(address as usize)
}

#[test]
fn pages_read_into_are_dirty() {
    for mode in MODES {
        // Aligned for O_DIRECT, and bounced.
        for shift in [0, 8] {
            let path = scratch();
            let mut guest = Guest::new(open(&path, mode), mode);
            assert!((0..4).all(|page| !dirty(&guest, DATA + page * 0x1000)));
            assert_eq!(guest.read(0, DATA + 0x1000 + shift, 8192 - shift as u32 / 8 * 512).0, 0, "{mode:?}");
            let pages: Vec<_> = (0..4).map(|page| dirty(&guest, DATA + page * 0x1000)).collect();
            assert_eq!(pages, [false, true, true, false], "{mode:?}, shifted by {shift}");
        }
    }
}

#[test]
fn quiesce_leaves_nothing_in_flight() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        let requests: Vec<_> = (0..60u64)
            .map(|index| {
                let (kind, address) =
                    (if index % 2 == 0 { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN }, DATA + index * 0x1_0000);
                let part = [(address + index % 3, 0x1_0000 - 512)];
                if index % 2 == 0 {
                    guest.offer(kind, index * 64, &part, &[])
                } else {
                    guest.offer(kind, index * 64, &[], &part)
                }
            })
            .collect();
        guest.notify();
        guest.blk.quiesce(&mut guest.driver.io()).unwrap();
        assert_eq!(guest.blk.traffic.as_ref().unwrap().engine.in_flight(), 0, "{mode:?}");
        let answered = requests.iter().filter(|request| guest.status(**request) == 0).count();
        // What had to wait for a bounce buffer is still on the ring, and is taken after the pause.
        assert!(answered >= 16, "{mode:?}: {answered}");
        guest.notify();
        assert!(guest.wait(&requests).iter().all(|answer| answer.0 == 0), "{mode:?}");
        guest.blk.reset();
        assert_eq!(guest.blk.backend(), None);
    }
}

#[test]
fn dropping_a_busy_disk_waits_for_it() {
    for mode in MODES {
        let path = scratch();
        let image = open(&path, mode);
        let mut guest = Guest::new(image.clone(), mode);
        for index in 0..50u64 {
            guest.driver.ram.write_slice(&[index as u8; 512], GuestAddress(DATA + index * 0x1_0000)).unwrap();
            guest.offer(VIRTIO_BLK_T_OUT, index * 128, &[(DATA + index * 0x1_0000, 0x1_0000)], &[]);
        }
        guest.notify();
        drop(guest);
        let file = fs::read(&path).unwrap();
        assert!((0..50).all(|index| file[index * 0x1_0000] == index as u8), "{mode:?}");
        // The clone has kept the lock, and with the last one it is free.
        assert!(matches!(Image::open(&path, false, false), Err(ImageError::Locked { holder: Holder::Itself, .. })));
        drop(image);
        Image::open(&path, false, false).unwrap();
    }
}

#[test]
fn configuration_space_describes_the_image() {
    let path = scratch();
    let blk = Blk::new(open(&path, Mode::Cached), "").unwrap();
    let field = |offset, length: usize| {
        let mut bytes = [0xee; 8];
        blk.read_config(offset, &mut bytes[..length]);
        bytes[length..].fill(0);
        u64::from_le_bytes(bytes)
    };
    assert_eq!((field(0, 8), field(12, 4), field(20, 4)), (DISK_BYTES / 512, 254, 512));
    assert_eq!((field(24, 1), field(34, 2)), (3, 1));
    assert_eq!((field(36, 4), field(40, 4), field(44, 4)), (1 << 22, 1, 1));
    assert_eq!((field(48, 4), field(52, 4), field(56, 1)), (1 << 22, 1, 1));
    assert_eq!((field(56, 8), field(60, 4), field(u64::MAX, 8)), (1, 0, 0));
}

/// The event loop went on waiting for a descriptor that a reset had closed, and never saw the new one of the same number.
#[test]
fn completions_after_a_reset_come_on_the_same_descriptor() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        let before = guest.blk.backend();
        assert!(before.is_some(), "{mode:?}");
        guest.blk.reset();
        assert_eq!(guest.blk.backend(), None, "{mode:?}");
        guest.blk.activate(&mut guest.driver.io()).unwrap();
        assert_eq!(guest.blk.backend(), before, "{mode:?}");
        assert_eq!(guest.read(3, DATA, 512), (0, pattern(3).to_vec()), "{mode:?}");
    }
}
