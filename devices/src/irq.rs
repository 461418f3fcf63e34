//! How devices raise interrupts and receive doorbells without knowing KVM.

use std::io;
use std::sync::Arc;
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

/// One MSI-X vector of one function, connected to the interrupt controller.
pub trait MsiVector: Send + Sync {
    /// Says where signals go; `None` disconnects. Called under the function's lock, never while a signal is raised.
    fn route(&self, message: Option<MsiMessage>) -> io::Result<()>;
    /// Raises the interrupt. Only called while routed.
    fn signal(&self) -> io::Result<()>;
}

/// What a PCI function needs from the hypervisor.
pub trait Wiring: Send + Sync {
    /// Makes a new, disconnected MSI-X vector.
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>>;
    /// Makes a guest write of 16 bits to guest physical `address` signal `event` instead of leaving the guest.
    fn bind_notify(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes `bind_notify` with the same arguments.
    fn unbind_notify(&self, address: u64, event: &EventFd) -> io::Result<()>;
}
