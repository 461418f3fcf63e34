//! Signals that end a process at once, with a terminal put back first.
//!
//! A crash, an abort and SIGQUIT leave no time for anything else: their handler restores the terminal and lets the signal do what it
//! would have done. It refuses to know what was wrong.
#![expect(unsafe_code, reason = "signal handlers")]

use libc::{SA_ONSTACK, SA_SIGINFO, SIG_DFL, SIG_ERR, c_int, c_void, sigaction, siginfo_t};
use libc::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGQUIT, SIGSEGV, SIGTRAP};
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

/// What ends a process with a core dump, by default.
const SIGNALS: [c_int; 7] = [SIGQUIT, SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP];

/// What was done at each of [`SIGNALS`] before: the runtime names a stack that has overflowed.
static FORMER: [OnceLock<sigaction>; SIGNALS.len()] = [const { OnceLock::new() }; SIGNALS.len()];
/// What is done first.
static FIRST: OnceLock<fn()> = OnceLock::new();

/// Calls `first` when one of these signals arrives, from now on. It must do only what a signal handler may (signal-safety(7)).
///
/// # Errors
/// What sigaction(2) says.
pub fn call_first(first: fn()) -> io::Result<()> {
    let _once = FIRST.set(first);
    for (signal, former) in SIGNALS.into_iter().zip(&FORMER) {
        let mut action = MaybeUninit::<sigaction>::zeroed();
        // SAFETY: a null pointer asks for the action only, which is written whole when the call succeeds.
        let asked = unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) };
        if asked != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: written above, and plain data that may be all zeros.
        let mut action = unsafe { action.assume_init() };
        if former.set(action).is_err() {
            continue; // ours already
        }
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        // SAFETY: the handler calls only what a signal handler may, on the runtime's signal stack where a thread's own is full.
        let set = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
        if set != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_signal(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    if let Some(first) = FIRST.get() {
        first();
    }
    let former = SIGNALS.iter().position(|known| *known == signal).and_then(|place| FORMER[place].get());
    // SAFETY: sigaction, signal, raise and _exit may be called in a handler; `former` is what sigaction gave, and the kernel's `info` is
    // valid for the length of the handler.
    unsafe {
        let is_sent = (*info).si_code <= 0 || matches!(signal, SIGQUIT | SIGABRT);
        match former {
            // What an instruction raised it raises again, for whoever was asked before.
            Some(former) if !is_sent && libc::sigaction(signal, former, ptr::null_mut()) == 0 => {}
            // What somebody sent does not come again by itself, and the runtime's handler takes it for nothing.
            Some(_) if is_sent && libc::signal(signal, SIG_DFL) != SIG_ERR => {
                libc::raise(signal);
            }
            _ => libc::_exit(128 + signal),
        }
    }
}
