//! Giving guest pages back to the host.
//!
//! A page that was given back reads as zeros, or it was kept and reads as before; never as anything else. The standard asks
//! for less of a page in the balloon (virtio 1.2, section 5.5.6.1), but a driver that has negotiated
//! VIRTIO_BALLOON_F_PAGE_POISON wants a reported page back unchanged or full of `poison_val` (5.5.6.7.2), and Linux with
//! init_on_free=1 relies on its zeros. What gives zeros depends on what is behind RAM, which its owner knows: [`GiveBack`].
#![expect(unsafe_code, reason = "madvise and mmap on guest RAM")]

use crate::virtio::GuestRam;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use std::io;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// Bytes in a page, the guest's and the host's.
pub(super) const PAGE_BYTES: u64 = 4096;

/// How pages are given back: what the owner of guest RAM says of it at that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveBack {
    /// RAM is anonymous memory, or a shared mapping of a file: a page that is let go is zeros.
    Release,
    /// RAM is a private mapping of a file, which would show again: anonymous memory takes the place of pages.
    Replace,
    /// Something still fills RAM, and would fill it again: pages stay.
    Keep,
}

/// Frees the host memory behind the whole pages of `[start, start + bytes)` and notes them as written: they read as zeros from
/// then on. Returns the bytes given back; `None` if some of the range is not guest RAM, in which case nothing is.
pub(super) fn discard(ram: &GuestRam, start: u64, bytes: u64, how: GiveBack) -> Option<io::Result<u64>> {
    let end = start.checked_add(bytes)?;
    if !ram.check_range(GuestAddress(start), usize::try_from(bytes).ok()?) {
        return None;
    }
    if how == GiveBack::Keep {
        return Some(Ok(0));
    }
    let mut next = start.checked_next_multiple_of(PAGE_BYTES)?;
    let last = end - end % PAGE_BYTES;
    let mut done = 0;
    while next < last {
        match discard_in_region(ram, next, last - next, how) {
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
fn discard_in_region(ram: &GuestRam, start: u64, bytes: u64, how: GiveBack) -> io::Result<u64> {
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
    let guard = slice.ptr_guard_mut();
    let (start, length) = (guard.as_ptr().cast(), slice.len());
    // SAFETY: the slice is a live part of guest RAM of exactly these bytes, a multiple of the page size, so no other
    // memory is touched; guest RAM may change at any time, and nothing of ours refers into it but volatile accessors. A
    // mapping in its place is as long and as accessible, and KVM's memory slots, which name addresses, see it.
    unsafe {
        match how {
            GiveBack::Replace => {
                let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
                mmap_anonymous(start, length, ProtFlags::READ | ProtFlags::WRITE, flags).map(drop)
            }
            GiveBack::Release | GiveBack::Keep => madvise(start, length, advice),
        }
    }?;
    slice.bitmap().mark_dirty(0, slice.len());
    Ok(bytes)
}
