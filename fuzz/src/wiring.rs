//! The hypervisor's side of a PCI function: it holds every call against the contract of `Wiring` and `MsiVector`.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use sterna_devices::{MsiMessage, MsiVector, Wiring};
use vmm_sys_util::eventfd::EventFd;

/// The checking fake.
#[derive(Default)]
pub struct Checker {
    /// Doorbells by address; as in KVM, an address that is taken refuses another.
    bound: Mutex<HashMap<u64, EventFd>>,
    refuses: Arc<AtomicBool>,
}

struct Vector {
    routed: Mutex<Option<MsiMessage>>,
    refuses: Arc<AtomicBool>,
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
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        permitted(&self.refuses)?;
        Ok(Arc::new(Vector { routed: Mutex::default(), refuses: self.refuses.clone() }))
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

impl MsiVector for Vector {
    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        permitted(&self.refuses)?;
        *lock(&self.routed) = message;
        Ok(())
    }

    fn signal(&self) -> io::Result<()> {
        assert!(lock(&self.routed).is_some(), "a vector was raised that is not routed");
        permitted(&self.refuses)
    }
}
