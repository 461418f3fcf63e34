//! A guest with one disk, for tests: requests at addresses of the test's choice, on real files.

use super::{Blk, Image};
use crate::virtio::VirtioDevice;
use crate::virtio::testing::Driver;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::{NamedTempFile, TempPath};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

/// Size of the disks that [`scratch`] makes, bytes.
pub const DISK_BYTES: u64 = 4 << 20;
/// Where tests put their data, 1 MiB into RAM.
pub const DATA: u64 = 0x10_0000;
/// Headers and status bytes, 32 bytes apart.
const HEADERS: u64 = 0x8_0000;
/// No answer takes longer.
const DEADLINE_MS: i32 = 10_000;

/// How the host does the I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// O_DIRECT through io_uring.
    Direct,
    /// The page cache through io_uring.
    Cached,
    /// O_DIRECT through the thread, as where io_uring is not permitted.
    Thread,
}

/// All of them.
pub const MODES: [Mode; 3] = [Mode::Direct, Mode::Cached, Mode::Thread];

/// A request under way.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// Its first descriptor.
    pub head: u16,
    status: u64,
}

/// See the module.
pub struct Guest {
    pub driver: Driver,
    pub blk: Blk,
    requests: u64,
    next: u16,
}

/// A directory whose filesystem does O_DIRECT. Panics where there is none: these tests cannot do without.
fn scratch_directory() -> PathBuf {
    let candidates = [std::env::temp_dir(), PathBuf::from("/var/tmp"), PathBuf::from(env!("CARGO_MANIFEST_DIR"))];
    let direct = |directory: &PathBuf| {
        let file = NamedTempFile::new_in(directory).and_then(|mut file| file.write_all(&[0; 8192]).map(|()| file));
        file.is_ok_and(|file| Image::open(file.path(), false, true).is_ok())
    };
    candidates.iter().find(|directory| direct(directory)).cloned().unwrap_or_else(|| {
        panic!("none of {candidates:?} lies on a filesystem with O_DIRECT: set TMPDIR to one that does")
    })
}

/// A disk image with a pattern in it, which names each sector's number.
pub fn scratch() -> TempPath {
    let mut file = NamedTempFile::new_in(scratch_directory()).unwrap();
    let sectors: Vec<_> = (0..DISK_BYTES / 512).map(pattern).collect();
    file.write_all(sectors.as_flattened()).unwrap();
    file.into_temp_path()
}

/// What [`scratch`] has in `sector`.
pub fn pattern(sector: u64) -> [u8; 512] {
    let mut bytes = [sector as u8 ^ 0x5a; 512];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes
}

impl Guest {
    /// A running driver that can flush.
    pub fn new(image: Image, mode: Mode) -> Self {
        Self::with_features(image, mode, 1 << VIRTIO_BLK_F_FLUSH)
    }

    /// A running driver that negotiated `features`.
    pub fn with_features(image: Image, mode: Mode, features: u64) -> Self {
        let mut driver = Driver::new(&[256]);
        driver.features = features;
        let mut blk = Blk::new(image, "tern-1").unwrap();
        blk.activate(&mut driver.io()).unwrap();
        let engine = &mut blk.traffic.as_mut().unwrap().engine;
        assert!(engine.ring.is_some(), "io_uring is not permitted here: these tests are about it");
        if mode == Mode::Thread {
            engine.ring = None;
        }
        Self { driver, blk, requests: 0, next: 0 }
    }

    /// Makes a request available; buffers are addresses and lengths. The status byte gets a descriptor of its own.
    pub fn offer(&mut self, kind: u32, sector: u64, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Pending {
        let header = HEADERS + 32 * (self.requests % 1024);
        let status = header + 16;
        self.requests += 1;
        let mut bytes = [0; 17];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        bytes[16] = 0xff;
        self.driver.ram.write_slice(&bytes, GuestAddress(header)).unwrap();
        let readable = [&[(header, 16)], readable].concat();
        let writable = [writable, &[(status, 1)]].concat();
        let head = self.chain(&readable, &writable);
        Pending { head, status }
    }

    /// Makes a chain of these available.
    pub fn chain(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let head = self.next;
        let total = readable.len() + writable.len();
        let parts = readable.iter().map(|part| (part, 0)).chain(writable.iter().map(|part| (part, Driver::WRITE)));
        for (position, ((address, length), flags)) in parts.enumerate() {
            let index = self.next;
            self.next = (index + 1) % 256;
            let more = if position + 1 < total { Driver::NEXT } else { 0 };
            self.driver.descriptor(0, index, *address, *length, flags | more, self.next);
        }
        self.driver.offer(0, head);
        head
    }

    pub fn notify(&mut self) {
        self.blk.queue_notified(0, &mut self.driver.io()).unwrap();
    }

    /// Waits for as many answers as `pending` and returns their statuses in the order of `pending`, and used lengths.
    pub fn wait(&mut self, pending: &[Pending]) -> Vec<(u8, u32)> {
        let mut used = Vec::new();
        loop {
            used.extend(std::iter::from_fn(|| self.driver.used(0)).map(|used| (used.head, used.length)));
            if used.len() >= pending.len() {
                break;
            }
            self.await_backend();
            self.blk.backend_ready(&mut self.driver.io()).unwrap();
        }
        let length = |head| used.iter().find(|used| used.0 == head).expect("each chain is answered once").1;
        pending.iter().map(|request| (self.status(*request), length(request.head))).collect()
    }

    fn await_backend(&self) {
        let backend = self.blk.backend().expect("an active disk has an event");
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, backend.fd, EpollEvent::new(backend.events, 0)).unwrap();
        // io_uring runs its work on this thread and interrupts the wait for it, as it does that of an event loop.
        let ready = loop {
            match epoll.wait(DEADLINE_MS, &mut [EpollEvent::default()]) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                ready => break ready.unwrap(),
            }
        };
        assert_eq!(ready, 1, "no completion within {:?}", Duration::from_millis(DEADLINE_MS as u64));
    }

    /// The status byte, 0xff before the answer.
    pub fn status(&self, request: Pending) -> u8 {
        self.driver.ram.read_obj(GuestAddress(request.status)).unwrap()
    }

    /// One request from start to end: its status.
    pub fn run(&mut self, kind: u32, sector: u64, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u8 {
        let request = self.offer(kind, sector, readable, writable);
        self.notify();
        self.wait(&[request])[0].0
    }

    /// Writes `bytes` at `sector` from guest memory at `address`.
    pub fn write(&mut self, sector: u64, address: u64, bytes: &[u8]) -> u8 {
        self.driver.ram.write_slice(bytes, GuestAddress(address)).unwrap();
        self.run(VIRTIO_BLK_T_OUT, sector, &[(address, bytes.len() as u32)], &[])
    }

    /// Reads `length` bytes at `sector` to guest memory at `address`.
    pub fn read(&mut self, sector: u64, address: u64, length: u32) -> (u8, Vec<u8>) {
        let status = self.run(VIRTIO_BLK_T_IN, sector, &[], &[(address, length)]);
        (status, self.memory(address, length))
    }

    /// Guest memory.
    pub fn memory(&self, address: u64, length: u32) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.driver.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// A discard or write-zeroes request.
    pub fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&flags.to_le_bytes());
        self.driver.ram.write_slice(&bytes, GuestAddress(DATA - 16)).unwrap();
        self.run(kind, 0, &[(DATA - 16, 16)], &[])
    }
}

/// Opens `path` as `mode` does, writable.
pub fn open(path: &std::path::Path, mode: Mode) -> Image {
    Image::open(path, false, mode != Mode::Cached).unwrap()
}
