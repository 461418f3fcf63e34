//! The device between a fake driver and the test's own memory.

use super::*;
use crate::virtio::testing::Driver;
use proptest::prelude::*;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

/// An address the tests may give away: 8 MiB, far from rings and buffers.
const PAGES: u64 = 0x80_0000;
const REPORTING: usize = 4;
const ALL: u64 = 1 << F_STATS | 1 << F_DEFLATE_ON_OOM | 1 << F_PAGE_POISON | 1 << F_REPORTING;

struct Bench {
    balloon: Balloon,
    host: BalloonHandle,
    driver: Driver,
}

impl Bench {
    fn new(features: u64) -> Self {
        let (balloon, host) = Balloon::new().unwrap();
        let mut bench = Self { balloon, host, driver: Driver::new(&[64; 5]) };
        bench.driver.features = features;
        bench.balloon.activate(&mut bench.driver.io()).unwrap();
        bench
    }

    fn notify(&mut self, queue: usize) -> Result<(), Fault> {
        self.balloon.queue_notified(queue, &mut self.driver.io())
    }

    /// What the event loop does when the host's side rang.
    fn woken(&mut self) {
        let fd = self.balloon.backend().unwrap().fd;
        assert_eq!(fd, self.host.wake.as_raw_fd());
        self.balloon.backend_ready(&mut self.driver.io()).unwrap();
    }

    /// Writes something into `count` pages from [`PAGES`].
    fn fill(&self, count: u64) {
        for page in 0..count {
            self.driver.ram.write_slice(&[0xa5; PAGE_BYTES as usize], GuestAddress(PAGES + page * PAGE_BYTES)).unwrap();
        }
    }

    /// Which of the first `count` pages the host still backs, asked of the kernel.
    fn backed(&self, count: u64) -> Vec<bool> {
        backed(&self.driver.ram, PAGES, count)
    }

    fn inflate(&mut self, frames: &[u32]) -> Result<(), Fault> {
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.to_le_bytes()).collect();
        self.driver.add(INFLATE, &[&bytes], &[]);
        self.notify(INFLATE)
    }

    /// Offers ranges of guest memory for reporting on `queue`.
    fn report(&mut self, queue: usize, ranges: &[(u64, u32)]) -> Result<(), Fault> {
        for (index, (address, length)) in (0u16..).zip(ranges) {
            let more = if usize::from(index) + 1 < ranges.len() { Driver::NEXT } else { 0 };
            self.driver.descriptor(queue, index, *address, *length, Driver::WRITE | more, index + 1);
        }
        self.driver.offer(queue, 0);
        self.notify(queue)
    }

    fn stat(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }
}

/// Bits 63 (present) and 62 (swapped) of /proc/self/pagemap.
fn backed(ram: &GuestRam, start: u64, count: u64) -> Vec<bool> {
    use std::os::unix::fs::FileExt;
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let at = ram.get_host_address(GuestAddress(start)).unwrap() as u64;
    let entry = |page: u64| {
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, (at / PAGE_BYTES + page) * 8).unwrap();
        u64::from_le_bytes(entry) >> 62 != 0
    };
    (0..count).map(entry).collect()
}

fn frame(page: u64) -> u32 {
    u32::try_from(PAGES / PAGE_BYTES + page).unwrap()
}

#[test]
fn inflated_pages_go_back_to_the_host_and_read_as_zero() {
    let mut bench = Bench::new(ALL);
    bench.fill(8);
    assert_eq!(bench.backed(8), [true; 8]);
    // In any order and twice, as a driver may.
    bench.inflate(&[frame(5), frame(1), frame(2), frame(0), frame(2)]).unwrap();
    assert_eq!(bench.backed(8), [false, false, false, true, true, false, true, true]);
    let mut byte = [1; 1];
    bench.driver.ram.read_slice(&mut byte, GuestAddress(PAGES)).unwrap();
    assert_eq!(byte, [0]);
    let used = bench.driver.used(INFLATE).unwrap();
    assert_eq!((used.length, &bench.driver.interrupts), (0, &vec![1, 0, 0, 0, 0]));
}

#[test]
fn given_back_pages_are_dirty_and_others_are_not() {
    let mut bench = Bench::new(ALL);
    bench.inflate(&[frame(1), frame(2)]).unwrap();
    let region = bench.driver.ram.find_region(GuestAddress(PAGES)).unwrap();
    let dirty: Vec<_> =
        (0..4).map(|page| region.bitmap().dirty_at(PAGES as usize + page * PAGE_BYTES as usize)).collect();
    assert_eq!(dirty, [false, true, true, false]);
}

#[test]
fn pages_of_shared_memory_are_freed_too() {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(8 * PAGE_BYTES).unwrap();
    let region = MmapRegionBuilder::new_with_bitmap(8 * PAGE_BYTES as usize, AtomicBitmap::default())
        .with_file_offset(FileOffset::new(file.try_clone().unwrap(), 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let ram = GuestRam::from_regions(vec![region]).unwrap();
    ram.write_slice(&[0xa5; 8 * PAGE_BYTES as usize], GuestAddress(0)).unwrap();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512;
    assert_eq!(blocks(), 8 * PAGE_BYTES);
    assert_eq!(discard(&ram, 0, 4 * PAGE_BYTES, GiveBack::Release).unwrap().unwrap(), 4 * PAGE_BYTES);
    assert_eq!(blocks(), 4 * PAGE_BYTES);
}

#[test]
fn a_range_over_two_regions_is_given_back_in_both() {
    let ranges = [(GuestAddress(0), 2 * PAGE_BYTES as usize), (GuestAddress(2 * PAGE_BYTES), 2 * PAGE_BYTES as usize)];
    let ram = GuestRam::from_ranges(&ranges).unwrap();
    ram.write_slice(&[0xa5; 4 * PAGE_BYTES as usize], GuestAddress(0)).unwrap();
    assert_eq!(discard(&ram, PAGE_BYTES, 2 * PAGE_BYTES, GiveBack::Release).unwrap().unwrap(), 2 * PAGE_BYTES);
    assert_eq!(backed(&ram, 0, 2), [true, false]);
    assert_eq!(backed(&ram, 2 * PAGE_BYTES, 2), [false, true]);
}

#[test]
fn a_page_frame_outside_ram_is_a_fault() {
    for outside in [0x1000, u32::MAX] {
        let mut bench = Bench::new(ALL);
        let fault = bench.inflate(&[frame(0), outside]).unwrap_err().to_string();
        assert_eq!(fault, "queue 0: a page frame outside guest RAM");
    }
}

#[test]
fn a_run_that_ends_outside_ram_is_a_fault_and_gives_nothing_back() {
    let mut bench = Bench::new(ALL);
    let last = (16 << 20) / PAGE_BYTES - 1;
    let address = GuestAddress(last * PAGE_BYTES);
    bench.driver.ram.write_slice(&[1], address).unwrap();
    bench.inflate(&[last as u32, last as u32 + 1]).unwrap_err();
    assert_eq!(bench.driver.ram.read_obj::<u8>(address).unwrap(), 1);
}

#[test]
fn too_many_page_frames_in_one_chain_are_a_fault() {
    let mut bench = Bench::new(ALL);
    bench.inflate(&vec![frame(0); MAX_FRAMES]).unwrap();
    let fault = bench.inflate(&vec![frame(0); MAX_FRAMES + 1]).unwrap_err().to_string();
    assert_eq!(fault, "queue 0: too many page frame numbers in one chain");
}

#[test]
fn a_reaction_gives_back_a_bounded_number_of_pages() {
    let mut bench = Bench::new(ALL);
    let frames: Vec<u8> = (0..1024).flat_map(|page| frame(page).to_le_bytes()).collect();
    for _ in 0..5 {
        bench.driver.add(INFLATE, &[&frames], &[]);
    }
    bench.notify(INFLATE).unwrap();
    assert_eq!(std::iter::from_fn(|| bench.driver.used(INFLATE)).count(), 4);
    assert_eq!(bench.driver.doorbells[INFLATE].read().unwrap(), 1);
}

#[test]
fn deflating_gives_the_chain_back() {
    let mut bench = Bench::new(ALL);
    bench.driver.add(DEFLATE, &[&frame(0).to_le_bytes()], &[]);
    bench.notify(DEFLATE).unwrap();
    assert_eq!(bench.driver.used(DEFLATE).unwrap().length, 0);
    assert_eq!(bench.driver.interrupts[DEFLATE], 1);
}

#[test]
fn reported_ranges_go_back_by_whole_pages() {
    // Linux until 6.10 finds this queue at 3, later ones where the standard has it.
    for queue in [3, REPORTING] {
        let mut bench = Bench::new(ALL);
        bench.fill(1024);
        bench.report(queue, &[(PAGES, 1 << 20), (PAGES + (1 << 20) + 1, 3 * 4096), (PAGES + (2 << 20), 4095)]).unwrap();
        let backed = bench.backed(1024);
        assert!(backed[..256].iter().all(|backed| !backed));
        assert_eq!(backed[256..260], [true, false, false, true], "only whole pages inside");
        assert!(backed[260..].iter().all(|backed| *backed));
        assert_eq!(bench.host.snapshot().reported_bytes, (1 << 20) + 2 * 4096);
        assert_eq!(bench.driver.used(queue).unwrap().length, 0);
    }
}

#[test]
fn a_driver_that_poisons_free_pages_keeps_them() {
    for (poison, kept) in [(0u32, false), (0xaaaa_aaaa, true)] {
        let mut bench = Bench::new(ALL);
        bench.fill(1);
        bench.balloon.write_config(POISON, &poison.to_le_bytes());
        bench.report(REPORTING, &[(PAGES, 4096)]).unwrap();
        assert_eq!(bench.backed(1), [kept]);
        assert_eq!(bench.host.snapshot().reported_bytes, if kept { 0 } else { 4096 });
        assert!(bench.driver.used(REPORTING).is_some());
    }
}

#[test]
fn reporting_that_was_not_negotiated_is_left_alone() {
    let mut bench = Bench::new(ALL & !(1 << F_REPORTING));
    bench.fill(1);
    bench.report(REPORTING, &[(PAGES, 4096)]).unwrap();
    assert_eq!(bench.backed(1), [true]);
}

#[test]
fn a_new_target_interrupts_once_and_stands_in_the_configuration() {
    let mut bench = Bench::new(ALL);
    bench.host.set_target((3 << 20) + 4095);
    bench.woken();
    assert_eq!(bench.driver.config_interrupts, 1);
    let mut config = [0xff; 20];
    bench.balloon.read_config(0, &mut config);
    assert_eq!(config[..4], 768u32.to_le_bytes());
    assert_eq!(config[4..], [0; 16]);
    bench.woken();
    bench.host.set_target(3 << 20);
    bench.woken();
    assert_eq!(bench.driver.config_interrupts, 1, "the same target is no news");
    bench.balloon.write_config(ACTUAL, &512u32.to_le_bytes());
    let status = bench.host.snapshot();
    assert_eq!((status.target_bytes, status.actual_bytes), (3 << 20, 2 << 20));
    bench.host.set_target(u64::MAX);
    assert_eq!(bench.host.snapshot().target_bytes, u64::from(u32::MAX) * PAGE_BYTES);
}

#[test]
fn other_configuration_writes_are_ignored() {
    let mut bench = Bench::new(ALL);
    for (offset, data) in
        [(0, &[9; 4][..]), (4, &[9; 2]), (4, &[9; 8]), (8, &[9; 4]), (5, &[9; 4]), (u64::MAX, &[9; 4])]
    {
        bench.balloon.write_config(offset, data);
    }
    let mut config = [0xff; 16];
    bench.balloon.read_config(0, &mut config);
    assert_eq!(config, [0; 16]);
    bench.balloon.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 16]);
}

#[test]
fn statistics_come_once_and_again_when_asked() {
    let mut bench = Bench::new(ALL);
    let bytes = [Bench::stat(4, 1000), Bench::stat(99, 1), Bench::stat(2, 7), vec![1, 2, 3]].concat();
    let first = bench.driver.add(STATS, &[&bytes], &[]);
    bench.notify(STATS).unwrap();
    let status = bench.host.snapshot();
    assert_eq!(status.stats, [("major-faults", 7), ("free-memory", 1000)], "unknown tags and fragments are left out");
    assert_eq!(status.stats_updates, 1);
    assert!(bench.driver.used(STATS).is_none(), "the buffer is kept");
    bench.host.request_stats();
    bench.woken();
    assert_eq!(bench.driver.used(STATS).unwrap().head, first);
    assert_eq!(bench.driver.interrupts[STATS], 1);
    bench.driver.add(STATS, &[&Bench::stat(4, 2000)], &[]);
    bench.notify(STATS).unwrap();
    assert!(bench.driver.used(STATS).is_none(), "one answer to one request");
    let status = bench.host.snapshot();
    assert_eq!((status.stats, status.stats_updates), (vec![("major-faults", 7), ("free-memory", 2000)], 2));
}

#[test]
fn statistics_asked_for_before_the_first_buffer_come_after_it() {
    let mut bench = Bench::new(ALL);
    bench.host.request_stats();
    bench.woken();
    let head = bench.driver.add(STATS, &[&Bench::stat(0, 1)], &[]);
    bench.notify(STATS).unwrap();
    assert_eq!(bench.driver.used(STATS).unwrap().head, head);
}

#[test]
fn the_statistics_buffer_goes_back_before_a_pause() {
    let mut bench = Bench::new(ALL);
    let head = bench.driver.add(STATS, &[&Bench::stat(4, 1000)], &[]);
    bench.notify(STATS).unwrap();
    bench.balloon.quiesce(&mut bench.driver.io()).unwrap();
    bench.host.request_stats();
    bench.woken();
    assert!(bench.driver.used(STATS).is_none());
    bench.notify(STATS).unwrap();
    assert_eq!(bench.driver.used(STATS).unwrap().head, head);
}

#[test]
fn a_chain_of_statistics_without_end_is_bounded() {
    let mut bench = Bench::new(ALL);
    bench.driver.add(STATS, &[&Bench::stat(4, 1).repeat(5000), &Bench::stat(5, 1)], &[]);
    bench.notify(STATS).unwrap();
    assert_eq!(bench.host.snapshot().stats, [("free-memory", 1)]);
}

#[test]
fn a_reset_forgets_the_driver_and_keeps_the_target() {
    let mut bench = Bench::new(ALL);
    bench.host.set_target(1 << 20);
    bench.balloon.write_config(ACTUAL, &5u32.to_le_bytes());
    bench.balloon.write_config(POISON, &5u32.to_le_bytes());
    bench.driver.add(STATS, &[&Bench::stat(4, 1000)], &[]);
    bench.notify(STATS).unwrap();
    bench.report(REPORTING, &[(PAGES, 4096)]).unwrap();
    bench.balloon.quiesce(&mut bench.driver.io()).unwrap();
    bench.balloon.reset();
    assert_eq!(bench.host.snapshot(), BalloonStatus { target_bytes: 1 << 20, ..Default::default() });
    assert!(bench.balloon.backend().is_none());
    let mut config = [0; 16];
    bench.balloon.read_config(0, &mut config);
    assert_eq!(config[4..], [0; 12]);
    bench.driver.add(INFLATE, &[&frame(0).to_le_bytes()], &[]);
    bench.notify(INFLATE).unwrap();
    assert!(bench.driver.used(INFLATE).is_none(), "nothing moves before DRIVER_OK");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_ring_makes_it_panic_or_spin(
        features: u64,
        descriptors in prop::collection::vec(
            (0usize..5, 0u16..8, 0u64..(17 << 20), 0u32..70_000, 0u16..8, 0u16..9),
            0..24,
        ),
        offers in prop::collection::vec((0usize..5, 0u16..9), 0..16),
        config in prop::collection::vec((0u64..20, prop::collection::vec(any::<u8>(), 0..9)), 0..4),
    ) {
        let mut bench = Bench::new(features);
        for (queue, index, address, length, flags, next) in descriptors {
            bench.driver.descriptor(queue, index, address, length, flags, next);
        }
        for (offset, data) in config {
            bench.balloon.write_config(offset, &data);
        }
        for (queue, head) in offers {
            bench.driver.offer(queue, head);
            bench.host.request_stats();
            bench.woken();
            // Whatever comes of it, it comes to an end.
            let _fault = bench.notify(queue);
        }
        bench.balloon.quiesce(&mut bench.driver.io()).unwrap();
        bench.balloon.reset();
    }
}
