//! One stream between a guest's port and a Unix socket: its credit, its two half-closes, what it owes the guest.
//!
//! Bytes to the host wait in a buffer that the guest's credit bounds; bytes to the guest wait in the kernel's socket
//! buffer and are read only when the guest has credit and a receive buffer. It refuses to know rings and other
//! connections.

use super::packet::{HOST_CID, Header, Key, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// Receive buffer we tell the guest of, bytes.
pub const BUFFER_BYTES: u32 = 128 << 10;
/// Consumed bytes after which the guest is told, unless a packet told it before.
const CREDIT_STEP: u32 = BUFFER_BYTES / 4;

/// How far the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A host's client waits; the guest has not been asked.
    Wanted,
    /// The guest was asked and has not answered.
    Requested,
    /// The guest asked, we owe it the answer.
    Accepted,
    /// Both agreed.
    Open,
}

/// What a packet or an event did to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It lives.
    Keep,
    /// It is over; the guest must be told with RST.
    Reset,
    /// It is over and the guest knows, or never knew.
    Forget,
}

/// What a connection has for the guest.
pub enum Outgoing {
    /// A header whose `len` bytes of payload were put into the buffer.
    Packet(Header),
    /// Nothing now.
    Nothing,
    /// The host's side failed.
    Broken,
}

/// See the module.
pub struct Connection {
    key: Key,
    stream: UnixStream,
    phase: Phase,
    /// Waits in the list of those with something for the guest.
    pub queued: bool,

    /// From the guest, not yet taken by the host. At most BUFFER_BYTES.
    to_host: VecDeque<u8>,
    /// Bytes the host took.
    fwd_cnt: u32,
    /// `fwd_cnt` as the guest last heard it.
    told_fwd_cnt: u32,
    owes_credit: bool,
    guest_sends_no_more: bool,
    host_receives_no_more: bool,

    /// Bytes sent to the guest.
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// The guest was asked for credit since it last gave any.
    asked_credit: bool,
    /// Reading the socket has not said "no more for now" since it last was ready.
    readable: bool,
    guest_receives_no_more: bool,
    host_sends_no_more: bool,
    /// Flags of the last SHUTDOWN sent.
    told_shutdown: u32,
}

impl Connection {
    fn new(key: Key, stream: UnixStream, phase: Phase) -> Self {
        Self {
            key,
            stream,
            phase,
            queued: false,
            to_host: VecDeque::new(),
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            owes_credit: false,
            guest_sends_no_more: false,
            host_receives_no_more: false,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            asked_credit: false,
            readable: false,
            guest_receives_no_more: false,
            host_sends_no_more: false,
            told_shutdown: 0,
        }
    }

    /// A host's client at `stream` wants the guest's port.
    pub fn from_host(key: Key, stream: UnixStream) -> Self {
        Self::new(key, stream, Phase::Wanted)
    }

    /// The guest's `request` was connected to `stream`.
    pub fn from_guest(request: &Header, stream: UnixStream) -> Self {
        let mut connection = Self::new(request.key(), stream, Phase::Accepted);
        connection.learn_credit(request);
        connection
    }

    /// What a packet of the guest with `payload` does, REQUEST apart.
    pub fn receive(&mut self, header: &Header, payload: &[u8]) -> Verdict {
        self.learn_credit(header);
        match (header.op, self.phase) {
            (op::RST, _) => Verdict::Forget,
            (op::RESPONSE, Phase::Requested) => {
                self.phase = Phase::Open;
                // An empty socket has room for a line; one that has not is broken.
                match writeln!(self.stream, "OK {}", self.key.host_port) {
                    Ok(()) => Verdict::Keep,
                    Err(_) => Verdict::Reset,
                }
            }
            (_, Phase::Wanted | Phase::Requested) | (op::RESPONSE, _) => Verdict::Reset,
            (op::RW, _) => self.receive_payload(payload),
            (op::SHUTDOWN, _) => {
                self.guest_receives_no_more |= header.flags & SHUTDOWN_RECEIVE != 0;
                self.guest_sends_no_more |= header.flags & SHUTDOWN_SEND != 0;
                if self.guest_receives_no_more {
                    // Fails only when the host is gone, which an event tells.
                    let _gone = self.stream.shutdown(Shutdown::Read);
                }
                self.flush()
            }
            (op::CREDIT_UPDATE, _) => Verdict::Keep,
            (op::CREDIT_REQUEST, _) => {
                self.owes_credit = true;
                Verdict::Keep
            }
            _ => Verdict::Reset,
        }
    }

    fn receive_payload(&mut self, payload: &[u8]) -> Verdict {
        if self.guest_sends_no_more || self.to_host.len() + payload.len() > BUFFER_BYTES as usize {
            return Verdict::Reset;
        }
        // The usual case goes past the buffer.
        let mut direct = 0;
        if self.to_host.is_empty() && !self.host_receives_no_more {
            // What it does not take and why is seen again in `flush`.
            direct = self.stream.write(payload).unwrap_or(0);
            self.fwd_cnt = self.fwd_cnt.wrapping_add(direct as u32);
        }
        self.to_host.extend(payload.get(direct..).unwrap_or_default());
        self.flush()
    }

    /// The socket has news: `hung_up` if the other side has closed both ways.
    pub fn socket_ready(&mut self, hung_up: bool) -> Verdict {
        match self.phase {
            Phase::Wanted if hung_up => return Verdict::Forget,
            Phase::Requested if hung_up => return Verdict::Reset,
            _ => {}
        }
        self.readable = true;
        self.host_receives_no_more |= hung_up;
        self.flush()
    }

    /// Gives the host what waits, as far as it takes it.
    fn flush(&mut self) -> Verdict {
        while !self.to_host.is_empty() && !self.host_receives_no_more {
            match self.stream.write(self.to_host.as_slices().0) {
                Ok(written) => self.consumed(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.host_receives_no_more = true,
            }
        }
        if self.host_receives_no_more {
            self.consumed(self.to_host.len());
        }
        if !self.guest_sends_no_more || !self.to_host.is_empty() {
            return Verdict::Keep;
        }
        if self.guest_receives_no_more {
            // A clean end: the guest waits for this RST (virtio 1.2, 5.10.6.5).
            return Verdict::Reset;
        }
        let _gone = self.stream.shutdown(Shutdown::Write);
        Verdict::Keep
    }

    fn consumed(&mut self, bytes: usize) {
        self.to_host.drain(..bytes);
        // At most BUFFER_BYTES.
        self.fwd_cnt = self.fwd_cnt.wrapping_add(bytes as u32);
        if self.to_host.is_empty() {
            self.to_host.shrink_to(0);
        }
    }

    fn learn_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
        self.asked_credit &= self.credit() == 0;
    }

    /// Bytes the guest has room for. None if its counters make no sense.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    fn wants_read(&self) -> bool {
        self.phase == Phase::Open && self.readable && !self.host_sends_no_more && !self.guest_receives_no_more
    }

    fn new_shutdown(&self) -> Option<u32> {
        let mut flags = if self.host_sends_no_more { SHUTDOWN_SEND } else { 0 };
        if self.host_receives_no_more {
            // What the host may still send is nothing to a guest that does not read.
            flags |= if self.guest_receives_no_more { SHUTDOWN_BOTH } else { SHUTDOWN_RECEIVE };
        }
        (self.phase == Phase::Open && flags & !self.told_shutdown != 0).then_some(flags)
    }

    fn owes_credit(&self) -> bool {
        self.owes_credit || self.fwd_cnt.wrapping_sub(self.told_fwd_cnt) >= CREDIT_STEP
    }

    /// Whether [`Self::next_packet`] may have something.
    pub fn has_news(&self) -> bool {
        matches!(self.phase, Phase::Wanted | Phase::Accepted)
            || self.owes_credit()
            || self.wants_read() && (self.credit() > 0 || !self.asked_credit)
            || self.new_shutdown().is_some()
    }

    /// Whether the guest knows of it.
    pub fn announced(&self) -> bool {
        self.phase != Phase::Wanted
    }

    /// The next packet for the guest, its payload at the start of `buffer`.
    pub fn next_packet(&mut self, guest_cid: u64, buffer: &mut [u8]) -> Outgoing {
        let mut header = Header { op: op::CREDIT_UPDATE, ..Header::default() };
        match self.phase {
            Phase::Wanted => {
                self.phase = Phase::Requested;
                header.op = op::REQUEST;
            }
            Phase::Requested => return Outgoing::Nothing,
            Phase::Accepted => {
                self.phase = Phase::Open;
                header.op = op::RESPONSE;
            }
            Phase::Open if self.owes_credit() => {}
            Phase::Open => match self.next_payload(buffer) {
                Err(_) => return Outgoing::Broken,
                Ok(Some((op, len))) => (header.op, header.len) = (op, len),
                Ok(None) => match self.new_shutdown() {
                    Some(flags) => {
                        self.told_shutdown = flags;
                        (header.op, header.flags) = (op::SHUTDOWN, flags);
                    }
                    None => return Outgoing::Nothing,
                },
            },
        }
        self.owes_credit = false;
        self.told_fwd_cnt = self.fwd_cnt;
        Outgoing::Packet(Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            kind: TYPE_STREAM,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.fwd_cnt,
            ..header
        })
    }

    /// Reads what the host sent: operation and length.
    fn next_payload(&mut self, buffer: &mut [u8]) -> io::Result<Option<(u16, u32)>> {
        while self.wants_read() && !buffer.is_empty() {
            let room = buffer.len().min(self.credit() as usize);
            if room == 0 {
                let ask = !self.asked_credit;
                self.asked_credit = true;
                return Ok(ask.then_some((op::CREDIT_REQUEST, 0)));
            }
            match self.stream.read(&mut buffer[..room]) {
                Ok(0) => self.host_sends_no_more = true,
                Ok(read) => {
                    // At most the credit, which has 32 bits.
                    self.tx_cnt = self.tx_cnt.wrapping_add(read as u32);
                    return Ok(Some((op::RW, read as u32)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
