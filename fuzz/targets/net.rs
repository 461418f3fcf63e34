//! The network device on a pair of datagram sockets, which keep frame boundaries as a tap does.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use sterna_devices::virtio::net::{Net, Offload, Port};
use sterna_fuzz::chain::{Chain, Framing};
use sterna_fuzz::drive::{Oracle, Step, drive};

#[derive(Arbitrary, Debug)]
enum Request {
    /// A frame to send.
    Frame { bytes: Vec<u8>, more: u16, split: u16, framing: Framing },
    /// Receive buffers.
    Buffer { lengths: Vec<u16>, framing: Framing },
    /// A command, usually one that is known.
    Command { class: u8, more: Vec<u8>, answer: u8, framing: Framing },
}

#[derive(Arbitrary, Debug)]
enum Host {
    /// A frame comes, with zeroes after these bytes.
    Frame { bytes: Vec<u8>, more: u16 },
    /// Many small frames come.
    Burst(u8),
    /// Room for what the guest sends.
    Drain,
    /// The cable is cut.
    Cut,
    /// The next offloads are refused, or accepted.
    Refuse(bool),
    /// The interface is announced.
    Announce,
}

struct Socket<'a> {
    socket: UnixDatagram,
    refuses: &'a Refuses,
}

/// Set by the host, read by the port.
#[derive(Default)]
struct Refuses(std::sync::atomic::AtomicBool);

impl AsFd for Socket<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Port for Socket<'_> {
    fn name(&self) -> &str {
        "socket"
    }
    fn mtu(&self) -> u16 {
        1500
    }
    fn set_offload(&self, offload: Offload) -> io::Result<()> {
        assert!(offload.checksum || !(offload.tso4 || offload.tso6), "segmentation without checksums: {offload:?}");
        assert!(offload.tso4 || offload.tso6 || !offload.ecn, "ECN without segmentation: {offload:?}");
        let refuses = self.refuses.0.load(std::sync::atomic::Ordering::Relaxed);
        if refuses { Err(io::Error::other("refused")) } else { Ok(()) }
    }
}

fn padded(mut bytes: Vec<u8>, more: u16) -> Vec<u8> {
    bytes.resize(bytes.len() + usize::from(more), 0);
    bytes
}

impl From<Request> for Chain {
    fn from(request: Request) -> Self {
        match request {
            Request::Frame { bytes, more, split, framing } => Chain::request(padded(bytes, more), split, [], framing),
            Request::Buffer { lengths, framing } => Chain::request(Vec::new(), 0, lengths, framing),
            Request::Command { class, more, answer, framing } => {
                Chain::request([&[class % 5, 0], &more[..]].concat(), 1, [answer.into()], framing)
            }
        }
    }
}

fuzz_target!(|steps: Vec<Step<Request, Host>>| {
    let (Ok((ours, theirs)), refuses) = (UnixDatagram::pair(), Refuses::default()) else { return };
    if ours.set_nonblocking(true).and(theirs.set_nonblocking(true)).is_err() {
        return;
    }
    let theirs = Cell::new(Some(theirs));
    let mut net = Net::new(Socket { socket: ours, refuses: &refuses }, [2, 0, 0, 0, 0, 1]);
    let mut buffer = vec![0; 70_000];
    drive(&mut net, Oracle::Whole, steps, |net, host| {
        let Some(peer) = theirs.take() else { return };
        match host {
            // A full socket drops frames, as any network may.
            Host::Frame { bytes, more } => drop(peer.send(&padded(bytes, more))),
            Host::Burst(count) => (0..count).for_each(|_| drop(peer.send(&[0; 60]))),
            Host::Drain => while peer.recv(&mut buffer).is_ok() {},
            Host::Announce => drop(net.handle().announce_once()),
            Host::Refuse(refuse) => refuses.0.store(refuse, std::sync::atomic::Ordering::Relaxed),
            Host::Cut => return,
        }
        theirs.set(Some(peer));
    });
});
