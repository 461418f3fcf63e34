//! fork(2), for a process with one thread: the child goes on with all that the parent has read, checked and holds.
#![expect(unsafe_code, reason = "fork, which is unsafe where there are other threads")]

use rustix::process::Pid;
use std::io;

/// A child that goes on where the caller is; `None` in it. Its caller has made no thread.
///
/// # Errors
/// The system's, and EBUSY where there are other threads.
pub fn fork() -> io::Result<Option<Pid>> {
    if std::fs::read_dir("/proc/self/task")?.count() > 1 {
        return Err(rustix::io::Errno::BUSY.into());
    }
    // SAFETY: there is no other thread that could hold a lock, of the allocator say, which nobody would release in the child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}
