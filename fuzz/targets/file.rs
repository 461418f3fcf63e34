//! A saved machine's file that is right but for some bytes, with checksums made right again or not: what is loaded is what verifies.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use sterna_fuzz::patch::{Patch, spoil};
use sterna_migration::file::{Contents, Hooks, Options, Saved, SavedFile, save};
use sterna_migration::ram::GuestRam;
use sterna_migration::wire::checksum;
use sterna_migration::{PAGE_BYTES, PageSet, Ram, Run, Section, Sections};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

/// RAM, in two regions, the second of which lies in two chunks of the table.
const LOW: u64 = 64;
const HIGH: u64 = 1000;
const FRAMES_AT: usize = 8192;
const END_BYTES: usize = 64;
const PIECE_BYTES: usize = 4096;
/// More RAM than is asked for here is said to be there, but not looked at.
const MOST_PAGES: u64 = 1 << 14;

#[derive(Arbitrary, Debug)]
struct Input {
    compressed: bool,
    head: Vec<Patch>,
    claim: Vec<Patch>,
    data: Vec<Patch>,
    table: Vec<Patch>,
    end: Vec<Patch>,
    /// Which checksums are made right again: of frames, of head and table, of the end record.
    frames: bool,
    parts: bool,
    record: bool,
    cut: Option<u32>,
    more: Vec<u8>,
}

/// A file: all before RAM, what is in RAM's place, the table, the end record.
#[derive(Clone)]
struct Parts {
    head: Vec<u8>,
    /// Bytes of the head that are not padding.
    head_bytes: usize,
    /// Where in the file the pieces of what is in RAM's place are, which are of a page or shorter, and that are not all zeros.
    places: Vec<usize>,
    /// Those pieces.
    data: Vec<u8>,
    table_at: usize,
    table: Vec<u8>,
    end: Vec<u8>,
}

fn ram_of(layout: &[(u64, u64)]) -> Option<Ram> {
    let ranges: Vec<_> = layout.iter().map(|(start, bytes)| (GuestAddress(*start), *bytes as usize)).collect();
    Some(Ram::new(Arc::new(GuestRam::from_ranges(&ranges).ok()?)))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// Where the frames of a head end, as far as its headers can be followed; `each` is told where one begins and ends.
fn walk(head: &mut [u8], mut each: impl FnMut(&mut [u8])) -> usize {
    let mut at = FRAMES_AT;
    for _ in 0..3 {
        let Some(header) = head.get(at..at + 16) else { break };
        let Some(end) = usize::try_from(word(header, 8)).ok().and_then(|bytes| bytes.checked_add(at + 16)) else {
            break;
        };
        let Some(frame) = head.get_mut(at..end).filter(|frame| frame.len() >= 24) else { break };
        each(frame);
        at = end;
    }
    at
}

fn valid(compress: bool) -> Parts {
    let ram = ram_of(&[(0, LOW * PAGE_BYTES), (1 << 32, HIGH * PAGE_BYTES)]).expect("some memory");
    let mut pages = PageSet::none(ram.pages());
    for page in [0, 1, 7, LOW, LOW + 1, LOW + 990] {
        let address = ram.address(page).expect("a page");
        ram.memory().write_slice(&page.to_le_bytes().repeat(512), address).expect("in RAM");
        pages.insert(Run { first: page, pages: 1 });
    }
    let text = || String::from("x");
    let saved =
        Saved { program: text(), host: text(), time: text(), time_unix_ns: 1, machine: text(), uuid: Uuid::nil() };
    let mut sections = Sections::default();
    sections.push(Section { name: "vcpu0".into(), version: 1, contents: vec![7; 40] }).expect("a good name");
    let contents = Contents { id: Uuid::nil(), epoch: 1, saved, description: b"{}".to_vec(), sections };
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("saved");
    let options = Options { threads: 1, compress, direct: false, overwrite: false };
    save(&path, &contents, &ram, &pages, &options, Hooks::none()).expect("a file");
    let all = std::fs::read(&path).expect("the file");
    let end = all.len() - END_BYTES;
    let table_at = word(&all, end + 8) as usize;
    let mut head = all.clone();
    let head_bytes = walk(&mut head, |_| {});
    let data_at = head_bytes.next_multiple_of(2 << 20);
    let places = (data_at..table_at).step_by(PIECE_BYTES);
    let piece = |at: usize| &all[at..table_at.min(at + PIECE_BYTES)];
    let places: Vec<_> = places.filter(|at| piece(*at).iter().any(|byte| *byte != 0)).collect();
    Parts {
        head: all[..head_bytes].to_vec(),
        head_bytes,
        data: places.iter().flat_map(|at| piece(*at)).copied().collect(),
        places,
        table_at,
        table: all[table_at..end].to_vec(),
        end: all[end..].to_vec(),
    }
}

impl Parts {
    fn spoil(&mut self, input: &Input) {
        spoil(&mut self.head[FRAMES_AT..], &input.head);
        spoil(&mut self.head[4096..4200], &input.claim);
        spoil(&mut self.data, &input.data);
        spoil(&mut self.table, &input.table);
        spoil(&mut self.end, &input.end);
        if input.frames {
            walk(&mut self.head, |frame| {
                let body = frame.len() - 8;
                let sum = checksum(&frame[..body]).to_le_bytes();
                frame[body..].copy_from_slice(&sum);
            });
        }
        if input.parts {
            let head = [&self.head[..4096], &self.head[FRAMES_AT..self.head_bytes]].concat();
            self.end[40..48].copy_from_slice(&checksum(&head).to_le_bytes());
            self.end[48..56].copy_from_slice(&checksum(&self.table).to_le_bytes());
        }
        if input.record {
            let sum = checksum(&self.end[..56]).to_le_bytes();
            self.end[56..].copy_from_slice(&sum);
        }
    }

    /// Only what is not zeros is written, so that it takes no time.
    fn write(&self, file: &File, cut: Option<u32>, more: &[u8]) {
        let whole = (self.table_at + self.table.len() + END_BYTES) as u64;
        file.set_len(0).and_then(|()| file.set_len(whole)).expect("an empty file");
        let put = |bytes: &[u8], at: usize| file.write_all_at(bytes, at as u64).expect("written");
        put(&self.head, 0);
        self.places.iter().zip(self.data.chunks(PIECE_BYTES)).for_each(|(at, piece)| put(piece, *at));
        put(&self.table, self.table_at);
        put(&self.end, self.table_at + self.table.len());
        match cut {
            Some(cut) => file.set_len(u64::from(cut).min(whole)).expect("a shorter file"),
            None => put(more, whole as usize),
        }
    }
}

/// Opens the file and does with it all that a restore does. A `whole` one is as it was saved.
fn read(path: &std::path::Path, whole: bool) {
    let mut file = match SavedFile::open(path) {
        Ok(file) => file,
        Err(error) => return assert!(!error.to_string().is_empty() && !whole, "{error:?}"),
    };
    let statistics = file.statistics().expect("a file");
    let _claimed = file.claim().expect("nobody else has it").restored_before;
    if statistics.ram_pages > MOST_PAGES {
        return;
    }
    let pages = file.pages();
    assert_eq!((pages.count(), pages.ram_pages()), (statistics.pages, statistics.ram_pages));
    let Some(loaded) = ram_of(file.layout()) else { return };
    let verified = file.verify(1, Hooks::none());
    let taken = file.load(&loaded, 1, Hooks::none());
    assert!(taken.is_ok() || verified.is_err());
    assert!(verified.is_ok() || !whole, "{verified:?}");
    let Some(mapped) = ram_of(file.layout()) else { return };
    if file.map(&mapped).is_ok() && verified.is_ok() {
        let (mut one, mut other) = ([0; 4096], [0; 4096]);
        for page in (0..mapped.pages()).step_by(7).chain(pages.runs().map(|run| run.first)) {
            mapped.copy_page(page, &mut one);
            loaded.copy_page(page, &mut other);
            assert_eq!(one, other, "page {page}");
        }
    }
}

fuzz_target!(|input: Input| {
    static VALID: OnceLock<([Parts; 2], File)> = OnceLock::new();
    let (valid, memory) = VALID.get_or_init(|| {
        let file = File::from(memfd_create("saved", MemfdFlags::CLOEXEC).expect("a file in memory"));
        ([valid(false), valid(true)], file)
    });
    let mut parts = valid[usize::from(input.compressed)].clone();
    parts.spoil(&input);
    parts.write(memory, input.cut, &input.more);
    let Input { head, claim: _, data, table, end, cut, more, .. } = &input;
    let whole = [head, data, table, end].iter().all(|patches| patches.is_empty()) && cut.is_none() && more.is_empty();
    read(&PathBuf::from(format!("/proc/self/fd/{}", memory.as_raw_fd())), whole);
});
