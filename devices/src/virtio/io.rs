//! What the transport lends a model for the length of one reaction: guest RAM, the queues, the interrupts.

use super::{Chain, Fault, GuestRam};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

/// Chains a model should take from one queue in one reaction, so that no driver keeps the event loop to itself;
/// past it, call [`Io::again`].
pub const BUDGET: usize = 256;

/// Interrupts of one function, as the transport raises them.
pub trait Interrupts {
    /// The used ring of `queue` has news.
    fn queue(&mut self, queue: usize);
    /// The device's configuration has changed.
    fn config(&mut self);
}

/// The loan. See the module.
pub struct Io<'a> {
    /// Guest RAM.
    pub ram: &'a GuestRam,
    queues: &'a mut [Queue],
    doorbells: &'a [EventFd],
    features: u64,
    interrupts: &'a mut dyn Interrupts,
}

impl<'a> Io<'a> {
    /// Bundles a loan. `doorbells` are the queues' notification events, `features` what was negotiated.
    pub fn new(
        ram: &'a GuestRam,
        queues: &'a mut [Queue],
        doorbells: &'a [EventFd],
        features: u64,
        interrupts: &'a mut dyn Interrupts,
    ) -> Self {
        Self { ram, queues, doorbells, features, interrupts }
    }

    /// Whether feature `bit` was negotiated.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Takes the next chain of `queue`. `None` when there is none; then the driver will notify of the next one.
    ///
    /// # Errors
    /// A ring or chain that breaks the rules, or a queue the driver has not enabled.
    pub fn pop(&mut self, queue: usize) -> Result<Option<Chain>, Fault> {
        let ram = self.ram;
        let Some(ring) = self.queues.get_mut(queue).filter(|ring| ring.ready()) else { return Ok(None) };
        let broken = |source| Fault::Ring { queue, source };
        // A second look after asking for notifications closes the race with a driver that has just added one. It is
        // bounded, since a hostile driver could play that race for ever.
        for _ in 0..2 {
            if let Some(chain) = ring.iter(ram).map_err(broken)?.next() {
                return Chain::collect(ram, queue, chain).map(Some);
            }
            if !ring.enable_notification(ram).map_err(broken)? {
                break;
            }
        }
        Ok(None)
    }

    /// Puts the chain just taken from `queue` back, to be taken again.
    pub fn put_back(&mut self, queue: usize) {
        if let Some(ring) = self.queues.get_mut(queue) {
            ring.go_to_previous_position();
        }
    }

    /// Gives the chain at `head` back with `written` bytes in its writable part. Call [`Self::signal`] after the last.
    ///
    /// # Errors
    /// A ring that cannot be written.
    pub fn complete(&mut self, queue: usize, head: u16, written: u32) -> Result<(), Fault> {
        let Some(ring) = self.queues.get_mut(queue) else { return Ok(()) };
        ring.add_used(self.ram, head, written).map_err(|source| Fault::Ring { queue, source })
    }

    /// Interrupts the driver for what `queue` completed, unless it asked not to be.
    ///
    /// # Errors
    /// A ring that cannot be read.
    pub fn signal(&mut self, queue: usize) -> Result<(), Fault> {
        let Some(ring) = self.queues.get_mut(queue) else { return Ok(()) };
        if ring.needs_notification(self.ram).map_err(|source| Fault::Ring { queue, source })? {
            self.interrupts.queue(queue);
        }
        Ok(())
    }

    /// Asks for another reaction to `queue` after other devices had their turn.
    pub fn again(&mut self, queue: usize) {
        if let Some(doorbell) = self.doorbells.get(queue) {
            // The counter can only refuse near 2^64, when the event is pending anyway.
            let _pending = doorbell.write(1);
        }
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn config_changed(&mut self) {
        self.interrupts.config();
    }

    /// Whether the driver can tell apart how far the device has come (RING_EVENT_IDX).
    pub fn event_idx(&self) -> bool {
        self.has_feature(VIRTIO_RING_F_EVENT_IDX)
    }
}
