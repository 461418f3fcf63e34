//! Memory that the host under this machine has backed: what it has not costs its first user several times as much.
#![expect(unsafe_code, reason = "advising the kernel on a mapping")]

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Touches and frees so much memory in huge pages, as monitors have guest memory. Who measures next takes its pages from there; where
/// free pages are given back to the host under this machine that is so for some seconds.
pub fn warm_memory(mib: u64) {
    let bytes = (mib as usize) << 20;
    // SAFETY: a new mapping, which nothing else knows, is advised on, written to and taken away.
    unsafe {
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
        munmap(start, bytes).unwrap();
    }
}
