//! Which pages of RAM exist, asked of the kernel and never found by reading them: reading would create them.
//!
//! A page that was never touched is in no page table. PAGEMAP_SCAN (Linux 6.7) walks the tables and skips what is empty; before
//! that, /proc/self/pagemap has 8 bytes for every page, there or not. Pages in swap exist. The page of zeros that the kernel
//! shares among all who only read is none of ours; pagemap cannot tell it, so there it counts, and is found by content.
//!
//! **RAM that is mapped from a file** (a restore by mapping) has pages that exist in the file and in no page table yet. The kernel
//! does not know them as ours: whoever mapped the file takes its pages in too ([`PageSet::insert_all`]).
#![expect(unsafe_code, reason = "PAGEMAP_SCAN has no safe wrapper")]

use crate::pages::{PAGE_BYTES, PageSet, Run};
use crate::ram::Ram;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Documentation/admin-guide/mm/pagemap.rst: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Regions that one call returns at most.
const REGIONS: usize = 512;
/// Bits of an entry of pagemap.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
/// Entries that are read at once: 128 KiB for 64 MiB of RAM.
const ENTRIES: u64 = 16 << 10;

/// The pages of `ram` that exist in this process's mapping.
///
/// # Errors
/// The kernel's.
pub fn present(ram: &Ram) -> io::Result<PageSet> {
    match by_scan(ram) {
        // Linux before 6.7.
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => by_entry(ram),
        result => result,
    }
}

/// Whether this kernel has PAGEMAP_SCAN, so that [`present`] takes microseconds where nothing is.
pub fn can_scan() -> bool {
    // A scan of nothing.
    let mut scan = Scan { size: size_of::<Scan>() as u64, category_anyof_mask: PAGE_IS_PRESENT, ..Scan::default() };
    File::open("/proc/self/pagemap").is_ok_and(|pagemap| {
        // SAFETY: as in `by_scan`; with no range it writes to `scan` alone.
        unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) >= 0 }
    })
}

/// Calls `look` for each region's run, with the address of its first page.
fn each_region(
    ram: &Ram,
    mut look: impl FnMut(&File, &mut PageSet, Run, u64) -> io::Result<()>,
) -> io::Result<PageSet> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut found = PageSet::none(ram.pages());
    for (run, address) in ram.pieces(Run { first: 0, pages: ram.pages() }) {
        look(&pagemap, &mut found, run, address as u64)?;
    }
    Ok(found)
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

fn by_scan(ram: &Ram) -> io::Result<PageSet> {
    let mut regions = [Region::default(); REGIONS];
    each_region(ram, |pagemap, found, run, base| {
        let end = base + run.bytes();
        let mut start = base;
        while start < end {
            let mut scan = Scan {
                size: size_of::<Scan>() as u64,
                start,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: REGIONS as u64,
                category_inverted: PAGE_IS_PFNZERO,
                category_mask: PAGE_IS_PFNZERO,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                ..Scan::default()
            };
            // SAFETY: `scan` has the layout and size that the call takes; it writes there and at most `vec_len` entries of
            // `regions`, which outlives it. No flag asks for a change of the page tables.
            let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
            for region in regions.iter().take(filled) {
                let first = run.first + region.start.saturating_sub(base) / PAGE_BYTES;
                found.insert(Run { first, pages: region.end.saturating_sub(region.start) / PAGE_BYTES });
            }
            if scan.walk_end <= start {
                return Err(io::Error::other("PAGEMAP_SCAN does not get on"));
            }
            start = scan.walk_end;
        }
        Ok(())
    })
}

fn by_entry(ram: &Ram) -> io::Result<PageSet> {
    let mut bytes = vec![0; ENTRIES as usize * 8];
    each_region(ram, |pagemap, found, run, base| {
        for first in (run.first..run.end()).step_by(ENTRIES as usize) {
            let entries = ENTRIES.min(run.end() - first);
            let part = &mut bytes[..entries as usize * 8];
            pagemap.read_exact_at(part, (base / PAGE_BYTES + first - run.first) * 8)?;
            let (entries, _) = part.as_chunks::<8>();
            let exists = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
            for (page, _) in (first..).zip(entries).filter(|(_, entry)| exists(entry)) {
                found.insert(Run { first: page, pages: 1 });
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::GuestRam;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};

    /// Regions of 300 MiB and 40 MiB, and pages at the edges of what the two ways read at once.
    fn touched() -> (Ram, Vec<Run>) {
        let ranges = [(GuestAddress(0), 300 << 20), (GuestAddress(1 << 32), 40 << 20)];
        let ram = Ram::new(Arc::new(GuestRam::from_ranges(&ranges).unwrap()));
        let runs = [(0, 1), (3, 2), (16383, 3), (40_000, 1), (76_799, 2), (87_039, 1)];
        let runs = runs.map(|(first, pages)| Run { first, pages }).to_vec();
        for page in runs.iter().flat_map(|run| run.first..run.end()) {
            ram.memory().write_obj(1u8, ram.address(page).unwrap()).unwrap();
        }
        (ram, runs)
    }

    /// All of `runs`; and no others, unless this host makes huge pages unasked.
    fn assert_found(found: &PageSet, runs: &[Run]) {
        let expected = runs.iter().all(|run| (run.first..run.end()).all(|page| found.contains(page)));
        assert!(expected, "{:?}", found.runs().collect::<Vec<_>>());
        let huge = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        if !huge.is_ok_and(|huge| huge.contains("[always]")) {
            assert_eq!(found.runs().collect::<Vec<_>>(), runs);
        }
    }

    #[test]
    fn touched_pages_exist_and_no_others() {
        let (ram, runs) = touched();
        assert_found(&present(&ram).unwrap(), &runs);
    }

    #[test]
    fn a_kernel_that_can_scan_is_known() {
        let (ram, _) = touched();
        assert_eq!(can_scan(), by_scan(&ram).is_ok());
    }

    #[test]
    fn before_linux_6_7_pagemap_says_the_same() {
        let (ram, runs) = touched();
        assert_found(&by_entry(&ram).unwrap(), &runs);
    }

    /// More pages apart than one call returns regions.
    #[test]
    fn many_regions_take_many_calls() {
        let ram = Ram::new(Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap()));
        for page in (0..ram.pages()).step_by(2) {
            ram.memory().write_obj(1u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        assert!(present(&ram).unwrap().count() >= ram.pages() / 2);
        assert_eq!(present(&ram).unwrap(), by_entry(&ram).unwrap());
    }

    #[test]
    fn a_page_that_was_only_read_is_not_there() {
        let (ram, _) = touched();
        assert!(ram.is_zero(50));
        match by_scan(&ram) {
            Ok(found) => assert!(!found.contains(50)),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
        }
    }
}
