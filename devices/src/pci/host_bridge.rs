//! The host bridge in slot 0: an identity, and nothing behind it. Linux wants to see one to trust the bus.

use super::{ConfigSpace, Identity, PciFunction};

/// A generic host bridge.
pub struct HostBridge(ConfigSpace);

impl HostBridge {
    /// Red Hat's generic PCI Express host bridge, for which no driver looks further.
    pub fn new() -> Self {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_00_00,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        };
        Self(ConfigSpace::new(&identity))
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl PciFunction for HostBridge {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }
    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.0
    }
    fn read_bar(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&mut self, _offset: u64, _data: &[u8]) {}
    fn reset(&mut self) {
        self.0.reset();
    }
}
