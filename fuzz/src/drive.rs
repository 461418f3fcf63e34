//! The life of a device model under a hostile driver: what the transport would call, in any order it might.

use crate::chain::Chain;
use crate::guest::Guest;
use arbitrary::Arbitrary;
use sterna_devices::virtio::{Fault, Io, VirtioDevice};

/// Steps of one run.
const MAX_STEPS: usize = 64;
/// Times a doorbell that rings again and again is heeded.
const MAX_ROUNDS: usize = 16;
/// VERSION_1, EVENT_IDX and INDIRECT_DESC, which the transport offers.
const TRANSPORT: u64 = 1 << 32 | 1 << 29 | 1 << 28;

/// One step, with requests of the kind `R` and doings of the host's side of the kind `H`.
#[derive(Arbitrary, Debug)]
pub enum Step<R, H> {
    /// The driver offers a request and notifies.
    Request(u8, R),
    /// The driver offers any chain.
    Chain(u8, Chain),
    /// The driver notifies.
    Notify(u8),
    /// The device's descriptor is ready, or not even that.
    BackendReady,
    /// The machine is paused and goes on.
    Pause,
    /// The machine goes on after a move that failed.
    Moved,
    /// The machine moves, and these bytes of the state change on the way.
    Restore(Vec<(u8, u8)>),
    /// The driver resets the device and starts again with these features, as far as they are offered.
    Restart(u64),
    /// The driver reads configuration.
    ReadConfig(u64, u8),
    /// The driver writes configuration.
    WriteConfig(u16, Vec<u8>),
    /// The driver says after which used entry it wants to be told.
    UsedEvent(u8, u16),
    /// The driver says that it has offered more, or less, than it has.
    Available(u8, u16),
    /// The driver writes anything anywhere.
    Poke(u32, Vec<u8>),
    /// The host does something.
    Host(H),
}

/// Whether what the device does to memory can be foretold from the shapes of the chains alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Oracle {
    /// It can.
    Whole,
    /// Requests name memory by their contents: only the bitmap is checked.
    BitmapOnly,
}

/// Runs `steps` on `device`, whose chains of kind `R` become chains through `Into`, and `host` does the rest.
pub fn drive<D: VirtioDevice, R: Into<Chain>, H>(
    device: &mut D,
    oracle: Oracle,
    steps: impl IntoIterator<Item = Step<R, H>>,
    mut host: impl FnMut(&mut D, H),
) {
    crate::format_logs();
    let guest = Guest::new(device.queue_sizes());
    let queues = device.queue_sizes().len();
    let queue = |number: u8| usize::from(number) % queues;
    let mut life = Life { device, guest, oracle };
    life.start(u64::MAX);
    for step in steps.into_iter().take(MAX_STEPS) {
        match step {
            Step::Request(number, request) => {
                life.recover();
                life.offer(queue(number), &request.into());
                life.notify(queue(number));
            }
            Step::Chain(number, chain) => life.offer(queue(number), &chain),
            Step::Notify(number) => life.notify(queue(number)),
            Step::BackendReady => life.react(|device, io| device.backend_ready(io)),
            Step::Pause => life.pause(),
            Step::Moved => life.react(|device, io| device.moved(io)),
            Step::Restore(patches) => life.restore(&patches),
            Step::Restart(features) => {
                life.end();
                life.start(features);
            }
            Step::ReadConfig(offset, length) => {
                life.device.read_config(offset, &mut vec![0; usize::from(length)]);
            }
            Step::WriteConfig(offset, data) => life.device.write_config(offset.into(), &data),
            Step::UsedEvent(number, index) => life.guest.set_used_event(queue(number), index),
            Step::Available(number, index) => life.guest.set_available(queue(number), index),
            Step::Poke(at, bytes) => life.guest.poke(at.into(), &bytes),
            Step::Host(doing) => host(life.device, doing),
        }
        life.heed_doorbells();
    }
    life.end();
}

struct Life<'a, D> {
    device: &'a mut D,
    guest: Guest,
    oracle: Oracle,
}

impl<D: VirtioDevice> Life<'_, D> {
    fn start(&mut self, features: u64) {
        self.guest.restart(features & (self.device.features() | TRANSPORT));
        self.guest.honest = self.oracle == Oracle::Whole;
        self.react(|device, io| device.activate(io));
    }

    /// What a driver does when the device needs a reset.
    fn recover(&mut self) {
        if self.guest.faulted {
            let features = self.guest.features;
            self.end();
            self.start(features);
        }
    }

    fn offer(&mut self, queue: usize, chain: &Chain) {
        self.guest.offer(queue, chain);
    }

    /// As the transport does: a device with a fault is left alone.
    fn react(&mut self, reaction: impl FnOnce(&mut D, &mut Io) -> Result<(), Fault>) {
        if !self.guest.faulted {
            let result = reaction(self.device, &mut self.guest.io());
            self.guest.faulted = result.is_err();
            let _waits_on = self.device.backend();
        }
    }

    fn notify(&mut self, queue: usize) {
        self.react(|device, io| device.queue_notified(queue, io));
    }

    fn heed_doorbells(&mut self) {
        for _ in 0..MAX_ROUNDS {
            let rung = self.guest.rung();
            if rung.is_empty() {
                break;
            }
            rung.into_iter().for_each(|queue| self.notify(queue));
        }
    }

    fn quiesce(&mut self) {
        let result = self.device.quiesce(&mut self.guest.io());
        self.guest.faulted |= result.is_err();
        self.guest.check();
    }

    /// After a reset the device stands for the one on the new host. A state that it refuses changes nothing.
    fn restore(&mut self, patches: &[(u8, u8)]) {
        self.quiesce();
        let mut saved = self.device.save();
        for (at, byte) in patches {
            let length = saved.contents.len().max(1);
            if let Some(old) = saved.contents.get_mut(usize::from(*at) % length) {
                *old = *byte;
            }
        }
        self.device.reset();
        let fresh = self.device.save();
        if let Err(error) = self.device.restore(&saved) {
            assert!(self.device.save() == fresh, "refused ({error}), and yet it has changed");
        }
        self.react(|device, io| device.activate(io));
        for queue in 0..self.guest.doorbells.len() {
            self.notify(queue);
        }
        self.react(|device, io| device.moved(io));
    }

    fn pause(&mut self) {
        self.quiesce();
        for queue in 0..self.guest.doorbells.len() {
            self.notify(queue);
        }
    }

    /// Quiesced, then reset: between the two, nothing of the guest may change any more.
    fn end(&mut self) {
        self.quiesce();
        self.device.reset();
        self.guest.check_untouched();
    }
}
