//! Source and target over real connections, a scripted machine between them: what arrives is what was there.

use super::rig::{LONG, Random, Rig, connections, differences, fill, ram, set};
use super::*;
use crate::handover::Order;
use crate::pages::PageSet;
use crate::ram::Ram;
use crate::wire::frame::MAX_DATA_PAGES;
use crate::wire::message::{self, ToTarget};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A target that takes in what comes until the connection ends or a message says that it is all.
fn target(ram: Ram, sockets: Vec<Socket>) -> JoinHandle<Result<(PageSet, u32), StreamError>> {
    thread::spawn(move || {
        let mut receiver = Receiver::low_at_first(ram, sockets)?;
        let mut passes = 0;
        loop {
            match receiver.next_event()? {
                Event::PassEnd(pass) => {
                    assert_eq!(pass, passes + FIRST_PASS);
                    passes += 1;
                }
                Event::Frame(_) => {
                    assert_eq!(receiver.counters().passes.load(Ordering::Relaxed), passes);
                    return receiver.finish().map(|(_, received)| (received, passes));
                }
            }
        }
    })
}

fn end(sender: Sender) {
    let control = sender.finish();
    message::send(&mut &control, &ToTarget::Order(Order::Go)).unwrap();
}

#[test]
fn memory_is_equal_after_passes_while_it_changes() {
    let mut random = Random::new();
    for (number, tcp) in [(1, false), (1, true), (2, true), (4, false), (4, true)] {
        let (here, there) = (ram(6 * 1024, 2305), ram(6 * 1024, 2305));
        let rig = Rig::new(here.clone());
        for _ in 0..4000 {
            rig.write(&mut random);
        }
        let (ours, theirs) = connections(number, tcp);
        let target = target(there.clone(), theirs);
        let mut sender = rig.sender(ours, None);
        let (stop, mut guest) = (AtomicBool::new(false), Random(random.next() | 1));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    rig.write(&mut guest);
                }
            });
            for _ in 0..4 {
                rig.pass(&mut sender, Pace::Limited).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        // Small last passes go over connection 0 alone, big ones over all.
        rig.pass(&mut sender, Pace::Full).unwrap();
        (0..20).for_each(|_| rig.write(&mut random));
        let last = rig.pass(&mut sender, Pace::Full).unwrap();
        assert!(last.pages <= 20 && last.pages > 0);
        end(sender);
        let (received, passes) = target.join().unwrap().unwrap();
        assert_eq!(passes, 6);
        assert_eq!(differences(&here, &there), [0; 0], "{number} connections, tcp {tcp}");
        assert!(rig.dirty.lock().unwrap().is_empty());
        // What was never written, or is zeros again, is not there.
        for page in 0..here.pages() {
            assert_eq!(received.contains(page), !here.is_zero(page), "page {page}");
        }
    }
}

#[test]
fn only_a_pass_that_is_neither_pressed_nor_the_last_steps_back() {
    let (here, there) = (ram(6 * 1024, 0), ram(6 * 1024, 0));
    let rig = Rig::new(here.clone());
    let (ours, theirs) = connections(2, true);
    let target = target(there.clone(), theirs);
    let mut sender = rig.sender(ours, None);
    (0..here.pages()).for_each(|page| fill(&here, page, 3));
    let all = set(&here, 0..here.pages());
    let own = rustix::process::getpriority_process(None).unwrap();
    for (pace, niceness) in [(Pace::Limited, NICE), (Pace::Pressed, own), (Pace::Limited, NICE), (Pace::Full, own)] {
        sender.send_pass(&all, pace).unwrap();
        let taken = std::mem::take(&mut *rig.niceness.lock().unwrap());
        assert_eq!(taken.into_iter().collect::<Vec<_>>(), [niceness], "{pace:?}");
    }
    end(sender);
    assert_eq!(target.join().unwrap().unwrap().1, 4);
    assert_eq!(differences(&here, &there), [0; 0]);
}

#[test]
fn zeros_are_left_out_at_first_and_sent_later() {
    let (here, there) = (ram(256, 0), ram(256, 0));
    let rig = Rig::new(here.clone());
    let (ours, theirs) = connections(2, false);
    let target = target(there.clone(), theirs);
    let mut sender = rig.sender(ours, None);
    (10..20).for_each(|page| fill(&here, page, 7));
    let first = sender.send_pass(&set(&here, 0..100), Pace::Limited).unwrap();
    assert_eq!((first.pass, first.pages, first.zero_pages), (1, 100, 90));
    // A frame with one range, and two ends.
    assert_eq!(first.bytes, 16 + 16 + 10 * 4096 + 2 * 16);
    (12..14).for_each(|page| fill(&here, page, 0));
    let second = sender.send_pass(&set(&here, 11..15), Pace::Full).unwrap();
    assert_eq!((second.pass, second.pages, second.zero_pages), (2, 4, 2));
    assert_eq!(second.bytes, 16 + 3 * 16 + 2 * 4096 + 2 * 16);
    let empty = sender.send_pass(&set(&here, []), Pace::Full).unwrap();
    assert_eq!((empty.pages, empty.bytes), (0, 2 * 16));
    assert_eq!(rig.seen_pages.load(Ordering::Relaxed), 104);
    end(sender);
    let (received, passes) = target.join().unwrap().unwrap();
    assert_eq!((passes, received), (3, (*set(&here, (10..12).chain(14..20))).clone()));
    assert_eq!(differences(&here, &there), [0; 0]);
}

#[test]
fn sparse_pages_share_frames() {
    let (here, there) = (ram(4096 * 4, 0), ram(4096 * 4, 0));
    let rig = Rig::new(here.clone());
    let pages: Vec<u64> = (0..1200).map(|page| page * 13).collect();
    pages.iter().for_each(|page| fill(&here, *page, 1));
    let (ours, theirs) = connections(1, false);
    let target = target(there.clone(), theirs);
    let mut sender = rig.sender(ours, None);
    let figures = sender.send_pass(&set(&here, pages), Pace::Full).unwrap();
    assert_eq!(figures.bytes, 1200 * (4096 + 16) + 3 * 16 + 16);
    end(sender);
    target.join().unwrap().unwrap();
    assert_eq!(differences(&here, &there), [0; 0]);
}

#[test]
fn cancel_ends_a_pass_whose_peer_takes_nothing() {
    for number in [1, 3] {
        let here = ram(MAX_DATA_PAGES * 8, 0);
        (0..here.pages()).for_each(|page| fill(&here, page, 1));
        let rig = Rig::new(here.clone());
        let (ours, theirs) = connections(number, true);
        let mut sender = rig.sender(ours, None);
        let all = set(&here, 0..here.pages());
        let (error, waited) = thread::scope(|scope| {
            let pass = scope.spawn(|| (sender.send_pass(&all, Pace::Full).unwrap_err(), Instant::now()));
            // Nobody reads: however far it has come by now, it cannot end.
            let start = Instant::now();
            rig.cancel.store(true, Ordering::Relaxed);
            let (error, end) = pass.join().unwrap();
            (error, end - start)
        });
        assert!(matches!(error, StreamError::Cancelled), "{error:?}");
        assert!(waited < Duration::from_secs(1), "{waited:?}");
        assert!(matches!(sender.send_pass(&all, Pace::Full), Err(StreamError::Failed)));
        drop(theirs);
    }
}

#[test]
fn cancel_ends_a_pass_that_waits_for_the_throttle() {
    let here = ram(2048, 0);
    (0..here.pages()).for_each(|page| fill(&here, page, 1));
    let rig = Rig::new(here.clone());
    let (ours, theirs) = connections(2, false);
    let target = target(ram(2048, 0), theirs);
    let mut sender = rig.sender(ours, Some(0));
    rig.cancel.store(true, Ordering::Relaxed);
    let start = Instant::now();
    assert!(matches!(sender.send_pass(&set(&here, 0..2048), Pace::Limited), Err(StreamError::Cancelled)));
    assert!(start.elapsed() < Duration::from_secs(1));
    // No frame was cut: the reason still gets through.
    crate::wire::frame::write_failure(&mut sender.control(), "the operator\x1b[2Jcancelled").unwrap();
    let error = target.join().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the other side gave up: the operator\u{fffd}[2Jcancelled");
}

#[test]
fn a_limit_holds_for_all_connections_and_not_for_the_last_pass() {
    let (here, there) = (ram(2048, 0), ram(2048, 0));
    (0..here.pages()).for_each(|page| fill(&here, page, 1));
    let rig = Rig::new(here.clone());
    let (ours, theirs) = connections(2, true);
    let target = target(there, theirs);
    let mut sender = rig.sender(ours, Some(16 << 20));
    let all = set(&here, 0..2048);
    let figures = sender.send_pass(&all, Pace::Limited).unwrap();
    let seconds = figures.elapsed.as_secs_f64();
    assert!((0.43..2.0).contains(&seconds), "8 MiB at 16 MiB/s took {seconds} s");
    let figures = sender.send_pass(&all, Pace::Full).unwrap();
    assert!(figures.elapsed.as_secs_f64() < seconds / 2.0, "{figures:?}");
    end(sender);
    target.join().unwrap().unwrap();
}

#[test]
fn a_peer_that_is_silent_or_full_ends_in_an_error_that_says_so() {
    let timeout = Duration::from_millis(200);
    let here = ram(MAX_DATA_PAGES * 8, 0);
    (0..here.pages()).for_each(|page| fill(&here, page, 1));
    for tcp in [false, true] {
        let (ours, theirs) = connections(2, tcp);
        ours.iter().chain(&theirs).for_each(|socket| socket.set_timeout(timeout).unwrap());
        let mut sender = Rig::new(here.clone()).sender(ours, None);
        let start = Instant::now();
        let error = sender.send_pass(&set(&here, 0..here.pages()), Pace::Full).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(chain(&error).ends_with("the peer took nothing for 200ms"), "{}", chain(&error));
        drop(sender);
        drop(theirs);
        let (ours, theirs) = connections(2, tcp);
        theirs.iter().for_each(|socket| socket.set_timeout(timeout).unwrap());
        let start = Instant::now();
        let error = target(here.clone(), theirs).join().unwrap().unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(
            chain(&error),
            "connection 0 of the move failed: waiting for a frame: the peer sent nothing for 200ms"
        );
        drop(ours);
    }
}

#[test]
fn a_broken_connection_ends_the_pass_by_name_or_with_the_peers_reason() {
    let here = ram(MAX_DATA_PAGES * 8, 0);
    (0..here.pages()).for_each(|page| fill(&here, page, 1));
    for reason in [None, Some("no space")] {
        let rig = Rig::new(here.clone());
        let (ours, mut theirs) = connections(2, false);
        if let Some(reason) = reason {
            crate::wire::frame::write_failure(&mut theirs[0], reason).unwrap();
        }
        drop(theirs.remove(1));
        let mut sender = rig.sender(ours, None);
        let error = sender.send_pass(&set(&here, 0..here.pages()), Pace::Full).unwrap_err();
        match reason {
            None => assert_eq!(error.to_string(), "connection 1 of the move failed"),
            Some(_) => assert_eq!(error.to_string(), "the other side gave up: no space"),
        }
    }
}

#[test]
fn a_dirty_log_that_fails_ends_the_pass() {
    let rig = Rig::new(ram(64, 64));
    let (ours, theirs) = connections(2, false);
    rig.broken.store(true, Ordering::Relaxed);
    let mut sender = rig.sender(ours, None);
    let error = sender.send_pass(&set(&rig.ram, 100..110), Pace::Full).unwrap_err();
    assert_eq!(chain(&error), "clearing the dirty log for 64 pages from page 64: no log");
    drop(theirs);
}

#[test]
fn connections_and_regions_have_their_bounds() {
    let rig = Rig::new(ram(65, 1));
    let new = |ram: &Ram, sockets| Sender::new(ram.clone(), sockets, Arc::new(Throttle::new(None)), rig.clone());
    let error = new(&rig.ram, connections(1, false).0).err().unwrap();
    assert!(matches!(error, StreamError::Layout { first: 65 }));
    for number in [0, 65] {
        let sockets = connections(number, false).0;
        assert!(matches!(new(&ram(64, 0), sockets.clone()), Err(StreamError::Connections { .. })));
        assert!(matches!(Receiver::new(ram(64, 0), sockets), Err(StreamError::Connections { .. })));
    }
}

#[test]
fn a_receiver_that_is_dropped_ends_everything() {
    let (ours, theirs) = connections(64, false);
    let start = Instant::now();
    drop(Receiver::new(ram(64, 0), theirs).unwrap());
    for mut socket in ours {
        socket.set_timeout(LONG).unwrap();
        assert_eq!(std::io::Read::read(&mut socket, &mut [0]).unwrap(), 0);
    }
    assert!(start.elapsed() < LONG);
}

/// The error and its causes.
fn chain(error: &StreamError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
