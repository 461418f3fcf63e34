//! The balloon: page frames, statistics and reports of free pages, with the host asking for both in between.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sterna_devices::virtio::balloon::Balloon;
use sterna_fuzz::chain::{Chain, Framing};
use sterna_fuzz::drive::{Oracle, Step, drive};
use sterna_fuzz::wire::Wire;

#[derive(Arbitrary, Debug)]
enum Request {
    /// A run of page frames, most of them in RAM.
    Frames {
        first: u8,
        count: u8,
        split: u16,
        framing: Framing,
    },
    /// Page frames from anywhere.
    Wild {
        frames: Vec<u32>,
        split: u16,
        framing: Framing,
    },
    /// More frames than a chain may hold.
    Many {
        count: u16,
    },
    Statistics {
        entries: Vec<(u16, u64)>,
        split: u16,
        framing: Framing,
    },
    /// Free pages.
    Report {
        lengths: Vec<u16>,
        framing: Framing,
    },
}

#[derive(Arbitrary, Debug)]
enum Host {
    Target(u64),
    Statistics,
    Look,
}

impl From<Request> for Chain {
    fn from(request: Request) -> Self {
        let frames = |frames: &mut dyn Iterator<Item = u32>| frames.fold(Wire::default(), Wire::u32).0;
        match request {
            Request::Frames { first, count, split, framing } => {
                let first = u32::from(first % 80);
                Chain::request(frames(&mut (first..first + u32::from(count))), split, [], framing)
            }
            Request::Wild { frames: wild, split, framing } => {
                Chain::request(frames(&mut wild.into_iter()), split, [], framing)
            }
            Request::Many { count } => Chain::request(vec![0x20; 4 * usize::from(count)], 0, [], Framing::Direct),
            Request::Statistics { entries, split, framing } => {
                let add = |wire: Wire, (tag, value): (u16, u64)| wire.u16(tag % 16).u64(value);
                Chain::request(entries.into_iter().fold(Wire::default(), add).0, split, [], framing)
            }
            Request::Report { lengths, framing } => Chain::request(Vec::new(), 0, lengths, framing),
        }
    }
}

fuzz_target!(|steps: Vec<Step<Request, Host>>| {
    let Ok((mut balloon, handle)) = Balloon::new() else { return };
    drive(&mut balloon, Oracle::BitmapOnly, steps, |_, host| match host {
        Host::Target(bytes) => handle.set_target(bytes),
        Host::Statistics => handle.request_stats(),
        Host::Look => {
            let status = handle.snapshot();
            assert!(status.stats.len() <= 10);
        }
    });
});
