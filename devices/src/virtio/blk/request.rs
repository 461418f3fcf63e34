//! Reading a request off a descriptor chain (virtio 1.2, 5.2.6). Pure: it looks at guest RAM, and touches no image.

use super::image::SECTOR_BYTES;
use crate::virtio::GuestRam;
use crate::virtio::chain::{Chain, Fault, Segment, slice};
use smallvec::SmallVec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestAddress;

const HEADER_BYTES: u64 = 16;
/// Length of a discard or write-zeroes range.
const RANGE_BYTES: u64 = 16;
/// Most sectors in one discard or write-zeroes range, as the guest is told: 2 GiB, a bound on how long one takes.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// What a request is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Failed, or outside what the device allows.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// Not known here.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What is asked. Offsets and lengths are bytes, inside the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Image to guest.
    Read,
    /// Guest to image.
    Write,
    /// Make durable what was reported as written.
    Flush,
    /// The serial number.
    Identify,
    /// The contents are no longer needed.
    Discard,
    /// Zeroes, by giving the space back if that is allowed.
    Zero {
        /// May deallocate.
        unmap: bool,
    },
}

/// A checked request.
#[derive(Debug)]
pub struct Request {
    /// What is asked, or how it is refused.
    pub verb: Result<Verb, Status>,
    /// First byte on the image.
    pub offset: u64,
    /// Bytes on the image.
    pub length: u64,
    /// Guest memory of a read, write or identify.
    pub data: SmallVec<[Segment; 4]>,
    /// Where the status byte goes.
    pub status: GuestAddress,
    /// Writable bytes before the status byte.
    pub room: u64,
}

/// What requests are held against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the image.
    pub size_bytes: u64,
    /// Nothing may be changed.
    pub readonly: bool,
}

impl Request {
    /// Reads the request in `chain` of `queue`.
    ///
    /// # Errors
    /// A chain without room for a header or a status byte, so that not even a refusal can be answered.
    pub fn parse(ram: &GuestRam, queue: usize, chain: &Chain, limits: Limits) -> Result<Self, Fault> {
        let malformed = |what| Fault::Malformed { queue, what };
        let mut header = [0; HEADER_BYTES as usize];
        if chain.read_at(ram, 0, &mut header) != header.len() {
            return Err(malformed("block request with less than a header of 16 bytes"));
        }
        let writable = chain.writable_bytes();
        let room = writable.checked_sub(1).ok_or(malformed("block request without a status byte"))?;
        // The last writable byte, wherever the driver has put it (5.2.6: the framing is free).
        let status = slice(&chain.writable, room, 1).next();
        let status = status.ok_or(malformed("block request without a status byte"))?.address;

        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let mut request =
            Self { verb: Err(Status::Unsupported), offset: 0, length: 0, data: SmallVec::new(), status, room };
        let payload = chain.readable_bytes() - HEADER_BYTES;
        let checked = match kind {
            VIRTIO_BLK_T_IN => {
                request.data = slice(&chain.writable, 0, room).collect();
                request.at(u64::from_le_bytes(sector), room, limits).map(|()| Verb::Read)
            }
            VIRTIO_BLK_T_OUT => {
                request.data = slice(&chain.readable, HEADER_BYTES, payload).collect();
                let place = request.at(u64::from_le_bytes(sector), payload, limits);
                place.and(limits.may_write()).map(|()| Verb::Write)
            }
            VIRTIO_BLK_T_FLUSH => Ok(Verb::Flush),
            VIRTIO_BLK_T_GET_ID => {
                request.data = slice(&chain.writable, 0, room).collect();
                Ok(Verb::Identify)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let mut range = [0; RANGE_BYTES as usize];
                if payload == RANGE_BYTES && chain.read_at(ram, HEADER_BYTES, &mut range) == range.len() {
                    request.range(kind == VIRTIO_BLK_T_DISCARD, range, limits)
                } else {
                    // max_discard_seg and max_write_zeroes_seg are 1.
                    Err(Status::IoError)
                }
            }
            _ => Err(Status::Unsupported),
        };
        request.verb = checked;
        Ok(request)
    }

    /// Places the request on the image.
    fn at(&mut self, sector: u64, length: u64, limits: Limits) -> Result<(), Status> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let end = offset.checked_add(length).ok_or(Status::IoError)?;
        if !length.is_multiple_of(SECTOR_BYTES) || end > limits.size_bytes {
            return Err(Status::IoError);
        }
        (self.offset, self.length) = (offset, length);
        Ok(())
    }

    /// Takes a discard or write-zeroes range (5.2.6): sector, count of sectors, flags.
    fn range(&mut self, discard: bool, range: [u8; RANGE_BYTES as usize], limits: Limits) -> Result<Verb, Status> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        // A discard may not even carry the unmap flag (5.2.6.2).
        let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        limits.may_write()?;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        self.at(sector, u64::from(sectors) * SECTOR_BYTES, limits)?;
        Ok(if discard { Verb::Discard } else { Verb::Zero { unmap: flags != 0 } })
    }
}

impl Limits {
    fn may_write(self) -> Result<(), Status> {
        if self.readonly { Err(Status::IoError) } else { Ok(()) }
    }
}
