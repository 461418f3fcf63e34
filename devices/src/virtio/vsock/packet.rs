//! Header of a vsock packet (virtio 1.2, 5.10.6): 44 bytes, little-endian, before the payload.
//!
//! It refuses to know connections. The virtio-vsock crate has a packet too, but over a raw descriptor chain with one
//! descriptor for the payload, which our checked chains need not be.

use std::array;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// Context id of the host.
pub const HOST_CID: u64 = 2;
/// Stream sockets, the only type served.
pub const TYPE_STREAM: u16 = 1;

/// Operations.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of SHUTDOWN: the sender of the packet receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// Flag of SHUTDOWN: the sender of the packet sends no more.
pub const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A connection of this device, which has one guest and one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub guest_port: u32,
    pub host_port: u32,
}

/// A header's fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes the sender's receive buffer has.
    pub buf_alloc: u32,
    /// Bytes the sender has consumed of it since the beginning, wrapping.
    pub fwd_cnt: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.iter().copied();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut all = self
            .src_cid
            .to_le_bytes()
            .into_iter()
            .chain(self.dst_cid.to_le_bytes())
            .chain(self.src_port.to_le_bytes())
            .chain(self.dst_port.to_le_bytes())
            .chain(self.len.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(self.op.to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buf_alloc.to_le_bytes())
            .chain(self.fwd_cnt.to_le_bytes());
        take(&mut all)
    }

    /// The connection a packet from the guest belongs to.
    pub fn key(&self) -> Key {
        Key { guest_port: self.src_port, host_port: self.dst_port }
    }

    /// The answer that ends what a packet from the guest is about.
    pub fn reset(&self, guest_cid: u64) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: guest_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// The next `N` bytes; callers have counted to 44.
fn take<const N: usize>(bytes: &mut impl Iterator<Item = u8>) -> [u8; N] {
    array::from_fn(|_| bytes.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_specification_has_them() {
        let bytes: [u8; HEADER_BYTES] = array::from_fn(|i| i as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(header.len, 0x1b1a_1918);
        assert_eq!((header.kind, header.op), (0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
        assert_eq!(header.bytes(), bytes);
    }
}
