//! Rings and descriptor tables that are nothing but fuzz bytes, through the checked chains every device takes.
//!
//! A chain that comes through lies in RAM, readable before writable, and is bounded.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sterna_devices::virtio::chain::MAX_SEGMENTS;
use sterna_fuzz::chain::Chain;
use sterna_fuzz::guest::Guest;
use vm_memory::{GuestMemory, Permissions};

#[derive(Arbitrary, Debug)]
struct Run {
    features: u64,
    /// Written to the start of the descriptor table.
    descriptors: Vec<[u8; 16]>,
    /// Written to the start of the available ring.
    available: Vec<u16>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Offer(Chain),
    Available(u16),
    Poke(u16, Vec<u8>),
    /// Takes a chain, copies through it, and does with it as said.
    Pop {
        offset: u32,
        bytes: Vec<u8>,
        then: Then,
    },
    Signal,
}

#[derive(Arbitrary, Debug)]
enum Then {
    Complete(u32),
    Together(Vec<u32>),
    PutBack,
    Keep,
}

const QUEUE: usize = 0;

fn pop(guest: &mut Guest, offset: u64, bytes: &[u8], then: Then) {
    let Ok(Some(chain)) = guest.io().pop(QUEUE) else { return };
    assert!(chain.readable.len() + chain.writable.len() <= MAX_SEGMENTS);
    for (segments, access) in [(&chain.readable, Permissions::Read), (&chain.writable, Permissions::Write)] {
        for segment in segments.iter().filter(|segment| segment.length != 0) {
            assert!(guest.ram.check_range(segment.address, segment.length as usize, access), "{segment:?}");
        }
    }
    let mut copy = vec![0; bytes.len()];
    let expected = |total: u64| total.saturating_sub(offset).min(bytes.len() as u64) as usize;
    assert_eq!(chain.read_at(&guest.ram, offset, &mut copy), expected(chain.readable_bytes()));
    assert_eq!(chain.write_at(&guest.ram, offset, bytes), expected(chain.writable_bytes()));
    let mut io = guest.io();
    let _fault = match then {
        Then::Complete(written) => io.complete(QUEUE, chain.head, written),
        Then::Together(written) => {
            let used: Vec<_> = written.into_iter().take(300).map(|written| (chain.head, written)).collect();
            io.complete_together(QUEUE, &used).and_then(|()| io.signal(QUEUE))
        }
        Then::PutBack => {
            io.put_back(QUEUE);
            Ok(())
        }
        Then::Keep => Ok(()),
    };
}

fuzz_target!(|run: Run| {
    let mut guest = Guest::new(&[16]);
    guest.restart(run.features);
    guest.poke(Guest::ring(QUEUE)[0], run.descriptors.as_flattened());
    let available: Vec<u8> = run.available.iter().flat_map(|word| word.to_le_bytes()).collect();
    guest.poke(Guest::ring(QUEUE)[1], &available);
    for step in run.steps.into_iter().take(64) {
        match step {
            Step::Offer(chain) => guest.offer(QUEUE, &chain),
            Step::Available(index) => guest.set_available(QUEUE, index),
            Step::Poke(at, bytes) => guest.poke(at.into(), &bytes),
            Step::Pop { offset, bytes, then } => pop(&mut guest, offset.into(), &bytes, then),
            Step::Signal => drop(guest.io().signal(QUEUE)),
        }
    }
    guest.check();
});
