//! A whole small move, hand-over and all, over connections that are cut after every byte in either direction. No KVM: the machine
//! is scripted, everything that is said and decided is the real thing.
//!
//! Whatever is cut, and whether or not the hosts hear of each other again at once: both sides end, in words; exactly one copy of the
//! guest runs in the end, never two did, and if it is the target's, it has its memory and its state.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod network;
mod source;
mod target;
mod world;

use network::{Cut, Direction, Network, Outage};
use source::SourceSide;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use sterna_migration::handover::{Move, SourceState, TargetState};
use uuid::Uuid;
use world::{Copy, Side, World};

/// Moves under way beside each other: most of one is waiting.
const AT_A_TIME: usize = 8;
/// Longer than any move here takes, its waits for a reason included.
const LONG: Duration = Duration::from_secs(5);

/// Of the frame that says Go, and of the one that says that the guest runs: header, message, checksum.
const GO_BYTES: usize = 16 + 2 + 8;
const RUNNING_BYTES: usize = 16 + 4 + 8;

const THIS_MOVE: Move = Move { id: Uuid::from_u128(7), epoch: 3 };

/// What became of a move.
#[derive(Debug)]
struct Outcome {
    source: SourceState,
    target: Option<TargetState>,
    /// What the source met first, in words.
    error: Option<String>,
    /// Bytes that passed: by connection, to the target and back.
    passed: Vec<[usize; 2]>,
}

/// Moves a machine over `connections`, some of which may be cut.
fn run(connections: u16, cuts: Vec<Cut>, outage: Outage) -> Outcome {
    let begin = Instant::now();
    let what = format!("{connections} connections, {cuts:?}, {outage:?}");
    let patience = if outage == Outage::None { LONG } else { Duration::from_millis(40) };
    let world = World::new();
    let (network, far) = Network::new(&world, cuts, outage, usize::from(connections));
    let (source, error, target) = thread::scope(|scope| {
        let host = scope.spawn(|| target::serve(&world, far, patience));
        let (state, error) = SourceSide::new(&world, &network, connections).run();
        network.close();
        (state, error, host.join().expect("a target that did not panic"))
    });
    assert!(begin.elapsed() < LONG, "{what}: it took {:?}", begin.elapsed());
    let outcome = Outcome { source, target, error, passed: network.passed() };
    world.check(&outcome, &what);
    outcome
}

impl World {
    /// What must hold whatever was cut.
    fn check(&self, outcome: &Outcome, what: &str) {
        let end = self.lock();
        assert_eq!(end.twice, None, "{what}: {outcome:?}");
        match (outcome.source, outcome.target) {
            (SourceState::Moved, Some(TargetState::Running)) => {
                assert_eq!(
                    (end.source, end.target, end.locks),
                    (Copy::Gone, Copy::Running, Some(Side::Target)),
                    "{what}"
                );
                assert_eq!(self.differences(), [0; 0], "{what}: pages that did not come");
                assert!(end.state_came, "{what}: its state did not come");
            }
            (SourceState::Here, None | Some(TargetState::Discarded)) => {
                assert_eq!(
                    (end.source, end.target, end.locks),
                    (Copy::Running, Copy::Gone, Some(Side::Source)),
                    "{what}"
                );
                assert!(!outcome.error.as_deref().unwrap_or_default().is_empty(), "{what}: no reason for {outcome:?}");
            }
            _ => panic!("{what}: both sides do not agree: {outcome:?}"),
        }
    }
}

/// A move for each of `cuts`, several at a time; `check` looks at what became of each.
fn for_each(
    connections: u16,
    cuts: &[Vec<Cut>],
    outage: Outage,
    at_a_time: usize,
    check: impl Fn(&[Cut], &Outcome) + Sync,
) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..at_a_time {
            scope.spawn(|| {
                while let Some(cut) = cuts.get(next.fetch_add(1, Ordering::Relaxed)) {
                    check(cut, &run(connections, cut.clone(), outage));
                }
            });
        }
    });
}

/// Cuts of a connection over which so much passes when it is not cut.
fn every_cut(connection: usize, [there, back]: [usize; 2]) -> impl Iterator<Item = Cut> {
    let there = (0..there).map(move |after| Cut { connection, direction: Direction::ToTarget, after });
    let back = (0..back).map(move |after| Cut { connection, direction: Direction::ToSource, after });
    there.chain(back)
}

fn alone(cut: Cut) -> Vec<Cut> {
    vec![cut]
}

#[test]
fn undisturbed_the_guest_arrives_whole() {
    for connections in [1, 2, 4] {
        let outcome = run(connections, vec![], Outage::None);
        assert_eq!((outcome.source, outcome.target), (SourceState::Moved, Some(TargetState::Running)));
        assert_eq!((outcome.error, outcome.passed.len()), (None, connections.into()));
    }
}

/// The hosts hear of each other again at once: the guest is the target's exactly from when Go was tried.
#[test]
fn wherever_the_connection_is_cut_one_copy_runs() {
    let [there, back] = run(1, vec![], Outage::None).passed[0];
    let cuts: Vec<_> = every_cut(0, [there, back]).map(alone).collect();
    for_each(1, &cuts, Outage::None, AT_A_TIME, |cut, outcome| {
        // At its first byte, the target may have loaded everything and not have said so.
        let tried = match cut[0].direction {
            Direction::ToTarget if cut[0].after == there - GO_BYTES => return,
            Direction::ToTarget => cut[0].after > there - GO_BYTES,
            Direction::ToSource => cut[0].after >= back - RUNNING_BYTES,
        };
        assert_eq!(outcome.source == SourceState::Moved, tried, "{cut:?} of {there} and {back} bytes: {outcome:?}");
        assert_eq!(outcome.passed.len() > 1, tried, "{cut:?}: a source asks exactly when it is in doubt");
    });
}

/// They do not for longer than a target waits for Go.
#[test]
fn wherever_the_connection_is_cut_for_long_one_copy_runs() {
    let [there, back] = run(1, vec![], Outage::None).passed[0];
    let by_the_pages = |cut: &Cut| cut.direction == Direction::ToTarget && (200..there - 200).contains(&cut.after);
    let cuts: Vec<_> = every_cut(0, [there, back]).filter(|cut| !by_the_pages(cut)).map(alone).collect();
    for_each(1, &cuts, Outage::Long, AT_A_TIME, |cut, outcome| {
        // Go came whole, or it did not.
        let came = cut[0].direction == Direction::ToSource && cut[0].after > back - RUNNING_BYTES;
        let tried = cut[0].after == back - RUNNING_BYTES;
        assert!(
            tried || came == (outcome.source == SourceState::Moved),
            "{cut:?} of {there} and {back} bytes: {outcome:?}"
        );
    });
}

/// A further connection carries nothing but pages.
#[test]
fn wherever_a_further_connection_is_cut_one_copy_runs() {
    let [there, back] = run(2, vec![], Outage::None).passed[1];
    assert!(there >= 48 + 2 * 16 && back == 0);
    let cuts: Vec<_> = every_cut(1, [there, back]).map(alone).collect();
    for_each(2, &cuts, Outage::None, cuts.len(), |cut, outcome| {
        assert_eq!(outcome.source, SourceState::Here, "{cut:?}");
    });
}

#[test]
fn wherever_a_question_is_cut_too_the_next_is_answered() {
    let [there, back] = run(1, vec![], Outage::None).passed[0];
    // Go or its answer is lost.
    for (direction, after) in [(Direction::ToTarget, there - 1), (Direction::ToSource, back - 1)] {
        let first = Cut { connection: 0, direction, after };
        let asked = run(1, vec![first], Outage::None).passed;
        let cuts: Vec<_> = every_cut(1, asked[1]).map(|second| vec![first, second]).collect();
        for_each(1, &cuts, Outage::None, AT_A_TIME, |cuts, outcome| {
            assert_eq!((outcome.source, outcome.passed.len()), (SourceState::Moved, 3), "{cuts:?}");
        });
    }
}
