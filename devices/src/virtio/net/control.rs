//! The control queue (virtio 1.2, section 5.1.6.5): commands of a class each, answered in one byte.
//!
//! One command is served: the driver has announced itself. It refuses to know what that means for the device.

use super::CONTROL;
use crate::virtio::{BUDGET, Chain, Fault, GuestRam, Io};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_OK,
};

/// Class and command of the one that is served.
const ANNOUNCED: [u8; 2] = [VIRTIO_NET_CTRL_ANNOUNCE as u8, VIRTIO_NET_CTRL_ANNOUNCE_ACK as u8];

/// Answers the commands that wait, and returns whether one says that the driver has announced itself.
pub(super) fn serve(io: &mut Io) -> Result<bool, Fault> {
    let offered = io.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE);
    let (mut taken, mut announced) = (0, false);
    while taken < BUDGET {
        let Some(chain) = io.pop(CONTROL)? else { break };
        if chain.writable_bytes() == 0 {
            return Err(Fault::Malformed { queue: CONTROL, what: "a command without room for its answer" });
        }
        let known = offered && command(&chain, io.ram) == Some(ANNOUNCED);
        announced |= known;
        let answer = if known { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.write_at(io.ram, 0, &[answer as u8]);
        io.complete(CONTROL, chain.head, 1)?;
        taken += 1;
    }
    if taken == BUDGET {
        io.again(CONTROL);
    }
    if taken != 0 {
        io.signal(CONTROL)?;
    }
    Ok(announced)
}

/// Class and command, if the chain holds both; what follows them is left unread.
fn command(chain: &Chain, ram: &GuestRam) -> Option<[u8; 2]> {
    let mut command = [0; 2];
    (chain.read_at(ram, 0, &mut command) == command.len()).then_some(command)
}
