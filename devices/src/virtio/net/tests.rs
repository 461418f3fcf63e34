//! The device between a fake driver and a socket pair that stands in for the tap: both keep frame boundaries.

use super::*;
use crate::virtio::testing::Driver;
use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const HEADER: [u8; 12] = [1, 0, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0];

struct Cable {
    end: OwnedFd,
    offloads: Arc<Mutex<Vec<Offload>>>,
}

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

impl Port for Cable {
    fn name(&self) -> &str {
        "cable"
    }
    fn mtu(&self) -> u16 {
        9000
    }
    fn set_offload(&self, offload: Offload) -> io::Result<()> {
        self.offloads.lock().unwrap().push(offload);
        Ok(())
    }
}

/// A device, its driver, and the far end of its cable.
struct Bench {
    net: Net<Cable>,
    driver: Driver,
    far: Option<OwnedFd>,
    offloads: Arc<Mutex<Vec<Offload>>>,
}

impl Bench {
    fn new(features: u64) -> Self {
        let (end, far) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        let offloads = Arc::default();
        let net = Net::new(Cable { end, offloads: Arc::clone(&offloads) }, MAC);
        let mut bench = Self { net, driver: Driver::new(&[512, 512]), far: Some(far), offloads };
        bench.driver.features = features;
        bench.net.activate(&mut bench.driver.io()).unwrap();
        bench
    }

    fn far(&self) -> &OwnedFd {
        self.far.as_ref().unwrap()
    }

    /// Posts `count` receive buffers of `bytes` each.
    fn post(&mut self, count: usize, bytes: u32) -> Vec<u16> {
        (0..count).map(|_| self.driver.add(RX, &[], &[bytes])).collect()
    }

    /// A frame from the far end, with a header as a tap writes it.
    fn arrive(&self, frame: &[u8]) {
        rustix::io::write(self.far(), &[&HEADER, frame].concat()).unwrap();
    }

    fn ready(&mut self) -> Result<(), Fault> {
        self.net.backend_ready(&mut self.driver.io())
    }

    fn notify(&mut self, queue: usize) -> Result<(), Fault> {
        self.net.queue_notified(queue, &mut self.driver.io())
    }

    /// What the far end got, header and all.
    fn departed(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let length = rustix::io::read(self.far(), &mut bytes[..]).ok()?;
        bytes.truncate(length);
        Some(bytes)
    }

    /// Takes used buffers of one frame: heads, the header, the frame.
    fn received(&mut self) -> Option<(Vec<u16>, Vec<u8>, Vec<u8>)> {
        let first = self.driver.used(RX)?;
        let buffers = u16::from_le_bytes([first.bytes[10], first.bytes[11]]);
        let (mut heads, mut bytes) = (vec![first.head], first.bytes);
        for _ in 1..buffers {
            let next = self.driver.used(RX).expect("num_buffers promised another");
            heads.push(next.head);
            bytes.extend(next.bytes);
        }
        let frame = bytes.split_off(HEADER_BYTES);
        Some((heads, bytes, frame))
    }

    fn polled(&self) -> bool {
        self.net.backend().is_some()
    }
}

fn frame(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn a_frame_leaves_whole_however_it_is_cut() {
    let mut bench = Bench::new(0);
    let whole = [&HEADER[..], &frame(1514)].concat();
    let head = bench.driver.add(TX, &[&whole], &[]);
    bench.driver.add(TX, &[&whole[..12], &whole[12..]], &[]);
    bench.driver.add(TX, &[&whole[..5], &[], &whole[5..13], &whole[13..100], &whole[100..]], &[]);
    bench.notify(TX).unwrap();
    for _ in 0..3 {
        assert_eq!(bench.departed().unwrap(), whole);
    }
    let used = bench.driver.used(TX).unwrap();
    assert_eq!((used.head, used.length), (head, 0));
    assert_eq!(bench.driver.interrupts, [0, 1]);
    let sent = bench.net.counters().sent.get();
    assert_eq!(sent, Traffic { frames: 3, bytes: 3 * 1514, dropped: 0 });
}

#[test]
fn a_sent_chain_without_a_whole_header_is_a_fault() {
    for bytes in [0, 1, 11] {
        let mut bench = Bench::new(0);
        bench.driver.add(TX, &[&HEADER[..bytes]], &[]);
        let fault = bench.notify(TX).unwrap_err().to_string();
        assert_eq!(fault, "queue 1: a frame to send is shorter than the header");
    }
}

#[test]
fn a_frame_longer_than_any_is_dropped_and_its_chain_given_back() {
    let mut bench = Bench::new(0);
    bench.driver.add(TX, &[&HEADER, &frame(FRAME_BYTES)], &[]);
    bench.driver.add(TX, &[&HEADER, &frame(FRAME_BYTES - HEADER_BYTES)], &[]);
    bench.notify(TX).unwrap();
    assert_eq!(bench.departed().unwrap().len(), FRAME_BYTES);
    assert!(bench.departed().is_none());
    assert_eq!(std::iter::from_fn(|| bench.driver.used(TX)).count(), 2);
    assert_eq!(bench.net.counters().sent.get().dropped, 1);
}

#[test]
fn what_a_full_cable_cannot_take_is_dropped_and_counted() {
    let mut bench = Bench::new(0);
    for _ in 0..100 {
        bench.driver.add(TX, &[&HEADER, &frame(9000)], &[]);
    }
    bench.notify(TX).unwrap();
    assert_eq!(std::iter::from_fn(|| bench.driver.used(TX)).count(), 100);
    let arrived = std::iter::from_fn(|| bench.departed()).count() as u64;
    let sent = bench.net.counters().sent.get();
    assert!(sent.dropped > 0, "the socket took 900 kB");
    assert_eq!((sent.frames, sent.dropped), (arrived, 100 - arrived));
}

#[test]
fn sending_stops_at_the_budget_and_asks_for_another_turn() {
    let mut bench = Bench::new(0);
    for _ in 0..BUDGET + 1 {
        bench.driver.add(TX, &[&HEADER, &frame(60)], &[]);
    }
    bench.notify(TX).unwrap();
    assert_eq!(std::iter::from_fn(|| bench.driver.used(TX)).count(), BUDGET);
    assert_eq!(bench.driver.doorbells[TX].read().unwrap(), 1);
    bench.notify(TX).unwrap();
    assert_eq!(std::iter::from_fn(|| bench.driver.used(TX)).count(), 1);
    assert!(bench.driver.doorbells[TX].read().is_err());
}

#[test]
fn a_received_frame_lands_in_one_buffer_without_merging() {
    let mut bench = Bench::new(1 << VIRTIO_NET_F_GUEST_CSUM);
    let heads = bench.post(3, 1526);
    bench.arrive(&frame(1514));
    bench.arrive(&frame(60));
    bench.ready().unwrap();
    let (buffers, header, bytes) = bench.received().unwrap();
    assert_eq!((buffers, bytes), (vec![heads[0]], frame(1514)));
    assert_eq!(header, [&HEADER[..10], &[1, 0]].concat(), "num_buffers is 1, the rest the tap's");
    let (buffers, _, bytes) = bench.received().unwrap();
    assert_eq!((buffers, bytes), (vec![heads[1]], frame(60)));
    assert_eq!(bench.driver.interrupts, [1, 0]);
    let received = bench.net.counters().received.get();
    assert_eq!(received, Traffic { frames: 2, bytes: 1574, dropped: 0 });
}

#[test]
fn a_driver_that_computes_checksums_itself_sees_no_flags() {
    for bytes in [1526, FRAME_BYTES as u32] {
        let mut bench = Bench::new(0);
        bench.post(1, bytes);
        bench.arrive(&frame(60));
        bench.ready().unwrap();
        let (_, header, _) = bench.received().unwrap();
        assert_eq!(header, [&[0], &HEADER[1..10], &[1, 0]].concat());
    }
}

#[test]
fn a_frame_spans_buffers_and_the_next_goes_on_behind_it() {
    let mut bench = Bench::new(MERGEABLE);
    let heads = bench.post(64, 1536);
    for bytes in [5000, 60, 1524, 1525] {
        bench.arrive(&frame(bytes));
    }
    bench.ready().unwrap();
    for (bytes, expected) in [(5000, &heads[..4]), (60, &heads[4..5]), (1524, &heads[5..6]), (1525, &heads[6..8])] {
        let (buffers, header, received) = bench.received().unwrap();
        assert_eq!((buffers.as_slice(), received), (expected, frame(bytes)));
        assert_eq!(header[10..], [expected.len() as u8, 0]);
    }
    assert_eq!(bench.driver.interrupts, [1, 0]);
}

#[test]
fn the_largest_frame_arrives() {
    let mut bench = Bench::new(MERGEABLE);
    let heads = bench.post(43, 1536);
    bench.arrive(&frame(FRAME_BYTES - HEADER_BYTES));
    bench.ready().unwrap();
    let (buffers, _, received) = bench.received().unwrap();
    assert_eq!((buffers, received), (heads, frame(FRAME_BYTES - HEADER_BYTES)));
}

#[test]
fn a_header_may_be_cut_anywhere() {
    let mut bench = Bench::new(MERGEABLE);
    for _ in 0..2 {
        bench.driver.add(RX, &[], &[1, 0, 10, 3, 80]);
    }
    bench.arrive(&frame(100));
    bench.ready().unwrap();
    let (buffers, header, received) = bench.received().unwrap();
    assert_eq!((buffers.len(), received), (2, frame(100)));
    assert_eq!(header[10..], [2, 0]);
}

#[test]
fn buffers_go_back_before_a_pause_and_serve_after_it() {
    let mut bench = Bench::new(MERGEABLE);
    let heads = bench.post(64, 1536);
    bench.arrive(&frame(60));
    bench.ready().unwrap();
    assert_eq!(bench.received().unwrap().0, heads[..1]);
    bench.net.quiesce(&mut bench.driver.io()).unwrap();
    bench.arrive(&frame(3000));
    assert!(bench.driver.used(RX).is_none());
    let next = bench.driver.io().pop(RX).unwrap().unwrap();
    assert_eq!(next.head, heads[1], "the ring stands where the driver thinks");
    bench.driver.io().put_back(RX);
    bench.notify(RX).unwrap();
    bench.ready().unwrap();
    assert_eq!(bench.received().unwrap().0, heads[1..3]);
}

#[test]
fn without_buffers_the_port_is_left_alone_until_some_come() {
    let mut bench = Bench::new(MERGEABLE);
    assert!(bench.polled());
    bench.arrive(&frame(60));
    bench.ready().unwrap();
    assert!(!bench.polled(), "a level-triggered wait would spin");
    bench.ready().unwrap();
    let heads = bench.post(1, 1536);
    bench.notify(RX).unwrap();
    assert_eq!(bench.received().unwrap().0, heads);
    assert!(!bench.polled());
    bench.post(1, 1536);
    bench.notify(RX).unwrap();
    assert!(bench.polled());
    assert_eq!(bench.net.counters().received.get().dropped, 0);
}

#[test]
fn a_frame_waits_once_for_more_buffers() {
    let mut bench = Bench::new(MERGEABLE);
    let mut heads = bench.post(2, 1536);
    bench.arrive(&frame(5000));
    bench.arrive(&frame(60));
    bench.ready().unwrap();
    assert!(bench.driver.used(RX).is_none());
    assert!(!bench.polled());
    heads.extend(bench.post(3, 1536));
    bench.notify(RX).unwrap();
    let (buffers, _, received) = bench.received().unwrap();
    assert_eq!((buffers.as_slice(), received), (&heads[..4], frame(5000)));
    assert_eq!(bench.received().unwrap().0, heads[4..]);
    assert_eq!(bench.net.counters().received.get().dropped, 0);
}

#[test]
fn a_frame_that_still_does_not_fit_is_dropped_and_the_next_arrives() {
    let mut bench = Bench::new(MERGEABLE);
    let mut heads = bench.post(1, 1536);
    bench.arrive(&frame(5000));
    bench.arrive(&frame(2000));
    bench.ready().unwrap();
    heads.extend(bench.post(1, 1536));
    bench.notify(RX).unwrap();
    let (buffers, _, received) = bench.received().unwrap();
    assert_eq!((buffers, received), (heads, frame(2000)));
    assert_eq!(bench.net.counters().received.get(), Traffic { frames: 1, bytes: 2000, dropped: 1 });
}

#[test]
fn a_held_frame_survives_a_pause_but_not_a_reset() {
    let mut bench = Bench::new(MERGEABLE);
    bench.post(1, 1536);
    bench.arrive(&frame(2000));
    bench.ready().unwrap();
    bench.net.quiesce(&mut bench.driver.io()).unwrap();
    let mut other = Bench::new(MERGEABLE);
    std::mem::swap(&mut other.net.receiver, &mut bench.net.receiver);
    bench.post(1, 1536);
    other.post(2, 1536);
    other.notify(RX).unwrap();
    assert_eq!(other.received().unwrap().2, frame(2000));

    bench.arrive(&frame(9000));
    bench.ready().unwrap();
    bench.net.quiesce(&mut bench.driver.io()).unwrap();
    bench.net.reset();
    assert!(!bench.polled());
    bench.net.activate(&mut bench.driver.io()).unwrap();
    bench.arrive(&frame(61));
    bench.ready().unwrap();
    assert_eq!(bench.received().unwrap().2, frame(61));
}

#[test]
fn a_frame_too_long_for_its_buffer_is_dropped_and_the_buffer_kept() {
    let mut bench = Bench::new(0);
    let heads = bench.post(1, 100);
    bench.arrive(&frame(89));
    bench.arrive(&frame(88));
    bench.ready().unwrap();
    assert_eq!(bench.received().unwrap(), (heads, [&[0], &HEADER[1..10], &[1, 0]].concat(), frame(88)));
    assert_eq!(bench.net.counters().received.get(), Traffic { frames: 1, bytes: 88, dropped: 1 });
}

#[test]
fn a_receive_buffer_shorter_than_the_header_is_a_fault() {
    for features in [0, MERGEABLE] {
        let mut bench = Bench::new(features);
        bench.post(1, 11);
        let fault = bench.ready().unwrap_err().to_string();
        assert_eq!(fault, "queue 0: a receive buffer is shorter than the header");
    }
}

#[test]
fn tiny_segments_without_end_are_bounded() {
    let mut bench = Bench::new(MERGEABLE);
    let heads: Vec<_> = (0..4).map(|_| bench.driver.add(RX, &[], &[1; 100])).collect();
    bench.arrive(&frame(300));
    bench.ready().unwrap();
    assert_eq!(bench.received().unwrap(), (heads, [&[0], &HEADER[1..10], &[4, 0]].concat(), frame(300)));
}

#[test]
fn a_truncated_header_from_the_port_is_dropped() {
    for bytes in [1536, FRAME_BYTES as u32] {
        let mut bench = Bench::new(0);
        bench.post(1, bytes);
        rustix::io::write(bench.far(), &HEADER[..11]).unwrap();
        bench.ready().unwrap();
        assert!(bench.driver.used(RX).is_none());
        assert_eq!(bench.net.counters().received.get().dropped, 1);
    }
}

#[test]
fn a_lost_port_takes_the_link_down() {
    for bytes in [1536, FRAME_BYTES as u32] {
        let mut bench = Bench::new(0);
        bench.post(1, bytes);
        let mut status = [0; 2];
        bench.net.read_config(6, &mut status);
        assert_eq!(status, [1, 0]);
        bench.far = None;
        bench.ready().unwrap();
        bench.net.read_config(6, &mut status);
        assert_eq!((status, bench.driver.config_interrupts), ([0, 0], 1));
        assert!(!bench.polled());
        bench.ready().unwrap();
        assert_eq!(bench.driver.config_interrupts, 1);
    }
}

#[test]
fn received_pages_are_dirty_and_others_are_not() {
    let mut bench = Bench::new(0);
    let at = bench.driver.buffer(0).next_multiple_of(4096);
    // The first frame is longer than expected and partly copied; the second is read straight into its pages.
    for chain in 0..2 {
        for page in (20 * chain)..(20 * chain + 20) {
            let flags = Driver::WRITE | if page % 20 < 19 { Driver::NEXT } else { 0 };
            bench.driver.descriptor(RX, page, at + 4096 * u64::from(page), 4096, flags, page + 1);
        }
        bench.driver.offer(RX, 20 * chain);
    }
    let dirty = |bench: &Bench, first: usize| -> Vec<bool> {
        let region = bench.driver.ram.find_region(GuestAddress(at)).unwrap();
        (first..first + 4).map(|page| region.bitmap().dirty_at(at as usize + 4096 * page)).collect()
    };
    for first in [0, 20] {
        assert_eq!(dirty(&bench, first), [false; 4]);
        bench.arrive(&frame(5000));
        bench.ready().unwrap();
        assert_eq!(bench.received().unwrap().2, frame(5000));
        assert_eq!(dirty(&bench, first), [true, true, false, false]);
    }
}

#[test]
fn the_tap_is_told_what_the_driver_takes() {
    let bits = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1 << bit);
    let all =
        bits(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN]);
    let mut bench = Bench::new(all);
    let told = |bench: &Bench| *bench.offloads.lock().unwrap().last().unwrap();
    assert_eq!(told(&bench), Offload { checksum: true, tso4: true, tso6: true, ecn: true });
    bench.net.reset();
    assert_eq!(told(&bench), Offload::default());
    let bench = Bench::new(all & !bits(&[VIRTIO_NET_F_GUEST_CSUM]));
    assert_eq!(told(&bench), Offload::default(), "segmentation without checksums is none");
    let bench = Bench::new(bits(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN]));
    assert_eq!(told(&bench), Offload { checksum: true, ..Offload::default() });
}

#[test]
fn the_configuration_is_the_address_the_link_and_the_mtu() {
    let mut bench = Bench::new(0);
    let mut config = [0xff; 16];
    bench.net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0x28, 0x23, 0, 0, 0, 0]);
    for offset in [12, 1 << 32, u64::MAX] {
        bench.net.read_config(offset, &mut config);
        assert_eq!(config, [0; 16]);
    }
    bench.net.write_config(0, &[9; 6]);
    bench.net.read_config(0, &mut config[..6]);
    assert_eq!(config[..6], MAC);
}

#[test]
fn nothing_moves_before_driver_ok() {
    let mut bench = Bench::new(0);
    bench.net.reset();
    bench.post(1, 1536);
    bench.driver.add(TX, &[&HEADER, &frame(60)], &[]);
    bench.arrive(&frame(60));
    bench.notify(TX).unwrap();
    bench.notify(RX).unwrap();
    bench.ready().unwrap();
    assert!(bench.driver.used(TX).is_none() && bench.driver.used(RX).is_none());
    assert!(!bench.polled());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_ring_makes_it_panic_or_spin(
        mergeable: bool,
        descriptors in prop::collection::vec(
            (0usize..2, 0u16..8, 0u64..(17 << 20), 0u32..70_000, 0u16..8, 0u16..9),
            0..24,
        ),
        offers in prop::collection::vec((0usize..2, 0u16..9), 0..16),
    ) {
        let mut bench = Bench::new(if mergeable { MERGEABLE } else { 0 });
        for (queue, index, address, length, flags, next) in descriptors {
            bench.driver.descriptor(queue, index, address, length, flags, next);
        }
        for (queue, head) in offers {
            bench.driver.offer(queue, head);
        }
        for bytes in [0, 60, 3000, 50_000] {
            bench.arrive(&frame(bytes));
            // Whatever comes of it, it comes to an end.
            let _faults = (bench.ready(), bench.notify(RX), bench.notify(TX));
        }
        bench.net.quiesce(&mut bench.driver.io()).unwrap();
        bench.net.reset();
    }
}
