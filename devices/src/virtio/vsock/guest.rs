//! A guest for tests of the device: the fake driver, real Unix sockets, and packets as a guest would send them.

use super::connection::BUFFER_BYTES;
use super::packet::{HEADER_BYTES, HOST_CID, Header, Key, TYPE_STREAM, op};
use super::{RX, TX, Vsock};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub const CID: u64 = 3;
pub const GUEST_BUFFER: u32 = 256 << 10;
pub const PAYLOAD: u32 = 4096;
pub const DEADLINE: Duration = Duration::from_secs(20);

pub struct Guest {
    pub device: Vsock,
    pub driver: Driver,
    pub directory: TempDir,
    /// Packets to the guest that no test has looked at.
    pub inbox: VecDeque<(Header, Vec<u8>)>,
    /// Receive buffers that are with the device.
    pub posted: usize,
}

impl Guest {
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut device = Vsock::new(CID as u32, &directory.path().join("v")).unwrap();
        let mut driver = Driver::new(&[256, 256, 16]);
        assert!(device.backend().is_none(), "no driver yet");
        device.activate(&mut driver.io()).unwrap();
        let mut guest = Self { device, driver, directory, inbox: VecDeque::new(), posted: 0 };
        guest.post(100);
        guest
    }

    /// Gives the device receive buffers until it has `count`.
    pub fn post(&mut self, count: usize) {
        while self.posted < count {
            self.driver.add(RX, &[], &[HEADER_BYTES as u32, PAYLOAD]);
            self.posted += 1;
        }
        self.device.queue_notified(RX, &mut self.driver.io()).unwrap();
        self.collect();
    }

    pub fn collect(&mut self) {
        while self.driver.used(TX).is_some() {}
        while let Some(used) = self.driver.used(RX) {
            self.posted -= 1;
            let (header, payload) = used.bytes.split_at(HEADER_BYTES);
            let header = Header::parse(header.try_into().unwrap());
            assert_eq!(header.len as usize, payload.len());
            assert_eq!(header.dst_cid, CID);
            self.inbox.push_back((header, payload.to_vec()));
        }
    }

    pub fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.add(TX, &[&header.bytes(), payload], &[]);
        self.device.queue_notified(TX, &mut self.driver.io()).unwrap();
        self.collect();
    }

    /// Lets the device react to its sockets once, as the event loop would.
    pub fn turn(&mut self) {
        self.device.backend_ready(&mut self.driver.io()).unwrap();
        self.collect();
    }

    /// As many reactions as all sockets there may be need.
    pub fn settle(&mut self) {
        for _ in 0..20 {
            self.turn();
        }
    }

    /// The next packet, waiting for the host's side.
    pub fn next(&mut self) -> (Header, Vec<u8>) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet came");
            self.turn();
        }
    }

    pub fn expect(&mut self, op: u16) -> Header {
        let (header, payload) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        assert_eq!(payload, b"");
        header
    }

    pub fn expect_nothing(&mut self) {
        self.settle();
        assert_eq!(self.inbox.pop_front(), None);
    }

    pub fn header(&self, key: Key, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: key.guest_port,
            dst_port: key.host_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: GUEST_BUFFER,
            ..Header::default()
        }
    }

    pub fn control(&mut self, key: Key, op: u16, flags: u32) {
        self.send(Header { flags, ..self.header(key, op) }, b"");
    }

    pub fn data(&mut self, key: Key, payload: &[u8]) {
        self.send(Header { len: payload.len() as u32, ..self.header(key, op::RW) }, payload);
    }

    pub fn service(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("v_{port}"))).unwrap()
    }

    /// Connects from the guest to a service of the host.
    pub fn connect_out(&mut self, service: &UnixListener, key: Key) -> UnixStream {
        self.control(key, op::REQUEST, 0);
        let header = self.expect(op::RESPONSE);
        assert_eq!((header.src_port, header.dst_port), (key.host_port, key.guest_port));
        assert_eq!((header.src_cid, header.buf_alloc), (HOST_CID, BUFFER_BYTES));
        let stream = service.accept().unwrap().0;
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    pub fn dial(&self, text: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.path().join("v")).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(text).unwrap();
        stream
    }

    /// Connects from the host to a port of the guest, which agrees.
    pub fn connect_in(&mut self, port: u32) -> (UnixStream, Key) {
        let mut stream = self.dial(format!("CONNECT {port}\n").as_bytes());
        let request = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        let key = Key { guest_port: port, host_port: request.src_port };
        self.control(key, op::RESPONSE, 0);
        assert_eq!(line(&mut stream), format!("OK {}\n", key.host_port));
        (stream, key)
    }

    pub fn connections(&self) -> usize {
        self.device.connections.len()
    }
}

pub fn line(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    while !text.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        text.push(char::from(byte[0]));
    }
    text
}
