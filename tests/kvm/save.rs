//! A VM goes to a file and comes back from it, and what a damaged file, a full disk and a wrong host make of that.

use crate::host_pair::{NAME, assert_says, await_equal, tick, verify};
use crate::vm::{Host, Vm};
use serde_json::Value;
use std::fs;
use std::path::Path;

const MIB: u64 = 1 << 20;
/// Pages of a MiB.
const PAGES: u64 = 256;
const REFUSED: i32 = 3;

/// A host whose VM, with `touch` MiB written, lies in a file.
fn saved(cmdline: &str, more: &[&str], options: &[&str]) -> (Host, String) {
    let host = Host::new();
    host.boot(cmdline, more);
    tick(&mut host.console(NAME));
    let file = host.path("vm.sterna");
    host.ok(&[&["save", NAME, &file], options].concat());
    assert_eq!(host.state(NAME), None);
    assert_eq!(host.left_behind(), [""; 0]);
    (host, file)
}

/// Every page is there again, with 1, 2, 8 and 12 vCPUs that write, however they come back.
pub fn a_saved_guest_goes_on_where_it_was() {
    for row in [
        ("1", 16, "64M", &[][..], "map"),
        ("2", 64, "256M", &[], "whole"),
        ("8", 64, "256M", &[], "background"),
        ("12", 48, "256M", &[], "map"),
        ("2", 64, "256M", &["--compress"], "map"),
        ("1", 16, "64M", &["--compress"], "background"),
    ] {
        goes_on(row);
    }
}

/// So it is with 4 GiB.
pub fn four_gib_go_through_a_file() {
    goes_on(("2", 4096, "5G", &[], "map"));
}

fn goes_on((cpus, touch, memory, save, load): (&str, u64, &str, &[&str], &str)) {
    let cmdline = format!("cpus={cpus} touch={touch} dirty={} rate=50 tick=20", touch / 2);
    let (host, file) = saved(&cmdline, &["--cpus", cpus, "--memory", memory], save);
    host.ok(&["inspect", &file, "--verify"]);
    host.ok(&["restore", &file, "--load", load]);
    assert_eq!(host.state(NAME).as_deref(), Some("running"));
    let mut console = host.console(NAME);
    tick(&mut console);
    verify(&mut console, touch * PAGES);
    let (count, _) = tick(&mut console);
    assert!(count > 1, "the guest began anew");
}

/// What is in a file is told, and that it was restored.
pub fn a_file_tells_what_is_in_it() {
    let (host, file) = saved("cpus=2 touch=16 tick=20", &["--cpus", "2"], &[]);
    let text = host.ok(&["inspect", &file]);
    let now = ["saved       2", " by sterna ", "format      version ", "vcpu0 v", "cpus        2, host", "r15 0x"];
    assert_says(
        &text,
        &[&["machine     vm (", "restored    never", "vcpu1", "64M of RAM", "cmdline     cpus=2"][..], &now].concat(),
    );
    let told = host.json(&["inspect", &file, "--verify"]);
    assert_eq!((&told["whole"], &told["memory-verified"]), (&true.into(), &Value::Null), "{told}");
    assert!(told["vcpus"][1]["registers"]["rax"].is_u64(), "{told}");
}

/// A file is restored once; `--again` makes a second copy, told apart by its name, though the first still runs from the file.
pub fn a_file_is_restored_once() {
    let (host, file) = saved("touch=16 tick=20", &[], &[]);
    host.ok(&["restore", &file, "--name", "mapped"]);
    let said = host.fails(REFUSED, &["restore", &file, "--name", "two"]);
    assert_says(&said, &["error: ", "was restored before", "next: ", &format!("sterna restore {file} --again")]);
    host.ok(&["restore", &file, "--name", "one", "--again", "--load", "whole"]);
    assert_eq!(host.state("two"), None);
    host.ok(&["restore", &file, "--name", "two", "--again"]);
    for name in ["mapped", "one", "two"] {
        verify(&mut host.console(name), 16 * PAGES);
    }
    let said = host.fails(2, &["restore", &file, "--name", "two", "--again"]);
    assert_says(&said, &["the name 'two' is in use by process "]);
}

/// Paused on the way or before, it stands still until it is told to go on.
pub fn a_paused_guest_stays_paused() {
    let host = Host::new();
    host.boot("touch=16 tick=20", &[]);
    tick(&mut host.console(NAME));
    host.ok(&["pause", NAME]);
    let file = host.path("vm.sterna");
    host.ok(&["save", NAME, &file]);
    host.ok(&["restore", &file]);
    assert_eq!(host.state(NAME).as_deref(), Some("paused"));
    host.ok(&["resume", NAME]);
    let mut console = host.console(NAME);
    tick(&mut console);
    drop(console);
    host.ok(&["save", NAME, &file, "--overwrite"]);
    host.ok(&["restore", &file, "--paused"]);
    assert_eq!(host.state(NAME).as_deref(), Some("paused"));
    host.ok(&["resume", NAME]);
    verify(&mut host.console(NAME), 16 * PAGES);
}

/// A guest that was given a level of processors instead of the host's has it wherever it goes on. A host that cannot be one says
/// what it lacks.
pub fn a_level_of_processors_stays_what_it_is() {
    for level in ["x86-64-v2", "x86-64-v3"] {
        let probe = Host::new().sterna(&[
            "run",
            "--name",
            NAME,
            "--kernel",
            sterna_guest::GUEST_ELF,
            "--cmdline",
            "off",
            "--cpu",
            level,
        ]);
        if !probe.status.success() {
            let said = String::from_utf8(probe.stderr).unwrap();
            assert_eq!(probe.status.code(), Some(REFUSED), "{said}");
            assert_says(
                &said,
                &[&format!("this host cannot be {level}: it lacks "), "(CPUID ", "guest: none was started"],
            );
            eprintln!("{level} goes nowhere here: {said}");
            continue;
        }
        let (host, file) = saved("cpus=2 touch=16 dirty=8 rate=50 tick=20", &["--cpus", "2", "--cpu", level], &[]);
        assert_eq!(host.json(&["inspect", &file])["machine"]["config"]["cpu"], level);
        host.ok(&["restore", &file]);
        assert_eq!(host.json(&["show", NAME])["config"]["cpu"], level);
        let mut console = host.console(NAME);
        tick(&mut console);
        verify(&mut console, 16 * PAGES);
    }
}

/// An existing file is kept, and the guest runs on, unless it may be replaced.
pub fn an_existing_file_is_kept() {
    let host = Host::new();
    host.boot("touch=16 tick=20", &[]);
    let mut console = host.console(NAME);
    tick(&mut console);
    let file = host.disk("precious", 5000);
    let said = host.fails(1, &["save", NAME, &file]);
    assert_says(&said, &["the save of 'vm' to", "exists", "guest: The guest runs here."]);
    assert_eq!(fs::metadata(&file).unwrap().len(), 5000);
    tick(&mut console);
    drop(console);
    host.ok(&["save", NAME, &file, "--overwrite"]);
    host.ok(&["restore", &file]);
    verify(&mut host.console(NAME), 16 * PAGES);
}

/// A file system that is full leaves no file, and the guest running. Needs root.
pub fn a_full_file_system_leaves_the_guest_running() {
    let volume = tempfile::tempdir().unwrap();
    let script = format!("mount -t tmpfs -o size=8M none {} && exec \"$@\"", volume.path().display());
    let host = Host::within(&["unshare", "--mount", "sh", "-c", &script, "sh"]);
    let mut vm = host.run("touch=16 dirty=1 tick=20", &[]);
    tick(&mut vm);
    // A process in the mount namespace of the VM sees what it sees.
    let root = format!("/proc/{}/root{}", vm.pid(), volume.path().display());
    let file = volume.path().join("vm.sterna");
    let said = host.fails(1, &["save", NAME, file.to_str().unwrap()]);
    assert_says(&said, &[" does not fit: it needs up to ", " are free", "guest: The guest runs here."]);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "{said}");
    tick(&mut vm);
    // How well memory compresses is not known before, so that there the room ends in the middle of the writing.
    fs::write(format!("{root}/other"), vec![1; (8 << 20) - (80 << 10)]).unwrap();
    let said = host.fails(1, &["save", NAME, file.to_str().unwrap(), "--compress"]);
    assert_says(&said, &[" does not fit: it needs up to ", " are free", "guest: The guest runs here."]);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 1, "{said}");
    tick(&mut vm);
    let said = host.fails(1, &["save", NAME, "/nowhere/vm.sterna"]);
    assert_says(&said, &["/nowhere", "guest: The guest runs here."]);
    verify(&mut vm, 16 * PAGES);
    vm.power_off();
}

/// A disk behind this host's cache may lack there what it had here: it is not saved or moved unless that is wanted.
pub fn a_disk_behind_the_cache_is_refused() {
    let host = Host::new();
    let disk = format!("path={},direct=off", host.disk("image", 1 << 20));
    host.boot("touch=1 tick=20", &["--disk", &disk]);
    tick(&mut host.console(NAME));
    let file = host.path("vm.sterna");
    for words in [&["save", NAME, &file][..], &["migrate", NAME, "tcp:127.0.0.1:1"]] {
        let said = host.fails(REFUSED, words);
        assert_says(&said, &["disk0", "--unsafe-cache", "guest: The guest runs here"]);
    }
    assert!(!Path::new(&file).exists());
    host.ok(&["save", NAME, &file, "--unsafe-cache"]);
    host.ok(&["restore", &file]);
    tick(&mut host.console(NAME));
}

/// Whatever is not a whole file is refused by name, and nothing starts.
pub fn a_damaged_file_is_refused() {
    let (host, file) = saved("touch=16 tick=20", &[], &[]);
    let good = fs::read(&file).unwrap();
    let bad = host.path("bad");
    let refused = |bytes: &[u8], what: &str| {
        fs::write(&bad, bytes).unwrap();
        for words in [&["inspect", &bad][..], &["restore", &bad]] {
            let said = host.fails(REFUSED, words);
            assert!(said.starts_with("error: ") && said.contains("cause: ") && said.contains(&bad), "{what}: {said}");
        }
        assert_eq!(host.state(NAME), None, "{what}");
    };
    refused(b"", "nothing");
    refused(b"#!/bin/sh\nexec sterna\n", "a script");
    refused(&[0x5a; 9000], "noise");
    for length in [40, 48, 4000, 4096, good.len() / 2, good.len() - 4096, good.len() - 1] {
        refused(&good[..length], &format!("cut after {length}"));
    }
    // Bits all over the head: everything but memory has its checksum.
    for at in [0, 8, 10, 12, 17, 33, 45, 60, 100, 1000, 2000] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        if bytes != good && good[at..at + 8] != [0; 8] {
            refused(&bytes, &format!("a bit at {at}"));
        }
    }
    let said = host.fails(REFUSED, &["inspect", &host.path("missing")]);
    assert_says(&said, &["missing", "No such file"]);
    host.ok(&["restore", &file]);
    verify(&mut host.console(NAME), 16 * PAGES);
}

/// A bit of memory that is not what was saved shows where memory is compared.
pub fn damaged_memory_is_found_where_it_is_compared() {
    let (host, file) = saved("touch=16 tick=20", &[], &[]);
    let mut bytes = fs::read(&file).unwrap();
    // Page 1000 of those that the guest has filled, by its number in word 0.
    let number = 1000u64.to_le_bytes();
    let page = bytes.chunks_exact(4096).position(|page| page[..8] == number && page[8..16] == 1u64.to_le_bytes());
    bytes[page.unwrap() * 4096 + 2048] ^= 1;
    fs::write(&file, bytes).unwrap();
    host.ok(&["inspect", &file]);
    for words in [&["inspect", &file, "--verify"][..], &["restore", &file, "--load", "whole"]] {
        let said = host.fails(REFUSED, words);
        assert_says(&said, &["the file is damaged: pages ", " are not those that were saved"]);
    }
    assert_eq!(host.state(NAME), None);
    // Its machine has not run.
    assert_says(&host.ok(&["inspect", &file]), &["restored    never"]);
}

/// Disks come back as they were left, or not at all.
pub fn a_disk_must_be_as_it_was_left() {
    let host = Host::new();
    let image = host.disk("image", MIB);
    let disk = format!("path={image}");
    host.boot("disk=64 tick=20", &["--disk", &disk]);
    tick(&mut host.console(NAME));
    let file = host.path("vm.sterna");
    host.ok(&["save", NAME, &file]);
    let mut other = host.run_named("other", "tick=20", &["--disk", &disk]);
    tick(&mut other);
    let said = host.fails(REFUSED, &["restore", &file]);
    assert_says(&said, &[&format!("disk image {image} is locked by VM other (sterna, process {})", other.pid())]);
    other.power_off();
    let good = fs::read(&image).unwrap();
    let mut changed = good.clone();
    changed[0] ^= 1;
    fs::write(&image, &changed).unwrap();
    let said = host.fails(REFUSED, &["restore", &file]);
    assert_says(&said, &[&format!("disk0: {image} has other contents here than at the source")]);
    let elsewhere = host.path("elsewhere");
    let missing = format!("disk0={elsewhere}");
    assert_says(
        &host.fails(2, &["restore", &file, "--map", &missing]),
        &[&format!("disk0: {elsewhere}: No such file")],
    );
    assert_says(&host.fails(REFUSED, &["restore", &file, "--map", "disk7=/x"]), &["the machine has no 'disk7'"]);
    fs::write(&elsewhere, &good).unwrap();
    host.ok(&["restore", &file, "--map", &missing]);
    tick(&mut host.console(NAME));
    let shown = host.json(&["show", NAME]);
    assert_eq!(shown["config"]["disks"][0]["path"], elsewhere.as_str(), "{shown}");
}

/// Called off while it writes, a save leaves no file, and the guest goes on.
pub fn a_cancelled_save_leaves_the_guest_running() {
    let host = Host::new();
    host.boot("touch=900 full tick=20", &["--memory", "1G"]);
    let mut console = host.console(NAME);
    tick(&mut console);
    let file = host.path("vm.sterna");
    let save = Vm::start(host.command(&["save", NAME, &file, "--compress"]), "save");
    await_equal("phase", &true, || {
        let output = host.sterna(&["migration", "status", NAME, "--json"]);
        String::from_utf8(output.stdout).unwrap().contains("\"transferring\"")
    });
    host.ok(&["migration", "cancel", NAME]);
    let (code, said) = save.wait_exit();
    assert_eq!(code, Some(4), "{said}");
    assert_says(&said, &["guest: The guest runs here."]);
    assert!(!Path::new(&file).exists());
    let names: Vec<_> = fs::read_dir(host.path(".")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_str().unwrap().contains("vm.sterna")), "{names:?}");
    tick(&mut console);
    verify(&mut console, 900 * PAGES);
}
