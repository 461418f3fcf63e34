//! An opened disk image: a raw file or a block device, its lock, and what must be known of it before I/O.
//!
//! It knows nothing of virtio. Sizes are bytes.

use super::lock::{self, Denied, Holder};
use super::sys::{self, Bounce, Buffers};
use rustix::fs::{AtFlags, OFlags, StatxFlags};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Deref;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// Unit of virtio-blk's addresses, bytes (virtio 1.2, 5.2.4).
pub const SECTOR_BYTES: u64 = 512;
/// Largest O_DIRECT granularity accepted; that of real disks is 512 or 4096.
pub const MAX_ALIGNMENT: u64 = 64 << 10;
/// Largest alignment of buffers accepted: a page.
const MAX_MEMORY_ALIGNMENT: u64 = 4096;
/// Places that [`Image::sample`] looks at, and bytes it takes of each.
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4096;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Missing, or no permission.
    #[error("cannot open disk image {}", path.display())]
    Open {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("disk image {} is a {kind}, not a file or block device", path.display())]
    Kind {
        /// As given.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// Smaller than a sector.
    #[error("disk image {} has {size_bytes} bytes, less than a sector of 512", path.display())]
    TooShort {
        /// As given.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// A size that is not a whole number of sectors, or of what O_DIRECT can read there. Rounding down would hide the
    /// end of the disk, where a GPT has its second header.
    #[error(
        "disk image {} has {size_bytes} bytes, not a multiple of {unit_bytes}: grow it with `truncate -s %{unit_bytes}`{}",
        path.display(), if *unit_bytes > SECTOR_BYTES { ", or use direct=off" } else { "" }
    )]
    Ragged {
        /// As given.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// What it should be a multiple of.
        unit_bytes: u64,
    },
    /// O_DIRECT is not possible there.
    #[error("the filesystem of disk image {} refuses O_DIRECT: use direct=off to go through the host's page cache", path.display())]
    Direct {
        /// As given.
        path: PathBuf,
        /// What the filesystem said.
        #[source]
        source: io::Error,
    },
    /// Somebody else uses it.
    #[error("disk image {} is locked by {holder}", path.display())]
    Locked {
        /// As given.
        path: PathBuf,
        /// By whom.
        holder: Holder,
    },
    /// The filesystem cannot lock.
    #[error("cannot lock disk image {}", path.display())]
    Lock {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The lock cannot be given back.
    #[error("cannot unlock disk image {}", path.display())]
    Unlock {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was written may not be durable.
    #[error("cannot flush disk image {}", path.display())]
    Flush {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be read.
    #[error("cannot read disk image {}", path.display())]
    Read {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Size or block size could not be found out.
    #[error("cannot find out the size of disk image {}", path.display())]
    Probe {
        /// As given.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What O_DIRECT wants of a transfer, bytes, powers of two. Both are 1 with the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of each buffer's address.
    pub memory: u64,
    /// Of the offset and of each buffer's length.
    pub offset: u64,
}

/// Block sizes as the guest is told, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Smallest unit the disk addresses. 512 for files wherever they lie, so that a partition table stays readable
    /// when the image moves; what O_DIRECT wants beyond that is met with a bounce buffer.
    pub logical: u32,
    /// Smallest unit written without a read before.
    pub physical: u32,
}

/// An opened image. Clones share the open file description and with it the lock, which ends with [`Self::unlock`] or with
/// the last of them: keep one while the machine is rebuilt for a guest's reboot.
#[derive(Clone, Debug)]
pub struct Image {
    file: Arc<ImageFile>,
    path: PathBuf,
    size_bytes: u64,
    readonly: bool,
    direct: bool,
    block_device: bool,
    alignment: Alignment,
    topology: Topology,
}

/// The descriptor of an image. The lock goes with it, even where something else still has the open file description: a
/// process that was forked and has not yet begun its program, or a ring that the kernel is still taking apart.
#[derive(Debug)]
pub struct ImageFile(File);

impl Deref for ImageFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for ImageFile {
    fn drop(&mut self) {
        if let Err(error) = sys::unlock(&self.0) {
            log::warn!("cannot unlock a disk image: {error}");
        }
    }
}

impl Image {
    /// Opens and locks `path`: [`Self::open_unlocked`], then [`Self::lock`].
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path, readonly: bool, direct: bool) -> Result<Self, ImageError> {
        let image = Self::open_unlocked(path, readonly, direct)?;
        image.lock()?;
        Ok(image)
    }

    /// Opens `path`, and leaves it to whoever has it locked: nothing may be written before [`Self::lock`]. `direct` goes
    /// past the host's page cache (O_DIRECT); a filesystem that cannot is an error, not a silent fallback, since
    /// what is lost is the coherence that shared storage and migration count on.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open_unlocked(path: &Path, readonly: bool, direct: bool) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Open { path: path.to_owned(), source };
        // Looked at before it is opened: opening a FIFO would wait for its other end.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let kind = if kind.is_dir() { "directory" } else { "special file" };
            return Err(ImageError::Kind { path: path.to_owned(), kind });
        }
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = OpenOptions::new().read(true).write(!readonly).custom_flags(flags).open(path);
        let file = file.map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) if direct => ImageError::Direct { path: path.to_owned(), source },
            _ => failed(source),
        })?;
        Self::probe(file, path, readonly, direct)
    }

    fn probe(mut file: File, path: &Path, readonly: bool, direct: bool) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Probe { path: path.to_owned(), source };
        let metadata = file.metadata().map_err(failed)?;
        let block_device = metadata.file_type().is_block_device();
        // A block device's metadata has no size, its end has.
        let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size_bytes < SECTOR_BYTES {
            return Err(ImageError::TooShort { path: path.to_owned(), size_bytes });
        }
        let alignment = direct_alignment(&file, size_bytes)
            .map_err(|source| ImageError::Direct { path: path.to_owned(), source })?;
        let unit_bytes = alignment.offset.max(SECTOR_BYTES);
        if !size_bytes.is_multiple_of(unit_bytes) {
            return Err(ImageError::Ragged { path: path.to_owned(), size_bytes, unit_bytes });
        }
        let topology = if block_device {
            let logical = rustix::fs::ioctl_blksszget(&file).map_err(|errno| failed(errno.into()))?;
            let physical = rustix::fs::ioctl_blkpbszget(&file).map_err(|errno| failed(errno.into()))?;
            Topology { logical, physical: physical.max(logical) }
        } else {
            let block = metadata.blksize().clamp(SECTOR_BYTES, 4096).max(alignment.offset);
            Topology { logical: 512, physical: u32::try_from(block).unwrap_or(4096) }
        };
        let (file, path) = (Arc::new(ImageFile(file)), path.to_owned());
        Ok(Self { file, path, size_bytes, readonly, direct, block_device, alignment, topology })
    }

    /// Locks it: alone if it may be written, together with other readers if not. Does not wait. Once locked it stays so,
    /// however often this is called.
    ///
    /// # Errors
    /// A lock in the way, with its holder where that can be found, or a filesystem without locks.
    pub fn lock(&self) -> Result<(), ImageError> {
        let path = self.path.clone();
        lock::take(&self.file, !self.readonly).map_err(|denied| match denied {
            Denied::Held(holder) => ImageError::Locked { path, holder },
            Denied::Failed(source) => ImageError::Lock { path, source },
        })
    }

    /// Gives the lock back: from here another may write. [`Self::flush`] before it.
    ///
    /// # Errors
    /// When the filesystem does not answer; whether it is locked is not known then.
    pub fn unlock(&self) -> Result<(), ImageError> {
        sys::unlock(&self.file).map_err(|source| ImageError::Unlock { path: self.path.clone(), source })
    }

    /// Whether somebody else has a lock that stands in the way of [`Self::lock`]. True for an image that a VM elsewhere
    /// writes to is the proof that both see the same file. Locks of one's own do not count, nor do those of other
    /// readers for a read-only image.
    ///
    /// # Errors
    /// A filesystem without locks.
    pub fn is_locked_elsewhere(&self) -> Result<bool, ImageError> {
        let failed = |source| ImageError::Lock { path: self.path.clone(), source };
        sys::conflicts(&self.file, !self.readonly).map_err(failed)
    }

    /// Makes durable what was written (fdatasync).
    ///
    /// # Errors
    /// A device that cannot.
    pub fn flush(&self) -> Result<(), ImageError> {
        self.file.sync_data().map_err(|source| ImageError::Flush { path: self.path.clone(), source })
    }

    /// A sample of what is in it: hashes of up to 16 blocks of 4 KiB, spread over it, the first and the last among them. Of an image
    /// that nobody writes to, two that differ are of different contents; two that are equal are most likely the same image. It
    /// is the same for every host and however the image is opened, and no defence against an image made to collide.
    ///
    /// # Errors
    /// An image that cannot be read.
    pub fn sample(&self) -> Result<Vec<u64>, ImageError> {
        let failed = |source| ImageError::Read { path: self.path.clone(), source };
        // Places that are aligned for every image, so that they are the same whatever this host asks for.
        let last = (self.size_bytes - 1) / MAX_ALIGNMENT;
        let mut places: Vec<u64> = (0..SAMPLES).map(|index| (last * index / (SAMPLES - 1)) * MAX_ALIGNMENT).collect();
        places.dedup();
        places.into_iter().map(|offset| Ok(xxh3_64(&self.read_block(offset).map_err(failed)?))).collect()
    }

    /// The up to [`SAMPLE_BYTES`] at `offset`, a multiple of [`MAX_ALIGNMENT`].
    fn read_block(&self, offset: u64) -> io::Result<Vec<u8>> {
        let rest = self.size_bytes - offset;
        // A multiple of what O_DIRECT asks for, as the image's size is.
        let length = SAMPLE_BYTES.max(self.alignment.offset).min(rest) as usize;
        let wanted = SAMPLE_BYTES.min(rest) as usize;
        let bounce = Bounce::new(length, MAX_MEMORY_ALIGNMENT as usize);
        let mut buffers = Buffers::bounce(bounce, 0, length);
        if (sys::read(&self.file, offset, &mut buffers)? as usize) < wanted {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bounce = buffers.into_bounce();
        let bytes = bounce.as_mut().and_then(|bounce| bounce.bytes().get(..wanted)).unwrap_or_default();
        Ok(bytes.to_vec())
    }

    /// Forgets what the page cache holds of an image that goes through it, where that can be.
    pub fn drop_cache(&self) {
        if self.cached()
            && let Err(errno) = rustix::fs::fadvise(&**self.file, 0, None, rustix::fs::Advice::DontNeed)
        {
            log::warn!("the page cache of {} stays: {errno}", self.path.display());
        }
    }

    /// The descriptor, shared by all clones.
    pub fn file(&self) -> &Arc<ImageFile> {
        &self.file
    }
    /// As given to [`Self::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// Size in bytes, a multiple of 512.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    /// Whether it may only be read.
    pub fn readonly(&self) -> bool {
        self.readonly
    }
    /// Whether what is written stays in this host's page cache at first, where another host that shares the image does not
    /// see it.
    pub fn cached(&self) -> bool {
        !self.readonly && !self.direct
    }
    /// Whether it is a block device rather than a file.
    pub fn block_device(&self) -> bool {
        self.block_device
    }
    /// What transfers must be aligned to.
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }
    /// The same image as if its filesystem asked for more.
    #[cfg(test)]
    pub(super) fn with_alignment(self, alignment: Alignment) -> Self {
        Self { alignment, ..self }
    }
    /// Block sizes.
    pub fn topology(&self) -> Topology {
        self.topology
    }
}

/// What O_DIRECT wants on `file`: the kernel says so since 6.1 for most filesystems; elsewhere it is tried out.
fn direct_alignment(file: &File, size_bytes: u64) -> io::Result<Alignment> {
    if !rustix::fs::fcntl_getfl(file)?.contains(OFlags::DIRECT) {
        return Ok(Alignment { memory: 1, offset: 1 });
    }
    let refused = || io::Error::from_raw_os_error(libc::EINVAL);
    let usable = |alignment: u64, most| alignment.is_power_of_two() && alignment <= most;
    let told = rustix::fs::statx(file.as_fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(told) = told
        && told.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        // Both are 0 where O_DIRECT is accepted by open but not done.
        let alignment =
            Alignment { memory: u64::from(told.stx_dio_mem_align), offset: u64::from(told.stx_dio_offset_align) };
        let fits = usable(alignment.memory, MAX_MEMORY_ALIGNMENT) && usable(alignment.offset, MAX_ALIGNMENT);
        return if fits { Ok(alignment) } else { Err(refused()) };
    }
    for size in [512, 4096] {
        // The second block, where there is one: the first is aligned to everything.
        let offset = if size_bytes >= 2 * size { size } else { 0 };
        // At an address that is a multiple of `size` and of no more, likewise.
        let bounce = Bounce::new(2 * size as usize, 2 * size as usize);
        let mut buffers = Buffers::bounce(bounce, size as usize, 2 * size as usize);
        match sys::read(file, offset, &mut buffers) {
            Ok(_) => return Ok(Alignment { memory: size, offset: size }),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Err(refused())
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
