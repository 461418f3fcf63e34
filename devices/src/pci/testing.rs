//! An interrupt controller and doorbell bindings that only remember, for tests without KVM.

use crate::{MsiMessage, Wiring};
use std::collections::HashMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use vmm_sys_util::eventfd::EventFd;

/// What was asked of the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// This message was sent.
    Signal(MsiMessage),
    /// A doorbell was bound to this address.
    Bind(u64),
    /// A doorbell was unbound from this address.
    Unbind(u64),
}

/// The recording fake.
#[derive(Default)]
pub struct Recorder {
    calls: Mutex<Vec<Call>>,
    bound: Mutex<HashMap<u64, EventFd>>,
    /// Refuses everything while set.
    pub refuses: AtomicBool,
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
        if self.refuses.load(Ordering::Relaxed) {
            return Err(io::Error::other("refused"));
        }
        self.calls.lock().unwrap().push(call);
        Ok(())
    }
}

impl Wiring for Recorder {
    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        self.record(Call::Signal(message))
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
