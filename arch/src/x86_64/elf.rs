//! ELF vmlinux: by PVH where a note names the entry point (Xen pvh.rst), else by the 64-bit Linux protocol at e_entry.
//! Headers are checked here against the file and against RAM; linux-loader copies the segments.

use super::BootError;
use super::bzimage::made_up_header;
use super::fields::{u16_at, u32_at, u64_at};
use super::kernel::{Entry, Image, Protocol, page_up};
use super::layout::KERNEL_START;
use super::memory_map::low_ram_end;
use linux_loader::loader::{KernelLoader, elf::Elf};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use vm_memory::GuestMemoryBackend;

const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
/// More program headers than any kernel has.
const MAX_PHDRS: usize = 256;
/// More bytes of notes than any kernel has.
const MAX_NOTE_BYTES: u64 = 1 << 20;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Note type and owner of the PVH entry point (Xen elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: usize = 18;
const NOTE_OWNER: &[u8] = b"Xen\0";
/// COMMAND_LINE_SIZE of Linux on x86 without the NUL: there is no header that says it.
const CMDLINE_MAX: usize = 2047;

struct Segment {
    kind: u32,
    offset: u64,
    file_bytes: u64,
    memory: Range<u64>,
}

/// Loads the segments at their physical addresses.
pub fn load<M: GuestMemoryBackend>(ram: &M, kernel: &mut File) -> Result<Image, BootError> {
    let ram_end = low_ram_end(ram);
    let file_bytes = kernel.metadata().map_err(BootError::ReadKernel)?.len();
    let (entry64, segments) = read_headers(kernel, file_bytes)?;
    let loads = || segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.file_bytes > 0);
    for segment in loads() {
        check_place(&segment.memory, ram_end)?;
    }
    let end = loads().map(|segment| segment.memory.end).max();
    let Some(end) = end else { return Err(BootError::KernelMalformed("no segment to load")) };

    let entry = match pvh_entry(kernel, &segments)? {
        Some(rip) => Entry { protocol: Protocol::Pvh, rip },
        None => Entry { protocol: Protocol::Linux64, rip: entry64 },
    };
    if !loads().any(|segment| segment.memory.contains(&entry.rip)) {
        return Err(BootError::KernelMalformed("the entry point lies outside every segment"));
    }

    Elf::load(ram, None, kernel, None).map_err(BootError::LoadKernel)?;
    Ok(Image { entry, end: page_up(end), initrd_max: ram_end - 1, cmdline_max: CMDLINE_MAX, header: made_up_header() })
}

/// Returns e_entry and the segments, each inside the file.
fn read_headers(kernel: &File, file_bytes: u64) -> Result<(u64, Vec<Segment>), BootError> {
    let truncated = |needed_bytes| BootError::KernelTruncated { needed_bytes, file_bytes };
    let mut ehdr = [0; EHDR_BYTES];
    if file_bytes < EHDR_BYTES as u64 {
        return Err(truncated(EHDR_BYTES as u64));
    }
    kernel.read_exact_at(&mut ehdr, 0).map_err(BootError::ReadKernel)?;
    // ET_EXEC, or ET_DYN for a kernel linked as position independent.
    if !matches!(u16_at(&ehdr, 16), 2 | 3) {
        return Err(BootError::KernelMalformed("not an executable ELF file"));
    }
    let count = usize::from(u16_at(&ehdr, 56));
    if usize::from(u16_at(&ehdr, 54)) != PHDR_BYTES || count == 0 || count > MAX_PHDRS {
        return Err(BootError::KernelMalformed("no usable program headers"));
    }

    let phoff = u64_at(&ehdr, 32);
    let mut phdrs = vec![0; count * PHDR_BYTES];
    let phdrs_end = phoff.saturating_add(phdrs.len() as u64);
    if phdrs_end > file_bytes {
        return Err(truncated(phdrs_end));
    }
    kernel.read_exact_at(&mut phdrs, phoff).map_err(BootError::ReadKernel)?;
    let segments: Vec<_> = phdrs.chunks_exact(PHDR_BYTES).map(segment).collect::<Result<_, _>>()?;
    let used = segments.iter().filter(|segment| matches!(segment.kind, PT_LOAD | PT_NOTE));
    let needed_bytes = used.map(|segment| segment.offset.saturating_add(segment.file_bytes)).max().unwrap_or(0);
    if needed_bytes > file_bytes {
        return Err(truncated(needed_bytes));
    }
    Ok((u64_at(&ehdr, 24), segments))
}

fn segment(phdr: &[u8]) -> Result<Segment, BootError> {
    let kind = u32_at(phdr, 0);
    let start = u64_at(phdr, 24);
    let (file_bytes, memory_bytes) = (u64_at(phdr, 32), u64_at(phdr, 40));
    if kind == PT_LOAD && memory_bytes < file_bytes {
        return Err(BootError::KernelMalformed("a segment is larger in the file than in memory"));
    }
    // A wrapped end saturates, and so is found to lie outside RAM.
    let memory = start..start.saturating_add(memory_bytes);
    Ok(Segment { kind, offset: u64_at(phdr, 8), file_bytes, memory })
}

fn check_place(memory: &Range<u64>, ram_end: u64) -> Result<(), BootError> {
    if memory.start < KERNEL_START {
        return Err(BootError::SegmentTooLow { start: memory.start });
    }
    if memory.end > ram_end {
        return Err(BootError::KernelTooLarge { end: memory.end, ram_end });
    }
    Ok(())
}

/// The PVH entry point, if any note segment names one.
fn pvh_entry(kernel: &File, segments: &[Segment]) -> Result<Option<u64>, BootError> {
    for segment in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        if segment.file_bytes > MAX_NOTE_BYTES {
            return Err(BootError::KernelMalformed("a note segment is larger than 1 MiB"));
        }
        let mut notes = vec![0; segment.file_bytes as usize];
        kernel.read_exact_at(&mut notes, segment.offset).map_err(BootError::ReadKernel)?;
        if let Some(description) = find_pvh_note(&notes) {
            let address =
                description.first_chunk().ok_or(BootError::KernelMalformed("its PVH note holds no address"))?;
            return Ok(Some(u32::from_le_bytes(*address).into()));
        }
    }
    Ok(None)
}

/// The description of the PVH note: each note has its name's size, its description's, its type, then both, padded to
/// 4 bytes.
fn find_pvh_note(mut notes: &[u8]) -> Option<&[u8]> {
    const HEADER_BYTES: usize = 12;
    loop {
        let size = |offset| u32_at(notes, offset) as usize;
        let name = notes.get(HEADER_BYTES..)?;
        let description = name.get(size(0).next_multiple_of(4)..)?;
        if size(8) == XEN_ELFNOTE_PHYS32_ENTRY && name.starts_with(NOTE_OWNER) {
            return description.get(..size(4));
        }
        notes = description.get(size(4).next_multiple_of(4)..)?;
    }
}
