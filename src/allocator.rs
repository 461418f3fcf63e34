//! How the C library hands out memory.
#![expect(unsafe_code, reason = "mallopt")]

/// One heap for all threads: nobody here allocates much. Else the first allocation of each thread maps 128 MiB of addresses for a heap
/// of its own, in the way of whoever maps or faults meanwhile: a tenth of a start. To be called before there are threads.
pub fn share_one_heap() {
    // SAFETY: plain integers. That it is not obeyed, where it returns 0, only costs time.
    let _obeyed = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
