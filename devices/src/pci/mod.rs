//! PCI: configuration space, MSI-X, and the one bus of a machine.
//!
//! Conventional PCI functions (PCI 3.0) behind an ECAM window, so no PCI Express capability; one bus, function 0 only,
//! one 32-bit memory BAR a function, MSI-X only. This folder refuses to know virtio and KVM.

pub mod config;
pub mod host_bridge;
pub mod msix;
pub mod segment;
#[cfg(test)]
pub(crate) mod testing;

pub use config::{ConfigSpace, Identity};
pub use segment::{BarWindow, ConfigPorts, Ecam, PciError, PciSegment};

/// A PCI function: configuration space and one memory BAR.
///
/// Called under the function's own lock and no other. Everything in a call comes from the guest: `offset` is inside
/// the space meant, `offset + data.len()` too, `data` is of any length.
pub trait PciFunction: Send {
    /// Its configuration space, as the bus needs it to place and find the BAR.
    fn config(&self) -> &ConfigSpace;
    /// The same, to place the BAR before the machine runs.
    fn config_mut(&mut self) -> &mut ConfigSpace;
    /// Reads configuration space.
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }
    /// Writes configuration space.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config_mut().write(offset, data);
    }
    /// Reads BAR 0, `offset` bytes in.
    fn read_bar(&mut self, offset: u64, data: &mut [u8]);
    /// Writes BAR 0, `offset` bytes in.
    fn write_bar(&mut self, offset: u64, data: &[u8]);
    /// Back to the state of power-on; the BAR is where the bus put it.
    fn reset(&mut self);
}
