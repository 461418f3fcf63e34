//! A disk goes on as its guest knows it, on whatever image it finds; images that are not its own are refused.

use super::state::State;
use super::testing::{DATA, DISK_BYTES, Guest, Mode, open, pattern, scratch};
use super::*;
use crate::state::testing::{from_hex, to_hex};
use proptest::prelude::*;
use std::fs;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

fn config_of(blk: &Blk) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    blk.read_config(0, &mut config);
    config
}

/// What a guest was told on a disk with blocks of 4 KiB and stripes of 32.
fn elsewhere() -> State {
    let mut id = [0; ID_BYTES];
    id[..9].copy_from_slice(b"elsewhere");
    State { size_bytes: DISK_BYTES, readonly: false, id, logical: 4096, physical: 32768 }
}

#[test]
fn the_guest_goes_on_seeing_what_it_was_told() {
    let path = scratch();
    let mut guest = Guest::new(open(&path, Mode::Direct), Mode::Direct);
    let fresh = (guest.blk.save(), config_of(&guest.blk));
    let mut blk = Blk::new(guest.blk.image().clone(), "tern-1").unwrap();
    blk.restore(&Saved::of(1, &elsewhere())).unwrap();
    let config = config_of(&blk);
    assert_eq!(config[..8], fresh.1[..8]);
    assert_eq!(
        (&config[20..24], config[24], &config[44..48]),
        (&4096u32.to_le_bytes()[..], 3, &8u32.to_le_bytes()[..])
    );
    assert!(blk.save() != fresh.0 && blk.save() == Saved::of(1, &elsewhere()));
    blk.activate(&mut guest.driver.io()).unwrap();
    guest.blk = blk;
    assert_eq!(guest.run(VIRTIO_BLK_T_GET_ID, 0, &[], &[(DATA, 20)]), 0);
    assert_eq!(guest.memory(DATA, 12), *b"elsewhere\0\0\0");
    // Once more, with what it was in the first place.
    let mut blk = Blk::new(guest.blk.image().clone(), "another").unwrap();
    blk.restore(&Saved::of(1, &elsewhere())).unwrap();
    blk.restore(&fresh.0).unwrap();
    assert_eq!((blk.save(), config_of(&blk)), fresh);
}

#[test]
fn requests_placed_before_the_move_are_served_after_it_on_an_image_with_larger_blocks() {
    let path = scratch();
    let mut guest = Guest::new(open(&path, Mode::Direct), Mode::Direct);
    assert_eq!(guest.write(16, DATA, &[1; 512]), 0);
    let read = guest.offer(VIRTIO_BLK_T_IN, 16, &[], &[(DATA + 0x1000, 1024)]);
    let write = guest.offer(VIRTIO_BLK_T_OUT, 9, &[(DATA, 512)], &[]);
    guest.blk.quiesce(&mut guest.driver.io()).unwrap();
    let saved = guest.blk.save();
    let coarse = guest.blk.image().clone().with_alignment(Alignment { memory: 4096, offset: 4096 });
    let mut there = Blk::new(coarse, "tern-1").unwrap();
    there.restore(&saved).unwrap();
    there.activate(&mut guest.driver.io()).unwrap();
    guest.blk = there;
    guest.notify();
    assert_eq!(guest.wait(&[read, write]), [(0, 1025), (0, 1)]);
    assert_eq!(guest.memory(DATA + 0x1000, 1024), [[1; 512], pattern(17)].concat());
    drop(guest);
    let file = fs::read(&path).unwrap();
    assert_eq!(file[8 * 512..11 * 512], [pattern(8), [1; 512], pattern(10)].concat());
}

#[test]
fn a_state_that_does_not_fit_the_image_is_refused_with_both_figures() {
    let path = scratch();
    let mut blk = Blk::new(open(&path, Mode::Direct), "tern-1").unwrap();
    let before = (blk.save(), config_of(&blk));
    type Damage = fn(&mut State);
    let wrong: [(&str, Damage); 9] = [
        ("the guest's disk has 8388608 bytes, and image PATH 4194304", |state| state.size_bytes = 8 << 20),
        ("the guest's disk is read-only, and image PATH is opened writable", |state| state.readonly = true),
        ("its blocks of 0 and 32768 bytes cannot be", |state| state.logical = 0),
        ("its blocks of 256 and 32768 bytes cannot be", |state| state.logical = 256),
        ("its blocks of 768 and 32768 bytes cannot be", |state| state.logical = 768),
        ("its blocks of 131072 and 131072 bytes cannot be", |state| {
            (state.logical, state.physical) = (131072, 131072);
        }),
        ("its blocks of 4096 and 2048 bytes cannot be", |state| state.physical = 2048),
        ("its serial number is not printable", |state| state.id[3] = b'\n'),
        ("its serial number is not printable", |state| state.id[12] = b'x'),
    ];
    for (expected, damage) in wrong {
        let mut state = elsewhere();
        damage(&mut state);
        let error = blk.restore(&Saved::of(1, &state)).unwrap_err().to_string();
        assert_eq!(error.replace(&path.display().to_string(), "PATH"), expected);
        assert_eq!((blk.save(), config_of(&blk)), before);
    }
    drop(blk);
    let mut readonly = Blk::new(Image::open(&path, true, true).unwrap(), "tern-1").unwrap();
    let error = readonly.restore(&Saved::of(1, &elsewhere())).unwrap_err().to_string();
    assert!(error.ends_with("is opened read-only"), "{error}");
    readonly.restore(&Saved::of(1, &State { readonly: true, ..elsewhere() })).unwrap();
}

/// Version 1, which must be read for ever.
const GOLDEN: &str = "8080800200656c7365776865726500000000000000000000008020808002";

#[test]
fn a_state_of_version_1_is_read() {
    let golden = from_hex(1, GOLDEN);
    assert_eq!(to_hex(&Saved::of(1, &elsewhere())), to_hex(&golden));
    let path = scratch();
    let mut blk = Blk::new(open(&path, Mode::Direct), "tern-1").unwrap();
    blk.restore(&golden).unwrap();
    assert_eq!(blk.save(), golden);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn random_bytes_never_panic(contents in prop::collection::vec(any::<u8>(), 0..64), cut in 0..30usize) {
        let path = scratch();
        let mut blk = Blk::new(open(&path, Mode::Cached), "tern-1").unwrap();
        let good = Saved::of(1, &elsewhere());
        let _refused = blk.restore(&Saved { version: 1, contents });
        let part = Saved { version: 1, contents: good.contents[..cut].to_vec() };
        prop_assert!(blk.restore(&part).is_err());
    }
}
