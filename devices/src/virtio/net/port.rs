//! Frames between a descriptor and guest RAM: one system call a frame.
//!
//! Refuses to know rings and headers. Whatever keeps frame boundaries will do as a port: a tap, or a datagram socket.
#![expect(unsafe_code, reason = "readv and writev on guest RAM, to which Rust may hold no slice")]

use crate::virtio::GuestRam;
use crate::virtio::chain::{Segment, slice};
use smallvec::SmallVec;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemory, Permissions};

/// Most pieces in one call: the kernel's UIO_MAXIOV.
pub(super) const MAX_PIECES: usize = 1024;

/// Work the peer of a port may leave to whoever reads from it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// Frames without a checksum.
    pub checksum: bool,
    /// TCP over IPv4 frames up to 64 KiB.
    pub tso4: bool,
    /// TCP over IPv6 frames up to 64 KiB.
    pub tso6: bool,
    /// Such frames with ECN bits.
    pub ecn: bool,
}

/// The host's end of the cable. Non-blocking.
pub trait Port: AsFd + Send + Sync {
    /// What people call it.
    fn name(&self) -> &str;
    /// Largest packet without the Ethernet header, bytes.
    fn mtu(&self) -> u16;
    /// Says what may be left to the guest.
    ///
    /// # Errors
    /// The host cannot do it.
    fn set_offload(&self, offload: Offload) -> io::Result<()>;
}

type Pieces = SmallVec<[libc::iovec; 64]>;

/// Reads one frame into `segments` and what does not fit into `rest`, notes the pages as written, and returns the
/// frame's length. A frame longer than both is cut.
pub(super) fn read_frame(port: &impl AsFd, ram: &GuestRam, segments: &[Segment], rest: &mut [u8]) -> io::Result<usize> {
    let mut pieces = pieces(ram, segments, Permissions::Write)?;
    pieces.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
    // SAFETY: every piece but the last lies in guest RAM, whose mapping `ram` keeps alive and which anyone may write at
    // any time; the last is `rest`, borrowed for the call. A count above MAX_PIECES is refused.
    let read = unsafe { libc::readv(port.as_fd().as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
    let bytes = length(read)?;
    mark_dirty(ram, segments, bytes);
    Ok(bytes)
}

/// Writes `segments` as one frame.
pub(super) fn write_frame(port: &impl AsFd, ram: &GuestRam, segments: &[Segment]) -> io::Result<usize> {
    let pieces = pieces(ram, segments, Permissions::Read)?;
    // SAFETY: as in `read_frame`; the kernel only reads from the pieces.
    length(unsafe { libc::writev(port.as_fd().as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) })
}

/// The host's view of the segments.
fn pieces(ram: &GuestRam, segments: &[Segment], access: Permissions) -> io::Result<Pieces> {
    let mut pieces = Pieces::new();
    for segment in segments {
        for slice in ram.get_slices(segment.address, segment.length as usize, access).map_err(io::Error::other)? {
            let slice = slice.map_err(io::Error::other)?;
            let base = slice.ptr_guard_mut().as_ptr().cast();
            pieces.push(libc::iovec { iov_base: base, iov_len: slice.len() });
        }
    }
    Ok(pieces)
}

fn mark_dirty(ram: &GuestRam, segments: &[Segment], bytes: usize) {
    for segment in slice(segments, 0, bytes as u64) {
        let length = segment.length as usize;
        // The same lookup has just succeeded for the whole segment.
        for slice in ram.get_slices(segment.address, length, Permissions::Write).into_iter().flatten().flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}

fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
