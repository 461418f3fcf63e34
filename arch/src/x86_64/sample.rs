//! The smallest kernels that are right, for tests to spoil.

use std::fs::File;
use std::io::Write;

/// Sectors of set-up code before the protected-mode part.
pub const SETUP_BYTES: usize = 5 * 512;
/// Bytes of the protected-mode part.
pub const PAYLOAD_BYTES: usize = 8192;

/// An open, unnamed file with these bytes.
pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Overwrites bytes at `offset`.
pub fn put(image: &mut [u8], offset: usize, bytes: &[u8]) {
    image[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// A relocatable 64-bit bzImage that unpacks to 16 MiB and works within 16 MiB there. The payload counts up.
pub fn bzimage() -> Vec<u8> {
    let mut image = vec![0; SETUP_BYTES];
    put(&mut image, 0x1f1, &[4]); // setup_sects
    put(&mut image, 0x1f4, &(PAYLOAD_BYTES as u32 / 16).to_le_bytes()); // syssize
    put(&mut image, 0x1fe, &[0x55, 0xaa]); // boot_flag
    put(&mut image, 0x200, &[0xeb, 0x6a]); // jump
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &[0x0f, 2]); // version
    put(&mut image, 0x211, &[1]); // loadflags
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(&mut image, 0x234, &[1]); // relocatable_kernel
    put(&mut image, 0x236, &[1, 0]); // xloadflags: XLF_KERNEL_64
    put(&mut image, 0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(&mut image, 0x260, &0x100_0000u32.to_le_bytes()); // init_size
    image.extend((0..PAYLOAD_BYTES).map(|i| i as u8));
    image
}

/// A note as it lies in a note segment.
pub fn note(owner: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [owner.len() as u32, description.len() as u32, kind] {
        note.extend(word.to_le_bytes());
    }
    for part in [owner, description] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// The note that names a PVH entry point.
pub fn pvh_note(entry: u32) -> Vec<u8> {
    note(b"Xen\0", 18, &entry.to_le_bytes())
}

/// Where the segment of [`elf`] is loaded.
pub const ELF_START: u64 = 0x20_0000;
/// Offsets in [`elf`]: program header of the segment to load, and the segment itself.
pub const ELF_LOAD_PHDR: usize = 64;
/// Offset of the loaded segment in the file.
pub const ELF_LOAD_OFFSET: usize = 0x1000;

/// An x86-64 ELF kernel: one segment of a page and two pages of zeros behind it, entered 0x10 in, and `notes`, each in
/// a segment of its own.
pub fn elf(notes: &[Vec<u8>]) -> Vec<u8> {
    let mut image = vec![0; ELF_LOAD_OFFSET];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0]); // ET_EXEC, x86-64
    put(&mut image, 24, &(ELF_START + 0x10).to_le_bytes()); // e_entry
    put(&mut image, 32, &64u64.to_le_bytes()); // e_phoff
    put(&mut image, 54, &[56, 0, 1 + notes.len() as u8, 0]); // e_phentsize, e_phnum
    put(&mut image, ELF_LOAD_PHDR, &phdr(1, ELF_LOAD_OFFSET, ELF_START, 4096, 3 * 4096));
    image.extend((0..4096).map(|i| (i % 251) as u8));
    for (i, note) in notes.iter().enumerate() {
        let offset = image.len();
        put(&mut image, ELF_LOAD_PHDR + 56 * (i + 1), &phdr(4, offset, 0, note.len(), note.len()));
        image.extend(note);
    }
    image
}

fn phdr(kind: u32, offset: usize, address: u64, file_bytes: usize, memory_bytes: usize) -> Vec<u8> {
    let mut phdr = [kind.to_le_bytes(), 7u32.to_le_bytes()].concat();
    for field in [offset as u64, address, address, file_bytes as u64, memory_bytes as u64, 4] {
        phdr.extend(field.to_le_bytes());
    }
    phdr
}
