//! The system calls and the memory of block I/O that no safe crate covers. With [`super::ring`] the only `unsafe` of
//! the block device; it knows nothing of virtio.
#![expect(unsafe_code, reason = "scatter-gather I/O on guest RAM, OFD locks and BLKDISCARD have no safe wrapper")]

use super::super::GuestRam;
use super::super::chain::Segment;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vm_memory::{GuestMemory, Permissions};

/// BLKDISCARD of <linux/fs.h>, `_IO(0x12, 119)`: takes start and length, two 64-bit byte counts.
const BLKDISCARD: libc::Ioctl = 0x1277;
/// Most buffers a vectored call takes (UIO_MAXIOV). What does not fit is a short transfer, which is continued.
const MAX_VECTORS: usize = 1024;

/// Memory outside guest RAM that starts at an address O_DIRECT accepts.
pub struct Bounce {
    storage: Vec<u8>,
    start: usize,
    length: usize,
}

impl Bounce {
    /// `length` zero bytes at a multiple of `alignment`, a power of two.
    pub fn new(length: usize, alignment: usize) -> Self {
        let storage = vec![0; length + alignment];
        let start = storage.as_ptr().align_offset(alignment).min(alignment);
        Self { storage, start, length }
    }

    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.storage.get_mut(self.start..self.start + self.length).unwrap_or_default()
    }
}

/// What keeps the memory behind the vectors mapped.
enum Owner {
    Guest(#[expect(dead_code, reason = "held, never read")] Arc<GuestRam>),
    Bounce(Bounce),
}

/// Scatter-gather memory of one operation. It owns what it points into, so the pointers live as long as it does.
pub struct Buffers {
    vectors: Vec<libc::iovec>,
    owner: Owner,
}

// SAFETY: the pointers lead into memory that `owner` keeps alive wherever it is moved to: heap or a mapping, both
// reachable from every thread. They are only handed to the kernel.
unsafe impl Send for Buffers {}

impl Buffers {
    /// The host memory of `segments`, at most [`MAX_VECTORS`] pieces of it.
    pub fn guest(ram: &Arc<GuestRam>, segments: impl Iterator<Item = Segment>) -> Self {
        let mut vectors = Vec::new();
        for segment in segments {
            // Segments were checked against this RAM; one that were not would end the transfer early, as a short one.
            let Ok(slices) = ram.get_slices(segment.address, segment.length as usize, Permissions::ReadWrite) else {
                break;
            };
            for slice in slices.map_while(Result::ok) {
                vectors.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            }
            if vectors.len() >= MAX_VECTORS {
                vectors.truncate(MAX_VECTORS);
                break;
            }
        }
        Self { vectors, owner: Owner::Guest(Arc::clone(ram)) }
    }

    /// Bytes `from..to` of `bounce`.
    pub fn bounce(mut bounce: Bounce, from: usize, to: usize) -> Self {
        let part = bounce.bytes().get_mut(from..to).unwrap_or_default();
        let vectors = vec![libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() }];
        Self { vectors, owner: Owner::Bounce(bounce) }
    }

    /// The bounce buffer, if that is what this was.
    pub fn into_bounce(self) -> Option<Bounce> {
        match self.owner {
            Owner::Guest(_) => None,
            Owner::Bounce(bounce) => Some(bounce),
        }
    }

    /// How many bytes there is room for.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        self.vectors.iter().map(|vector| vector.iov_len).sum()
    }

    /// For the kernel: first vector and how many.
    pub(super) fn vectors(&self) -> (*const libc::iovec, u32) {
        // At most MAX_VECTORS.
        (self.vectors.as_ptr(), u32::try_from(self.vectors.len()).unwrap_or(0))
    }
}

/// A byte count or an error as Linux returns it.
fn counted(result: libc::ssize_t) -> io::Result<u32> {
    // One call moves less than 2 GiB.
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(u32::try_from(result).unwrap_or(u32::MAX)) }
}

/// File offsets are below 2^63: the image's size is, and requests end inside it.
fn signed(offset: u64) -> i64 {
    i64::try_from(offset).unwrap_or(i64::MAX)
}

/// preadv: reads at `offset` into `into`; returns bytes, fewer than asked at the end of the file.
pub fn read(file: &File, offset: u64, into: &mut Buffers) -> io::Result<u32> {
    let (vectors, count) = into.vectors();
    // SAFETY: the vectors are owned by `into`, which is borrowed for the length of the call, and point into memory
    // that it keeps alive. Guest RAM is shared with the guest anyway: no Rust reference to it exists.
    counted(unsafe { libc::preadv(file.as_raw_fd(), vectors, count.cast_signed(), signed(offset)) })
}

/// pwritev2: writes `from` at `offset`, to stable storage before the return if `through`; returns bytes.
pub fn write(file: &File, offset: u64, from: &Buffers, through: bool) -> io::Result<u32> {
    let (vectors, count) = from.vectors();
    let flags = if through { libc::RWF_DSYNC } else { 0 };
    // SAFETY: as in `read`.
    counted(unsafe { libc::pwritev2(file.as_raw_fd(), vectors, count.cast_signed(), signed(offset), flags) })
}

/// Tells a block device that `length` bytes at `offset` are no longer needed.
pub fn discard(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let range = [offset, length];
    // SAFETY: BLKDISCARD reads two 64-bit numbers, which outlive the call.
    counted(unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } as libc::ssize_t).map(drop)
}

/// An OFD lock of `kind` on a whole file: start and length 0, however long it is; the process id must be 0.
fn whole(kind: i32) -> libc::flock {
    libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 }
}

fn lock_kind(exclusive: bool) -> i32 {
    if exclusive { libc::F_WRLCK } else { libc::F_RDLCK }
}

fn set_lock(file: &File, kind: i32) -> io::Result<()> {
    let lock = whole(kind);
    // SAFETY: F_OFD_SETLK reads one `flock`, which outlives the call.
    counted(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } as libc::ssize_t).map(drop)
}

/// Takes an OFD lock on all of `file` without waiting: a write lock if `exclusive`, else a read lock. The lock belongs
/// to the open file description and ends with [`unlock`] or with the last descriptor of it.
pub fn lock(file: &File, exclusive: bool) -> io::Result<()> {
    set_lock(file, lock_kind(exclusive))
}

/// Gives back what [`lock`] took; without a lock nothing happens.
pub fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK)
}

/// Whether another open file description has a lock that stands in the way of [`lock`].
pub fn conflicts(file: &File, exclusive: bool) -> io::Result<bool> {
    let mut lock = whole(lock_kind(exclusive));
    // SAFETY: F_OFD_GETLK reads and writes one `flock`, which outlives the call.
    counted(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } as libc::ssize_t)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
