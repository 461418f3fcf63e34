//! `make bench-boot`: from exec to the guest's first instruction, memory over what the guest touched, and from exec to /init of a stock
//! kernel on a testbed host: Sterna and QEMU's microvm beside each other in one run, alternating, on warm memory.
//!
//! The guest's first instruction writes to the serial port; the time is taken where that byte arrives, by the same
//! clock for both. It goes to a pipe, so what a monitor needs to pass it on counts for both too.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot measure has failed")]

mod linux;
mod monitor;

use monitor::{Kind, Sample};
use serde_json::json;
use sterna_bench::{Summary, blocks};

const MEMORY_MIB: u64 = 256;
const DEFAULT_BLOCKS: usize = 30;
/// Blocks with the test guest for one with a stock kernel, which takes a hundred times as long.
const BLOCKS_A_LINUX_BLOCK: usize = 5;

fn main() {
    let blocks = blocks(DEFAULT_BLOCKS);
    let kinds = [Kind::Sterna, Kind::Qemu];
    let mut samples: [Vec<Sample>; 2] = Default::default();
    println!("{blocks} blocks, {MEMORY_MIB} MiB, 1 vCPU, guest {}", sterna_guest::GUEST_ELF);
    let directory = tempfile::TempDir::with_prefix("sterna-bench-").unwrap();
    monitor::install(directory.path());
    for block in 0..blocks {
        // Whoever goes first changes with each block.
        for turn in 0..kinds.len() {
            let which = (block + turn) % kinds.len();
            samples[which].push(monitor::measure(kinds[which], MEMORY_MIB, directory.path()));
        }
    }
    let versions = kinds.map(|kind| monitor::version(kind, directory.path()));
    report(&versions, &samples);
}

fn report(versions: &[String; 2], samples: &[Vec<Sample>; 2]) {
    type Figure = fn(&Sample) -> f64;
    let figures: [(&str, &str, Figure); 3] = [
        ("exec to first instruction", "ms", |sample| sample.first_instruction_ms),
        ("resident over what the guest touched", "MiB", |sample| sample.overhead_mib),
        ("CPU while the guest halts", "ms/s", |sample| sample.idle_cpu_ms_per_s),
    ];
    let mut results = Vec::new();
    println!("\n{:38} {:>8} {:>22} {:>22}   ratio", "median (10th to 90th percentile)", "", "sterna", "qemu microvm");
    for (name, unit, figure) in figures {
        let [sterna, qemu] = [0, 1].map(|which| Summary::of(samples[which].iter().map(figure)));
        let ratios = samples[0].iter().zip(&samples[1]).map(|(ours, theirs)| figure(ours) / figure(theirs));
        let ratio = Summary::of(ratios.filter(|ratio| ratio.is_finite()));
        println!("{name:38} {unit:>8} {sterna:>22} {qemu:>22}   {ratio}");
        results.push(json!({
            "figure": name, "unit": unit, "sterna": sterna.json(), "qemu": qemu.json(), "ratio": ratio.json(),
        }));
    }
    let linux_blocks = samples[0].len().div_ceil(BLOCKS_A_LINUX_BLOCK);
    results.push(linux::run(linux_blocks).unwrap());
    let document =
        json!({ "blocks": samples[0].len(), "memory_mib": MEMORY_MIB, "monitors": versions, "results": results });
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/build/bench-boot.json");
    std::fs::create_dir_all(concat!(env!("CARGO_MANIFEST_DIR"), "/build")).unwrap();
    std::fs::write(path, format!("{document:#}\n")).unwrap();
    println!("\n{}\nwritten to {path}", versions.join(" · "));
}
