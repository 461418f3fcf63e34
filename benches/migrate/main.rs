//! `make bench-migrate`: a running guest moves between two processes over loopback TCP, live: Sterna and QEMU with the same guest, beside
//! each other in one run, alternating, on warm memory, with plain TCP in each block. The guest's memory is verified after every move.
//!
//! What is stopped is measured by the guest's ticks: the longest time between two of them less the usual one, by the guest's clock (which
//! Sterna lets go on while the guest stands still, and QEMU does not) and by the host's. QEMU's target process is there before the clock
//! starts; Sterna's is started by the move.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot measure has failed")]

mod arm;

use arm::{Kind, Sample, measure};
use serde_json::json;
use sterna_bench::{Goal, Guest, Network, Qemu, Report, blocks};

const DEFAULT_BLOCKS: usize = 3;
/// What is touched of the larger guests.
const TOUCHED_MIB: u64 = 900;
/// As a move has them by default.
const CONNECTIONS: usize = 2;

/// A guest, and what is asked of its move.
struct Case {
    name: &'static str,
    memory_mib: u64,
    touched_mib: u64,
    /// What it does besides.
    work: &'static str,
    budget_ms: u64,
    /// After so many seconds of its own it verifies its memory.
    verify_s: u64,
}

const SMALL: usize = 0;
const LARGE: usize = 1;
const BUSY: usize = 2;
const HARD: usize = 3;
const PACED: usize = 4;

const CASES: [Case; 5] = [
    Case { name: "16 MiB of 1 GiB", memory_mib: 1024, touched_mib: 16, work: "", budget_ms: 50, verify_s: 2 },
    Case { name: "16 MiB of 8 GiB", memory_mib: 8192, touched_mib: 16, work: "", budget_ms: 50, verify_s: 3 },
    Case {
        name: "900 MiB, 1 MiB dirtied",
        memory_mib: 1024,
        touched_mib: TOUCHED_MIB,
        work: "dirty=1",
        budget_ms: 50,
        verify_s: 4,
    },
    Case {
        name: "900 MiB, 128 MiB dirtied",
        memory_mib: 1024,
        touched_mib: TOUCHED_MIB,
        work: "dirty=128",
        budget_ms: 50,
        verify_s: 6,
    },
    Case {
        name: "900 MiB, 16 MiB at 100 MB/s",
        memory_mib: 1024,
        touched_mib: TOUCHED_MIB,
        work: "dirty=16 rate=95 tally",
        budget_ms: 50,
        verify_s: 4,
    },
];

impl Case {
    fn guest(&self, verify_s: u64) -> Guest {
        let (touched, work) = (self.touched_mib, self.work);
        let cmdline = format!("touch={touched} tick=2 verify={verify_s} {work}");
        Guest { kernel: sterna_guest::GUEST_ELF, memory_mib: self.memory_mib, cmdline }
    }
}

/// What one block showed.
#[derive(Default)]
struct Block {
    raw_mib_per_s: f64,
    /// By case, of Sterna and of QEMU.
    samples: Vec<[Option<Sample>; 2]>,
}

fn main() {
    let blocks = blocks(DEFAULT_BLOCKS);
    let qemu = Qemu::is_there();
    let peer = if qemu { Qemu::version() } else { "no QEMU here: install qemu-system-x86".to_owned() };
    println!("{blocks} blocks, 1 vCPU, loopback TCP, guest {}\n{peer}", sterna_guest::GUEST_ELF);
    let mut network = Network::new(TOUCHED_MIB as usize, CONNECTIONS);
    let all: Vec<_> = (0..blocks).map(|number| block(number, qemu, &mut network)).collect();
    let mut report = Report::new(&format!("live migration, {blocks} blocks"));
    rows(&mut report, &all);
    report.write(env!("CARGO_MANIFEST_DIR"), "migrate", json!({ "blocks": blocks, "peer": peer }));
}

fn block(number: usize, qemu: bool, network: &mut Network) -> Block {
    let raw_mib_per_s = TOUCHED_MIB as f64 / network.transfer(TOUCHED_MIB as usize).as_secs_f64();
    let mut block = Block { raw_mib_per_s, samples: Vec::new() };
    for case in &CASES {
        let mut samples = [None, None];
        for turn in 0..2 {
            // Whoever goes first changes with each block.
            let which = (number + turn) % 2;
            let kind = [Kind::Sterna, Kind::Qemu][which];
            if kind == Kind::Sterna || qemu {
                samples[which] = Some(verified(case, kind));
            }
        }
        block.samples.push(samples);
    }
    eprintln!("block {} of this run done, plain TCP {:.0} MiB/s", number + 1, raw_mib_per_s);
    block
}

/// One move, again with more time before the guest verifies its memory where it did so before the move was over.
fn verified(case: &Case, kind: Kind) -> Sample {
    for factor in 1.. {
        if let Some(sample) = measure(kind, case, case.verify_s * factor) {
            eprintln!("{}, {kind:?}: {sample:.1?}", case.name);
            return sample;
        }
        assert!(factor < 8, "{}: the move takes longer than the guest waits", case.name);
    }
    unreachable!("the loop has no end")
}

/// Every value of `figure` in `case`, of both sides.
fn values(blocks: &[Block], case: usize, figure: impl Fn(&Sample) -> f64) -> [Vec<f64>; 2] {
    [0, 1].map(|side| blocks.iter().filter_map(|block| block.samples[case][side].as_ref().map(&figure)).collect())
}

fn rows(report: &mut Report, blocks: &[Block]) {
    let mut row = |case: usize, what: &str, unit: &str, figure: &dyn Fn(&Sample) -> f64, goal: Goal| {
        let [sterna, qemu] = values(blocks, case, figure);
        report.row(&format!("{}: {what}", CASES[case].name), unit, &sterna, &qemu, goal);
    };
    for case in [SMALL, LARGE, BUSY, HARD, PACED] {
        let total = match case {
            SMALL | LARGE => Goal::AtMost(100.0),
            BUSY => Goal::RatioAtMost(0.5),
            _ => Goal::None,
        };
        let seen = if case == BUSY { Goal::AtMost(4.0) } else { Goal::None };
        let budget = if case == HARD { Goal::AtMost(50.0) } else { Goal::None };
        row(case, "in all", "ms", &|sample| sample.total_ms, total);
        row(case, "downtime as reported", "ms", &|sample| sample.reported_ms, budget);
        row(case, "downtime as the guest saw it", "ms", &|sample| sample.guest_gap_ms, seen);
        row(case, "downtime seen from outside", "ms", &|sample| sample.outside_gap_ms, Goal::None);
        row(case, "longest gap as long before", "ms", &|sample| sample.quiet_gap_ms, Goal::None);
        if case != HARD {
            row(case, "reported and seen differ by", "ms", &Sample::disagreement_ms, Goal::AtMost(3.0));
        }
        row(case, "CPU of both processes", "ms", &|sample| sample.cpu_ms, Goal::None);
    }
    row(PACED, "guest slower while copying by", "%", &|sample| sample.slowed_percent, Goal::AtMost(10.0));
    let [small, large] = [SMALL, LARGE].map(|case| values(blocks, case, |sample| sample.total_ms));
    let times =
        |side: usize| small[side].iter().zip(&large[side]).map(|(small, large)| large / small).collect::<Vec<_>>();
    report.row("8 GiB against 1 GiB, 16 MiB touched", "times", &times(0), &times(1), Goal::AtMost(1.5));
    let raw: Vec<_> = blocks.iter().map(|block| block.raw_mib_per_s).collect();
    let share = |values: &[f64]| values.iter().zip(&raw).map(|(value, raw)| value / raw * 100.0).collect::<Vec<_>>();
    for case in [BUSY, PACED] {
        let [first, _] = values(blocks, case, |sample| sample.first_pass_mib_per_s);
        let name = format!("{}: first pass, of plain TCP to resident memory", CASES[case].name);
        report.row(&name, "%", &share(&first), &[], if case == BUSY { Goal::AtLeast(80.0) } else { Goal::None });
    }
    report.row("plain TCP over 2 connections", "MiB/s", &raw, &[], Goal::None);
}
