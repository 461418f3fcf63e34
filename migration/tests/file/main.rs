//! Saved machines, from outside: round trips, damage, full disks, claims. No KVM.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod claims;
mod damage;
mod disk;
mod golden;
mod lazy;
mod round_trip;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use sterna_migration::file::{Contents, Error, Figures, Hooks, Options, Saved, save};
use sterna_migration::ram::GuestRam;
use sterna_migration::{PageSet, Ram, Run, Section, Sections};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

type Page = [u8; 4096];

/// Two regions with a hole between them.
fn ram(low_pages: usize, high_pages: usize) -> Ram {
    let ranges = [(GuestAddress(0), low_pages * 4096), (GuestAddress(1 << 32), high_pages * 4096)];
    Ram::new(Arc::new(GuestRam::from_ranges(&ranges).unwrap()))
}

/// What page `number` holds when it is not zeros.
fn pattern(number: u64) -> Page {
    let mut state = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut page = [0; 4096];
    for word in page.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    page
}

fn fill(ram: &Ram, pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::none(ram.pages());
    for page in pages {
        ram.memory().write_slice(&pattern(page), ram.address(page).unwrap()).unwrap();
        set.insert(Run { first: page, pages: 1 });
    }
    set
}

/// Every page of `ram` holds its pattern if it is in `pages`, and zeros if not.
fn assert_holds(ram: &Ram, pages: &BTreeSet<u64>) {
    let mut found = [0; 4096];
    for page in 0..ram.pages() {
        ram.copy_page(page, &mut found);
        let expected = if pages.contains(&page) { pattern(page) } else { [0; 4096] };
        assert!(found == expected, "page {page}, which should be {}", pages.contains(&page));
    }
}

fn contents() -> Contents {
    let saved = Saved {
        program: "sterna 0.1.0".into(),
        host: "a".into(),
        time: "2026-11-01".into(),
        time_unix_ns: 1,
        machine: "web".into(),
        uuid: Uuid::from_u128(7),
    };
    let mut sections = Sections::default();
    sections.push(Section { name: "vcpu0".into(), version: 3, contents: vec![1, 2, 3] }).unwrap();
    Contents { id: Uuid::from_u128(9), epoch: 5, saved, description: b"{}".to_vec(), sections }
}

fn save_to(path: &Path, ram: &Ram, pages: &PageSet, options: &Options) -> Result<Figures, Error> {
    save(path, &contents(), ram, pages, options, Hooks::none())
}

fn compressed() -> Options {
    Options { compress: true, threads: 1, ..Options::default() }
}

/// Names in `folder`.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}
