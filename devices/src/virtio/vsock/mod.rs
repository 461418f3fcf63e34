//! Socket device (virtio 1.2, 5.10) backed by Unix sockets, with the convention of other microVM monitors.
//!
//! ```text
//! guest connects to (2, P)                   -> we connect to <socket>_P
//! host connects to <socket>, "CONNECT P\n"   -> we connect to the guest's port P, then "OK <our port>\n"
//! ```
//!
//! Everything is bounded: connections, clients that have not said their port, bytes and resets under way. A packet
//! that fits no rule is answered with RST. No thread and no worker: one epoll descriptor gathers all sockets, and
//! nothing touches guest RAM between two reactions. Connections do not survive the machine's move: their other ends
//! are sockets of this host. The guest is told so by an event, so that its side ends too.

mod connection;
mod host;
mod packet;
mod state;
mod token;

use super::{BUDGET, Backend, Chain, Fault, Io, VirtioDevice};
use crate::listener::{ListenError, Listener, connect_now};
use crate::state::{Saved, StateError};
use connection::{BUFFER_BYTES, Connection, Outgoing, Verdict};
use host::{Client, Said};
use log::{debug, warn};
use packet::{HEADER_BYTES, HOST_CID, Header, Key, TYPE_STREAM, op};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use token::Token;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// VIRTIO_VSOCK_F_STREAM (virtio 1.2, 5.10.3).
const FEATURE_STREAM: u64 = 1 << 0;

/// Connections of one guest.
const MAX_CONNECTIONS: usize = 512;
/// Host clients that have not said a port; one more replaces the oldest.
const MAX_CLIENTS: usize = 64;
/// Resets that wait for receive buffers; beyond it the guest's packets wait too.
const MAX_RESETS: usize = 256;
/// Payload of one packet to the guest; its buffers are usually 4 KiB.
const MAX_PAYLOAD: usize = 64 << 10;
/// Socket events of one reaction.
const MAX_EVENTS: usize = 64;
/// Host ports of connections from the host: above those that services use.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// VMADDR_PORT_ANY, no port.
const NO_PORT: u32 = u32::MAX;

/// Why a socket device cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket for host clients.
    #[error("cannot make the vsock device")]
    Listen(#[source] ListenError),
    /// The descriptor that gathers all sockets.
    #[error("cannot make an epoll descriptor for the vsock device")]
    Epoll(#[source] io::Error),
}

/// The device. See the module.
pub struct Vsock {
    guest_cid: u64,
    listener: Listener,
    /// Gathers all sockets, edge-triggered.
    epoll: Epoll,
    active: bool,
    connections: BTreeMap<Key, Connection>,
    /// Connections with something for the guest, in turn.
    ready: VecDeque<Key>,
    resets: VecDeque<Header>,
    /// The guest's packets wait until `resets` is shorter.
    held_back: bool,
    clients: BTreeMap<u32, Client>,
    next_client: u32,
    next_host_port: u32,
    /// The guest must hear that the connections it knows of are gone.
    reset_pending: bool,
    /// Payload on its way to the guest, never kept between two packets.
    buffer: Vec<u8>,
}

impl Vsock {
    /// A device for the guest `guest_cid`, which must be 3 or more, listening at `socket`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(guest_cid: u32, socket: &Path) -> Result<Self, Error> {
        let listener = Listener::bind(socket).map_err(Error::Listen)?;
        let device = Self {
            guest_cid: guest_cid.into(),
            epoll: Epoll::new().map_err(Error::Epoll)?,
            active: false,
            connections: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            held_back: false,
            clients: BTreeMap::new(),
            next_client: 0,
            next_host_port: FIRST_HOST_PORT,
            reset_pending: false,
            buffer: vec![0; MAX_PAYLOAD],
            listener,
        };
        device.watch(device.listener.as_raw_fd(), Token::Listener).map_err(Error::Epoll)?;
        Ok(device)
    }

    /// Edge-triggered, so that a socket whose news nobody can use yet is not told of again and again. A closed
    /// descriptor leaves by itself.
    fn watch(&self, fd: RawFd, token: Token) -> io::Result<()> {
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token.encode()))
    }

    // From the guest.

    fn transmit(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.held_back = false;
        for count in 0.. {
            if count == BUDGET {
                io.again(TX);
                break;
            }
            if self.resets.len() >= MAX_RESETS {
                self.held_back = true;
                break;
            }
            let Some(chain) = io.pop(TX)? else { break };
            self.take_packet(&chain, io)?;
            io.complete(TX, chain.head, 0)?;
        }
        io.signal(TX)
    }

    fn take_packet(&mut self, chain: &Chain, io: &Io) -> Result<(), Fault> {
        let mut bytes = [0; HEADER_BYTES];
        if chain.read_at(io.ram, 0, &mut bytes) < HEADER_BYTES {
            return Err(Fault::Malformed { queue: TX, what: "a packet is shorter than its header" });
        }
        let header = Header::parse(&bytes);
        let has_payload = header.op == op::RW;
        let length = if has_payload { header.len } else { 0 };
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            // About no connection of ours, even if its ports are those of one.
            self.refuse(&header);
            return Ok(());
        }
        let sane = header.src_port != NO_PORT
            && length <= BUFFER_BYTES
            && chain.readable_bytes() >= HEADER_BYTES as u64 + u64::from(length);
        if !sane {
            self.end(header.key(), &header);
            return Ok(());
        }
        let mut payload = vec![0; length as usize];
        chain.read_at(io.ram, HEADER_BYTES as u64, &mut payload);
        self.receive(&header, &payload);
        Ok(())
    }

    fn receive(&mut self, header: &Header, payload: &[u8]) {
        let key = header.key();
        if header.op == op::REQUEST {
            if self.connections.contains_key(&key) || !self.connect_host(header) {
                self.end(key, header);
            }
            return;
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            return self.end(key, header);
        };
        let verdict = connection.receive(header, payload);
        self.settle(key, verdict);
    }

    /// Ends the connection that an invalid packet is about.
    fn end(&mut self, key: Key, header: &Header) {
        self.remove(key);
        self.refuse(header);
    }

    /// Answers a packet with RST, but nobody answers an RST.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset(self.guest_cid));
        }
    }

    /// Drops a connection and its turn: the list of turns never holds more than there are connections.
    fn remove(&mut self, key: Key) {
        if self.connections.remove(&key).is_some_and(|connection| connection.queued) {
            self.ready.retain(|queued| *queued != key);
        }
    }

    /// Connects a guest's request to the host's service. False if there is none or no room for it.
    fn connect_host(&mut self, request: &Header) -> bool {
        if self.connections.len() >= MAX_CONNECTIONS {
            debug!("vsock: the guest has {MAX_CONNECTIONS} connections, one more is refused");
            return false;
        }
        let path = service_path(self.listener.path(), request.dst_port);
        let stream = match connect_now(&path) {
            Ok(stream) => stream,
            Err(error) => {
                debug!("vsock: no connection to {}: {error}", path.display());
                return false;
            }
        };
        self.add(request.key(), Connection::from_guest(request, stream))
    }

    fn add(&mut self, key: Key, connection: Connection) -> bool {
        if let Err(error) = self.watch(connection.as_raw_fd(), Token::Connection(key)) {
            warn!("vsock: cannot watch a connection: {error}");
            return false;
        }
        self.connections.insert(key, connection);
        self.settle(key, Verdict::Keep);
        true
    }

    /// Does what a packet or an event made of a connection.
    fn settle(&mut self, key: Key, verdict: Verdict) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        match verdict {
            Verdict::Keep => {
                if connection.has_news() && !connection.queued {
                    connection.queued = true;
                    self.ready.push_back(key);
                }
            }
            Verdict::Reset | Verdict::Forget => {
                let told = verdict == Verdict::Reset && connection.announced();
                self.remove(key);
                if told {
                    let (src_port, dst_port) = (key.guest_port, key.host_port);
                    let of_guest =
                        Header { dst_cid: HOST_CID, src_port, dst_port, kind: TYPE_STREAM, ..Header::default() };
                    self.resets.push_back(of_guest.reset(self.guest_cid));
                }
            }
        }
    }

    // From the host.

    fn serve_sockets(&mut self) -> Result<(), Fault> {
        let mut events = [EpollEvent::default(); MAX_EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(source) => return Err(Fault::Backend { attempt: "waiting for vsock sockets", source }),
        };
        for event in events.iter().take(count) {
            match Token::decode(event.data()) {
                Token::Listener => self.accept(),
                Token::Client(id) => self.hear_client(id),
                Token::Connection(key) => {
                    let gone = event.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
                    if let Some(connection) = self.connections.get_mut(&key) {
                        let verdict = connection.socket_ready(gone);
                        self.settle(key, verdict);
                    }
                }
            }
        }
        Ok(())
    }

    /// Takes all that wait: the edge does not come again for them.
    fn accept(&mut self) {
        loop {
            let stream = match self.listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return,
                Err(error) => return warn!("vsock: cannot accept a client: {error}"),
            };
            if self.clients.len() >= MAX_CLIENTS {
                self.clients.pop_first();
            }
            let id = self.next_client;
            // Past the listener's value, and then past the oldest.
            self.next_client = if id == u32::MAX - 1 { 0 } else { id + 1 };
            match self.watch(stream.as_raw_fd(), Token::Client(id)) {
                Ok(()) => drop(self.clients.insert(id, Client::new(stream))),
                Err(error) => warn!("vsock: cannot watch a client: {error}"),
            }
        }
    }

    fn hear_client(&mut self, id: u32) {
        let said = match self.clients.get_mut(&id) {
            Some(client) => client.read(),
            None => return,
        };
        let port = match said {
            Said::Waiting => return,
            Said::Port(port) => Some(port).filter(|port| *port != NO_PORT),
            Said::Nonsense => None,
        };
        let (Some(client), Some(guest_port)) = (self.clients.remove(&id), port) else { return };
        if self.connections.len() >= MAX_CONNECTIONS {
            return warn!("vsock: the guest has {MAX_CONNECTIONS} connections, a client of the host is refused");
        }
        let host_port = self.free_host_port();
        let key = Key { guest_port, host_port };
        // Its descriptor was watched as a client's.
        let events = EpollEvent::default();
        if self.epoll.ctl(ControlOperation::Delete, client.stream.as_raw_fd(), events).is_ok() {
            self.add(key, Connection::from_host(key, client.stream));
        }
    }

    /// A port that no connection has; there are far more ports than connections.
    fn free_host_port(&mut self) -> u32 {
        loop {
            let port = self.next_host_port;
            self.next_host_port = if port == NO_PORT - 1 { FIRST_HOST_PORT } else { port + 1 };
            if self.connections.keys().all(|key| key.host_port != port) {
                return port;
            }
        }
    }

    // To the guest.

    fn deliver(&mut self, io: &mut Io) -> Result<(), Fault> {
        for count in 0.. {
            if self.resets.is_empty() && self.ready.is_empty() {
                break;
            }
            if count == BUDGET {
                io.again(RX);
                break;
            }
            let Some(chain) = io.pop(RX)? else { break };
            let room = chain.writable_bytes().saturating_sub(HEADER_BYTES as u64);
            if chain.writable_bytes() < HEADER_BYTES as u64 {
                return Err(Fault::Malformed { queue: RX, what: "a receive buffer is shorter than a header" });
            }
            let Some(header) = self.next_packet(usize::try_from(room).unwrap_or(usize::MAX)) else {
                io.put_back(RX);
                break;
            };
            let payload = self.buffer.get(..header.len as usize).unwrap_or_default();
            chain.write_at(io.ram, 0, &header.bytes());
            chain.write_at(io.ram, HEADER_BYTES as u64, payload);
            // A header and at most MAX_PAYLOAD bytes.
            io.complete(RX, chain.head, HEADER_BYTES as u32 + header.len)?;
        }
        if self.held_back && self.resets.len() < MAX_RESETS {
            io.again(TX);
        }
        io.signal(RX)
    }

    /// The next packet for the guest; its payload, at most `room` bytes, is in `buffer`.
    fn next_packet(&mut self, room: usize) -> Option<Header> {
        let room = room.min(MAX_PAYLOAD);
        loop {
            if let Some(reset) = self.resets.pop_front() {
                return Some(reset);
            }
            let key = self.ready.pop_front()?;
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.queued = false;
            match connection.next_packet(self.guest_cid, &mut self.buffer[..room]) {
                Outgoing::Packet(header) => {
                    self.settle(key, Verdict::Keep);
                    return Some(header);
                }
                Outgoing::Nothing => {}
                Outgoing::Broken => self.settle(key, Verdict::Reset),
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn pci_class(&self) -> u32 {
        0x07_80_00 // communication controller, other
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 16]
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let cid = self.guest_cid.to_le_bytes();
        for (byte, position) in data.iter_mut().zip(0..) {
            let index = usize::try_from(offset.saturating_add(position)).ok();
            *byte = index.and_then(|index| cid.get(index)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.active = true;
        self.deliver(io)
    }

    fn queue_notified(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault> {
        match queue {
            TX => self.transmit(io)?,
            EVENT => self.tell_reset(io)?,
            _ => {}
        }
        self.deliver(io)
    }

    /// Clients wait in the listener's queue while there is no driver.
    fn backend(&self) -> Option<Backend> {
        self.active.then(|| Backend { fd: self.epoll.as_raw_fd(), events: EventSet::IN })
    }

    fn backend_ready(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.serve_sockets()?;
        self.deliver(io)
    }

    /// Nothing is ever in flight: what is not in the guest's buffers yet is in the sockets or here.
    fn quiesce(&mut self, _io: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    /// After a move that failed there is nothing to tell: the connections are still there.
    fn moved(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.tell_reset(io)
    }

    fn reset(&mut self) {
        self.active = false;
        self.connections.clear();
        self.ready.clear();
        self.resets.clear();
        self.held_back = false;
        self.reset_pending = false;
    }

    fn save(&self) -> Saved {
        self.saved()
    }

    fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        self.take_over(saved)
    }
}

/// Where a host's service for `port` listens.
fn service_path(socket: &Path, port: u32) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

#[cfg(test)]
mod guest;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;
