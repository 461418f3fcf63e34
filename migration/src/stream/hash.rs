//! A hash of all of RAM, for those who want to see with their own eyes that nothing changed on the way.
//!
//! The sum of the XXH3 of each page that is not all zeros, its number the seed: the order does not matter, so threads share
//! the work. A page of zeros counts like one that is not there, because a target cannot tell them apart. A sum finds damage,
//! not malice: whoever sends the pages could send the hash.

use crate::pages::{PAGE_BYTES, PageSet, Run};
use crate::ram::Ram;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Pages that a thread takes at a time.
const CHUNK_PAGES: u64 = 2048;

/// Hash of `ram`, of which only `pages` are touched: all others are known to be zeros. At most `threads` work on it.
pub fn hash(ram: &Ram, pages: &PageSet, threads: usize) -> u64 {
    let (next, sum) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        let mut page_bytes = [0; PAGE_BYTES as usize];
        loop {
            let first = next.fetch_add(CHUNK_PAGES, Ordering::Relaxed);
            if first >= ram.pages() {
                return;
            }
            let runs = pages.runs_in(Run { first, pages: CHUNK_PAGES });
            let part = runs.flat_map(|run| run.first..run.end()).fold(0u64, |part, page| {
                ram.copy_page(page, &mut page_bytes);
                let zero = page_bytes.iter().fold(0, |bits, byte| bits | byte) == 0;
                if zero { part } else { part.wrapping_add(xxh3_64_with_seed(&page_bytes, page)) }
            });
            sum.fetch_add(part, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without another thread it takes longer; the result is the same.
            if let Err(error) = thread::Builder::new().name("move-hash".to_owned()).spawn_scoped(scope, work) {
                log::debug!("hashing RAM with fewer threads: {error}");
            }
        }
        work();
    });
    sum.into_inner()
}

#[cfg(test)]
mod tests {
    use super::super::rig::{Random, fill, ram, set};
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn equal_contents_hash_alike_whoever_works() {
        let (one, other) = (ram(5000, 100), ram(5000, 100));
        let mut random = Random::new();
        let written: Vec<u64> = (0..500).map(|_| random.below(5100)).collect();
        written.iter().for_each(|page| fill(&one, *page, page + 1));
        written.iter().rev().for_each(|page| fill(&other, *page, page + 1));
        let here = hash(&one, &set(&one, written.iter().copied()), 1);
        for threads in [0, 1, 2, 7] {
            assert_eq!(hash(&other, &set(&other, 0..5100), threads), here, "{threads} threads");
        }
    }

    #[test]
    fn contents_and_places_count_and_zeros_do_not() {
        let ram = ram(64, 0);
        let all = set(&ram, 0..64);
        assert_eq!(hash(&ram, &all, 1), 0);
        fill(&ram, 3, 1);
        let third = hash(&ram, &all, 1);
        fill(&ram, 3, 2);
        assert_ne!(hash(&ram, &all, 1), third);
        fill(&ram, 3, 0);
        fill(&ram, 4, 1);
        assert_ne!(hash(&ram, &all, 1), third);
        // Two pages that change places.
        fill(&ram, 3, 2);
        let two = hash(&ram, &all, 1);
        fill(&ram, 3, 1);
        fill(&ram, 4, 2);
        assert_ne!(hash(&ram, &all, 1), two);
    }

    #[test]
    fn pages_outside_the_set_are_not_touched() {
        let ram = ram(64, 0);
        fill(&ram, 3, 1);
        // Bit 63 of a page's entry in pagemap says that it is there.
        let resident = |page| {
            let (_, address) = ram.pieces(Run { first: page, pages: 1 }).next().unwrap();
            let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, address as u64 / PAGE_BYTES * 8).unwrap();
            u64::from_le_bytes(entry) >> 63 != 0
        };
        let before = [4, 5].map(resident);
        assert_ne!(hash(&ram, &set(&ram, [3]), 2), 0);
        assert_eq!([4, 5].map(resident), before);
    }
}
