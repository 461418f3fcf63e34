//! What of a socket device goes along when its machine moves, and how the guest hears that the rest did not.

use super::{EVENT, FIRST_HOST_PORT, NO_PORT, Vsock};
use crate::state::{Saved, StateError};
use crate::virtio::{Fault, Io};
use serde::{Deserialize, Serialize};

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET as the event itself, 32 bits (virtio 1.2, section 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Version 1. Nothing of connections: their host ends stay behind, and see the end when the old process ends.
#[derive(Serialize, Deserialize)]
struct State {
    guest_cid: u64,
    /// Goes on where it was, so that no port is used again while the guest may still know a connection of it.
    next_host_port: u32,
}

impl Vsock {
    pub(super) fn saved(&self) -> Saved {
        let Self {
            guest_cid,
            next_host_port,
            active: _,
            // Follows from being restored.
            reset_pending: _,
            buffer: _,
            // Sockets of this host, and what waits in them and for them.
            listener: _,
            epoll: _,
            connections: _,
            ready: _,
            resets: _,
            held_back: _,
            clients: _,
            next_client: _,
        } = self;
        Saved::of(1, &State { guest_cid: *guest_cid, next_host_port: *next_host_port })
    }

    /// Takes over a state: from then on the guest must be told that its connections are gone.
    pub(super) fn take_over(&mut self, saved: &Saved) -> Result<(), StateError> {
        let State { guest_cid, next_host_port } = saved.decode(1)?;
        if guest_cid != self.guest_cid {
            let own = self.guest_cid;
            return Err(StateError::Value(format!("it is of a guest with cid {guest_cid}, and this one has {own}")));
        }
        if !(FIRST_HOST_PORT..NO_PORT).contains(&next_host_port) {
            return Err(StateError::Value(format!("host port {next_host_port} is none for connections of the host")));
        }
        self.next_host_port = next_host_port;
        self.reset_pending = true;
        Ok(())
    }

    /// Sends the event that the guest must hear, as soon as it has given a buffer for it.
    pub(super) fn tell_reset(&mut self, io: &mut Io) -> Result<(), Fault> {
        if !self.reset_pending {
            return Ok(());
        }
        let Some(chain) = io.pop(EVENT)? else { return Ok(()) };
        let written = chain.write_at(io.ram, 0, &TRANSPORT_RESET);
        if written < TRANSPORT_RESET.len() {
            return Err(Fault::Malformed { queue: EVENT, what: "an event buffer is shorter than an event" });
        }
        self.reset_pending = false;
        io.complete(EVENT, chain.head, written as u32)?;
        io.signal(EVENT)
    }
}
