//! The initial RAM disk: as high as possible in RAM below the hole, so that the kernel has room to unpack below it.

use super::BootError;
use super::kernel::{Image, Initrd, page_up};
use super::layout::PAGE_SIZE;
use super::memory_map::low_ram_end;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Loads `file` between the kernel's end and the highest address that the kernel takes, page aligned.
pub fn load<M: GuestMemoryBackend>(ram: &M, file: &mut File, image: &Image) -> Result<Initrd, BootError> {
    let metadata = file.metadata().map_err(BootError::ReadInitrd)?;
    if !metadata.is_file() {
        return Err(BootError::InitrdNotAFile);
    }
    let size = metadata.len();
    if size == 0 {
        return Err(BootError::InitrdEmpty);
    }
    let start = place(size, image.end, low_ram_end(ram).min(image.initrd_max.saturating_add(1)))?;
    file.seek(SeekFrom::Start(0)).map_err(BootError::ReadInitrd)?;
    // The size fits into RAM, and so into usize.
    ram.read_exact_volatile_from(GuestAddress(start), file, size as usize).map_err(BootError::LoadInitrd)?;
    Ok(Initrd { start, size })
}

/// The highest page aligned start for `size` bytes within `[bottom, top)`.
fn place(size: u64, bottom: u64, top: u64) -> Result<u64, BootError> {
    let top = top - top % PAGE_SIZE;
    let room_bytes = top.saturating_sub(page_up(bottom));
    // Both ends of the room are page aligned: what fits does so after rounding up.
    if size > room_bytes {
        return Err(BootError::InitrdTooLarge { bytes: size, room_bytes });
    }
    Ok(top - page_up(size))
}
