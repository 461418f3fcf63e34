//! Makes a vCPU thread leave the guest: a signal whose handler sets `immediate_exit` in the thread's own `kvm_run`.
//!
//! Wherever the signal meets the thread, nothing is lost: inside KVM_RUN it ends with EINTR; before it, KVM_RUN sees
//! `immediate_exit`, completes the access that was under way and ends with EINTR (KVM API, 5, `immediate_exit`).
#![expect(unsafe_code, reason = "a signal handler that writes to the thread's kvm_run")]

use super::machine::lock;
use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: set by `Armed::new` on this same thread to a byte of the mapping that its vCPU owns, and cleared
        // before that vCPU can be dropped. A volatile store of one byte is what KVM expects from a signal handler.
        unsafe { ptr::write_volatile(flag, 1) };
    }
}

/// Installs the handler for the whole process.
pub fn install() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)
}

/// A vCPU as its thread and whoever saves it share it: its thread holds the lock while the guest runs, and lets go of it
/// while it stands still.
pub type SharedVcpu = Arc<Mutex<VcpuFd>>;

/// Makes the calling thread, which runs `vcpu`, one that can be kicked.
pub struct Armed {
    /// Keeps the mapping of `kvm_run` for as long as the handler may write to it.
    _vcpu: SharedVcpu,
}

impl Armed {
    /// To be called on the thread that runs `vcpu`.
    pub fn new(vcpu: SharedVcpu) -> Self {
        IMMEDIATE_EXIT.set(&raw mut lock(&vcpu).get_kvm_run().immediate_exit);
        Self { _vcpu: vcpu }
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Kicks the vCPU that `thread` runs. The thread looks at what is wanted as soon as it is out of the guest.
pub fn kick(thread: &JoinHandle<()>) -> io::Result<()> {
    thread.kill(SIGRTMIN()).map_err(io::Error::from)
}
