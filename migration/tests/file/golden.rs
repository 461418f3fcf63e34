//! Version 1, byte for byte: it must be readable for ever.

use crate::{contents, fill, ram, save_to};
use std::fs::File;
use std::os::unix::fs::FileExt;
use sterna_migration::file::{Hooks, Options, SavedFile};
use sterna_migration::{PageSet, Ram, Run};
use vm_memory::Bytes;

const DATA: u64 = 2 << 20;
const RAM_BYTES: u64 = 12 * 4096;
/// The preamble, the frames, and the table with the end record: a line each.
const GOLDEN: &str = include_str!("v1.hex");
/// The same of a compressed file, the pages before the table.
const GOLDEN_ZSTD: &str = include_str!("v1-zstd.hex");
const TERNS: [u8; 4096] = [b't'; 4096];

fn lines(golden: &str) -> [Vec<u8>; 3] {
    let parts: Vec<_> = golden.lines().map(bytes).collect();
    parts.try_into().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn the_golden_bytes_are_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let source = ram(8, 4);
    save_to(&path, &source, &fill(&source, [0, 9]), &Options::default()).unwrap();
    let file = std::fs::read(&path).unwrap();
    let [_, frames, _] = lines(GOLDEN);
    let parts = [&file[..48], &file[8192..8192 + frames.len()], &file[(DATA + RAM_BYTES) as usize..]];
    assert_eq!(parts.map(hex).join("\n"), GOLDEN.trim_end());
}

#[test]
fn the_golden_bytes_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (source, target) = (ram(8, 4), ram(8, 4));
    let pages = fill(&source, [0, 9]);
    let file = File::create_new(&path).unwrap();
    let [preamble, frames, end] = lines(GOLDEN);
    file.write_all_at(&preamble, 0).unwrap();
    file.write_all_at(&frames, 8192).unwrap();
    for run in pages.runs() {
        source.write_at(&file, run, DATA + run.first * 4096).unwrap();
    }
    file.write_all_at(&end, DATA + RAM_BYTES).unwrap();
    let saved = SavedFile::open(&path).unwrap();
    assert_eq!(saved.sections(), &contents().sections);
    assert_eq!(saved.saved(), &contents().saved);
    saved.load(&target, 1, Hooks::none()).unwrap();
    crate::assert_holds(&target, &[0, 9].into());
}

/// A machine with one page, which is easily compressed.
fn one_page() -> (Ram, PageSet) {
    let source = ram(8, 4);
    let mut pages = PageSet::none(source.pages());
    pages.insert(Run { first: 9, pages: 1 });
    source.memory().write_slice(&TERNS, source.address(9).unwrap()).unwrap();
    (source, pages)
}

/// Compressed, the bytes of the pages are the library's and may be others that mean the same. They are read for ever.
#[test]
fn the_golden_bytes_of_a_compressed_file_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let file = File::create_new(&path).unwrap();
    let [preamble, frames, end] = lines(GOLDEN_ZSTD);
    file.write_all_at(&preamble, 0).unwrap();
    file.write_all_at(&frames, 8192).unwrap();
    file.write_all_at(&end, DATA).unwrap();
    let saved = SavedFile::open(&path).unwrap();
    assert_eq!((saved.sections(), saved.saved()), (&contents().sections, &contents().saved));
    let (target, (source, _)) = (ram(8, 4), one_page());
    saved.load(&target, 1, Hooks::none()).unwrap();
    let (mut found, mut expected) = ([0; 4096], [0; 4096]);
    for page in 0..target.pages() {
        target.copy_page(page, &mut found);
        source.copy_page(page, &mut expected);
        assert!(found == expected, "page {page}");
    }
}

#[test]
fn the_golden_head_of_a_compressed_file_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (source, pages) = one_page();
    save_to(&path, &source, &pages, &crate::compressed()).unwrap();
    let file = std::fs::read(&path).unwrap();
    let [preamble, frames, _] = lines(GOLDEN_ZSTD);
    assert_eq!([&file[..48], &file[8192..8192 + frames.len()]], [&preamble, &frames]);
}
