//! virtio-blk (virtio 1.2, section 5.2): one queue onto a raw image.
//!
//! One queue, since one event loop serves all devices of a VM: a second would be another ring for the same thread. It
//! offers the same features whatever the host can do, so that they stay as they are when the VM moves: what the host
//! lacks is answered with UNSUPP (discard) or done otherwise (zeroing). No CONFIG_WCE: the cache is write-back for a
//! driver that can flush and write-through for one that cannot, and nobody has a use for a switch.

mod engine;
mod event;
mod flight;
mod image;
mod lock;
mod op;
mod request;
mod ring;
mod state;
mod sys;
mod traffic;
mod worker;

#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod loop_tests;
#[cfg(test)]
mod random_tests;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod testing;

pub use image::{Alignment, Image, ImageError, SECTOR_BYTES, Topology};
pub use lock::Holder;

use super::{Backend, Fault, Io, VirtioDevice};
use crate::state::{Saved, StateError};
use engine::Engine;
use event::Event;
use flight::Ground;
use request::{Limits, MAX_RANGE_SECTORS};
use std::sync::Arc;
use traffic::Traffic;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vmm_sys_util::epoll::EventSet;

/// Descriptors of the queue, and most requests in flight.
const SLOTS: u16 = 256;
/// Length of a serial number.
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Mass storage, other: what virtio-blk functions carry.
const PCI_CLASS: u32 = 0x01_80_00;
/// Length of the configuration up to write_zeroes_may_unmap and its padding (5.2.4).
const CONFIG_BYTES: usize = 60;

/// Why a disk cannot be made of an image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlkError {
    /// A serial number that virtio cannot carry.
    #[error("disk serial number {serial:?} is not 0 to {ID_BYTES} printable ASCII characters")]
    Serial {
        /// As given.
        serial: String,
    },
    /// No descriptor is left.
    #[error("cannot make an event for the disk's completions")]
    Event(#[source] std::io::Error),
}

/// A virtio block device.
pub struct Blk {
    image: Image,
    /// Serial number, padded with zeroes; also names the disk in the log.
    id: [u8; ID_BYTES],
    name: String,
    /// Block sizes as the guest is told: the image's, or those of where the guest comes from.
    topology: Topology,
    config: [u8; CONFIG_BYTES],
    /// Signalled when I/O has ended. It outlives the driver: the event loop may still wait for it after a reset, when a
    /// descriptor closed and opened again under the same number would go unwatched.
    completed: Event,
    /// There while the driver runs.
    traffic: Option<Traffic>,
    /// Made at a restore for the driver to come: an io_uring takes up to 0.1 ms, and the guest stands still at `activate`.
    spare: Option<Engine>,
}

impl Blk {
    /// A disk on `image`. `serial` is what the guest reads as its serial number and what the log calls it.
    ///
    /// # Errors
    /// A serial number of more than 20 bytes or that is not printable ASCII; no descriptor left.
    pub fn new(image: Image, serial: &str) -> Result<Self, BlkError> {
        let id = padded(serial).ok_or_else(|| BlkError::Serial { serial: serial.to_owned() })?;
        let name = format!("{serial} ({})", image.path().display());
        let topology = image.topology();
        let config = config(image.size_bytes(), topology);
        let completed = Event::new().map_err(BlkError::Event)?;
        Ok(Self { image, id, name, topology, config, completed, traffic: None, spare: None })
    }

    fn engine(&self) -> Engine {
        Engine::new(Arc::clone(self.image.file()), self.completed.clone(), &self.name)
    }

    /// The image, to be kept for the next machine when this one is rebuilt.
    pub fn image(&self) -> &Image {
        &self.image
    }
}

/// A serial number as it goes over the wire, if it can.
fn padded(serial: &str) -> Option<[u8; ID_BYTES]> {
    let mut id = [0; ID_BYTES];
    id.get_mut(..serial.len())?.copy_from_slice(serial.as_bytes());
    serial.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ').then_some(id)
}

/// `struct virtio_blk_config` (5.2.4).
fn config(size_bytes: u64, topology: Topology) -> [u8; CONFIG_BYTES] {
    let Topology { logical, physical } = topology;
    let exponent = (physical / logical).max(1).ilog2();
    let sectors_a_block = logical / SECTOR_BYTES as u32;
    let mut config = [0; CONFIG_BYTES];
    let mut field = |offset: usize, bytes: &[u8]| {
        if let Some(place) = config.get_mut(offset..offset + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    field(0, &(size_bytes / SECTOR_BYTES).to_le_bytes());
    // seg_max: header and status take one descriptor each.
    field(12, &u32::from(SLOTS - 2).to_le_bytes());
    field(20, &logical.to_le_bytes());
    // topology: physical_block_exp, alignment_offset, min_io_size and opt_io_size (both in blocks).
    field(24, &[exponent as u8, 0]);
    field(26, &1u16.to_le_bytes());
    field(28, &0u32.to_le_bytes());
    // num_queues
    field(34, &1u16.to_le_bytes());
    // max_discard_sectors, max_discard_seg, discard_sector_alignment
    field(36, &MAX_RANGE_SECTORS.to_le_bytes());
    field(40, &1u32.to_le_bytes());
    field(44, &sectors_a_block.to_le_bytes());
    // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
    field(48, &MAX_RANGE_SECTORS.to_le_bytes());
    field(52, &1u32.to_le_bytes());
    field(56, &[1]);
    config
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn pci_class(&self) -> u32 {
        PCI_CLASS
    }

    fn queue_sizes(&self) -> &[u16] {
        &[SLOTS]
    }

    fn features(&self) -> u64 {
        let always = [VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_TOPOLOGY];
        let changing = [VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES];
        let rest: &[u32] = if self.image.readonly() { &[VIRTIO_BLK_F_RO] } else { &changing };
        always.iter().chain(rest).fold(0, |bits, bit| bits | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = self.config.get(start..).unwrap_or_default();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = rest.get(index).copied().unwrap_or(0);
        }
    }

    /// There is nothing to write without CONFIG_WCE.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, io: &mut Io) -> Result<(), Fault> {
        let engine = self.spare.take().unwrap_or_else(|| self.engine());
        let ground = Ground {
            // Shares the regions, so that they stay mapped as long as the kernel may write there.
            ram: Arc::new(io.ram.clone()),
            alignment: self.image.alignment(),
            block_device: self.image.block_device(),
            through: !io.has_feature(VIRTIO_BLK_F_FLUSH),
        };
        let limits = Limits { size_bytes: self.image.size_bytes(), readonly: self.image.readonly() };
        self.traffic = Some(Traffic::new(self.name.clone(), self.id, limits, ground, engine));
        Ok(())
    }

    fn queue_notified(&mut self, _queue: usize, io: &mut Io) -> Result<(), Fault> {
        self.traffic.as_mut().map_or(Ok(()), |traffic| traffic.pump(io))
    }

    fn backend(&self) -> Option<Backend> {
        self.traffic.as_ref().map(|_| Backend { fd: self.completed.fd(), events: EventSet::IN })
    }

    fn backend_ready(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.traffic.as_mut().map_or(Ok(()), |traffic| traffic.completed(io))
    }

    fn quiesce(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.traffic.as_mut().map_or(Ok(()), |traffic| traffic.quiesce(io))
    }

    fn moved(&mut self, _io: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    fn reset(&mut self) {
        self.traffic = None;
    }

    fn save(&self) -> Saved {
        self.saved()
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        self.take_over(saved)
    }
}
