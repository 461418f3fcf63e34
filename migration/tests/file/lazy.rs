//! Loading in the background where something goes wrong.

use crate::{assert_holds, fill, names, pattern, ram, save_to};
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::Duration;
use sterna_migration::Ram;
use sterna_migration::file::{Error, Options, SavedFile};

const DEADLINE: Duration = Duration::from_secs(20);

fn page(ram: &Ram, number: u64) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    ram.copy_page(number, &mut bytes);
    bytes
}

#[test]
fn the_file_is_free_to_go_once_all_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (source, target) = (ram(2500, 700), ram(2500, 700));
    save_to(&path, &source, &fill(&source, 1000..2000), &Options::default()).unwrap();
    let lazy = SavedFile::open(&path).unwrap().load_lazily(&target, 2, |error| panic!("{error}")).unwrap();
    assert_eq!(lazy.progress().1, 1000);
    lazy.wait().unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_holds(&target, &(1000..2000).collect());
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn a_page_that_cannot_be_read_is_told_and_never_becomes_zeros() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (source, target) = (ram(2500, 700), ram(2500, 700));
    save_to(&path, &source, &fill(&source, 0..3200), &Options::default()).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"damaged", (2 << 20) + 1500 * 4096).unwrap();

    let (told, errors) = mpsc::channel();
    let saved = SavedFile::open(&path).unwrap();
    let lazy = saved.load_lazily(&target, 2, move |error| told.send(error.to_string()).unwrap()).unwrap();
    let error = errors.recv_timeout(DEADLINE).unwrap();
    assert_eq!(error, "the file is damaged: pages 1024 to 2047 are not those that were saved");
    assert!(matches!(lazy.wait(), Err(Error::Pages { first: 1024, last: 2047 })));
    for number in (0..1024).chain(2048..3200) {
        assert!(page(&target, number) == pattern(number), "page {number}");
    }

    // This thread ends with the process, as a vCPU would.
    let (got, pages) = mpsc::channel();
    std::thread::spawn(move || got.send(Box::new(page(&target, 1100))));
    assert_eq!(pages.recv_timeout(Duration::from_millis(200)), Err(mpsc::RecvTimeoutError::Timeout));
}

#[test]
fn pages_that_nobody_saved_are_zeros_at_once_and_afterwards() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (source, target) = (ram(2500, 700), ram(2500, 700));
    save_to(&path, &source, &fill(&source, [0, 3100]), &Options::default()).unwrap();
    let saved = SavedFile::open(&path).unwrap();
    let lazy = saved.load_lazily(&target, 1, |error| panic!("{error}")).unwrap();
    assert!(page(&target, 1) == [0; 4096] && page(&target, 1500) == [0; 4096]);
    lazy.wait().unwrap();
    assert_holds(&target, &[0, 3100].into());
    fill(&target, [5]);
    assert_holds(&target, &[0, 5, 3100].into());
}

/// The kernel wakes who waits for pages before it lets them go, and lets a thread begin to wait in between (Linux 6.8 and later).
#[test]
fn nobody_who_touches_a_page_as_it_is_let_go_waits_for_ever() {
    const ROUNDS: usize = 400;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let (source, target) = (ram(2500, 700), ram(2500, 700));
    let few: BTreeSet<u64> = (0..3200).filter(|page| page / 16 % 8 == 0).collect();
    save_to(&path, &source, &fill(&source, few.iter().copied()), &Options::default()).unwrap();
    for round in 0..ROUNDS {
        let saved = SavedFile::open(&path).unwrap();
        let lazy = saved.load_lazily(&target, 1 + round % 3, |error| panic!("{error}")).unwrap();
        let (through, reader) = mpsc::channel();
        let (ram, expected) = (target.clone(), few.clone());
        std::thread::spawn(move || {
            assert_holds(&ram, &expected);
            through.send(()).unwrap();
        });
        assert_eq!(reader.recv_timeout(DEADLINE), Ok(()), "round {round}");
        lazy.wait().unwrap();
    }
}
