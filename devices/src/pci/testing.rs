//! An interrupt controller and doorbell bindings that only remember, for tests without KVM.

use crate::{MsiMessage, MsiVector, Wiring};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// What was asked of the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// A vector was made.
    Made,
    /// A vector was connected or disconnected.
    Route(Option<MsiMessage>),
    /// A vector connected to this message was raised.
    Signal(MsiMessage),
    /// A doorbell was bound to this address.
    Bind(u64),
    /// A doorbell was unbound from this address.
    Unbind(u64),
}

/// The recording fake.
#[derive(Default)]
pub struct Recorder {
    calls: Arc<Mutex<Vec<Call>>>,
    bound: Mutex<HashMap<u64, EventFd>>,
    /// Refuses everything while set.
    pub refuses: Arc<AtomicBool>,
}

struct Vector {
    calls: Arc<Mutex<Vec<Call>>>,
    routed: Mutex<Option<MsiMessage>>,
    refuses: Arc<AtomicBool>,
}

impl Recorder {
    /// Takes the calls since the last time.
    pub fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    /// A guest's write to `address`, if a doorbell takes it.
    pub fn notify(&self, address: u64) -> bool {
        self.bound.lock().unwrap().get(&address).is_some_and(|event| event.write(1).is_ok())
    }

    fn record(&self, call: Call) -> io::Result<()> {
        record(&self.refuses, &self.calls, call)
    }
}

fn record(refuses: &AtomicBool, calls: &Mutex<Vec<Call>>, call: Call) -> io::Result<()> {
    if refuses.load(Ordering::Relaxed) {
        return Err(io::Error::other("refused"));
    }
    calls.lock().unwrap().push(call);
    Ok(())
}

impl Wiring for Recorder {
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        self.record(Call::Made)?;
        let (calls, refuses) = (self.calls.clone(), self.refuses.clone());
        Ok(Arc::new(Vector { calls, routed: Mutex::default(), refuses }))
    }

    fn bind_notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.record(Call::Bind(address))?;
        assert!(self.bound.lock().unwrap().insert(address, event.try_clone()?).is_none(), "bound twice");
        Ok(())
    }

    fn unbind_notify(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        self.record(Call::Unbind(address))?;
        assert!(self.bound.lock().unwrap().remove(&address).is_some(), "unbound twice");
        Ok(())
    }
}

impl MsiVector for Vector {
    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        record(&self.refuses, &self.calls, Call::Route(message))?;
        let before = std::mem::replace(&mut *self.routed.lock().unwrap(), message);
        assert_ne!(before, message, "only real changes are routed");
        Ok(())
    }

    fn signal(&self) -> io::Result<()> {
        let message = self.routed.lock().unwrap().expect("only a routed vector is raised");
        record(&self.refuses, &self.calls, Call::Signal(message))
    }
}
