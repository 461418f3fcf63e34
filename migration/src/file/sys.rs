//! The system calls of files that no safe crate covers: mapping over guest RAM, and OFD locks.
#![expect(unsafe_code, reason = "mmap over guest RAM and OFD locks have no safe wrapper")]

use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Maps `bytes` of `file` from `offset` on privately over guest RAM at `address`, which comes from [`crate::ram::Ram::pieces`] with
/// that length.
pub(super) fn map_over(address: *mut u8, bytes: u64, file: &File, offset: u64) -> io::Result<()> {
    let (protection, flags) =
        (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE);
    // SAFETY: the range is exactly guest RAM, which is mapped, is only reached through pointers and may change at any moment; the
    // mapping that takes its place is as long and as accessible.
    unsafe { mmap(address.cast(), bytes as usize, protection, flags, file, offset) }?;
    Ok(())
}

/// Takes an OFD lock on all of `file` without waiting: it holds between hosts on NFSv4 and cluster file systems, and as long as a
/// descriptor or a mapping of this opening is there. False when somebody else has one that is in the way.
pub(super) fn lock(file: &File, exclusive: bool) -> io::Result<bool> {
    set_lock(file, if exclusive { libc::F_WRLCK } else { libc::F_RDLCK })
}

/// Lets go of what [`lock`] took.
pub(super) fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK).map(drop)
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<bool> {
    // Start and length 0 mean the whole file, however long; the process id must be 0 for OFD locks.
    let whole = libc::flock { l_type: kind as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 };
    // SAFETY: F_OFD_SETLK reads one `flock`, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) { Ok(false) } else { Err(error) }
}
