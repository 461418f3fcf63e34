//! One restore at a time, and none twice by accident.

use crate::disk::SmallDisk;
use crate::{fill, ram, save_to};
use std::path::Path;
use sterna_migration::file::{Error, Hooks, Options, SavedFile};

fn saved(path: &Path) -> SavedFile {
    let source = ram(8, 4);
    save_to(path, &source, &fill(&source, [3]), &Options::default()).unwrap();
    SavedFile::open(path).unwrap()
}

#[test]
fn two_restores_at_once_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.saved");
    let mut first = saved(&path);
    let mut second = SavedFile::open(&path).unwrap();
    let claim = first.claim().unwrap();
    assert!(claim.restored_before.is_none() && claim.writable);
    let error = second.claim().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the file is in use: by another restore, or by a VM that was restored from it and has it mapped"
    );

    // The mapping goes on holding it.
    let machine = ram(8, 4);
    first.map(&machine).unwrap();
    drop((claim, first));
    assert!(matches!(second.claim(), Err(Error::Claimed)));
    drop(machine);
    second.claim().unwrap();
}

#[test]
fn a_file_whose_machine_still_maps_it_can_be_claimed_again_with_its_mark() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.saved");
    let mut first = saved(&path);
    let claim = first.claim().unwrap();
    let machine = ram(8, 4);
    first.map(&machine).unwrap();
    claim.mark("on host a").unwrap();
    // Who could take its mark back is alone with the file.
    assert!(matches!(SavedFile::open(&path).unwrap().claim(), Err(Error::Claimed)));
    claim.share().unwrap();
    let again = SavedFile::open(&path).unwrap().claim().unwrap();
    assert_eq!(again.restored_before.as_deref(), Some("on host a"));
    again.mark("on host b").unwrap();
    drop((machine, claim));
}

#[test]
fn a_restored_file_says_so_and_stays_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.saved");
    let mut file = saved(&path);
    assert_eq!(file.restored_before().unwrap(), None);
    file.claim().unwrap().mark("2026-11-01 12:00 on host b").unwrap();
    drop(file);
    let mut again = SavedFile::open(&path).unwrap();
    again.verify(1, Hooks::none()).unwrap();
    assert_eq!(again.restored_before().unwrap().as_deref(), Some("2026-11-01 12:00 on host b"));
    let claim = again.claim().unwrap();
    assert_eq!(claim.restored_before.as_deref(), Some("2026-11-01 12:00 on host b"));
    claim.mark("later").unwrap();
    assert_eq!(again.restored_before().unwrap().as_deref(), Some("later"));
}

#[test]
fn a_mark_that_is_taken_back_leaves_what_was_there_before() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.saved");
    let mut file = saved(&path);
    let claim = file.claim().unwrap();
    claim.mark("on host a").unwrap();
    claim.unmark().unwrap();
    assert_eq!(file.restored_before().unwrap(), None);
    claim.mark("on host a").unwrap();
    claim.share().unwrap();
    drop(claim);
    let claim = file.claim().unwrap();
    claim.mark("on host b").unwrap();
    claim.unmark().unwrap();
    assert_eq!(file.restored_before().unwrap().as_deref(), Some("on host a"));
}

#[test]
fn a_read_only_file_can_be_restored_but_not_marked() {
    let mut disk = SmallDisk::new("8m");
    let path = disk.folder().join("web.saved");
    drop(saved(&path));
    disk.make_read_only();
    let mut file = SavedFile::open(&path).unwrap();
    let claim = file.claim().unwrap();
    assert!(!claim.writable);
    let error = claim.mark("now").unwrap_err().to_string();
    assert_eq!(error, "the file is read-only: that it was restored cannot be noted in it");
}
