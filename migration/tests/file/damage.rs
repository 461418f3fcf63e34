//! A file that is not as it was written is told, whatever is wrong with it.

use crate::{compressed, fill, ram, save_to};
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use sterna_migration::Ram;
use sterna_migration::file::{Error, Hooks, Options, SavedFile};

const DATA: u64 = 2 << 20;
const PAGES: u64 = 12;
/// More than the frames are long.
const FRAMES: u64 = 256;
const TABLE: u64 = DATA + PAGES * 4096;

/// In memory, since it is damaged and opened many thousand times.
struct Sample {
    path: PathBuf,
    file: File,
    bytes: u64,
}

fn machine() -> Ram {
    ram(8, 4)
}

/// A file of 12 pages, of which 0, 1, 6 and 9 are there.
fn sample(options: &Options) -> Sample {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.saved");
    let source = machine();
    let bytes = save_to(&path, &source, &fill(&source, [0, 1, 6, 9]), options).unwrap().file_bytes;
    let file = File::from(memfd_create("saved", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    for (block, at) in std::fs::read(&path).unwrap().chunks(4096).zip((0..).step_by(4096)) {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, at).unwrap(); // holes stay holes
        }
    }
    Sample { path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(), file, bytes }
}

impl Sample {
    /// Opens and verifies the file with bit `bit` of the byte at `at` the other way round, and puts it back.
    fn with_flipped(&self, at: u64, bit: u8, check: impl FnOnce(Result<SavedFile, Error>)) {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at).unwrap();
        self.file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
        check(SavedFile::open(&self.path));
        self.file.write_all_at(&byte, at).unwrap();
    }
}

#[test]
fn every_truncation_is_told() {
    let sample = sample(&Options::default());
    // In the gap before RAM one length is as good as another.
    let lengths = (DATA..sample.bytes).rev().chain((12_288..DATA).rev().step_by(997)).chain((0..12_288).rev());
    for length in lengths {
        sample.file.set_len(length).unwrap();
        assert!(SavedFile::open(&sample.path).is_err(), "{length} bytes");
    }
}

#[test]
fn a_save_that_did_not_come_to_its_end_is_not_whole() {
    let sample = sample(&Options::default());
    for length in [sample.bytes - 1, TABLE, TABLE - 4096, DATA] {
        sample.file.set_len(length).unwrap();
        let error = SavedFile::open(&sample.path).unwrap_err();
        assert_eq!(error.to_string(), "the file is not whole: its end record is missing or damaged");
    }
}

#[test]
fn every_flipped_bit_outside_ram_is_told() {
    let sample = sample(&Options::default());
    let full = (0..48).chain(8192..8192 + FRAMES).chain(TABLE..sample.bytes);
    let empty = (48..4096).chain(8192 + FRAMES..12_288).chain((12_288..DATA).step_by(4099)).chain([DATA - 1]);
    let bits = full.flat_map(|at| (0..8).map(move |bit| (at, bit))).chain(empty.map(|at| (at, (at % 8) as u8)));
    for (at, bit) in bits {
        sample.with_flipped(at, bit, |opened| assert!(opened.is_err(), "bit {bit} of byte {at}"));
    }
    for at in (4096..8192).step_by(61) {
        sample.with_flipped(at, (at % 8) as u8, |opened| {
            let mark = opened.unwrap().restored_before().unwrap().unwrap();
            assert!(mark.contains("the mark is damaged"), "{mark}");
        });
    }
}

#[test]
fn every_flipped_bit_in_ram_is_found_by_who_looks() {
    let sample = sample(&Options::default());
    let target = machine();
    for at in (DATA..TABLE).step_by(7) {
        let page = (at - DATA) / 4096;
        sample.with_flipped(at, (at % 8) as u8, |opened| {
            let saved = opened.unwrap();
            let (load, verify) = (saved.load(&target, 1, Hooks::none()), saved.verify(1, Hooks::none()));
            if [0, 1, 6, 9].contains(&page) {
                assert!(matches!(load, Err(Error::Pages { first: 0, last: 1023 })), "{at}: {load:?}");
                assert!(matches!(verify, Err(Error::Pages { .. })), "{at}: {verify:?}");
            } else {
                // What is not a page of the machine's is not loaded; only a mapping would show it.
                load.unwrap();
                assert!(matches!(verify, Err(Error::Damaged { .. })), "{at}: {verify:?}");
            }
        });
    }
}

#[test]
fn damage_in_compressed_ram_is_told_or_does_no_harm() {
    let sample = sample(&compressed());
    let (whole, target) = (machine(), machine());
    SavedFile::open(&sample.path).unwrap().load(&whole, 1, Hooks::none()).unwrap();
    let mut told = 0;
    let places = (DATA..DATA + 64).chain((DATA + 64..sample.bytes - 152 - 64).step_by(7));
    let bits: Vec<_> = places.map(|at| (at, (at % 8) as u8)).collect();
    for (at, bit) in &bits {
        sample.with_flipped(*at, *bit, |opened| match opened.unwrap().load(&target, 1, Hooks::none()) {
            Err(Error::Pages { .. }) => told += 1,
            Err(error) => panic!("{error}"),
            // zstd has bits without a meaning.
            Ok(()) => assert!((0..PAGES).all(|page| {
                let (mut one, mut other) = ([0; 4096], [1; 4096]);
                whole.copy_page(page, &mut one);
                target.copy_page(page, &mut other);
                one == other
            })),
        });
    }
    assert!(told + 8 > bits.len(), "only {told} of {} are told", bits.len());
}

#[test]
fn what_is_something_else_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    std::fs::write(&path, [b'x'; 9000]).unwrap();
    let error = SavedFile::open(&path).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("does not begin with Sterna's magic number"), "{source}");
    std::fs::write(&path, b"").unwrap();
    assert!(SavedFile::open(&path).is_err());
    assert!(SavedFile::open(folder.path()).is_err());
}

/// A copy whose holes were filled is as good as the file.
#[test]
fn a_copy_without_holes_is_whole() {
    let sample = sample(&Options::default());
    let zeros = vec![0; 4096];
    for page in [2, 5, 11] {
        sample.file.write_all_at(&zeros, DATA + page * 4096).unwrap();
    }
    sample.file.write_all_at(&zeros, DATA - 4096).unwrap();
    SavedFile::open(&sample.path).unwrap().verify(1, Hooks::none()).unwrap();
}

/// Anything may stand where the frames, the table and the end record were.
#[test]
fn garbage_is_refused_and_never_panics() {
    let sample = sample(&Options::default());
    let end = sample.bytes;
    let places = prop_oneof![8192..8192 + FRAMES, TABLE..end];
    proptest!(|(at in places, bytes in prop::collection::vec(any::<u8>(), 8..64))| {
        let bytes = &bytes[..bytes.len().min((end - at) as usize)];
        let mut before = vec![0; bytes.len()];
        sample.file.read_exact_at(&mut before, at).unwrap();
        prop_assume!(before != bytes);
        sample.file.write_all_at(bytes, at).unwrap();
        let opened = SavedFile::open(&sample.path);
        sample.file.write_all_at(&before, at).unwrap();
        prop_assert!(opened.is_err());
    });
}

/// Lengths that nothing stands behind: what is there is read, and then it is told.
#[test]
fn huge_claims_allocate_nothing() {
    let sample = sample(&Options::default());
    for length in [u64::MAX, 1 << 40, (64 << 20) + 8] {
        let mut before = [0; 8];
        sample.file.read_exact_at(&mut before, 8200).unwrap();
        sample.file.write_all_at(&length.to_le_bytes(), 8200).unwrap();
        let error = SavedFile::open(&sample.path).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("the length of a frame is"), "{source}");
        sample.file.write_all_at(&before, 8200).unwrap();
    }
}
