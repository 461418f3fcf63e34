//! Virtio 1.x devices: what every model implements, and what the transport lends it.
//!
//! A model holds its backend and its features, nothing of the rings: the transport ([`pci`]) owns the queues, lends
//! them through [`Io`] for the length of one reaction, and so is the only one to save, reset and drain them.
//! A model never panics on what it finds in a ring: it returns a [`Fault`], and the transport sets NEEDS_RESET.

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod net;
pub mod pci;
pub mod rng;
pub mod vsock;

mod io;
#[cfg(test)]
pub(crate) mod testing;

pub use chain::{Chain, Fault};
pub use io::{BUDGET, Interrupts, Io};

use crate::state::{Saved, StateError};
use std::os::fd::RawFd;
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;
use vmm_sys_util::epoll::EventSet;

/// Guest RAM with a bitmap of the monitor's own writes, which KVM's dirty log does not see.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// A descriptor that wakes a device from the host side (tap, timer, completion event) and what to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The descriptor, owned by the device and open for as long as the device exists.
    pub fd: RawFd,
    /// What to wait for, level-triggered.
    pub events: EventSet,
}

/// A virtio device model (virtio 1.2, section 5). Register space, queues and interrupts belong to the transport.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.2, section 5: 1 net, 2 block, ...).
    fn device_type(&self) -> u32;
    /// PCI class code, 24 bits: class, subclass, programming interface.
    fn pci_class(&self) -> u32;
    /// Largest size of each queue, in descriptors; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];
    /// Feature bits offered by the device. The transport adds VERSION_1, RING_EVENT_IDX and RING_INDIRECT_DESC.
    fn features(&self) -> u64;
    /// Reads device configuration; `offset + data.len()` may lie outside, which reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes device configuration; read-only and unknown fields are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// DRIVER_OK was set: `io.features()` are negotiated and the queues are usable.
    fn activate(&mut self, io: &mut Io) -> Result<(), Fault>;
    /// The driver notified `queue`, or the device was resumed and must look again.
    fn queue_notified(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault>;
    /// The descriptor to wait on now, asked again after every reaction. `None` waits on nothing.
    fn backend(&self) -> Option<Backend>;
    /// [`Self::backend`] is ready. May be called spuriously.
    fn backend_ready(&mut self, io: &mut Io) -> Result<(), Fault>;
    /// Finishes what is in flight, so that after the return nothing reads or writes guest RAM or the rings until the
    /// next call. Called before a pause and before a reset.
    fn quiesce(&mut self, io: &mut Io) -> Result<(), Fault>;
    /// The machine has just started on a new host, or goes on here after a move that failed. It is about to run, and
    /// `restore` was called on this device in the first case only.
    fn moved(&mut self, io: &mut Io) -> Result<(), Fault>;
    /// Forgets the driver: back to the state after construction. In-flight work was finished by `quiesce`.
    fn reset(&mut self);
    /// The model's own state; queues and registers are the transport's. Called after `quiesce`, and also on a running
    /// device by way of rehearsal: it changes nothing.
    fn save(&self) -> Saved;
    /// Takes over a state, on a device that has never run; `activate` follows where the driver was up. May be repeated
    /// with another state.
    ///
    /// # Errors
    /// A state that is not one of this device, which is then as it was.
    fn restore(&mut self, saved: &Saved) -> Result<(), StateError>;
}
