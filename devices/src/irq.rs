//! How devices raise interrupts and receive doorbells without knowing KVM.
//!
//! Raising is synchronous: when a call returns, the interrupt is in the interrupt controller's own state. So once the
//! devices stand still none is on its way, and whoever saves the interrupt controllers after that has all of them.

use std::io;
use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line into the I/O APIC.
pub trait IrqLine: Send + Sync {
    /// Raises one edge.
    fn trigger(&self) -> io::Result<()>;
}

/// A level-triggered interrupt line into the I/O APIC: while it is high, the interrupt is pending, so that none is lost
/// before the guest has unmasked it.
pub trait LevelLine: Send + Sync {
    /// Drives the line.
    fn set(&self, high: bool) -> io::Result<()>;
}

/// A message-signalled interrupt: one memory write (PCI 3.0, 6.8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address, bytes.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// What a PCI function needs from the hypervisor.
pub trait Wiring: Send + Sync {
    /// Sends `message` to the local APICs. One that names none is dropped, as on a bus.
    fn signal(&self, message: MsiMessage) -> io::Result<()>;
    /// Makes a guest write of 16 bits to guest physical `address` signal `event` instead of leaving the guest.
    fn bind_notify(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes `bind_notify` with the same arguments.
    fn unbind_notify(&self, address: u64, event: &EventFd) -> io::Result<()>;
}
