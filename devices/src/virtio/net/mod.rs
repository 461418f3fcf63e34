//! Network device on a tap (virtio 1.2, section 5.1).
//!
//! Frames go between the tap and guest RAM in one system call each. Checksums and segmentation are left to whoever
//! reads the frame last: the tap carries them in the same header. The device refuses to know bridges, addresses and
//! what is in a frame. A frame that cannot go on is dropped and counted, as a network card does; a chain too short for
//! the header breaks the protocol and is a [`Fault`], since the ring offers no way to say so for one chain.
//! While the machine is paused, or has no buffers, frames wait in the tap's own queue.

mod announce;
mod control;
mod counters;
mod holders;
mod port;
mod receive;
#[cfg(test)]
mod state_tests;
mod tap;
#[cfg(test)]
mod tap_tests;
#[cfg(test)]
mod tests;

pub use announce::{NetHandle, announce_delays, rarp_frame};
pub use counters::{Counters, Direction, Traffic};
pub use port::{Offload, Port};
pub use tap::{Tap, TapError};

use super::{BUDGET, Backend, Chain, Fault, Io, VirtioDevice};
use crate::state::{Saved, StateError};
use port::write_frame;
use receive::{Receiver, Step};
use serde::{Deserialize, Serialize};
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;

/// `struct virtio_net_hdr_v1`.
const HEADER_BYTES: usize = 12;
/// Largest frame with its header: 14 bytes of Ethernet, 64 KiB and the header (virtio 1.2, section 5.1.6.3.1).
const FRAME_BYTES: usize = HEADER_BYTES + 14 + 65536;

/// Smallest MTU that may be offered (virtio 1.2, section 5.1.4.1).
const MIN_MTU: u16 = 68;

/// Offered features. The control queue is there for GUEST_ANNOUNCE alone: the device filters nothing.
const FEATURES: [u32; 14] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// What an interface takes along, version 1. Whether its link is up, the new host's port says; a frame that waited for
/// buffers is lost like one on the wire.
#[derive(Serialize, Deserialize)]
struct State {
    mac: [u8; 6],
    mtu: u16,
    announcing: bool,
}

/// The device.
pub struct Net<P: Port = Tap> {
    /// The host's end of the cable.
    port: Arc<P>,
    /// The guest's address.
    mac: [u8; 6],
    /// What the guest was told, which the port of another host may exceed.
    mtu: u16,
    /// DRIVER_OK was set.
    active: bool,
    /// The port still gives frames. Survives a reset: a tap that was deleted does not come back.
    link_up: bool,
    /// The guest is asked to announce itself and has not said that it did (VIRTIO_NET_S_ANNOUNCE).
    announcing: bool,
    /// The control queue's notification event, for [`NetHandle`].
    bell: Arc<OnceLock<EventFd>>,
    receiver: Receiver,
    counters: Arc<Counters>,
}

impl<P: Port> Net<P> {
    /// A device for the guest's address `mac` on `port`, with the link up.
    pub fn new(port: P, mac: [u8; 6]) -> Self {
        Self {
            mtu: port.mtu(),
            port: Arc::new(port),
            mac,
            active: false,
            link_up: true,
            announcing: false,
            bell: Arc::default(),
            receiver: Receiver::new(),
            counters: Arc::default(),
        }
    }

    /// What went through, readable while the device runs.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Announces the interface while the device runs.
    pub fn handle(&self) -> NetHandle<P> {
        NetHandle { port: Arc::clone(&self.port), mac: self.mac, bell: Arc::clone(&self.bell) }
    }

    fn receive(&mut self, io: &mut Io) -> Result<(), Fault> {
        if self.receiver.starved || !self.link_up {
            return Ok(());
        }
        let mut delivered = false;
        // The port is waited on level-triggered, so what is beyond the budget needs no reminder.
        for _ in 0..BUDGET {
            match self.receiver.step(&*self.port, io)? {
                Step::Delivered(bytes) => {
                    self.counters.received.count(bytes);
                    delivered = true;
                }
                Step::Dropped => self.counters.received.count_dropped(),
                Step::Drained | Step::Starved => break,
                Step::Lost(error) => {
                    log::warn!("{}: the interface gives no more frames ({error}); its link is down", self.port.name());
                    self.link_up = false;
                    io.config_changed();
                    break;
                }
            }
        }
        if delivered { io.signal(RX) } else { Ok(()) }
    }

    fn transmit(&mut self, io: &mut Io) -> Result<(), Fault> {
        let mut taken = 0;
        while taken < BUDGET {
            let Some(chain) = io.pop(TX)? else { break };
            self.send(&chain, io)?;
            io.complete(TX, chain.head, 0)?;
            taken += 1;
        }
        if taken == BUDGET {
            io.again(TX);
        }
        if taken != 0 { io.signal(TX) } else { Ok(()) }
    }

    /// Answers commands, and interrupts a driver that still has not announced itself: it may have been looking away.
    fn control(&mut self, io: &mut Io) -> Result<(), Fault> {
        if control::serve(io)? {
            self.announcing = false;
        }
        if self.announcing {
            io.config_changed();
        }
        Ok(())
    }

    /// Sends one frame or drops it: the tap has no room (EAGAIN), is down (EIO), or finds the header or the frame
    /// wrong (EINVAL). Waiting for room instead would let one busy bridge hold up the guest's whole queue.
    fn send(&self, chain: &Chain, io: &Io) -> Result<(), Fault> {
        let bytes = chain.readable_bytes();
        if bytes < HEADER_BYTES as u64 {
            return Err(Fault::Malformed { queue: TX, what: "a frame to send is shorter than the header" });
        }
        let sent = bytes <= FRAME_BYTES as u64 && write_frame(&*self.port, io.ram, &chain.readable).is_ok();
        if sent {
            self.counters.sent.count(bytes - HEADER_BYTES as u64);
        } else {
            self.counters.sent.count_dropped();
        }
        Ok(())
    }
}

impl<P: Port> VirtioDevice for Net<P> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn pci_class(&self) -> u32 {
        0x02_0000
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 64]
    }

    fn features(&self) -> u64 {
        FEATURES.iter().fold(0, |bits, bit| bits | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let link = if self.link_up { VIRTIO_NET_S_LINK_UP } else { 0 };
        let announce = if self.announcing { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let status = (link | announce) as u16;
        let mut config = [0; 12];
        let fields = self.mac.into_iter().chain(status.to_le_bytes()).chain([0; 2]).chain(self.mtu.to_le_bytes());
        config.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        let wanted = usize::try_from(offset).ok().and_then(|at| config.get(at..)).unwrap_or_default();
        data.fill(0);
        data.iter_mut().zip(wanted).for_each(|(to, from)| *to = *from);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, io: &mut Io) -> Result<(), Fault> {
        // Offloads that depend on ones which were not negotiated are left out, as the tap would refuse them.
        let checksum = io.has_feature(VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = checksum && io.has_feature(VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = checksum && io.has_feature(VIRTIO_NET_F_GUEST_TSO6);
        let ecn = (tso4 || tso6) && io.has_feature(VIRTIO_NET_F_GUEST_ECN);
        let offload = Offload { checksum, tso4, tso6, ecn };
        // A tap that is gone cannot be told, and gives no frames either.
        if self.link_up {
            let attempt = "set the offloads of the tap interface";
            self.port.set_offload(offload).map_err(|source| Fault::Backend { attempt, source })?;
        }
        self.announcing &= io.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE);
        // Without it an announcement is not repeated; nothing else is lost.
        if self.bell.get().is_none()
            && let Some(bell) = io.doorbell(CONTROL).and_then(|bell| bell.try_clone().ok())
        {
            let _first = self.bell.set(bell);
        }
        self.active = true;
        Ok(())
    }

    fn queue_notified(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault> {
        match queue {
            RX if self.active && self.receiver.starved => {
                self.receiver.starved = false;
                self.receive(io)
            }
            TX if self.active => self.transmit(io),
            CONTROL if self.active => self.control(io),
            _ => Ok(()),
        }
    }

    fn backend(&self) -> Option<Backend> {
        let waiting = self.active && self.link_up && !self.receiver.starved;
        waiting.then(|| Backend { fd: self.port.as_fd().as_raw_fd(), events: EventSet::IN })
    }

    fn backend_ready(&mut self, io: &mut Io) -> Result<(), Fault> {
        if self.active { self.receive(io) } else { Ok(()) }
    }

    fn quiesce(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.receiver.put_back(io);
        Ok(())
    }

    /// Asks the guest to announce itself. The interrupt comes in any case: the link may be another one.
    fn moved(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.announcing |= io.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE);
        io.config_changed();
        Ok(())
    }

    fn reset(&mut self) {
        self.active = false;
        self.announcing = false;
        self.receiver.reset();
        // The next driver says what it takes before it gets any frame; until then the tap completes them itself.
        let offload = if self.link_up { self.port.set_offload(Offload::default()) } else { Ok(()) };
        if let Err(error) = offload {
            log::warn!("{}: cannot switch off the offloads ({error})", self.port.name());
        }
    }

    fn save(&self) -> Saved {
        let Self { port: _, mac, mtu, active: _, link_up: _, announcing, bell: _, receiver: _, counters: _ } = self;
        Saved::of(1, &State { mac: *mac, mtu: *mtu, announcing: *announcing })
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        let State { mac, mtu, announcing } = saved.decode(1)?;
        let (name, largest) = (self.port.name(), self.port.mtu());
        if mac != self.mac {
            let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
            return Err(StateError::Value(format!(
                "it is of the interface {}, and this one is {}",
                text(mac),
                text(self.mac)
            )));
        }
        if !(MIN_MTU..=largest).contains(&mtu) {
            return Err(StateError::Value(format!(
                "the guest was told an MTU of {mtu}, and interface {name} takes {MIN_MTU} to {largest}"
            )));
        }
        (self.mtu, self.announcing) = (mtu, announcing);
        Ok(())
    }
}
