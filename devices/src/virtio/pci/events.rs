//! The event loop's side of a virtio function: doorbells, the device's own descriptor, and a wake-up for changes of
//! what to wait for that come from other threads.

use super::VirtioPci;
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::os::fd::AsRawFd;
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;

impl MutEventSubscriber for VirtioPci {
    fn init(&mut self, ops: &mut EventOps) {
        let doorbells = self.doorbells.iter().zip(0..);
        let events = doorbells.map(|(doorbell, queue)| Events::with_data(doorbell, queue, EventSet::IN));
        for events in events.chain([Events::new(&self.wake, EventSet::IN)]) {
            if let Err(error) = ops.add(events) {
                log::error!("{}: the event loop cannot watch it: {error}", self.name);
            }
        }
        self.watch_backend(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let queue = events.data() as usize;
        if events.fd() == self.wake.as_raw_fd() {
            // Nothing to read means that someone else has seen it.
            let _drained = self.wake.read();
        } else if self.watched.is_some_and(|backend| backend.fd == events.fd()) {
            self.react(|device, io| device.backend_ready(io));
        } else if let Some(doorbell) = self.doorbells.get(queue).filter(|bell| bell.as_raw_fd() == events.fd()) {
            // Drained before the ring is looked at, and also when nobody looks: every start looks at all rings.
            let _drained = doorbell.read();
            if self.queues.get(queue).is_some_and(QueueT::ready) {
                self.react(|device, io| device.queue_notified(queue, io));
            }
        }
        self.watch_backend(ops);
    }
}

impl VirtioPci {
    /// Makes the event loop wait for what the device wants now, and for nothing while it does not work.
    fn watch_backend(&mut self, ops: &mut EventOps) {
        let wanted = if self.working() { self.device.backend() } else { None };
        if wanted == self.watched {
            return;
        }
        let changed = match (self.watched, wanted) {
            (Some(old), Some(new)) if old.fd == new.fd => ops.modify(Events::new_raw(new.fd, new.events)),
            (old, new) => {
                let removed = old.map_or(Ok(()), |old| ops.remove(Events::new_raw(old.fd, old.events)));
                removed.and(new.map_or(Ok(()), |new| ops.add(Events::new_raw(new.fd, new.events))))
            }
        };
        self.watched = wanted;
        if let Err(error) = changed {
            log::error!("{}: the event loop cannot watch descriptor {wanted:?}: {error}", self.name);
        }
    }
}
