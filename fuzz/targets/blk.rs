//! The disk: requests of every kind on a small image, with O_DIRECT or without, writable or not.
//!
//! The image keeps its size, and one that is read-only its contents.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use sterna_devices::virtio::blk::{Blk, Image};
use sterna_fuzz::chain::{Chain, Framing, Part};
use sterna_fuzz::drive::{Oracle, Step, drive};
use sterna_fuzz::wire::Wire;

/// Size of each image.
const IMAGE_BYTES: usize = 64 << 10;
/// What the read-only image is full of.
const PATTERN: u8 = 0x5a;

#[derive(Arbitrary, Debug)]
struct Run {
    disk: Disk,
    steps: Vec<Step<Request, ()>>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Disk {
    Direct,
    Cached,
    ReadOnly,
}

#[derive(Arbitrary, Debug)]
struct Request {
    kind: Kind,
    sector: Sector,
    /// Data buffers.
    buffers: Vec<Buffer>,
    /// Where the header is cut in two.
    split: u16,
    framing: Framing,
}

#[derive(Arbitrary, Debug)]
enum Kind {
    Read,
    Write,
    Flush,
    Identify,
    Discard { sector: Sector, sectors: u8, flags: u8 },
    Zero { sector: Sector, sectors: u8, flags: u8 },
    WildRange { kind: bool, range: [u8; 16] },
    Other(u32),
}

#[derive(Clone, Copy, Debug)]
enum Sector {
    /// On the image or a little past its end.
    Near(u8),
    Any(u64),
}

impl<'a> Arbitrary<'a> for Sector {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let near = u8::arbitrary(u)?;
        Ok(if near < 240 { Sector::Near(near) } else { Sector::Any(u.arbitrary()?) })
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Buffer {
    Sectors(u8),
    Bytes(u16),
}

impl Sector {
    fn number(self) -> u64 {
        match self {
            Sector::Near(sector) => u64::from(sector % 136),
            Sector::Any(sector) => sector,
        }
    }
}

impl Buffer {
    fn length(self) -> u16 {
        match self {
            Buffer::Sectors(sectors) => u16::from(sectors % 17) * 512,
            Buffer::Bytes(bytes) => bytes % 9000,
        }
    }
}

impl From<Request> for Chain {
    fn from(request: Request) -> Self {
        let Request { kind, sector, buffers, split, framing } = request;
        let range = |sector: Sector, sectors: u8, flags: u8| {
            Wire::default().u64(sector.number()).u32(sectors.into()).u32(flags.into()).0
        };
        let (number, payload) = match &kind {
            Kind::Read => (0, Vec::new()),
            Kind::Write => (1, Vec::new()),
            Kind::Flush => (4, Vec::new()),
            Kind::Identify => (8, Vec::new()),
            Kind::Discard { sector, sectors, flags } => (11, range(*sector, *sectors, *flags)),
            Kind::Zero { sector, sectors, flags } => (13, range(*sector, *sectors, *flags)),
            Kind::WildRange { kind, range } => (if *kind { 11 } else { 13 }, range.to_vec()),
            Kind::Other(number) => (*number, Vec::new()),
        };
        let header = Wire::default().u32(number).u32(0).u64(sector.number()).bytes(&payload).0;
        let mut chain = Chain::request(header, split, [], framing);
        let buffers = buffers.into_iter().take(8).map(Buffer::length);
        if matches!(kind, Kind::Write) {
            chain.parts.extend(buffers.map(|length| Part::Readable(vec![0xa5; length.into()])));
        } else {
            chain.parts.extend(buffers.map(Part::Writable));
        }
        chain.parts.push(Part::Writable(1));
        chain
    }
}

/// The images and the same files to look at, for all runs. Beside the sources, where O_DIRECT is more likely than in a
/// temporary directory; their names are gone at once, so that nothing stays behind.
fn disks() -> &'static [(File, Image); 3] {
    static DISKS: OnceLock<[(File, Image); 3]> = OnceLock::new();
    DISKS.get_or_init(|| {
        let directory = tempfile::tempdir_in(std::env::current_dir().expect("a directory")).expect("a directory");
        let image = |name: &str, readonly, direct| {
            let path = directory.path().join(name);
            std::fs::write(&path, [PATTERN; IMAGE_BYTES]).expect("an image");
            let image = Image::open(&path, readonly, direct).expect("an image on a filesystem with O_DIRECT");
            (File::open(path).expect("an image"), image)
        };
        [image("direct", false, true), image("cached", false, false), image("readonly", true, false)]
    })
}

fuzz_target!(|run: Run| {
    let (file, image) = &disks()[run.disk as usize];
    let mut blk = Blk::new(image.clone(), "tern-1").expect("a good serial number");
    drive(&mut blk, Oracle::Whole, run.steps, |_, ()| {});
    let size = file.metadata().expect("the image").len();
    assert_eq!(size, IMAGE_BYTES as u64, "the image has another size");
    if let Disk::ReadOnly = run.disk {
        let mut bytes = [0; IMAGE_BYTES];
        file.read_exact_at(&mut bytes, 0).expect("the image");
        assert!(bytes.iter().all(|byte| *byte == PATTERN), "the image was changed");
    }
});
