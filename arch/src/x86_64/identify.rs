//! What kind of file a kernel is, by its first bytes, and a plain word for what is not one. It reads nothing further.

use super::BootError;
use super::fields::{bytes_at, u16_at, u32_at};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of the file that are looked at; they hold a whole setup header.
const PROBE_BYTES: usize = 1024;
/// Offset of `boot_flag` in a bzImage (Linux boot.rst).
const BOOT_FLAG: usize = 0x1fe;
/// Offset of the "HdrS" magic in a bzImage.
const HEADER_MAGIC: usize = 0x202;

/// A kernel format this machine boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Compressed Linux image with a setup header.
    BzImage,
    /// Uncompressed ELF image, 64 bits, x86-64.
    Elf,
}

/// Tells the format of `kernel`, or why it is none.
pub fn identify(kernel: &File) -> Result<Format, BootError> {
    let metadata = kernel.metadata().map_err(BootError::ReadKernel)?;
    if !metadata.is_file() {
        return Err(BootError::KernelNotAFile);
    }
    if metadata.len() == 0 {
        return Err(BootError::KernelEmpty);
    }
    classify(&probe(kernel).map_err(BootError::ReadKernel)?, metadata.len())
}

fn probe(kernel: &File) -> io::Result<Vec<u8>> {
    let mut start = vec![0; PROBE_BYTES];
    let mut filled = 0;
    while let Some(rest) = start.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match kernel.read_at(rest, filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    start.truncate(filled);
    Ok(start)
}

fn classify(start: &[u8], file_bytes: u64) -> Result<Format, BootError> {
    if start.starts_with(b"\x7fELF") {
        return classify_elf(start, file_bytes);
    }
    if u16_at(start, BOOT_FLAG) == 0xAA55 && bytes_at(start, HEADER_MAGIC) == Some(*b"HdrS") {
        return Ok(Format::BzImage);
    }
    if let Some(architecture) = foreign_image(start) {
        return Err(BootError::OtherArchitecture(architecture.into()));
    }
    if let Some(codec) = compression(start) {
        return Err(BootError::KernelCompressed(codec));
    }
    // A bzImage with an EFI stub starts as a DOS program does; one cut before its header is otherwise unknown.
    if start.starts_with(b"MZ") && start.len() < HEADER_MAGIC + 4 {
        return Err(BootError::KernelTruncated { needed_bytes: PROBE_BYTES as u64, file_bytes });
    }
    if is_text(start) {
        return Err(BootError::KernelIsText);
    }
    Err(BootError::UnknownFormat)
}

fn classify_elf(start: &[u8], file_bytes: u64) -> Result<Format, BootError> {
    let Some(machine) = bytes_at(start, 18) else {
        return Err(BootError::KernelTruncated { needed_bytes: 64, file_bytes });
    };
    let big_endian = start.get(5) == Some(&2);
    let machine = if big_endian { u16::from_be_bytes(machine) } else { u16::from_le_bytes(machine) };
    let name = match machine {
        // An x32 image says x86-64 but is of the 32-bit class.
        62 if start.get(4) == Some(&2) && !big_endian => return Ok(Format::Elf),
        3 | 62 => "32-bit x86",
        8 => "MIPS",
        20 | 21 => "PowerPC",
        22 => "s390",
        40 => "32-bit Arm",
        183 => "arm64",
        243 => "RISC-V",
        258 => "LoongArch",
        other => return Err(BootError::OtherArchitecture(format!("ELF machine {other}"))),
    };
    Err(BootError::OtherArchitecture(name.into()))
}

/// Images of other architectures have their magic in a DOS-like header (Linux Documentation/arch/*/booting.rst).
fn foreign_image(start: &[u8]) -> Option<&'static str> {
    match bytes_at(start, 0x38).as_ref() {
        Some(b"ARM\x64") => return Some("arm64"),
        Some(b"RSC\x05") => return Some("RISC-V"),
        _ => {}
    }
    if u32_at(start, 0x24) == 0x016f_2818 {
        return Some("32-bit Arm");
    }
    // An EFI zboot image; x86 has no such images.
    (start.starts_with(b"MZ") && bytes_at(start, 4) == Some(*b"zimg")).then_some("another architecture (EFI zboot)")
}

fn compression(start: &[u8]) -> Option<&'static str> {
    const MAGICS: [(&[u8], &str); 9] = [
        (b"\x1f\x8b", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"BZh", "bzip2"),
        (b"\x5d\0\0", "lzma"),
        (b"\x89LZO", "lzo"),
        (b"PK\x03\x04", "zip"),
    ];
    MAGICS.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, name)| *name)
}

fn is_text(start: &[u8]) -> bool {
    let valid = match std::str::from_utf8(start) {
        Ok(text) => text,
        // The probe may end inside a character.
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(start.get(..error.valid_up_to()).unwrap_or_default()).unwrap_or_default()
        }
        Err(_) => return false,
    };
    !valid.is_empty() && valid.chars().all(|c| !c.is_control() || matches!(c, '\t' | '\n' | '\r' | '\x0c'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(start: &[u8]) -> String {
        classify(start, start.len() as u64).unwrap_err().to_string()
    }

    fn elf(class: u8, endian: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut start = b"\x7fELF".to_vec();
        start.extend([class, endian]);
        start.resize(18, 0);
        start.extend(machine);
        start.resize(64, 0);
        start
    }

    fn with_magic(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut start = b"MZ".to_vec();
        start.resize(offset, 0);
        start.extend(magic);
        start.resize(PROBE_BYTES, 0);
        start
    }

    #[test]
    fn compressed_kernels_are_named() {
        for (magic, name) in [(&b"\x1f\x8b\x08"[..], "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\0", "xz")] {
            let mut start = magic.to_vec();
            start.resize(PROBE_BYTES, 0x80);
            let message =
                format!("the kernel is a {name}-compressed file, not a bzImage or an ELF vmlinux; decompress it first");
            assert_eq!(refusal(&start), message);
        }
    }

    #[test]
    fn images_of_other_architectures_are_named() {
        let built_for = |name| format!("the kernel is built for {name}; this machine is x86-64");
        assert_eq!(refusal(&with_magic(0x38, b"ARM\x64")), built_for("arm64"));
        assert_eq!(refusal(&with_magic(0x38, b"RSC\x05")), built_for("RISC-V"));
        assert_eq!(refusal(&with_magic(0x24, &0x016f_2818u32.to_le_bytes())), built_for("32-bit Arm"));
        assert_eq!(refusal(&with_magic(4, b"zimg")), built_for("another architecture (EFI zboot)"));
        assert_eq!(refusal(&elf(2, 1, [183, 0])), built_for("arm64"));
        assert_eq!(refusal(&elf(2, 2, [0, 22])), built_for("s390"));
        assert_eq!(refusal(&elf(1, 1, [3, 0])), built_for("32-bit x86"));
        assert_eq!(refusal(&elf(1, 1, [62, 0])), built_for("32-bit x86"));
        assert_eq!(refusal(&elf(2, 1, [0x34, 0x12])), built_for("ELF machine 4660"));
    }

    #[test]
    fn text_is_text_even_cut_inside_a_character() {
        let text = "the kernel is a text file, not a bzImage or an ELF vmlinux";
        assert_eq!(refusal(b"#!/bin/sh\necho hello\n"), text);
        assert_eq!(refusal(&"naïve".as_bytes()[..3]), text);
    }

    #[test]
    fn anything_else_is_unknown() {
        let unknown = "the kernel is neither a bzImage nor an ELF vmlinux";
        assert_eq!(refusal(&[0; PROBE_BYTES]), unknown);
        assert_eq!(refusal(&[0xff, 0xfe, 0x00]), unknown);
        assert_eq!(refusal(b"\xc3"), unknown);
        // An EFI program that is no kernel.
        assert_eq!(refusal(&with_magic(0x40, b"PE\0\0")), unknown);
    }

    #[test]
    fn images_cut_inside_their_headers_are_truncated() {
        let needed =
            |needed, file| format!("the kernel is truncated: its headers describe {needed} bytes, the file has {file}");
        assert_eq!(refusal(b"\x7fELF\x02\x01"), needed(64, 6));
        assert_eq!(refusal(&with_magic(0x40, b"PE\0\0")[..100]), needed(PROBE_BYTES, 100));
    }
}
