//! How a virtio function looks on the bus: identity, capabilities, and one BAR (virtio 1.2, 4.1.2 to 4.1.4).
//!
//! Each structure has a page of the BAR to itself, which makes finding the one an access means a shift.

use crate::pci::config::{CAPABILITY_MSIX, CAPABILITY_VENDOR};
use crate::pci::{ConfigSpace, Identity, msix};

/// Bytes of the BAR.
pub(super) const BAR_BYTES: u32 = 0x8000;
/// Bytes between the notification addresses of two queues.
pub(super) const NOTIFY_STRIDE: u32 = 4;
/// Bytes of each structure's place in the BAR.
const PAGE: u32 = 0x1000;
/// Most queues of a device: one vector each and one for the configuration fill the vector table's page.
pub(super) const MAX_QUEUES: usize = PAGE as usize / msix::ENTRY_BYTES - 1;

const VIRTIO_VENDOR: u16 = 0x1af4;
/// Device id of a virtio 1.x function: this plus the virtio device id.
const VIRTIO_DEVICE_BASE: u16 = 0x1040;

const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI_ACCESS: u8 = 5;

/// A structure in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Region {
    Common,
    Isr,
    Device,
    Notify,
    MsixTable,
    MsixPending,
}

impl Region {
    const ALL: [Region; 6] =
        [Region::Common, Region::Isr, Region::Device, Region::Notify, Region::MsixTable, Region::MsixPending];

    /// Where it starts in the BAR.
    pub(super) const fn offset(self) -> u32 {
        self as u32 * PAGE
    }

    /// The structure at `offset` in the BAR, and the offset in it.
    pub(super) fn at(offset: u64) -> Option<(Region, usize)> {
        let page = usize::try_from(offset / u64::from(PAGE)).ok()?;
        Some((*Self::ALL.get(page)?, (offset % u64::from(PAGE)) as usize))
    }
}

/// Where in configuration space the parts are that a write may act on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capabilities {
    /// MSI-X message control, two bytes.
    pub msix_control: usize,
    /// The PCI configuration access capability: bar, offset, length and data in it.
    pub access: usize,
}

impl Capabilities {
    /// BAR number.
    pub(super) const ACCESS_BAR: usize = 4;
    /// Offset in the BAR.
    pub(super) const ACCESS_OFFSET: usize = 8;
    /// Bytes of an access.
    pub(super) const ACCESS_LENGTH: usize = 12;
    /// Window of four bytes to the BAR.
    pub(super) const ACCESS_DATA: usize = 16;
}

/// Configuration space of a virtio function with `vectors` interrupt vectors.
pub(super) fn config_space(device_type: u32, class: u32, queues: usize, vectors: u16) -> (ConfigSpace, Capabilities) {
    let device = VIRTIO_DEVICE_BASE + device_type as u16;
    let mut space = ConfigSpace::new(&Identity {
        vendor: VIRTIO_VENDOR,
        device,
        class,
        revision: 1, // not a transitional device
        subsystem_vendor: VIRTIO_VENDOR,
        subsystem: device,
    })
    .with_bar(BAR_BYTES);

    let mut table = [0; 10];
    table[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    table[2..6].copy_from_slice(&Region::MsixTable.offset().to_le_bytes());
    table[6..].copy_from_slice(&Region::MsixPending.offset().to_le_bytes());
    let control = msix::CONTROL_ENABLE | msix::CONTROL_MASK;
    let msix = space.add_capability(CAPABILITY_MSIX, &table, &control.to_le_bytes());

    let mut add = |kind, region: Region, length: u32, more: &[u8], writable: &[u8]| {
        // virtio_pci_cap without the two bytes that every capability starts with.
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend(region.offset().to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(more);
        space.add_capability(CAPABILITY_VENDOR, &body, writable)
    };
    add(CAP_COMMON, Region::Common, super::registers::BYTES as u32, &[], &[]);
    add(CAP_NOTIFY, Region::Notify, queues as u32 * NOTIFY_STRIDE, &NOTIFY_STRIDE.to_le_bytes(), &[]);
    add(CAP_ISR, Region::Isr, 1, &[], &[]);
    add(CAP_DEVICE, Region::Device, PAGE, &[], &[]);
    let mut writable = [0xff; 18];
    writable[..2].fill(0); // capability length and type
    writable[3..6].fill(0); // id and padding
    let access = add(CAP_PCI_ACCESS, Region::Common, 0, &[0; 4], &writable);
    (space, Capabilities { msix_control: msix + 2, access })
}
