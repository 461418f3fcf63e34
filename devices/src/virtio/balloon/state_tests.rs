//! A balloon that goes from one machine to another, its statistics request under way or not.

use super::*;
use crate::virtio::testing::Driver;
use proptest::prelude::*;
use std::fs::File;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap};

const FEATURES: u64 = 1 << F_STATS | 1 << F_DEFLATE_ON_OOM | 1 << F_PAGE_POISON | 1 << F_REPORTING;

/// Every field of version 1 with a value of its own: pages 768 and 512, statistics 2 and 4, 7 updates, wanted, known, no
/// news, 4096 bytes reported, poison 0xaa.
const GOLDEN: &str = "80068004000001e8070001882700000000000701010080\
                      20aa01";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn balloon() -> (Balloon, BalloonHandle) {
    Balloon::new().unwrap()
}

/// A balloon of which every saved field was changed through its own ways.
fn used() -> (Balloon, BalloonHandle, Driver) {
    let (mut balloon, host) = balloon();
    let mut driver = Driver::new(&[64; 5]);
    driver.features = FEATURES;
    balloon.activate(&mut driver.io()).unwrap();
    host.set_target(3 << 20);
    balloon.backend_ready(&mut driver.io()).unwrap();
    balloon.write_config(ACTUAL, &512u32.to_le_bytes());
    driver.add(4, &[], &[4096]);
    driver.ram.write_slice(&[1; 8192], GuestAddress(1 << 20)).unwrap();
    driver.descriptor(4, 0, 1 << 20, 4096, Driver::WRITE, 0);
    balloon.queue_notified(4, &mut driver.io()).unwrap();
    balloon.write_config(POISON, &0xaau32.to_le_bytes());
    stats(&mut balloon, &mut driver, 1000);
    (balloon, host, driver)
}

/// The driver hands in statistics.
fn stats(balloon: &mut Balloon, driver: &mut Driver, free_bytes: u64) -> u16 {
    let bytes = [&4u16.to_le_bytes()[..], &free_bytes.to_le_bytes()].concat();
    let head = driver.add(STATS, &[&bytes], &[]);
    balloon.queue_notified(STATS, &mut driver.io()).unwrap();
    head
}

/// Goes on as the transport of a new machine would: activated, and every queue looked at.
fn arrive(saved: &Saved, driver: &mut Driver) -> (Balloon, BalloonHandle) {
    let (mut balloon, host) = balloon();
    balloon.restore(saved).unwrap();
    assert_eq!(&balloon.save(), saved);
    balloon.activate(&mut driver.io()).unwrap();
    for queue in 0..5 {
        balloon.queue_notified(queue, &mut driver.io()).unwrap();
    }
    (balloon, host)
}

#[test]
fn version_1_is_read_for_ever() {
    let (mut balloon, host) = balloon();
    let contents = (0..GOLDEN.len()).step_by(2).map(|at| u8::from_str_radix(&GOLDEN[at..at + 2], 16).unwrap());
    let golden = Saved { version: 1, contents: contents.collect() };
    balloon.restore(&golden).unwrap();
    assert_eq!(hex(&balloon.save().contents), GOLDEN);
    let status = BalloonStatus {
        target_bytes: 3 << 20,
        actual_bytes: 2 << 20,
        stats: vec![("major-faults", 1000), ("free-memory", 5000)],
        stats_updates: 7,
        reported_bytes: 4096,
    };
    assert_eq!(host.snapshot(), status);
    let mut config = [0; 16];
    balloon.read_config(0, &mut config);
    assert_eq!((config[0..2].to_vec(), config[4..6].to_vec(), config[12]), (vec![0, 3], vec![0, 2], 0xaa));
    let shared = lock(&host.shared).clone();
    assert_eq!((shared.stats_wanted, shared.target_news, balloon.stats_known), (true, false, true));
}

#[test]
fn the_new_hosts_handle_shows_what_the_old_one_showed() {
    let (mut balloon, host, mut driver) = used();
    balloon.quiesce(&mut driver.io()).unwrap();
    let before = host.snapshot();
    assert_eq!((before.actual_bytes, before.reported_bytes, before.stats_updates), (2 << 20, 4096, 1));
    let (mut moved, new_host) = arrive(&balloon.save(), &mut driver);
    assert_eq!(new_host.snapshot(), before);
    // Reporting goes on, and heeds the poison value that came along.
    while driver.used(4).is_some() {}
    driver.offer(4, 0);
    moved.queue_notified(4, &mut driver.io()).unwrap();
    assert_eq!((driver.used(4).unwrap().length, new_host.snapshot().reported_bytes), (0, 4096));
    moved.write_config(POISON, &[0; 4]);
    driver.offer(4, 0);
    moved.queue_notified(4, &mut driver.io()).unwrap();
    assert_eq!(new_host.snapshot().reported_bytes, 8192);
}

#[test]
fn saving_by_way_of_rehearsal_changes_nothing() {
    let (mut balloon, host, mut driver) = used();
    let (first, status) = (balloon.save(), host.snapshot());
    assert_eq!((balloon.save(), host.snapshot()), (first, status));
    host.request_stats();
    balloon.backend_ready(&mut driver.io()).unwrap();
    assert!(driver.used(STATS).is_some(), "the statistics buffer is still with the device");
}

#[test]
fn a_target_set_just_before_the_move_interrupts_after_it() {
    let (mut balloon, host, mut driver) = used();
    host.set_target(5 << 20);
    balloon.quiesce(&mut driver.io()).unwrap();
    let before = driver.config_interrupts;
    arrive(&balloon.save(), &mut driver);
    assert_eq!(driver.config_interrupts, before + 1);
}

#[test]
fn a_request_for_statistics_is_answered_once_wherever_the_move_falls() {
    // Asked before the device saw it; asked, and the driver is at it; asked on the new host.
    for moment in 0..3 {
        let (mut balloon, host, mut driver) = used();
        if moment < 2 {
            host.request_stats();
        }
        if moment == 1 {
            balloon.backend_ready(&mut driver.io()).unwrap();
        }
        balloon.quiesce(&mut driver.io()).unwrap();
        let (mut moved, new_host) = arrive(&balloon.save(), &mut driver);
        assert_eq!(new_host.snapshot().stats_updates, 1, "what is known already is no answer ({moment})");
        if moment == 2 {
            assert!(driver.used(STATS).is_none(), "nobody asked yet");
            new_host.request_stats();
            moved.backend_ready(&mut driver.io()).unwrap();
        }
        assert!(driver.used(STATS).is_some(), "the driver is asked ({moment})");
        stats(&mut moved, &mut driver, 2000);
        let status = new_host.snapshot();
        assert_eq!((status.stats_updates, status.stats), (2, vec![("free-memory", 2000)]), "{moment}");
        assert!(driver.used(STATS).is_none(), "asked once ({moment})");
    }
}

#[test]
fn a_move_that_failed_leaves_the_request_as_it_was() {
    let (mut balloon, host, mut driver) = used();
    host.request_stats();
    balloon.quiesce(&mut driver.io()).unwrap();
    let _saved = balloon.save();
    balloon.queue_notified(STATS, &mut driver.io()).unwrap();
    balloon.moved(&mut driver.io()).unwrap();
    assert_eq!((driver.used(STATS).is_some(), host.snapshot().stats_updates), (true, 1));
}

#[test]
fn a_state_that_is_none_leaves_the_balloon_as_it_was() {
    let (mut balloon, host, _) = used();
    let before = (balloon.save(), host.snapshot());
    let good = before.0.contents.clone();
    let newer = Saved { version: 2, contents: good.clone() };
    assert_eq!(balloon.restore(&newer).unwrap_err().to_string(), "it has version 2, and this program reads up to 1");
    for contents in [vec![], good[..good.len() - 1].to_vec(), [&good[..], &[0]].concat(), vec![0xff; 40]] {
        balloon.restore(&Saved { version: 1, contents }).unwrap_err();
        assert_eq!((balloon.save(), host.snapshot()), before);
    }
}

#[test]
fn a_page_given_back_does_not_show_the_file_that_ram_was_mapped_from() {
    let file: File = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xf1; 8192], 0).unwrap();
    let region = MmapRegionBuilder::new_with_bitmap(8192, vm_memory::bitmap::AtomicBitmap::default())
        .with_file_offset(FileOffset::new(file, 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    let ram = GuestRam::from_regions(vec![region]).unwrap();
    ram.write_slice(&[0xa5; 8192], GuestAddress(0)).unwrap();
    assert_eq!(discard(&ram, 0, 4096, GiveBack::Keep).unwrap().unwrap(), 0);
    let pages = || [0, 4096].map(|at| ram.read_obj::<u8>(GuestAddress(at)).unwrap());
    assert_eq!(pages(), [0xa5, 0xa5]);
    assert_eq!(discard(&ram, 0, 4096, GiveBack::Replace).unwrap().unwrap(), 4096);
    assert_eq!(pages(), [0, 0xa5]);
    // As any page: it can be written, and given back again.
    ram.write_obj(1u8, GuestAddress(0)).unwrap();
    assert_eq!(discard(&ram, 0, 8192, GiveBack::Replace).unwrap().unwrap(), 8192);
    assert_eq!(pages(), [0, 0]);
}

proptest! {
    #[test]
    fn any_bytes_are_taken_whole_or_not_at_all(version in 0u16..3, contents in prop::collection::vec(any::<u8>(), 0..64)) {
        let (mut balloon, host) = balloon();
        host.set_target(7 << 20);
        let before = balloon.save();
        let taken = balloon.restore(&Saved { version, contents }).is_ok();
        prop_assert!(taken || balloon.save() == before);
        // What was taken can be lived with.
        let mut driver = Driver::new(&[64; 5]);
        driver.features = FEATURES;
        balloon.activate(&mut driver.io()).unwrap();
        stats(&mut balloon, &mut driver, 1);
        host.snapshot();
    }
}
