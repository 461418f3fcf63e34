//! What a driver may not do: it gets an error status or a fault, and the image stays as it is.

use super::testing::{DATA, DISK_BYTES, Guest, MODES, Mode, open, scratch};
use super::*;
use std::fs;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const END: u64 = DISK_BYTES / 512;

#[test]
fn requests_outside_the_disk_fail() {
    for mode in MODES {
        let path = scratch();
        let before = fs::read(&path).unwrap();
        let mut guest = Guest::new(open(&path, mode), mode);
        for sector in [END, END - 1, u64::MAX, u64::MAX - 1, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
            assert_eq!(guest.read(sector, DATA, 1024).0, IO_ERROR, "{sector:#x}");
            assert_eq!(guest.write(sector, DATA, &[0; 1024]), IO_ERROR, "{sector:#x}");
            assert_eq!(guest.range(VIRTIO_BLK_T_DISCARD, sector, 2, 0), IO_ERROR, "{sector:#x}");
            assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, sector, 2, 1), IO_ERROR, "{sector:#x}");
        }
        assert_eq!(guest.read(END - 1, DATA, 512).0, 0);
        assert!(fs::read(&path).unwrap() == before, "{mode:?}");
    }
}

#[test]
fn lengths_that_are_no_sectors_or_too_long_fail() {
    let path = scratch();
    let before = fs::read(&path).unwrap();
    let mut guest = Guest::new(open(&path, Mode::Direct), Mode::Direct);
    for length in [1, 511, 513] {
        assert_eq!(guest.read(0, DATA, length).0, IO_ERROR);
        assert_eq!(guest.write(0, DATA, &vec![0; length as usize]), IO_ERROR);
    }
    // All of RAM a hundred times over: 1.6 GiB in one chain.
    let huge = vec![(0, 16 << 20); 100];
    let request = guest.offer(VIRTIO_BLK_T_OUT, 0, &huge, &[]);
    guest.notify();
    assert_eq!(guest.wait(&[request]), [(IO_ERROR, 1)]);
    for sectors in [u32::MAX, (1 << 22) + 1] {
        assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, sectors, 0), IO_ERROR);
    }
    assert!(fs::read(&path).unwrap() == before);
    // Nothing at all is no mistake.
    assert_eq!(guest.run(VIRTIO_BLK_T_IN, 0, &[], &[]), 0);
    assert_eq!(guest.range(VIRTIO_BLK_T_DISCARD, 0, 0, 0), 0);
}

#[test]
fn a_readonly_disk_stays_as_it_is() {
    for direct in [true, false] {
        let path = scratch();
        let before = fs::read(&path).unwrap();
        let mut guest = Guest::new(Image::open(&path, true, direct).unwrap(), Mode::Direct);
        assert_eq!(guest.write(0, DATA, &[0; 512]), IO_ERROR);
        assert_eq!(guest.range(VIRTIO_BLK_T_DISCARD, 0, 8, 0), IO_ERROR);
        assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 1), IO_ERROR);
        assert_eq!(guest.run(VIRTIO_BLK_T_FLUSH, 0, &[], &[]), 0);
        let (status, bytes) = guest.read(8, DATA, 512);
        assert!(status == 0 && bytes == before[4096..4608]);
        assert!(fs::read(&path).unwrap() == before);
        let features = guest.blk.features();
        assert_eq!(features & 1 << VIRTIO_BLK_F_RO, 1 << VIRTIO_BLK_F_RO);
        assert_eq!(features & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
    }
}

#[test]
fn unknown_requests_and_flags_are_unsupported() {
    let path = scratch();
    let mut guest = Guest::new(open(&path, Mode::Cached), Mode::Cached);
    for kind in [2, 3, 5, 7, 9, 14, 16, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.run(kind, 0, &[], &[(DATA, 512)]), UNSUPPORTED, "{kind}");
    }
    assert_eq!(guest.range(VIRTIO_BLK_T_DISCARD, 0, 1, 1), UNSUPPORTED);
    assert_eq!(guest.range(VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 2), UNSUPPORTED);
    // Ranges: none, half of one, two.
    for length in [0, 8, 32] {
        assert_eq!(guest.run(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, length)], &[]), IO_ERROR, "{length}");
    }
}

#[test]
fn a_chain_that_cannot_be_answered_is_a_fault() {
    type Parts = &'static [(u64, u32)];
    let cases: [(Parts, Parts, &str); 4] = [
        (&[(DATA, 16)], &[], "queue 0: block request without a status byte"),
        (&[(DATA, 16)], &[(DATA + 16, 0)], "queue 0: block request without a status byte"),
        (&[(DATA, 15)], &[(DATA + 16, 1)], "queue 0: block request with less than a header of 16 bytes"),
        (&[], &[(DATA + 16, 513)], "queue 0: block request with less than a header of 16 bytes"),
    ];
    for (readable, writable, message) in cases {
        let path = scratch();
        let mut guest = Guest::new(open(&path, Mode::Direct), Mode::Direct);
        // What was in order before it is answered all the same.
        let good = guest.offer(VIRTIO_BLK_T_IN, 0, &[], &[(DATA + 0x1000, 512)]);
        guest.chain(readable, writable);
        let fault = guest.blk.queue_notified(0, &mut guest.driver.io()).unwrap_err();
        assert_eq!(fault.to_string(), message);
        guest.blk.quiesce(&mut guest.driver.io()).unwrap();
        assert_eq!(guest.status(good), 0);
    }
}

#[test]
fn header_data_and_status_may_be_framed_in_any_way() {
    let path = scratch();
    let mut guest = Guest::new(open(&path, Mode::Direct), Mode::Direct);
    guest.driver.ram.write_slice(&[0; 16], GuestAddress(DATA)).unwrap();
    // A header in three pieces; data and status in one.
    guest.driver.ram.write_obj(0xffu8, GuestAddress(DATA + 0x1000 + 512)).unwrap();
    guest.chain(&[(DATA, 1), (DATA + 1, 0), (DATA + 1, 15)], &[(DATA + 0x1000, 513), (DATA, 0)]);
    guest.notify();
    guest.blk.quiesce(&mut guest.driver.io()).unwrap();
    assert_eq!(guest.driver.used(0).unwrap().length, 513);
    assert_eq!(guest.memory(DATA + 0x1000 + 512, 1), [0]);
}

#[test]
fn one_chain_offered_again_and_again_is_bounded() {
    let path = scratch();
    let mut guest = Guest::new(open(&path, Mode::Direct), Mode::Direct);
    let request = guest.offer(VIRTIO_BLK_T_IN, 0, &[], &[(DATA, 4096)]);
    // The driver breaks the rule that a chain belongs to the device until it is used.
    for _ in 1..256 {
        guest.driver.offer(0, request.head);
    }
    guest.notify();
    guest.blk.quiesce(&mut guest.driver.io()).unwrap();
    assert_eq!(std::iter::from_fn(|| guest.driver.used(0)).count(), 256);
}

#[test]
fn an_image_cut_short_behind_the_disk_is_an_error() {
    for mode in MODES {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
        assert_eq!(guest.read(2048, DATA, 4096).0, IO_ERROR, "{mode:?}");
        assert_eq!(guest.read(2044, DATA, 4096).0, IO_ERROR, "{mode:?}");
        assert_eq!(guest.read(2040, DATA, 4096).0, 0, "{mode:?}");
    }
}

#[test]
fn serial_numbers_virtio_cannot_carry_are_refused() {
    let path = scratch();
    let image = open(&path, Mode::Cached);
    for serial in ["123456789012345678901", "tern\n", "küste"] {
        let Err(error) = Blk::new(image.clone(), serial) else { panic!("{serial:?} was taken") };
        assert!(error.to_string().contains("is not 0 to 20 printable ASCII characters"), "{error}");
    }
    assert!(Blk::new(image, "12345678901234567890").is_ok());
}
