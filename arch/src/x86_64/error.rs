//! Why a kernel could not be made ready to run. Sentences name the kernel or the initrd, never a path: the caller has it.

use linux_loader::{cmdline, configurator, loader};
use std::io;
use vm_memory::GuestMemoryError;

/// What was attempted while a kernel was made ready, and how it failed.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file cannot be read.
    #[error("cannot read the kernel")]
    ReadKernel(#[source] io::Error),
    /// A directory, device or pipe.
    #[error("the kernel is not a regular file")]
    KernelNotAFile,
    /// No bytes.
    #[error("the kernel file is empty")]
    KernelEmpty,
    /// Text instead of an image.
    #[error("the kernel is a text file, not a bzImage or an ELF vmlinux")]
    KernelIsText,
    /// A bare compressed file.
    #[error("the kernel is a {0}-compressed file, not a bzImage or an ELF vmlinux; decompress it first")]
    KernelCompressed(&'static str),
    /// An image that x86-64 cannot run.
    #[error("the kernel is built for {0}; this machine is x86-64")]
    OtherArchitecture(String),
    /// Nothing known.
    #[error("the kernel is neither a bzImage nor an ELF vmlinux")]
    UnknownFormat,
    /// The file ends before what its headers describe.
    #[error("the kernel is truncated: its headers describe {needed_bytes} bytes, the file has {file_bytes}")]
    KernelTruncated {
        /// Least size by the headers.
        needed_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// Older than the 64-bit entry point.
    #[error("the kernel speaks boot protocol {major}.{minor:02}; 2.12 (Linux 3.8) or later is needed")]
    OldProtocol {
        /// Before the dot.
        major: u8,
        /// After the dot.
        minor: u8,
    },
    /// Headers that contradict themselves.
    #[error("the kernel's headers are wrong: {0}")]
    KernelMalformed(&'static str),
    /// The kernel does not fit into RAM below the hole.
    #[error("the kernel needs RAM up to {end:#x}, but RAM ends at {ram_end:#x}: give the machine more memory")]
    KernelTooLarge {
        /// First address past what the kernel needs.
        end: u64,
        /// First address past low RAM.
        ram_end: u64,
    },
    /// A segment over the boot structures.
    #[error("the kernel has a segment at {start:#x}, below 1 MiB, where the boot structures are")]
    SegmentTooLow {
        /// The segment's physical address.
        start: u64,
    },
    /// Copying the image into RAM.
    #[error("cannot load the kernel into guest memory")]
    LoadKernel(#[source] loader::Error),
    /// The command line does not fit.
    #[error("the kernel command line is {bytes} bytes long; this kernel takes {max_bytes}")]
    CmdlineTooLong {
        /// Its length.
        bytes: usize,
        /// What the kernel takes, without the NUL.
        max_bytes: usize,
    },
    /// A NUL inside the command line.
    #[error("the kernel command line contains a NUL byte")]
    CmdlineNul,
    /// Characters linux-loader does not pass on.
    #[error("the kernel command line is not valid")]
    Cmdline(#[source] cmdline::Error),
    /// The initrd cannot be read.
    #[error("cannot read the initrd")]
    ReadInitrd(#[source] io::Error),
    /// A directory, device or pipe.
    #[error("the initrd is not a regular file")]
    InitrdNotAFile,
    /// No bytes.
    #[error("the initrd is empty")]
    InitrdEmpty,
    /// No room above the kernel.
    #[error("the initrd is {bytes} bytes long, but only {room_bytes} bytes of RAM are left for it beside the kernel")]
    InitrdTooLarge {
        /// Size of the file.
        bytes: u64,
        /// Room between the kernel's end and the highest address it takes.
        room_bytes: u64,
    },
    /// Copying the initrd into RAM.
    #[error("cannot load the initrd into guest memory")]
    LoadInitrd(#[source] GuestMemoryError),
    /// GDT, page tables or reset vector.
    #[error("cannot write the boot tables into guest memory")]
    WriteTables(#[source] GuestMemoryError),
    /// Zero page or start info.
    #[error("cannot write the boot parameters into guest memory")]
    WriteParams(#[source] configurator::Error),
}
