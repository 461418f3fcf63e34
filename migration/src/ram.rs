//! Guest RAM as a move sees it: pages that go from the mapping to a descriptor and back, with no copy in between.
//!
//! The guest may write a page while it is sent. What arrives then is neither the old nor the new page, and does not matter: the
//! dirty log has the page again, and it is sent again.
#![expect(
    unsafe_code,
    reason = "guest memory changes under our hands: it is reached through pointers, never references"
)]

use crate::pages::{PAGE_BYTES, Run};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// The RAM that is moved: vm-memory's, with its bitmap of the monitor's own writes.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// Entries that one writev takes.
const MAX_SLICES: usize = 1024;
/// Bytes that one call moves over a connection, at most: a kernel that is not preemptible lets a vCPU that waits for the processor
/// wait for the call's end (8 MiB of pages that the target has not touched: up to 60 ms).
const STREAM_BYTES: usize = 1 << 20;

/// See the module.
#[derive(Clone)]
pub struct Ram {
    memory: Arc<GuestRam>,
    /// By region: number of its first page, and its pages.
    regions: Vec<Run>,
}

impl Ram {
    /// All of `memory`, whose regions consist of whole pages.
    pub fn new(memory: Arc<GuestRam>) -> Self {
        let mut first = 0;
        let regions = memory
            .iter()
            .map(|region| {
                let run = Run { first, pages: region.len() / PAGE_BYTES };
                first = run.end();
                run
            })
            .collect();
        Self { memory, regions }
    }

    /// The memory.
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }

    /// Pages there are.
    pub fn pages(&self) -> u64 {
        self.regions.last().map_or(0, Run::end)
    }

    /// Guest physical address and bytes of each region.
    pub fn layout(&self) -> Vec<(u64, u64)> {
        self.memory.iter().map(|region| (region.start_addr().0, region.len())).collect()
    }

    /// The regions as runs of pages: a memory slot each.
    pub fn regions(&self) -> &[Run] {
        &self.regions
    }

    /// `run` cut at the ends of regions, each piece with the host address of its first byte. Pages outside RAM are left out.
    pub fn pieces(&self, run: Run) -> impl Iterator<Item = (Run, *mut u8)> + '_ {
        let pieces = self.regions.iter().zip(self.memory.iter());
        pieces.filter_map(move |(place, region)| {
            let first = run.first.max(place.first);
            let end = run.first.saturating_add(run.pages).min(place.end());
            let pages = end.checked_sub(first).filter(|pages| *pages > 0)?;
            let start = MemoryRegionAddress((first - place.first) * PAGE_BYTES);
            let address = region.get_host_address(start).ok()?;
            Some((Run { first, pages }, address))
        })
    }

    /// Guest physical address of `page`.
    pub fn address(&self, page: u64) -> Option<GuestAddress> {
        let mut places = self.regions.iter().zip(self.memory.iter());
        let (place, region) = places.find(|(place, _)| (place.first..place.end()).contains(&page))?;
        Some(GuestAddress(region.start_addr().0 + (page - place.first) * PAGE_BYTES))
    }

    fn slices(&self, head: &[u8], runs: &[Run]) -> Vec<libc::iovec> {
        let mut slices = Vec::with_capacity(runs.len() + 1);
        if !head.is_empty() {
            slices.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
        }
        for (piece, address) in runs.iter().flat_map(|run| self.pieces(*run)) {
            slices.push(libc::iovec { iov_base: address.cast(), iov_len: piece.bytes() as usize });
        }
        slices
    }

    /// Writes `head`, then the pages of `runs`.
    ///
    /// # Errors
    /// The descriptor's; `WriteZero` where it takes no more.
    pub fn write_to(&self, output: &impl AsFd, head: &[u8], runs: &[Run]) -> io::Result<()> {
        let fd = output.as_fd().as_raw_fd();
        let slices = self.slices(head, runs);
        each_part(slices, STREAM_BYTES, io::ErrorKind::WriteZero, |part| {
            // SAFETY: the entries describe `head`, which outlives the call, and guest RAM, which stays mapped while `self` is
            // there; the kernel only reads them.
            unsafe { libc::writev(fd, part.as_ptr(), part.len() as libc::c_int) }
        })
    }

    /// Reads the pages of `runs`.
    ///
    /// # Errors
    /// The descriptor's; `UnexpectedEof` where it ends first.
    pub fn read_from(&self, input: &impl AsFd, runs: &[Run]) -> io::Result<()> {
        let fd = input.as_fd().as_raw_fd();
        let slices = self.slices(&[], runs);
        each_part(slices, STREAM_BYTES, io::ErrorKind::UnexpectedEof, |part| {
            // SAFETY: the entries describe guest RAM, which stays mapped while `self` is there and has no Rust references.
            unsafe { libc::readv(fd, part.as_ptr(), part.len() as libc::c_int) }
        })
    }

    /// Writes `run` to `file` at `offset` bytes.
    ///
    /// # Errors
    /// The file's.
    pub fn write_at(&self, file: &impl AsFd, run: Run, offset: u64) -> io::Result<()> {
        let fd = file.as_fd().as_raw_fd();
        let mut at = offset;
        each_part(self.slices(&[], &[run]), usize::MAX, io::ErrorKind::WriteZero, |part| {
            // SAFETY: as for `write_to`.
            let done = unsafe { libc::pwritev(fd, part.as_ptr(), part.len() as libc::c_int, at as libc::off_t) };
            at += u64::try_from(done).unwrap_or(0);
            done
        })
    }

    /// Reads `run` from `file` at `offset` bytes.
    ///
    /// # Errors
    /// The file's; `UnexpectedEof` where it ends first.
    pub fn read_at(&self, file: &impl AsFd, run: Run, offset: u64) -> io::Result<()> {
        let fd = file.as_fd().as_raw_fd();
        let mut at = offset;
        each_part(self.slices(&[], &[run]), usize::MAX, io::ErrorKind::UnexpectedEof, |part| {
            // SAFETY: as for `read_from`.
            let done = unsafe { libc::preadv(fd, part.as_ptr(), part.len() as libc::c_int, at as libc::off_t) };
            at += u64::try_from(done).unwrap_or(0);
            done
        })
    }

    /// Copies `page` out; a page outside RAM is all zeros.
    pub fn copy_page(&self, page: u64, to: &mut [u8; PAGE_BYTES as usize]) {
        match self.pieces(Run { first: page, pages: 1 }).next() {
            // SAFETY: `from` is a whole page of a mapping that stays while `self` is there; `to` is ours alone. A guest that
            // writes meanwhile gives a mixed page, as the module says.
            Some((_, from)) => unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), to.as_mut_ptr(), to.len()) },
            None => to.fill(0),
        }
    }

    /// Whether `page` is all zeros now.
    pub fn is_zero(&self, page: u64) -> bool {
        let Some((_, start)) = self.pieces(Run { first: page, pages: 1 }).next() else { return true };
        let words = start.cast_const().cast::<u64>();
        // Most pages that are not zero say so in their first bytes; the rest is read 64 bytes at a time.
        (0..PAGE_BYTES as usize / 64).all(|line| {
            let bits = (0..8).fold(0, |bits, word| {
                // SAFETY: inside the page, which is aligned; volatile because the guest may be writing.
                bits | unsafe { words.add(line * 8 + word).read_volatile() }
            });
            bits == 0
        })
    }

    /// Makes the pages of `run` zeros: they are let go, so that they cost nothing. **Only in a private anonymous mapping**, as RAM
    /// is that something is to be loaded into: one of a file shows the file again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn discard(&self, run: Run) -> io::Result<()> {
        for (piece, address) in self.pieces(run) {
            // SAFETY: whole pages of a private anonymous mapping that stays; what was there is guest memory, reached only by
            // pointer.
            if unsafe { libc::madvise(address.cast(), piece.bytes() as usize, libc::MADV_DONTNEED) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    /// Makes the pages of `run` exist, as zeros where they do not yet, so that writing to them later does not wait for the kernel.
    /// Pages outside RAM are left out; Linux before 5.14 makes none.
    ///
    /// # Errors
    /// The kernel's: there is no memory for them.
    pub fn make(&self, run: Run) -> io::Result<()> {
        for (piece, address) in self.pieces(run) {
            // SAFETY: whole pages of a mapping that stays; their contents do not change.
            if unsafe { libc::madvise(address.cast(), piece.bytes() as usize, libc::MADV_POPULATE_WRITE) } != 0 {
                match io::Error::last_os_error() {
                    error if error.raw_os_error() == Some(libc::EINVAL) => {}
                    error => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// Calls `transfer` with what is left of `slices`, at most `most_bytes` of it, until nothing is. `end` is what it means when no byte
/// moves.
fn each_part(
    mut slices: Vec<libc::iovec>,
    most_bytes: usize,
    end: io::ErrorKind,
    mut transfer: impl FnMut(&[libc::iovec]) -> libc::ssize_t,
) -> io::Result<()> {
    let mut start = 0;
    while start < slices.len() {
        let (mut upto, mut bytes) = (start, 0usize);
        while upto < slices.len().min(start + MAX_SLICES) && bytes < most_bytes {
            bytes += slices[upto].iov_len;
            upto += 1;
        }
        let over = bytes.saturating_sub(most_bytes);
        slices[upto - 1].iov_len -= over;
        let done = transfer(&slices[start..upto]);
        slices[upto - 1].iov_len += over;
        let mut moved = match usize::try_from(done) {
            Ok(0) => return Err(end.into()),
            Ok(moved) => moved,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            },
        };
        while let Some(slice) = slices.get_mut(start).filter(|slice| slice.iov_len <= moved) {
            moved -= slice.iov_len;
            start += 1;
        }
        if let Some(slice) = slices.get_mut(start) {
            slice.iov_base = slice.iov_base.wrapping_byte_add(moved);
            slice.iov_len -= moved;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom};
    use vm_memory::Bytes;

    /// Two regions of 4 and 3 pages, each page filled with its number from 1 on.
    fn ram() -> Ram {
        let ranges = [(GuestAddress(0), 4 * 4096), (GuestAddress(1 << 32), 3 * 4096)];
        let memory = GuestRam::from_ranges(&ranges).unwrap();
        for page in 0..7u64 {
            let address = if page < 4 { page * 4096 } else { (1 << 32) + (page - 4) * 4096 };
            memory.write_slice(&[page as u8 + 1; 4096], GuestAddress(address)).unwrap();
        }
        Ram::new(Arc::new(memory))
    }

    fn first_bytes(ram: &Ram) -> Vec<u8> {
        let mut page = [0; 4096];
        (0..ram.pages())
            .map(|number| {
                ram.copy_page(number, &mut page);
                page[0]
            })
            .collect()
    }

    #[test]
    fn made_pages_exist_and_keep_their_contents() {
        let ram = ram();
        ram.discard(Run { first: 2, pages: 3 }).unwrap();
        ram.make(Run { first: 1, pages: 2 }).unwrap();
        ram.make(Run { first: 6, pages: u64::MAX }).unwrap();
        let existing: Vec<_> = crate::present(&ram).unwrap().runs().collect();
        assert_eq!(existing, [Run { first: 0, pages: 3 }, Run { first: 5, pages: 2 }]);
        assert!(!ram.is_zero(1) && ram.is_zero(2) && !ram.is_zero(6));
    }

    #[test]
    fn pages_count_through_the_hole() {
        let ram = ram();
        assert_eq!(ram.pages(), 7);
        assert_eq!(ram.address(5), Some(GuestAddress((1 << 32) + 4096)));
        assert_eq!(ram.address(7), None);
        let pieces: Vec<_> = ram.pieces(Run { first: 2, pages: 100 }).map(|(run, _)| (run.first, run.pages)).collect();
        assert_eq!(pieces, [(2, 2), (4, 3)]);
    }

    #[test]
    fn runs_go_out_and_come_back_in_order() {
        let (from, to) = (ram(), ram());
        to.discard(Run { first: 0, pages: 7 }).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let runs = [Run { first: 3, pages: 2 }, Run { first: 0, pages: 1 }];
        from.write_to(&file, b"head", &runs).unwrap();
        file.seek(SeekFrom::Start(4)).unwrap();
        to.read_from(&file, &runs).unwrap();
        assert_eq!(first_bytes(&to), [1, 0, 0, 4, 5, 0, 0]);
        assert_eq!(to.read_from(&file, &runs).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        from.write_at(&file, Run { first: 5, pages: 2 }, 4096).unwrap();
        to.read_at(&file, Run { first: 5, pages: 2 }, 4096).unwrap();
        assert_eq!(first_bytes(&to), [1, 0, 0, 4, 5, 6, 7]);
    }

    #[test]
    fn no_call_moves_more_than_it_may() {
        let mut memory = [0u8; 10];
        let mut slice = |from: usize, bytes| libc::iovec {
            iov_base: memory.as_mut_ptr().wrapping_add(from).cast(),
            iov_len: bytes,
        };
        let slices = [(0, 3), (3, 6), (9, 1)].map(|(from, bytes)| slice(from, bytes)).to_vec();
        let mut calls = Vec::new();
        each_part(slices, 4, io::ErrorKind::WriteZero, |part| {
            calls.push(part.iter().map(|slice| slice.iov_len).collect::<Vec<_>>());
            // The third call moves less than it was given.
            if calls.len() == 3 { 1 } else { part.iter().map(|slice| slice.iov_len as isize).sum() }
        })
        .unwrap();
        assert_eq!(calls, [vec![3, 1], vec![4], vec![1, 1], vec![1]]);
    }

    #[test]
    fn zero_pages_are_known() {
        let ram = ram();
        assert!(!ram.is_zero(2));
        ram.discard(Run { first: 2, pages: 1 }).unwrap();
        assert!(ram.is_zero(2));
        ram.memory().write_obj(1u8, GuestAddress(2 * 4096 + 4095)).unwrap();
        assert!(!ram.is_zero(2));
    }
}
