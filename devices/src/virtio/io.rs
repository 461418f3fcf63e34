//! What the transport lends a model for the length of one reaction: guest RAM, the queues, the interrupts.

use super::{Chain, Fault, GuestRam};
use smallvec::SmallVec;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
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
    /// Queues that were given chains back together, and where their used rings stood before.
    together: SmallVec<[(usize, u16); 1]>,
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
        Self { ram, queues, doorbells, features, interrupts, together: SmallVec::new() }
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

    /// Gives several chains of `queue` back at once: a driver that polls sees all of `used` (head, bytes written) or
    /// none, as a frame that spans buffers needs (virtio 1.2, section 5.1.6.4). Not to be mixed with
    /// [`Self::complete`] before the next [`Self::signal`], which must follow in the same loan.
    ///
    /// # Errors
    /// A ring that cannot be written.
    pub fn complete_together(&mut self, queue: usize, used: &[(u16, u32)]) -> Result<(), Fault> {
        let Some(ring) = self.queues.get_mut(queue) else { return Ok(()) };
        let Some(((head, written), before)) = used.split_last() else { return Ok(()) };
        let broken = |source| Fault::Ring { queue, source };
        let start = ring.next_used();
        let mut index = start;
        for (head, written) in before {
            let slot = u64::from(index.checked_rem(ring.size()).unwrap_or(0));
            let address = ring.used_ring().checked_add(4 + 8 * slot);
            let address = address.ok_or(broken(virtio_queue::Error::AddressOverflow))?;
            let element = u64::from(*head) | u64::from(*written) << 32;
            let stored = self.ram.write_obj(element, GuestAddress(address));
            stored.map_err(|source| broken(virtio_queue::Error::GuestMemory(source)))?;
            index = index.wrapping_add(1);
        }
        ring.set_next_used(index);
        if self.together.iter().all(|(other, _)| *other != queue) {
            self.together.push((queue, start));
        }
        // This one stores the index, which publishes those before it too.
        ring.add_used(self.ram, *head, *written).map_err(broken)
    }

    /// Interrupts the driver for what `queue` completed, unless it asked not to be.
    ///
    /// # Errors
    /// A ring that cannot be read.
    pub fn signal(&mut self, queue: usize) -> Result<(), Fault> {
        let Some(ring) = self.queues.get_mut(queue) else { return Ok(()) };
        let mut needed = ring.needs_notification(self.ram).map_err(|source| Fault::Ring { queue, source })?;
        if let Some(position) = self.together.iter().position(|(other, _)| *other == queue) {
            let (_, start) = self.together.swap_remove(position);
            needed =
                needed || passed_used_event(ring, self.ram, start).map_err(|source| Fault::Ring { queue, source })?;
        }
        if needed {
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

    /// The notification event of `queue`: who writes to a copy of it asks for a reaction from any thread.
    pub fn doorbell(&self, queue: usize) -> Option<&EventFd> {
        self.doorbells.get(queue)
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

/// Whether the used ring has come past the driver's `used_event` since it stood at `start` (virtio 1.2, section
/// 2.7.7.2). virtio-queue counts only the chains it added itself.
fn passed_used_event(ring: &Queue, ram: &GuestRam, start: u16) -> Result<bool, virtio_queue::Error> {
    let address = ring.avail_ring().checked_add(4 + 2 * u64::from(ring.size()));
    let address = GuestAddress(address.ok_or(virtio_queue::Error::AddressOverflow)?);
    let event: u16 = ram.read_obj(address).map_err(virtio_queue::Error::GuestMemory)?;
    let now = ring.next_used();
    Ok(now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    const USED: u64 = 0x3000;
    const AVAILABLE: u64 = 0x2000;

    struct Count(u32);

    impl Interrupts for Count {
        fn queue(&mut self, _queue: usize) {
            self.0 += 1;
        }
        fn config(&mut self) {}
    }

    /// A queue of 8 with RING_EVENT_IDX whose used ring stands at `start`.
    fn queue(start: u16) -> (GuestRam, Queue) {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let mut queue = Queue::new(8).unwrap();
        queue.set_desc_table_address(Some(0x1000), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_event_idx(true);
        queue.set_next_used(start);
        queue.set_ready(true);
        (ram, queue)
    }

    #[test]
    fn chains_given_back_together_follow_each_other_around_the_ring() {
        let (ram, queue) = queue(u16::MAX - 1);
        let mut count = Count(0);
        let mut queues = [queue];
        let mut io = Io::new(&ram, &mut queues, &[], 0, &mut count);
        io.complete_together(0, &[]).unwrap();
        io.complete_together(0, &[(5, 50), (6, 60), (7, 70)]).unwrap();
        let [queue] = queues;
        assert_eq!(queue.next_used(), 1);
        assert_eq!(ram.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 1);
        for (slot, expected) in [(6, [5u32, 50]), (7, [6, 60]), (0, [7, 70])] {
            assert_eq!(ram.read_obj::<[u32; 2]>(GuestAddress(USED + 4 + 8 * slot)).unwrap(), expected);
        }
    }

    #[test]
    fn a_driver_is_interrupted_for_any_chain_of_those_given_back_together() {
        for start in [0u16, u16::MAX - 2] {
            // The driver wants an interrupt once the chain at this distance is used; 5 are.
            for (distance, interrupts) in [(-1, 0), (0, 1), (1, 1), (3, 1), (4, 1), (5, 0), (100, 0)] {
                let (ram, queue) = queue(start);
                let event = start.wrapping_add_signed(distance);
                ram.write_obj(event, GuestAddress(AVAILABLE + 4 + 2 * 8)).unwrap();
                let mut count = Count(0);
                let mut queues = [queue];
                let mut io = Io::new(&ram, &mut queues, &[], 0, &mut count);
                io.complete_together(0, &[(1, 1), (2, 1), (3, 1)]).unwrap();
                io.complete_together(0, &[(4, 1), (5, 1)]).unwrap();
                io.signal(0).unwrap();
                io.signal(0).unwrap();
                assert_eq!(count.0, interrupts, "start {start}, distance {distance}");
            }
        }
    }
}
