//! A kernel file, as an operator hands it over: loaded or refused, and what is entered lies in RAM.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use sterna_arch::{BootSource, load_kernel, ram_ranges};
use sterna_fuzz::wire::Wire;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

#[derive(Arbitrary, Debug)]
struct Run {
    image: Image,
    /// Bytes of the image that are others.
    patches: Vec<Patch>,
    /// The file has this length, with a hole at its end.
    length: Option<u32>,
    /// An initrd of zeroes.
    initrd_bytes: Option<u32>,
    cmdline: String,
    ram: Ram,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Ram {
    Little,
    Enough,
}

#[derive(Arbitrary, Debug)]
enum Image {
    Bytes(Vec<u8>),
    BzImage,
    Elf { entry: Address, segments: Vec<Segment>, notes: Vec<u8> },
}

#[derive(Arbitrary, Debug)]
enum Patch {
    /// One of the header's fields.
    Field {
        field: u8,
        value: u32,
    },
    Byte {
        at: u16,
        value: u8,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Address {
    /// From 2 MiB on.
    Good(u16),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Segment {
    Load {
        offset: u16,
        address: Address,
        file_bytes: u16,
        more_bytes: u32,
    },
    /// A PVH entry point.
    Pvh(u32),
    /// Of the notes at the end of the file.
    Notes {
        offset: u16,
        bytes: u16,
    },
    Any {
        kind: u8,
        words: [u64; 6],
    },
}

/// Offsets in a bzImage (boot.rst) and in an ELF header.
const FIELDS: [usize; 22] = [
    0x1f1, 0x1f4, 0x1fe, 0x200, 0x202, 0x206, 0x211, 0x214, 0x22c, 0x230, 0x234, 0x236, 0x238, 0x258, 0x25c, 0x260, 16,
    18, 24, 32, 54, 56,
];
/// Where an ELF file's own bytes begin after the headers.
const BODY: usize = 0x1000;
const PHDR_BYTES: usize = 56;

impl Address {
    fn value(self) -> u64 {
        match self {
            Address::Good(offset) => 0x20_0000 + u64::from(offset),
            Address::Any(address) => address,
        }
    }
}

fn put(image: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if image.len() < at + bytes.len() {
        image.resize(at + bytes.len(), 0);
    }
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The smallest one that is right: relocatable, 64-bit, works in 16 MiB to 32 MiB.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 5 * 512];
    for (at, value) in [
        (0x1f1, 4),
        (0x1f4, 8192 / 16),
        (0x1fe, 0xaa55),
        (0x206, 0x20f),
        (0x211, 1),
        (0x22c, 0x7fff_ffff),
        (0x230, 0x20_0000),
        (0x238, 2047),
        (0x258, 0x100_0000),
        (0x260, 0x100_0000),
    ] {
        put(&mut image, at, &u32::to_le_bytes(value));
    }
    put(&mut image, 0x200, &[0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    put(&mut image, 0x234, &[1, 0, 1]);
    image.extend((0..8192).map(|index| index as u8));
    image
}

fn elf(entry: Address, segments: Vec<Segment>, notes: &[u8]) -> Vec<u8> {
    let segments: Vec<_> = segments.into_iter().take(16).collect();
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    put(&mut image, 16, &[2, 0, 62, 0]);
    put(&mut image, 24, &entry.value().to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &[PHDR_BYTES as u8, 0, segments.len() as u8, 0]);
    let notes_at = BODY + 0x2000;
    put(&mut image, notes_at, notes);
    for (index, segment) in segments.into_iter().enumerate() {
        let (kind, words) = match segment {
            Segment::Load { offset, address, file_bytes, more_bytes } => {
                let (file_bytes, address) = (u64::from(file_bytes) % 0x2000, address.value());
                let offset = BODY as u64 + u64::from(offset) % 0x1000;
                (1, [offset, address, address, file_bytes, file_bytes + u64::from(more_bytes), 4096])
            }
            Segment::Pvh(entry) => {
                let at = image.len();
                let note = Wire::default().u32(4).u32(4).u32(18).bytes(b"Xen\0").u32(entry).0;
                put(&mut image, at, &note);
                (4, [at as u64, 0, 0, note.len() as u64, note.len() as u64, 4])
            }
            Segment::Notes { offset, bytes } => {
                (4, [notes_at as u64 + u64::from(offset), 0, 0, bytes.into(), bytes.into(), 4])
            }
            Segment::Any { kind, words } => (u32::from(kind % 8), words),
        };
        let header = words.into_iter().fold(Wire::default().u32(kind).u32(7), Wire::u64).0;
        put(&mut image, 64 + PHDR_BYTES * index, &header);
    }
    image
}

fn image(image: Image, patches: Vec<Patch>) -> Vec<u8> {
    let mut bytes = match image {
        Image::Bytes(bytes) => bytes,
        Image::BzImage => bzimage(),
        Image::Elf { entry, segments, notes } => elf(entry, segments, &notes),
    };
    for patch in patches {
        match patch {
            Patch::Field { field, value } => {
                put(&mut bytes, FIELDS[usize::from(field) % FIELDS.len()], &value.to_le_bytes());
            }
            Patch::Byte { at, value } => put(&mut bytes, usize::from(at) % 0x4000, &[value]),
        }
    }
    bytes
}

fn file(bytes: &[u8], length: Option<u64>) -> File {
    let mut file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a file in memory"));
    file.write_all(bytes).expect("room in memory");
    if let Some(length) = length {
        file.set_len(length).expect("a hole");
    }
    file
}

fuzz_target!(|run: Run| {
    let ram_bytes = match run.ram {
        Ram::Little => 4 << 20,
        Ram::Enough => 40 << 20,
    };
    let ram = GuestMemoryMmap::<()>::from_ranges(&ram_ranges(ram_bytes)).expect("address space");
    let mut kernel = file(&image(run.image, run.patches), run.length.map(u64::from));
    let mut initrd = run.initrd_bytes.map(|bytes| file(b"", Some(bytes.into())));
    let source = BootSource { kernel: &mut kernel, initrd: initrd.as_mut(), cmdline: &run.cmdline };
    match load_kernel(&ram, source, GuestAddress(0xE_0000)) {
        Ok(entry) => assert!(ram.address_in_range(GuestAddress(entry.rip)), "{entry:?} is not in RAM"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
