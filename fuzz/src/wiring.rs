//! The hypervisor's side of a PCI function: it holds every call against the contract of `Wiring`.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use sterna_devices::{MsiMessage, Wiring};
use vmm_sys_util::eventfd::EventFd;

/// The checking fake.
#[derive(Default)]
pub struct Checker {
    /// Doorbells by address; as in KVM, an address that is taken refuses another.
    bound: Mutex<HashMap<u64, EventFd>>,
    refuses: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn permitted(refuses: &AtomicBool) -> io::Result<()> {
    if refuses.load(Ordering::Relaxed) { Err(io::Error::other("refused")) } else { Ok(()) }
}

impl Checker {
    /// From now on, refuses everything, or nothing.
    pub fn set_refuses(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::Relaxed);
    }

    /// A guest's write to `address`: whether a doorbell takes it.
    pub fn notify(&self, address: u64) -> bool {
        lock(&self.bound).get(&address).is_some_and(|event| event.write(1).is_ok())
    }

    /// Addresses at which a write does not leave the guest.
    pub fn bound(&self) -> usize {
        lock(&self.bound).len()
    }
}

impl Wiring for Checker {
    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        assert_eq!(message.address & 3, 0, "a message is a write of a double word");
        permitted(&self.refuses)
    }

    fn bind_notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        permitted(&self.refuses)?;
        let mut bound = lock(&self.bound);
        if bound.contains_key(&address) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        assert!(event.as_raw_fd() >= 0);
        bound.insert(address, event.try_clone()?);
        Ok(())
    }

    fn unbind_notify(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        // KVM never refuses to undo what it did.
        assert!(lock(&self.bound).remove(&address).is_some(), "unbound at {address:#x}, where nothing was bound");
        Ok(())
    }
}
