//! Telling the network where a machine is after it has moved.
//!
//! Two ways, since neither is enough: a frame in the guest's name from this side, which bridges and switches learn the
//! port from, and the guest's own word (VIRTIO_NET_F_GUEST_ANNOUNCE), which also says IP addresses and VLANs. It
//! refuses to know time: who calls keeps to [`announce_delays`].

use super::HEADER_BYTES;
use super::port::Port;
use super::tap::Tap;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// How long to wait before each announcement: five, in growing intervals, since a switch on the way may not forward at
/// once. The first is made at once.
pub fn announce_delays() -> impl Iterator<Item = Duration> {
    [0, 50, 150, 250, 350].into_iter().map(Duration::from_millis)
}

/// "Who am I" from `mac` to all (RFC 903, a reverse request), padded to the shortest Ethernet frame. Every switch learns
/// from it, and no host answers it but a RARP server that knows the address.
pub fn rarp_frame(mac: [u8; 6]) -> [u8; 60] {
    let ethernet = [0xff; 6].into_iter().chain(mac).chain([0x80, 0x35]);
    // Ethernet and IPv4 addresses, 6 and 4 bytes long; request reverse.
    let operation = [0, 1, 8, 0, 6, 4, 0, 3];
    let fields = ethernet.chain(operation).chain(mac).chain([0; 4]).chain(mac);
    let mut frame = [0; 60];
    frame.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    frame
}

/// Announces a machine's interface, from any thread and for as long as the device lives.
pub struct NetHandle<P: Port = Tap> {
    pub(super) port: Arc<P>,
    pub(super) mac: [u8; 6],
    /// Makes the event loop look at the control queue. Known once a driver was there.
    pub(super) bell: Arc<OnceLock<EventFd>>,
}

impl<P: Port> NetHandle<P> {
    /// Makes one announcement: puts a RARP frame on the wire as if the guest had sent it, and interrupts a guest that
    /// was asked to announce itself and has not yet said that it did.
    ///
    /// # Errors
    /// The interface does not take the frame: it is down, gone, or its queue is full. The guest is told all the same.
    pub fn announce_once(&self) -> io::Result<()> {
        if let Some(bell) = self.bell.get() {
            // The counter can only refuse near 2^64, when the event is pending anyway.
            let _pending = bell.write(1);
        }
        let mut bytes = [0; HEADER_BYTES + 60];
        bytes[HEADER_BYTES..].copy_from_slice(&rarp_frame(self.mac));
        rustix::io::write(&*self.port, &bytes)?;
        Ok(())
    }
}

impl<P: Port> Clone for NetHandle<P> {
    fn clone(&self) -> Self {
        Self { port: Arc::clone(&self.port), mac: self.mac, bell: Arc::clone(&self.bell) }
    }
}
