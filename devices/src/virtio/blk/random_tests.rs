//! Random requests: proper ones against a model of the disk, improper ones against the rule that nothing breaks.

use super::testing::{DATA, DISK_BYTES, Guest, MODES, open, scratch};
use super::*;
use proptest::prelude::*;
use std::fs;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_WRITE_ZEROES};
use vm_memory::{Bytes, GuestAddress};

#[derive(Clone, Debug)]
enum Action {
    Read,
    Write(u8),
    Zero(u32),
    Discard,
    Flush,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        Just(Action::Read),
        any::<u8>().prop_map(Action::Write),
        (0..2u32).prop_map(Action::Zero),
        Just(Action::Discard),
        Just(Action::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the alignment of disk and memory, the disk is what was written to it.
    #[test]
    fn the_disk_does_as_its_model(
        mode in prop::sample::select(MODES.to_vec()),
        // Of the memory, and of the disk.
        memory in prop::sample::select(vec![512u64, 4096]),
        offset in prop::sample::select(vec![512u64, 4096, 65536]),
        actions in prop::collection::vec((action(), 0..1200u64, 1..700u32, 0..5u64), 1..24),
    ) {
        let path = scratch();
        let mut model = fs::read(&path).unwrap();
        let mut image = open(&path, mode);
        if image.alignment().offset != 1 {
            image = image.with_alignment(Alignment { memory, offset });
        }
        let mut guest = Guest::new(image, mode);
        for (action, sector, sectors, shift) in actions {
            let length = sectors * 512;
            let part = sector as usize * 512..sector as usize * 512 + length as usize;
            // 0, 256, 512, 768 or 1024 bytes into a page.
            let address = DATA + shift * 256;
            let status = match action {
                Action::Read => {
                    let (status, bytes) = guest.read(sector, address, length);
                    prop_assert!(bytes == model[part]);
                    status
                }
                Action::Write(seed) => {
                    let bytes: Vec<u8> = (0..length).map(|index| (index >> 7) as u8 ^ seed).collect();
                    model[part].copy_from_slice(&bytes);
                    guest.write(sector, address, &bytes)
                }
                Action::Zero(unmap) => {
                    model[part].fill(0);
                    guest.range(VIRTIO_BLK_T_WRITE_ZEROES, sector, sectors, unmap)
                }
                Action::Discard => {
                    // In a file, a hole.
                    model[part].fill(0);
                    guest.range(VIRTIO_BLK_T_DISCARD, sector, sectors, 0)
                }
                Action::Flush => guest.run(VIRTIO_BLK_T_FLUSH, 0, &[], &[]),
            };
            prop_assert_eq!(status, 0);
        }
        prop_assert!(fs::read(&path).unwrap() == model);
    }

    /// Chains of any shape inside RAM: every one is answered, or is a fault; nothing panics or hangs, and the image
    /// keeps its size.
    #[test]
    fn any_chain_is_answered_or_a_fault(
        mode in prop::sample::select(MODES.to_vec()),
        chains in prop::collection::vec(
            (
                prop_oneof![0..16u32, any::<u32>()],
                prop_oneof![0..DISK_BYTES / 512, any::<u64>()],
                prop::collection::vec((DATA..DATA + 0x1_0000, prop_oneof![0..40u32, (0..9u32).prop_map(|n| n * 512)]), 0..4),
                prop::collection::vec((DATA..DATA + 0x1_0000, prop_oneof![0..40u32, (0..9u32).prop_map(|n| n * 512)]), 0..4),
                any::<[u8; 16]>(),
            ),
            1..30,
        ),
    ) {
        let path = scratch();
        let mut guest = Guest::new(open(&path, mode), mode);
        let mut offered = 0;
        for (kind, sector, readable, writable, range) in chains {
            if readable.is_empty() && writable.is_empty() {
                continue;
            }
            // The first bytes of most are a header.
            if let Some((address, _)) = readable.first() {
                guest.driver.ram.write_obj(kind, GuestAddress(*address)).unwrap();
                guest.driver.ram.write_obj(sector, GuestAddress(*address + 8)).unwrap();
                guest.driver.ram.write_slice(&range, GuestAddress(*address + 16)).unwrap();
            }
            guest.chain(&readable, &writable);
            offered += 1;
            if guest.blk.queue_notified(0, &mut guest.driver.io()).is_err() {
                offered -= 1;
            }
        }
        // What waits for a bounce buffer is taken later.
        for _ in 0..4 {
            guest.blk.quiesce(&mut guest.driver.io()).unwrap();
            guest.blk.queue_notified(0, &mut guest.driver.io()).ok();
        }
        guest.blk.quiesce(&mut guest.driver.io()).unwrap();
        prop_assert_eq!(std::iter::from_fn(|| guest.driver.used(0)).count(), offered);
        prop_assert_eq!(fs::metadata(&path).unwrap().len(), DISK_BYTES);
    }
}
