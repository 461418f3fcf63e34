//! `make bench-save`: a guest goes to a file and comes back, and moves quickly over loopback TCP: Sterna and QEMU with the same guest,
//! beside each other in one run, alternating, on warm memory, with plain writing and plain TCP in each block.
//!
//! QEMU of this age cannot write a file by itself: it goes through `cat`, as its users have it, and the file is brought to the disk before
//! the clock stops, as Sterna's is. Restoring is timed from exec to the first byte that the guest writes after it.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot measure has failed")]

mod arm;

use arm::{Files, Kind, Saving};
use serde_json::json;
use std::path::Path;
use sterna_bench::{Goal, Guest, Network, Qemu, Report, blocks, ms, write_direct};

const DEFAULT_BLOCKS: usize = 3;
/// What is touched of a guest that is to be written or carried.
const TOUCHED_MIB: u64 = 900;
/// As a move has them by default.
const CONNECTIONS: usize = 2;
/// RAM of the guests with little in them.
const LITTLE_IN_MIB: [u64; 2] = [1024, 8192];
const LITTLE_MIB: u64 = 16;
/// What is touched of the guests that are restored.
const RESTORED_MIB: [u64; 2] = [256, 4096];
const KINDS: [Kind; 2] = [Kind::Sterna, Kind::Qemu];

/// Values of Sterna and of QEMU, one a block.
type Values = [Vec<f64>; 2];

/// What all blocks showed so far.
#[derive(Default)]
struct Shown {
    write_ms: Vec<f64>,
    transfer_ms: Vec<f64>,
    saved: [Vec<Saving>; 2],
    little: [Values; 2],
    restored: [Values; 2],
    restored_inside: [Vec<f64>; 2],
    quick: Vec<arm::Quick>,
}

fn guest(memory_mib: u64, touched_mib: u64, more: &str) -> Guest {
    let cmdline = format!("touch={touched_mib} tick=1 {more}");
    Guest { kernel: sterna_guest::GUEST_ELF, memory_mib, cmdline }
}

fn main() {
    let blocks = blocks(DEFAULT_BLOCKS);
    let peer = if Qemu::is_there() { Qemu::version() } else { "no QEMU here: install qemu-system-x86".to_owned() };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("build");
    std::fs::create_dir_all(&folder).unwrap();
    let folder = tempfile::TempDir::with_prefix_in("bench-save-", folder).unwrap();
    println!(
        "{blocks} blocks, 1 vCPU, files in {}, guest {}\n{peer}",
        folder.path().display(),
        sterna_guest::GUEST_ELF
    );
    let files = RESTORED_MIB.map(|mib| Files::make(folder.path(), &guest(mib + 512, mib, "verify=3")));
    let mut network = Network::new(TOUCHED_MIB as usize, CONNECTIONS);
    let mut shown = Shown::default();
    for number in 0..blocks {
        block(number, folder.path(), &files, &mut network, &mut shown);
        eprintln!("block {} of {blocks} done", number + 1);
    }
    let mut report = Report::new(&format!("save, restore and quick migration, {blocks} blocks"));
    saving_rows(&mut report, &shown);
    restoring_rows(&mut report, &shown);
    quick_rows(&mut report, &shown);
    report.write(env!("CARGO_MANIFEST_DIR"), "save", json!({ "blocks": blocks, "peer": peer }));
}

fn block(number: usize, folder: &Path, files: &[Files; 2], network: &mut Network, shown: &mut Shown) {
    // Whoever goes first changes with each block.
    let kinds = || [0, 1].map(|turn| (number + turn) % 2).into_iter().filter(|which| *which == 0 || Qemu::is_there());
    let file = folder.join("saved");
    shown.write_ms.push(ms(write_direct(&file, TOUCHED_MIB)));
    eprintln!("plain writing: {:.0} ms", shown.write_ms[number]);
    for which in kinds() {
        shown.saved[which].push(arm::save(KINDS[which], &guest(1024, TOUCHED_MIB, "full"), &file));
    }
    for (little, memory_mib) in shown.little.iter_mut().zip(LITTLE_IN_MIB) {
        for which in kinds() {
            little[which].push(arm::save(KINDS[which], &guest(memory_mib, LITTLE_MIB, ""), &file).total_ms);
        }
    }
    for (size, files) in files.iter().enumerate() {
        for which in kinds() {
            let restored = files.restore(KINDS[which], number == 0);
            eprintln!("{:?}, {} MiB: {restored:?}", KINDS[which], RESTORED_MIB[size]);
            shown.restored[size][which].push(restored.sign_ms);
            if KINDS[which] == Kind::Sterna {
                shown.restored_inside[size].push(restored.inside_ms);
            }
        }
    }
    shown.transfer_ms.push(ms(network.transfer(TOUCHED_MIB as usize)));
    shown.quick.push(arm::quick(&guest(1024, TOUCHED_MIB, "verify=5"), TOUCHED_MIB));
}

fn column(values: &[Saving], figure: impl Fn(&Saving) -> f64) -> Vec<f64> {
    values.iter().map(figure).collect()
}

fn saving_rows(report: &mut Report, shown: &Shown) {
    let [sterna, qemu] = &shown.saved;
    let share = |values: &[Saving], time: fn(&Saving) -> f64| {
        shown.write_ms.iter().zip(values).map(|(plain, saving)| plain / time(saving) * 100.0).collect::<Vec<_>>()
    };
    let speed = |values: &[f64]| values.iter().map(|ms| TOUCHED_MIB as f64 / ms * 1e3).collect::<Vec<_>>();
    let name = |what: &str| format!("save of {TOUCHED_MIB} MiB: {what}");
    report.row(&name("plain O_DIRECT writing"), "MiB/s", &speed(&shown.write_ms), &[], Goal::None);
    let [ours, theirs] = [sterna, qemu].map(|values| share(values, |saving| saving.total_ms));
    report.row(&name("of plain, command to its end"), "%", &ours, &theirs, Goal::AtLeast(80.0));
    let [ours, theirs] = [sterna, qemu].map(|values| column(values, |saving| saving.total_ms));
    report.row(&name("command to its end"), "ms", &ours, &theirs, Goal::None);
    report.row(&name("standstill, reported"), "ms", &column(sterna, |saving| saving.standstill_ms), &[], Goal::None);
    let [small, large] = &shown.little;
    for (values, memory_mib) in shown.little.iter().zip(LITTLE_IN_MIB) {
        let name = format!("save of {LITTLE_MIB} MiB of {} GiB", memory_mib / 1024);
        report.row(&name, "ms", &values[0], &values[1], Goal::None);
    }
    let times =
        |side: usize| small[side].iter().zip(&large[side]).map(|(small, large)| large / small).collect::<Vec<_>>();
    report.row("save of 16 MiB: 8 GiB against 1 GiB", "times", &times(0), &times(1), Goal::AtMost(1.5));
}

fn restoring_rows(report: &mut Report, shown: &Shown) {
    for (size, mib) in RESTORED_MIB.iter().enumerate() {
        let [ours, theirs] = &shown.restored[size];
        let goal = if size == 0 { Goal::AtMost(8.0) } else { Goal::None };
        report.row(&format!("restore of {mib} MiB: exec to the guest's first byte"), "ms", ours, theirs, goal);
        let name = format!("restore of {mib} MiB: in the VM's process");
        report.row(&name, "ms", &shown.restored_inside[size], &[], Goal::None);
    }
    let [small, large] = &shown.restored;
    let times =
        |side: usize| small[side].iter().zip(&large[side]).map(|(small, large)| large / small).collect::<Vec<_>>();
    report.row("restore: 4 GiB against 256 MiB", "times", &times(0), &times(1), Goal::AtMost(1.5));
}

fn quick_rows(report: &mut Report, shown: &Shown) {
    let all = |figure: fn(&arm::Quick) -> f64| shown.quick.iter().map(figure).collect::<Vec<_>>();
    let against =
        |values: &[f64]| values.iter().zip(&shown.transfer_ms).map(|(ours, raw)| ours / raw).collect::<Vec<_>>();
    let (reported, seen) = (all(|quick| quick.reported_ms), all(|quick| quick.guest_gap_ms));
    let name = |what: &str| format!("quick move of {TOUCHED_MIB} MiB: {what}");
    report.row(&name("plain TCP"), "ms", &shown.transfer_ms, &[], Goal::None);
    report.row(&name("standstill, reported"), "ms", &reported, &[], Goal::None);
    report.row(&name("standstill, the guest's ticks"), "ms", &seen, &[], Goal::None);
    report.row(&name("standstill against plain TCP"), "times", &against(&seen), &[], Goal::AtMost(1.3));
    report.row(&name("command to its end"), "ms", &all(|quick| quick.total_ms), &[], Goal::None);
}
