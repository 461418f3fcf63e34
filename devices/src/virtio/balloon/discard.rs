//! Giving guest pages back to the host.
#![expect(unsafe_code, reason = "madvise on guest RAM")]

use crate::virtio::GuestRam;
use rustix::mm::{Advice, madvise};
use std::io;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// Bytes in a page, the guest's and the host's.
pub(super) const PAGE_BYTES: u64 = 4096;

/// Frees the host memory behind the whole pages of `[start, start + bytes)` and notes them as written, since their
/// contents change: anonymous and shared memory reads as zero from then on, a private mapping of a file shows the file
/// again. Returns the bytes given back; `None` if some of the range is not guest RAM, in which case nothing is.
pub(super) fn discard(ram: &GuestRam, start: u64, bytes: u64) -> Option<io::Result<u64>> {
    let end = start.checked_add(bytes)?;
    if !ram.check_range(GuestAddress(start), usize::try_from(bytes).ok()?) {
        return None;
    }
    let mut next = start.checked_next_multiple_of(PAGE_BYTES)?;
    let last = end - end % PAGE_BYTES;
    let mut done = 0;
    while next < last {
        match discard_in_region(ram, next, last - next) {
            Ok(bytes) => {
                done += bytes;
                next += bytes;
            }
            Err(error) => return Some(Err(error)),
        }
    }
    Some(Ok(done))
}

/// Does so for what of the range lies in the first region it touches; never returns zero.
fn discard_in_region(ram: &GuestRam, start: u64, bytes: u64) -> io::Result<u64> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let region = ram.find_region(GuestAddress(start)).ok_or_else(outside)?;
    let offset = start - region.start_addr().0;
    let bytes = bytes.min(region.len() - offset);
    // Only a region that does not end on a page boundary could leave less than a page.
    if !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(outside());
    }
    let slice = region.get_slice(MemoryRegionAddress(offset), bytes as usize).map_err(io::Error::other)?;
    // Shared pages belong to the file: dropping the mapping alone would keep them.
    let shared = region.file_offset().is_some() && region.flags() & libc::MAP_SHARED != 0;
    let advice = if shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
    // SAFETY: the slice is a live part of guest RAM of exactly these bytes, a multiple of the page size, so no other
    // memory is touched; guest RAM may change at any time, and nothing of ours refers into it but volatile accessors.
    unsafe { madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), advice) }?;
    slice.bitmap().mark_dirty(0, slice.len());
    Ok(bytes)
}
