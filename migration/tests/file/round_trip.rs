//! What is saved comes back, on every way.

use crate::{assert_holds, compressed, contents, fill, names, ram, save_to};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use sterna_migration::file::{Error, Form, Hooks, Options, SavedFile, save};
use sterna_migration::{Run, present};

const LOW: usize = 2500;
const HIGH: usize = 700;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn random_pages_come_back(
        runs in prop::collection::vec((0..3200u64, prop_oneof![1..4u64, 1..900u64]), 0..24),
        zeros in prop::collection::vec(0..3200u64, 0..24),
        compress: bool,
        direct: bool,
        threads in 1..4usize,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.saved");
        let source = ram(LOW, HIGH);
        let pages: BTreeSet<u64> = runs.iter().flat_map(|(first, pages)| *first..(first + pages).min(3200)).collect();
        let mut set = fill(&source, pages.iter().copied());
        zeros.iter().for_each(|page| set.insert(Run { first: *page, pages: 1 }));
        let zeros = zeros.into_iter().collect::<BTreeSet<_>>().difference(&pages).count() as u64;

        let options = Options { compress, direct, threads, ..Options::default() };
        let figures = save_to(&path, &source, &set, &options).unwrap();
        prop_assert_eq!((figures.pages, figures.zero_pages), (pages.len() as u64, zeros));
        let saved = SavedFile::open(&path).unwrap();
        prop_assert_eq!(saved.pages().runs().flat_map(|run| run.first..run.end()).collect::<BTreeSet<_>>(), pages.clone());
        saved.verify(threads, Hooks::none()).unwrap();

        let target = ram(LOW, HIGH);
        fill(&target, [7, 3000]); // what was there before goes away
        saved.load(&target, threads, Hooks::none()).unwrap();
        assert_holds(&target, &pages);

        let target = ram(LOW, HIGH);
        match saved.map(&target) {
            Ok(()) => assert_holds(&target, &pages),
            Err(error) => prop_assert!(compress && matches!(error, Error::Compressed)),
        }

        let target = ram(LOW, HIGH);
        let lazy = saved.load_lazily(&target, threads, |error| panic!("{error}")).unwrap();
        assert_holds(&target, &pages);
        lazy.wait().unwrap();
        assert_holds(&target, &pages);
    }
}

#[test]
fn who_saved_what_and_how_much_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.saved");
    let source = ram(LOW, HIGH);
    let pages = fill(&source, 10..20);
    save_to(&path, &source, &pages, &Options::default()).unwrap();
    let saved = SavedFile::open(&path).unwrap();
    assert_eq!(saved.saved(), &contents().saved);
    assert_eq!(saved.sections(), &contents().sections);
    let sections: Vec<_> = saved.sections().iter().map(|part| (part.name.as_str(), part.version)).collect();
    assert_eq!(sections, [("vcpu0", 3)]);
    assert_eq!((saved.contents().id, saved.contents().epoch), (contents().id, 5));
    assert_eq!((saved.contents().description.as_slice(), saved.form()), (b"{}".as_slice(), Form::InPlace));
    assert_eq!(saved.layout(), source.layout());
    let statistics = saved.statistics().unwrap();
    assert_eq!((statistics.ram_pages, statistics.pages, statistics.zero_pages), (3200, 10, 0));
    assert_eq!(statistics.file_bytes, (2 << 20) + 3200 * 4096 + 152 + 64);
    assert!(statistics.disk_bytes < 1 << 20, "{statistics:?}: it is not sparse");
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(names(folder.path()), ["web.saved"]);
}

#[test]
fn a_mapped_machine_is_saved_again_with_the_pages_of_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let source = ram(LOW, HIGH);
    save_to(&first, &source, &fill(&source, 100..200), &Options::default()).unwrap();
    let saved = SavedFile::open(&first).unwrap();
    let target = ram(LOW, HIGH);
    saved.map(&target).unwrap();
    fill(&target, [500]);
    let mut pages = present(&target).unwrap();
    assert!(pages.contains(500));
    pages.insert_all(&saved.pages());
    save_to(&second, &target, &pages, &Options::default()).unwrap();
    let again = ram(LOW, HIGH);
    SavedFile::open(&second).unwrap().load(&again, 2, Hooks::none()).unwrap();
    assert_holds(&again, &(100..200).chain([500]).collect());
    SavedFile::open(&first).unwrap().verify(1, Hooks::none()).unwrap();
}

#[test]
fn a_machine_with_other_ram_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.saved");
    let source = ram(LOW, HIGH);
    save_to(&path, &source, &fill(&source, [1]), &compressed()).unwrap();
    let saved = SavedFile::open(&path).unwrap();
    let other = ram(LOW + 1, HIGH);
    assert!(matches!(saved.load(&other, 1, Hooks::none()), Err(Error::Layout)));
    assert!(matches!(saved.map(&other), Err(Error::Layout)));
    assert!(matches!(saved.load_lazily(&other, 1, |_| {}), Err(Error::Layout)));
}

#[test]
fn progress_goes_forward_to_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let source = ram(LOW, HIGH);
    let pages = fill(&source, 0..3000);
    let seen = Mutex::new(Vec::new());
    let hooks = Hooks { progress: &|done, of| seen.lock().unwrap().push((done, of)), ..Hooks::none() };
    save(&folder.path().join("a"), &contents(), &source, &pages, &Options::default(), hooks).unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(seen.is_sorted(), "{seen:?}");
    assert_eq!(seen.last(), Some(&(3000, 3000)));
}
