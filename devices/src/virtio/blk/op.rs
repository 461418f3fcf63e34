//! One operation on an image, as io_uring or a thread of ours can do it. It knows nothing of requests.

use super::sys::{self, Buffers};
use io_uring::{opcode, squeue, types};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;

/// An operation with all it needs. Offsets and lengths are bytes.
pub enum Op {
    /// Reads into the buffers.
    Read {
        /// Where in the image.
        offset: u64,
        /// Where to.
        into: Buffers,
    },
    /// Writes the buffers.
    Write {
        /// Where in the image.
        offset: u64,
        /// Where from.
        from: Buffers,
        /// Not done before it is on stable storage.
        through: bool,
    },
    /// Brings to stable storage what was written and reported as done.
    Flush,
    /// fallocate: punches holes and zeroes ranges, of block devices too.
    Allocate {
        /// Which of these.
        mode: FallocateFlags,
        /// Where in the image.
        offset: u64,
        /// How much.
        length: u64,
    },
    /// BLKDISCARD on a block device, whose fallocate can only zero: some can discard but not zero (thin volumes).
    Discard {
        /// Where on the device.
        offset: u64,
        /// How much.
        length: u64,
    },
}

/// An operation that has ended.
pub struct Done {
    /// Which one, as named when it was started.
    pub token: u16,
    /// The operation, with its buffers.
    pub op: Op,
    /// Bytes moved, or why not.
    pub result: io::Result<u32>,
}

impl Op {
    /// The submission queue entry for it. `None`: io_uring cannot do it.
    pub fn entry(&self, fd: RawFd) -> Option<squeue::Entry> {
        let fd = types::Fd(fd);
        Some(match self {
            Self::Read { offset, into } => {
                let (vectors, count) = into.vectors();
                opcode::Readv::new(fd, vectors, count).offset(*offset).build()
            }
            Self::Write { offset, from, through } => {
                let (vectors, count) = from.vectors();
                let flags = if *through { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, vectors, count).offset(*offset).rw_flags(flags as _).build()
            }
            Self::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Self::Allocate { mode, offset, length } => {
                opcode::Fallocate::new(fd, *length).offset(*offset).mode(mode.bits().cast_signed()).build()
            }
            Self::Discard { .. } => return None,
        })
    }

    /// The memory it worked on.
    pub fn into_buffers(self) -> Option<Buffers> {
        match self {
            Self::Read { into: buffers, .. } | Self::Write { from: buffers, .. } => Some(buffers),
            Self::Flush | Self::Allocate { .. } | Self::Discard { .. } => None,
        }
    }

    /// Does it now, on this thread. Returns bytes moved, 0 for what moves none.
    pub fn run(&mut self, file: &File) -> io::Result<u32> {
        match self {
            Self::Read { offset, into } => sys::read(file, *offset, into),
            Self::Write { offset, from, through } => sys::write(file, *offset, from, *through),
            Self::Flush => file.sync_data().map(|()| 0),
            Self::Allocate { mode, offset, length } => {
                rustix::fs::fallocate(file, *mode, *offset, *length)?;
                Ok(0)
            }
            Self::Discard { offset, length } => sys::discard(file, *offset, *length).map(|()| 0),
        }
    }
}
