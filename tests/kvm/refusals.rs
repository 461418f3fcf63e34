//! What a target cannot take: it says so by name before anything is moved, to a trial and to a move of either kind, and the guest
//! goes on where it is.

use crate::host_pair::{NAME, Pair, assert_says, tick, verify};
use crate::net::{Namespace, shell};
use crate::vm::{Host, Vm};
use crate::wire::{Wire, Word};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use sterna_migration::file::{self, Hooks, Options, SavedFile};
use sterna_migration::ram::GuestRam;
use sterna_migration::{PageSet, Ram};
use vm_memory::GuestAddress;

/// Pages of a MiB.
const PAGES: u64 = 256;
const REFUSED: i32 = 3;

/// A VM on A, with `touch` MiB written, and a wire to B.
fn pair_with_guest(hosts: [Host; 2], touch: u64) -> (Pair, Wire) {
    let pair = Pair::of(hosts);
    pair.a().boot(&format!("touch={touch} tick=20"), &[]);
    tick(&mut pair.a().console(NAME));
    let wire = Wire::to(pair.to_b());
    (pair, wire)
}

/// A trial and both kinds of move, as `words` order them, are refused with all of `parts`; the guest goes on, and nothing is left
/// at B.
fn assert_refused(pair: &Pair, words: &[&str], parts: &[&str]) {
    let mut console = pair.a().console(NAME);
    let before = entries(pair.b());
    for (kind, guest) in [
        (&["--check"][..], "guest: it was not touched"),
        (&["--mode", "live"], "guest: The guest runs here"),
        (&["--mode", "quick"], "guest: The guest runs here"),
    ] {
        let output = pair.a().sterna(&[&["migrate", NAME], words, kind].concat());
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(REFUSED), "{kind:?}: {said}");
        assert_says(&said, &[parts, &[guest]].concat());
        let before = tick(&mut console);
        assert!(tick(&mut console) > before);
    }
    pair.await_states(Some("running"), None);
    assert_eq!(pair.b().left_behind(), [""; 0], "left by a VM that was refused");
    let is_new = |name: &String| !before.contains(name) && !name.ends_with(".log");
    assert_eq!(entries(pair.b()).into_iter().filter(is_new).collect::<Vec<_>>(), [""; 0], "at B");
}

/// All names in the directory of `host`, in their order.
fn entries(host: &Host) -> Vec<String> {
    let names = fs::read_dir(host.path(".")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

/// A target with less free memory than the guest has in use says how much of each there is. Needs root.
pub fn a_target_with_too_little_memory_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let meminfo = folder.path().join("meminfo");
    let offer =
        |mib: u64| fs::write(&meminfo, format!("MemTotal: 99999999 kB\nMemAvailable: {} kB\n", mib << 10)).unwrap();
    offer(8);
    let script = format!("mount --bind {} /proc/meminfo && exec \"$@\"", meminfo.display());
    let small = Host::within(&["unshare", "--mount", "sh", "-c", &script, "sh"]);
    let (pair, _wire) = pair_with_guest([Host::new(), small], 16);
    assert_refused(&pair, &[pair.to_b()], &["it has ", " of memory in use, and this host has 8M free"]);
    offer(64);
    pair.go(&["--verify"]);
    verify(&mut pair.b().console(NAME), 16 * PAGES);
}

/// What [`add_feature`] makes of a guest.
const LACKING: &str = "the guest uses avx512er (CPUID 7.0 EBX bit 27), which this host lacks";

/// A feature that the guest has been told of and this machine lacks: only Xeon Phis had it.
fn add_feature(description: &mut Value) {
    let leaves = description["cpu"]["leaves"].as_array_mut().unwrap();
    let leaf = leaves.iter_mut().find(|leaf| leaf["function"] == 7 && leaf["index"] == 0).unwrap();
    let ebx = leaf["registers"][1].as_u64().unwrap();
    leaf["registers"][1] = json!(ebx | 1 << 27);
}

/// Another maker's name, as CPUID spells it: `EBX EDX ECX`.
fn change_maker(description: &mut Value) {
    let leaves = description["cpu"]["leaves"].as_array_mut().unwrap();
    let leaf = leaves.iter_mut().find(|leaf| leaf["function"] == 0).unwrap();
    for (register, letters) in [(1, *b"Ster"), (3, *b"naCP"), (2, *b"UMak")] {
        leaf["registers"][register] = json!(u32::from_le_bytes(letters));
    }
}

/// A processor that is not one of the target's is refused by what the target lacks of it.
pub fn a_processor_that_the_target_lacks_is_refused_by_name() {
    let (pair, wire) = pair_with_guest([Host::new(), Host::new()], 16);
    wire.alter(Word::Machine, |description| {
        add_feature(description);
        change_maker(description);
    });
    let maker = "the guest has a processor by \"SternaCPUMak\", and this host one by ";
    assert_refused(&pair, &[&wire.address], &[LACKING, maker]);
    pair.go(&["--verify"]);
    verify(&mut pair.b().console(NAME), 16 * PAGES);
}

/// What another program or another kind of machine says is told by its version, architecture or word.
pub fn another_format_is_refused_by_name() {
    let (pair, wire) = pair_with_guest([Host::new(), Host::new()], 16);
    wire.alter_preamble(|preamble| preamble.version = 77);
    assert_refused(&pair, &[&wire.address], &["format version 77"]);
    wire.alter_preamble(|preamble| preamble.architecture = 183);
    assert_refused(&pair, &[&wire.address], &["183"]);
    wire.alter(Word::Machine, |description| description["flux-capacitor"] = json!(1));
    assert_refused(&pair, &[&wire.address], &["flux-capacitor"]);
    pair.go(&["--verify"]);
    verify(&mut pair.b().console(NAME), 16 * PAGES);
}

/// A trial names a disk, a tap and a name that cannot be had at the target in one go; a move is refused for the first.
pub fn all_that_is_missing_at_the_target_is_named() {
    let namespace = Namespace::new();
    let hosts = [namespace.host(), namespace.host()];
    shell(&hosts[0], "ip link set lo up; ip tuntap add tapa mode tap");
    let pair = Pair::of(hosts);
    let disk = format!("path={}", pair.a().disk("image", 1 << 20));
    pair.a().boot("touch=16 tick=20", &["--disk", &disk, "--net", "tap=tapa"]);
    let mut taken = pair.b().run_named("taken", "tick=20", &[]);
    tick(&mut taken);
    let interfaces = || shell(pair.a(), "ip -o link show");
    let before = interfaces();
    let missing = pair.b().path("missing");
    let map = format!("disk0={missing},net0=none0");
    let words = ["migrate", NAME, pair.to_b(), "--map", &map, "--as", "taken"];
    let told = pair.a().sterna(&[&words[..], &["--check", "--json"]].concat());
    assert_eq!(told.status.code(), Some(REFUSED), "{told:?}");
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    let problems: Vec<_> = told["problems"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(problems.len(), 3, "{problems:#?}");
    assert_says(problems[0], &["disk0: ", &missing, "No such file or directory"]);
    assert_says(problems[1], &["net0: ", "tap interface none0 does not exist; to make it: ip tuntap add"]);
    assert_says(problems[2], &["the name 'taken' is in use by process "]);
    taken.power_off();
    assert_refused(&pair, &words[2..], &["disk0: ", &missing, "No such file or directory"]);
    assert_eq!(interfaces(), before);
}

/// MSRs that the target's KVM does not have: told of those alone that the guest uses, and the guest goes on.
pub fn an_msr_that_the_target_lacks_is_told_if_the_guest_uses_it() {
    const PAT: u32 = 0x277; // its value after a reset is not 0
    const CSTAR: u32 = 0xc000_0083;
    let (pair, wire) = pair_with_guest([Host::new(), Host::new()], 16);
    let check = ["migrate", NAME, &wire.address, "--check"];
    wire.alter(Word::Checked, |report| report["unknown_msrs"] = json!([CSTAR, 0xbad]));
    assert_eq!(pair.a().json(&check)["problems"], json!([]));
    wire.alter(Word::Checked, |report| report["unknown_msrs"] = json!([CSTAR, PAT]));
    let told = pair.a().sterna(&check);
    let said = String::from_utf8([told.stdout, told.stderr].concat()).unwrap();
    assert_eq!(told.status.code(), Some(REFUSED), "{said}");
    assert_says(&said, &["vcpu0 has 0x", " in MSR 0x277, which the target's KVM does not have", "it was not touched"]);
    assert!(!said.contains("c0000083"), "{said}");
    // What the target itself lacks, it says: a made-up one, which is in no guest.
    wire.alter(Word::Machine, |description| description["state_msrs"] = json!([CSTAR, 0xbad]));
    assert_eq!(pair.a().json(&check)["problems"], json!([]));
    tick(&mut pair.a().console(NAME));
    pair.a().ok(&["migrate", NAME, &wire.address]);
    tick(&mut pair.b().console(NAME));
}

/// A trial tells how far the clocks are apart, and that is all that it does: no event comes of it, and no file on either side.
pub fn a_check_tells_how_far_the_clocks_are_apart() {
    const APART_S: u64 = 3650;
    let (pair, wire) = pair_with_guest([Host::new(), Host::new()], 16);
    let mut events = Vm::start(pair.a().command(&["events", NAME]), "events");
    let before = [entries(pair.a()), entries(pair.b())];
    let check = ["migrate", NAME, &wire.address, "--check"];
    let told = pair.a().json(&check);
    assert_eq!((&told["clock-skew"], &told["warnings"]), (&json!(0), &json!([])), "one clock for both");
    wire.alter(Word::Checked, |report| {
        report["unix_ns"] = json!(report["unix_ns"].as_u64().unwrap() - APART_S * 1_000_000_000)
    });
    let told = pair.a().json(&check);
    let skew_ms = told["clock-skew"].as_i64().unwrap();
    // The target may have looked at its clock at any time while it was waited for.
    let apart_ms = -1000 * APART_S as i64;
    assert!((apart_ms..apart_ms + 60_000).contains(&skew_ms), "{told}");
    assert_says(&pair.a().ok(&check), &["clocks      differ by 36", "verdict     it can move"]);
    wire.alter(Word::Machine, |description| {
        description["written_unix_ns"] =
            json!(description["written_unix_ns"].as_u64().unwrap() - APART_S * 1_000_000_000);
    });
    let warning = "and this host differ by 36";
    assert_says(
        &pair.a().ok(&check),
        &["warning     the clocks of ", warning, "wall clock will jump", "verdict     it can move"],
    );
    assert_eq!([entries(pair.a()), entries(pair.b())], before);
    pair.a().ok(&["pause", NAME]);
    let first: Value = serde_json::from_str(&events.wait_for("{")).unwrap();
    assert_eq!(first["event"], "paused", "something happened to the guest: {first}");
    pair.a().ok(&["resume", NAME]);
    // The move itself says so too, and goes on.
    let said = pair.a().ok(&["migrate", NAME, &wire.address]);
    assert_says(&said, &["warning     the clocks of ", warning]);
    verify(&mut pair.b().console(NAME), 16 * PAGES);
}

/// Writes the machine in the file `from` to the file `to`, without its memory, with a feature more than this host has.
fn forge(from: &str, to: &str) {
    let saved = SavedFile::open(Path::new(from)).unwrap();
    let mut contents = saved.contents().clone();
    let mut description = serde_json::from_slice(&contents.description).unwrap();
    add_feature(&mut description);
    contents.description = serde_json::to_vec(&description).unwrap();
    let regions: Vec<_> = saved.layout().iter().map(|(start, bytes)| (GuestAddress(*start), *bytes as usize)).collect();
    let ram = Ram::new(Arc::new(GuestRam::from_ranges(&regions).unwrap()));
    let none = PageSet::none(ram.pages());
    file::save(Path::new(to), &contents, &ram, &none, &Options::default(), Hooks::none()).unwrap();
}

/// A file whose machine has a processor that this host is not says by name what is missing, and is still to be restored elsewhere.
pub fn a_file_of_a_processor_that_this_host_lacks_is_refused_by_name() {
    let host = Host::new();
    host.boot("touch=16 tick=20", &[]);
    tick(&mut host.console(NAME));
    let (file, forged) = (host.path("vm.sterna"), host.path("forged.sterna"));
    host.ok(&["save", NAME, &file]);
    forge(&file, &forged);
    let said = host.fails(REFUSED, &["restore", &forged]);
    assert_says(&said, &[LACKING]);
    assert_eq!(host.state(NAME), None);
    assert_says(&host.ok(&["inspect", &forged]), &["restored    never"]);
    host.ok(&["restore", &file]);
    verify(&mut host.console(NAME), 16 * PAGES);
}
