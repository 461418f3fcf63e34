//! What an event of the epoll descriptor is about, in the 64 bits that the kernel keeps for us.

use super::NO_PORT;
use super::packet::Key;

/// What an event of the epoll descriptor is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    Listener,
    Client(u32),
    Connection(Key),
}

impl Token {
    // A connection's ports fill 64 bits. No guest port is NO_PORT, so those values are left for the others.
    pub fn encode(self) -> u64 {
        let (high, low) = match self {
            Self::Listener => (NO_PORT, u32::MAX),
            Self::Client(id) => (NO_PORT, id),
            Self::Connection(key) => (key.guest_port, key.host_port),
        };
        u64::from(high) << 32 | u64::from(low)
    }

    pub fn decode(data: u64) -> Self {
        match ((data >> 32) as u32, data as u32) {
            (NO_PORT, u32::MAX) => Self::Listener,
            (NO_PORT, id) => Self::Client(id),
            (guest_port, host_port) => Self::Connection(Key { guest_port, host_port }),
        }
    }
}
