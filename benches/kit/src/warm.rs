//! Memory that the host under this machine has backed: what it has not costs its first user several times as much.
#![expect(unsafe_code, reason = "a mapping that is only touched")]

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;

/// Memory that is touched, in huge pages, as monitors have guest memory. Once this is dropped, who measures next takes its pages
/// from there. What lies free is given back to the host under this machine, within a second and a half by Linux's free page
/// reporting on one such machine, or at once where there is much of it: dropped just before what is measured, it is still there.
pub struct WarmMemory {
    start: *mut c_void,
    bytes: usize,
}

impl WarmMemory {
    /// Touches so much.
    pub fn touch(mib: u64) -> Self {
        let bytes = (mib as usize) << 20;
        // SAFETY: a new mapping, which nothing else knows, is advised on and written to.
        let start = unsafe {
            let start = mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
            .unwrap();
            let _a_kernel_without = madvise(start, bytes, Advice::LinuxHugepage);
            for page in (0..bytes).step_by(4096) {
                start.cast::<u8>().add(page).write_volatile(1);
            }
            start
        };
        Self { start, bytes }
    }
}

impl Drop for WarmMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping that `touch` made, which nothing else knows.
        unsafe { munmap(self.start, self.bytes) }.unwrap();
    }
}
