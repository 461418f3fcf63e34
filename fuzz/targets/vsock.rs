//! The socket device between packets of any kind and Unix sockets whose other ends do as they please.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use sterna_devices::virtio::vsock::Vsock;
use sterna_fuzz::chain::{Chain, Framing};
use sterna_fuzz::drive::{Oracle, Step, drive};
use sterna_fuzz::wire::Wire;

const CID: u32 = 3;
const HOST_CID: u64 = 2;
/// The one port with a service of the host.
const SERVICE: u32 = 1;
/// First port of a connection from the host.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Most sockets of the host's side in one run.
const MAX_STREAMS: usize = 32;

#[derive(Arbitrary, Debug)]
enum Request {
    Packet(Packet),
    /// So many receive buffers, one a chain.
    Buffer {
        lengths: Vec<u16>,
        framing: Framing,
    },
}

#[derive(Arbitrary, Debug)]
struct Packet {
    op: u8,
    guest_port: u8,
    host_port: HostPort,
    flags: u8,
    credit: Credit,
    payload: Vec<u8>,
    /// Zeroes after the payload.
    more: u16,
    /// The header is as it should be but for these bytes.
    patches: Vec<(u8, u8)>,
    split: u16,
    framing: Framing,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum HostPort {
    Service,
    OfClient(u8),
    Any(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Credit {
    Plenty,
    Little { buffer: u8, consumed: u8 },
    Any { buffer: u32, consumed: u32 },
}

#[derive(Arbitrary, Debug)]
enum Host {
    /// A client asks for a port of the guest.
    Dial {
        port: u8,
        more: Vec<u8>,
    },
    /// A client says anything.
    Say(Vec<u8>),
    /// The service takes the connections that wait.
    Accept,
    Write {
        stream: u8,
        bytes: Vec<u8>,
        more: u16,
    },
    Read {
        stream: u8,
        most: u16,
    },
    Shutdown {
        stream: u8,
        how: u8,
    },
    Close {
        stream: u8,
    },
}

impl From<Packet> for Chain {
    fn from(packet: Packet) -> Self {
        let host_port = match packet.host_port {
            HostPort::Service => SERVICE,
            HostPort::OfClient(number) => FIRST_HOST_PORT + u32::from(number % 4),
            HostPort::Any(port) => port,
        };
        let (buffer, consumed) = match packet.credit {
            Credit::Plenty => (256 << 10, 0),
            Credit::Little { buffer, consumed } => (buffer.into(), consumed.into()),
            Credit::Any { buffer, consumed } => (buffer, consumed),
        };
        let mut payload = packet.payload;
        payload.resize(payload.len() + usize::from(packet.more), 0);
        let ports = Wire::default().u64(CID.into()).u64(HOST_CID).u32((packet.guest_port % 4).into()).u32(host_port);
        let kind = ports.u32(payload.len() as u32).u16(1).u16((packet.op % 9).into()).u32(packet.flags.into());
        let mut header = kind.u32(buffer).u32(consumed).0;
        for (at, byte) in packet.patches {
            let at = usize::from(at) % header.len();
            header[at] = byte;
        }
        header.extend(payload);
        Chain::request(header, packet.split, [], packet.framing)
    }
}

impl From<Request> for Chain {
    fn from(request: Request) -> Self {
        match request {
            Request::Packet(packet) => packet.into(),
            Request::Buffer { lengths, framing } => Chain::request(Vec::new(), 0, lengths, framing),
        }
    }
}

/// The host's side: a service and the far ends of sockets.
struct Far {
    socket: PathBuf,
    service: UnixListener,
    streams: Vec<UnixStream>,
}

impl Far {
    fn keep(&mut self, stream: UnixStream) {
        if stream.set_nonblocking(true).is_ok() && self.streams.len() < MAX_STREAMS {
            self.streams.push(stream);
        }
    }

    fn say(&mut self, text: &[u8]) {
        // The queue of the listener has an end; connecting must not wait there.
        if self.streams.len() < MAX_STREAMS
            && let Ok(mut stream) = sterna_devices::listener::connect_now(&self.socket)
        {
            let _refused = stream.write(text);
            self.keep(stream);
        }
    }

    fn stream(&mut self, number: u8) -> Option<&mut UnixStream> {
        let count = self.streams.len().max(1);
        self.streams.get_mut(usize::from(number) % count)
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.service.accept() {
            self.keep(stream);
        }
    }

    fn act(&mut self, doing: Host) {
        match doing {
            Host::Dial { port, more } => {
                self.say(&[format!("CONNECT {}\n", port % 4).as_bytes(), &more].concat());
            }
            Host::Say(text) => self.say(&text),
            Host::Accept => self.accept(),
            Host::Write { stream, mut bytes, more } => {
                bytes.resize(bytes.len() + usize::from(more), 0);
                let _taken = self.stream(stream).map(|stream| stream.write(&bytes));
            }
            Host::Read { stream, most } => {
                let _read = self.stream(stream).map(|stream| stream.read(&mut vec![0; most.into()]));
            }
            Host::Shutdown { stream, how } => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(how % 3)];
                let _done = self.stream(stream).map(|stream| stream.shutdown(how));
            }
            Host::Close { stream } => {
                if !self.streams.is_empty() {
                    self.streams.swap_remove(usize::from(stream) % self.streams.len());
                }
            }
        }
    }
}

fuzz_target!(|steps: Vec<Step<Request, Host>>| {
    // In memory, and of this run only: nothing stays behind.
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let service = UnixListener::bind(directory.path().join(format!("v_{SERVICE}"))).expect("a socket");
    service.set_nonblocking(true).expect("a socket");
    let socket = directory.path().join("v");
    let mut device = Vsock::new(CID, &socket).expect("nobody else listens there");
    let mut far = Far { socket, service, streams: Vec::new() };
    drive(&mut device, Oracle::Whole, steps, |_, doing| far.act(doing));
});
