//! System calls by their number, and a ring: what has no safe wrapper, since it is not meant to be called.
#![expect(unsafe_code, reason = "system calls that no program of ours makes")]

use io_uring::{IoUring, opcode, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Makes a system call with plain numbers. None of those used here would harm this process if it came through.
pub fn call(number: libc::c_long, arguments: [u64; 6]) -> io::Result<u64> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: no argument is a pointer to memory of ours; a call that takes one is given null.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result.cast_unsigned()) }
}

/// Reads the start of `file` with a ring of its own.
pub fn read_with_ring(file: &File) -> io::Result<Vec<u8>> {
    let mut ring = IoUring::new(4)?;
    let mut bytes = vec![0; 64];
    let read = opcode::Read::new(types::Fd(file.as_raw_fd()), bytes.as_mut_ptr(), 64).build();
    // SAFETY: the buffer is 64 bytes long, and the call below waits until the kernel has done with it.
    unsafe { ring.submission().push(&read) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().ok_or(io::ErrorKind::UnexpectedEof)?.result();
    let count = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))?;
    bytes.truncate(count);
    Ok(bytes)
}
