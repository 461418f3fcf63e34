//! The common configuration structure as plain state (virtio 1.2, 4.1.4.3).
//!
//! The registers are laid out as bytes, an access of any width is laid over them, and each field that was touched
//! takes its new value. What a status write sets in motion is not decided here.

use super::super::Fault;
use crate::state::StateError;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

/// Bytes of the structure.
pub(super) const BYTES: usize = 0x40;
/// Vector that raises nothing.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Status bits (virtio 1.2, 2.1).
pub(super) mod status {
    use virtio_bindings::virtio_config as bits;
    pub(crate) const ACKNOWLEDGE: u8 = bits::VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
    pub(crate) const DRIVER: u8 = bits::VIRTIO_CONFIG_S_DRIVER as u8;
    pub(crate) const FEATURES_OK: u8 = bits::VIRTIO_CONFIG_S_FEATURES_OK as u8;
    pub(crate) const DRIVER_OK: u8 = bits::VIRTIO_CONFIG_S_DRIVER_OK as u8;
    pub(crate) const NEEDS_RESET: u8 = bits::VIRTIO_CONFIG_S_NEEDS_RESET as u8;
    pub(crate) const FAILED: u8 = bits::VIRTIO_CONFIG_S_FAILED as u8;
}

/// ISR bit: a queue has news.
pub(super) const ISR_QUEUE: u8 = 1;
/// ISR bit: the configuration has changed.
pub(super) const ISR_CONFIG: u8 = 2;

const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const DEVICE_STATUS: usize = 0x14;
const CONFIG_GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFFSET: usize = 0x1e;
const QUEUE_DESCRIPTORS: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;

/// The registers as they are saved, named as in [`Registers`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub config_vector: u16,
    pub status: u8,
    pub config_generation: u8,
    pub isr: u8,
    pub queue_select: u16,
    pub queues: Vec<QueueState>,
}

/// A queue's registers as they are saved, named as in [`QueueRegisters`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct QueueState {
    pub size: u16,
    pub vector: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
}

/// What the driver has set up of one queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    /// Largest size, descriptors.
    max_size: u16,
    /// Size the driver chose, a power of two.
    pub size: u16,
    /// Interrupt vector.
    pub vector: u16,
    /// The driver has enabled it; from then on size and addresses stand.
    pub enabled: bool,
    /// Guest physical address of the descriptor table.
    descriptors: u64,
    /// Guest physical address of the available ring.
    driver: u64,
    /// Guest physical address of the used ring.
    device: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, vector: NO_VECTOR, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }

    fn save(&self) -> QueueState {
        let Self { max_size: _, size, vector, enabled, descriptors, driver, device } = *self;
        QueueState { size, vector, enabled, descriptors, driver, device }
    }

    /// These registers with what `saved` says.
    fn restored(&self, index: usize, saved: &QueueState) -> Result<Self, StateError> {
        let QueueState { size, vector, enabled, descriptors, driver, device } = *saved;
        let max_size = self.max_size;
        if !size.is_power_of_two() || size > max_size {
            return Err(StateError::Value(format!(
                "its queue {index} has a size of {size}, not a power of 2 up to {max_size}"
            )));
        }
        Ok(Self { max_size, size, vector, enabled, descriptors, driver, device })
    }

    /// Makes `queue` what the driver set up. It is the caller's to see whether that lies in guest RAM.
    ///
    /// # Errors
    /// Misaligned rings.
    pub(super) fn configure(&self, index: usize, queue: &mut Queue, event_idx: bool) -> Result<(), Fault> {
        let broken = |source| Fault::Ring { queue: index, source };
        queue.reset();
        queue.try_set_size(self.size).map_err(broken)?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).map_err(broken)?;
        queue.try_set_avail_ring_address(GuestAddress(self.driver)).map_err(broken)?;
        queue.try_set_used_ring_address(GuestAddress(self.device)).map_err(broken)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(())
    }
}

/// The registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    /// Features the driver wants, what it negotiated once FEATURES_OK is set.
    pub driver_features: u64,
    /// Interrupt vector for configuration changes.
    pub config_vector: u16,
    /// Status bits.
    pub status: u8,
    /// Counts changes of the device's configuration.
    pub config_generation: u8,
    /// Interrupt causes not yet read.
    pub isr: u8,
    queue_select: u16,
    /// By queue.
    pub queues: Vec<QueueRegisters>,
    /// Interrupt vectors there are.
    vectors: u16,
}

impl Registers {
    pub(super) fn new(queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            status: 0,
            config_generation: 0,
            isr: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|size| QueueRegisters::new(*size)).collect(),
            vectors,
        }
    }

    /// Forgets the driver.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(&sizes, self.vectors);
    }

    /// What is to be saved of them.
    pub(super) fn save(&self) -> State {
        let Self {
            device_feature_select,
            driver_feature_select,
            driver_features,
            config_vector,
            status,
            config_generation,
            isr,
            queue_select,
            ref queues,
            vectors: _,
        } = *self;
        let queues = queues.iter().map(QueueRegisters::save).collect();
        State {
            device_feature_select,
            driver_feature_select,
            driver_features,
            config_vector,
            status,
            config_generation,
            isr,
            queue_select,
            queues,
        }
    }

    /// These registers with what `saved` says. `offered` are the device's features.
    ///
    /// # Errors
    /// What a driver cannot have brought about.
    pub(super) fn restored(&self, saved: &State, offered: u64) -> Result<Self, StateError> {
        let wrong = |what: String| Err(StateError::Value(what));
        if saved.queues.len() != self.queues.len() {
            let (theirs, ours) = (saved.queues.len(), self.queues.len());
            return wrong(format!("it has registers of {theirs} queues, and the device {ours} queues"));
        }
        let vectors = saved.queues.iter().map(|queue| queue.vector).chain([saved.config_vector]);
        if let Some(vector) = vectors.into_iter().find(|vector| *vector >= self.vectors && *vector != NO_VECTOR) {
            return wrong(format!("it raises interrupt vector {vector}, and there are {}", self.vectors));
        }
        if saved.isr & !(ISR_QUEUE | ISR_CONFIG) != 0 {
            return wrong(format!("its interrupt status is {:#x}", saved.isr));
        }
        check_status(saved.status, saved.driver_features, offered)?;
        let pairs = self.queues.iter().zip(&saved.queues).enumerate();
        let queues = pairs.map(|(index, (queue, saved))| queue.restored(index, saved)).collect::<Result<_, _>>()?;
        let State { device_feature_select, driver_feature_select, driver_features, config_vector, status, .. } = *saved;
        let State { config_generation, isr, queue_select, .. } = *saved;
        Ok(Self {
            device_feature_select,
            driver_feature_select,
            driver_features,
            config_vector,
            status,
            config_generation,
            isr,
            queue_select,
            queues,
            vectors: self.vectors,
        })
    }

    /// Whether all of status `bits` are set.
    pub(super) fn has(&self, bits: u8) -> bool {
        self.status & bits == bits
    }

    /// The structure as bytes. `offered` are the device's features.
    fn image(&self, offered: u64) -> [u8; BYTES] {
        let mut image = [0; BYTES];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(DEVICE_FEATURE, &half(offered, self.device_feature_select).to_le_bytes());
        put(DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        put(DRIVER_FEATURE, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(DEVICE_STATUS, &[self.status]);
        put(CONFIG_GENERATION, &[self.config_generation]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFFSET, &self.queue_select.to_le_bytes());
            put(QUEUE_DESCRIPTORS, &queue.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(QUEUE_DEVICE, &queue.device.to_le_bytes());
        }
        image
    }

    /// Reads any number of bytes.
    pub(super) fn read(&self, offset: usize, data: &mut [u8], offered: u64) {
        let image = self.image(offered);
        for (position, byte) in data.iter_mut().enumerate() {
            *byte = image.get(offset + position).copied().unwrap_or(0);
        }
    }

    /// Writes any number of bytes and returns what was written to the status register, which is left as it was.
    pub(super) fn write(&mut self, offset: usize, data: &[u8], offered: u64) -> Option<u8> {
        let mut image = self.image(offered);
        for (byte, new) in image.iter_mut().skip(offset).zip(data) {
            *byte = *new;
        }
        let touched = |at: usize, width: usize| offset < at + width && at < offset + data.len();
        if touched(DEVICE_FEATURE_SELECT, 4) {
            self.device_feature_select = number(&image, DEVICE_FEATURE_SELECT, 4) as u32;
        }
        if touched(DRIVER_FEATURE_SELECT, 4) {
            self.driver_feature_select = number(&image, DRIVER_FEATURE_SELECT, 4) as u32;
        }
        if touched(DRIVER_FEATURE, 4) && !self.has(status::FEATURES_OK) && self.driver_feature_select < 2 {
            let shift = 32 * self.driver_feature_select;
            self.driver_features &= !(0xffff_ffff << shift);
            self.driver_features |= number(&image, DRIVER_FEATURE, 4) << shift;
        }
        if touched(CONFIG_VECTOR, 2) {
            self.config_vector = self.vector(&image, CONFIG_VECTOR);
        }
        if touched(QUEUE_SELECT, 2) {
            self.queue_select = number(&image, QUEUE_SELECT, 2) as u16;
        }
        self.write_queue(&image, touched);
        touched(DEVICE_STATUS, 1).then(|| number(&image, DEVICE_STATUS, 1) as u8)
    }

    /// The part of a write that goes to the selected queue.
    fn write_queue(&mut self, image: &[u8; BYTES], touched: impl Fn(usize, usize) -> bool) {
        let vector = self.vector(image, QUEUE_VECTOR);
        // A queue is set up before DRIVER_OK and stands from its enabling on: there is no per-queue reset.
        let fixed = self.has(status::DRIVER_OK);
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if touched(QUEUE_VECTOR, 2) {
            queue.vector = vector;
        }
        if queue.enabled || fixed {
            return;
        }
        let size = number(image, QUEUE_SIZE, 2) as u16;
        if touched(QUEUE_SIZE, 2) && size.is_power_of_two() && size <= queue.max_size {
            queue.size = size;
        }
        if touched(QUEUE_DESCRIPTORS, 8) {
            queue.descriptors = number(image, QUEUE_DESCRIPTORS, 8);
        }
        if touched(QUEUE_DRIVER, 8) {
            queue.driver = number(image, QUEUE_DRIVER, 8);
        }
        if touched(QUEUE_DEVICE, 8) {
            queue.device = number(image, QUEUE_DEVICE, 8);
        }
        if touched(QUEUE_ENABLE, 2) {
            queue.enabled = number(image, QUEUE_ENABLE, 2) == 1;
        }
    }

    /// A vector as written: one that does not exist is refused by reading back as NO_VECTOR.
    fn vector(&self, image: &[u8; BYTES], at: usize) -> u16 {
        let vector = number(image, at, 2) as u16;
        if vector < self.vectors { vector } else { NO_VECTOR }
    }
}

/// Whether a driver can have come to this status with these features: each step asks for the one before.
fn check_status(status: u8, features: u64, offered: u64) -> Result<(), StateError> {
    use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
    let has = |bits| status & bits == bits;
    let steps = [
        (FEATURES_OK, ACKNOWLEDGE | DRIVER), //
        (DRIVER_OK, FEATURES_OK),
        (NEEDS_RESET, DRIVER_OK),
    ];
    let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED;
    if status & !known != 0 || steps.iter().any(|(step, before)| has(*step) && !has(*before)) {
        return Err(StateError::Value(format!("its device status {status:#04x} cannot be")));
    }
    if has(FEATURES_OK) && !acceptable(features, offered) {
        return Err(StateError::Value(format!(
            "its driver negotiated {features:#x}, and {offered:#x} is offered here"
        )));
    }
    Ok(())
}

/// Whether a driver may negotiate `features`.
pub(super) fn acceptable(features: u64, offered: u64) -> bool {
    features & !offered == 0 && features & 1 << VIRTIO_F_VERSION_1 != 0
}

/// The 32 feature bits that `select` names.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// The little-endian number of `width` bytes at `at`.
fn number(image: &[u8; BYTES], at: usize, width: usize) -> u64 {
    image.iter().skip(at).take(width).rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
