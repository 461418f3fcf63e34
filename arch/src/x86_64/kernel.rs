//! From an open kernel file to an entry point: identify, load, then everything the boot protocol wants beside the
//! kernel. It refuses to know paths, and vCPUs beyond the entry point.

use super::identify::{Format, identify};
use super::layout::{CMDLINE_SIZE, PAGE_SIZE};
use super::memory_map::memory_map;
use super::{BootError, boot_params, boot_tables, bzimage, cmdline, elf, initrd, pvh, reset_vector};
use linux_loader::loader::bootparam::setup_header;
use std::fs::File;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// What to boot. Files are open for reading; their offsets do not matter.
#[derive(Debug)]
pub struct BootSource<'a> {
    /// bzImage or ELF vmlinux.
    pub kernel: &'a mut File,
    /// Initial RAM disk.
    pub initrd: Option<&'a mut File>,
    /// Kernel command line, without a NUL.
    pub cmdline: &'a str,
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// 64-bit boot protocol: long mode, RSI = zero page (Linux boot.rst, "64-bit boot protocol").
    Linux64,
    /// PVH: 32-bit protected mode without paging, EBX = start info (Xen pvh.rst).
    Pvh,
}

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// State it starts in.
    pub protocol: Protocol,
    /// Guest physical address of the first instruction.
    pub rip: u64,
}

/// A kernel image in guest memory, and what it asks for.
pub(super) struct Image {
    pub entry: Entry,
    /// First address past all that the kernel uses before it reads the memory map, page aligned.
    pub end: u64,
    /// Highest address of an initrd's last byte.
    pub initrd_max: u64,
    /// Longest command line without its NUL, bytes.
    pub cmdline_max: usize,
    /// Header for the zero page.
    pub header: setup_header,
}

/// An initrd in guest memory.
#[derive(Clone, Copy)]
pub(super) struct Initrd {
    pub start: u64,
    pub size: u64,
}

/// Loads kernel, initrd and command line into `ram`, and writes the boot parameters, page tables, GDT and reset vector.
///
/// `ram` is laid out as [`super::ram_ranges`] says and is all zero: only bytes that are not zero by then are written.
/// `rsdp` is what [`super::write_acpi_tables`] returned.
pub fn load_kernel<M: GuestMemoryBackend>(
    ram: &M,
    source: BootSource<'_>,
    rsdp: GuestAddress,
) -> Result<Entry, BootError> {
    let BootSource { kernel, initrd, cmdline } = source;
    let image = match identify(kernel)? {
        Format::BzImage => bzimage::load(ram, kernel)?,
        Format::Elf => elf::load(ram, kernel)?,
    };
    cmdline::write(ram, cmdline, image.cmdline_max.min(CMDLINE_SIZE - 1))?;
    let initrd = initrd.map(|file| initrd::load(ram, file, &image)).transpose()?;

    let map = memory_map(ram);
    match image.entry.protocol {
        Protocol::Linux64 => {
            boot_params::write(ram, image.header, initrd, &map, rsdp)?;
            boot_tables::write_identity_map(ram)?;
        }
        Protocol::Pvh => pvh::write(ram, initrd, &map, rsdp)?,
    }
    boot_tables::write_gdt(ram, image.entry.protocol)?;
    reset_vector::write(ram)?;
    Ok(image.entry)
}

/// `address` rounded up to a page; saturates.
pub(super) fn page_up(address: u64) -> u64 {
    address.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX)
}
