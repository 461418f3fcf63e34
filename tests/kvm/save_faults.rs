//! What may go wrong while a VM goes to a file or comes from one: processes killed, volumes that refuse or vanish. The guest goes on, or
//! lies whole in a file, and half a file never has its name.

use crate::host_pair::{NAME, assert_says, await_equal, kill, tick, verify};
use crate::vm::{Host, Vm, finish};
use rustix::process::{Pid, Signal};
use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// Pages of a MiB.
const PAGES: u64 = 256;
/// What takes a while to be compressed and to be read.
const LARGE: &str = "touch=512 full tick=20";
const LARGE_PAGES: u64 = 512 * PAGES;
const LARGE_RAM: [&str; 2] = ["--memory", "768M"];

/// Names in `folder` that are of `vm.sterna`.
fn names(folder: &str) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("vm.sterna")).collect()
}

/// Waits until a save is writing to `folder`; its file has no name of its own yet.
fn await_writing(folder: &str) {
    await_equal("a file that is being written", &true, || names(folder).iter().any(|name| name.ends_with(".partial")));
}

/// A process killed in mid-save takes the guest with it, as a crash does; no file has the name, and the next save takes it and leaves
/// nothing else.
pub fn a_save_that_is_killed_leaves_no_file_under_its_name() {
    let host = Host::new();
    host.boot(LARGE, &LARGE_RAM);
    tick(&mut host.console(NAME));
    let (folder, file) = (host.path("."), host.path("vm.sterna"));
    let pid = host.pid(NAME);
    let save = Vm::start(host.command(&["save", NAME, &file, "--compress"]), "save");
    await_writing(&folder);
    kill(pid);
    let (code, said) = save.wait_exit();
    assert_eq!(code, Some(7), "{said}");
    assert_says(&said, &["has gone without a farewell", "guest: it is gone with its process"]);
    let left = names(&folder);
    assert!(!left.contains(&"vm.sterna".to_owned()) && left.len() == 1, "{left:?}");
    assert_eq!(host.state(NAME), None);
    host.boot("touch=16 tick=20", &[]);
    tick(&mut host.console(NAME));
    host.ok(&["save", NAME, &file]);
    assert_eq!(names(&folder), ["vm.sterna"]);
    host.ok(&["restore", &file]);
    verify(&mut host.console(NAME), 16 * PAGES);
}

/// The VM's process that the command `parent` has started, once it reads memory from its file.
fn reader(parent: u32) -> Option<Pid> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    let reads = |child: &&str| {
        let threads = fs::read_dir(format!("/proc/{child}/task")).into_iter().flatten().flatten();
        threads
            .map(|thread| fs::read_to_string(thread.path().join("comm")))
            .any(|name| name.is_ok_and(|n| n == "file\n"))
    };
    Pid::from_raw(children.split_whitespace().find(reads)?.parse().unwrap())
}

/// A process killed while it reads memory has run nothing: the file is whole, says so, and is restored.
pub fn a_restore_that_is_killed_leaves_the_file_to_the_next() {
    let host = Host::new();
    host.boot(LARGE, &LARGE_RAM);
    tick(&mut host.console(NAME));
    let file = host.path("vm.sterna");
    host.ok(&["save", NAME, &file, "--compress"]);
    let restore = Vm::start(host.command(&["restore", &file, "--load", "whole"]), "restore");
    let mut found = None;
    await_equal("a process that reads", &true, || {
        found = reader(restore.pid());
        found.is_some()
    });
    kill(found.unwrap());
    let (code, said) = restore.wait_exit();
    assert_eq!(code, Some(1), "{said}");
    assert_says(&said, &["'vm'", "signal: 9"]);
    assert_eq!(host.state(NAME), None);
    assert_says(&host.ok(&["inspect", &file, "--verify"]), &["restored    never"]);
    host.ok(&["restore", &file, "--load", "whole"]);
    verify(&mut host.console(NAME), LARGE_PAGES);
}

/// A file system in memory, with mount's `options`, that a host's processes have to themselves; their sandbox is `on` or `off`. Needs
/// root.
fn volume(options: &str, sandbox: &str) -> (TempDir, Host) {
    let volume = tempfile::tempdir().unwrap();
    let script = format!("mount -t tmpfs -o {options} none {} && exec \"$@\"", volume.path().display());
    let sandbox = format!("STERNA_SANDBOX={sandbox}");
    let host = Host::within(&["env", &sandbox, "unshare", "--mount", "sh", "-c", &script, "sh"]);
    (volume, host)
}

/// A volume that may not be written to is told, and the guest runs on.
pub fn a_read_only_volume_leaves_the_guest_running() {
    let (volume, host) = volume("ro", "on");
    let mut vm = host.run("touch=16 dirty=1 tick=20", &[]);
    tick(&mut vm);
    let file = volume.path().join("vm.sterna");
    let said = host.fails(1, &["save", NAME, file.to_str().unwrap()]);
    assert_says(&said, &["Read-only file system", "guest: The guest runs here."]);
    tick(&mut vm);
    verify(&mut vm, 16 * PAGES);
    vm.power_off();
}

/// Where writing fails in the middle, for a reason that no look beforehand shows, no file is left, and the guest runs on.
pub fn a_write_that_fails_in_mid_save_leaves_the_guest_running() {
    // In blocks of 512 bytes: 4 MiB.
    let host = Host::within(&["sh", "-c", "trap '' XFSZ; ulimit -f 8192; exec \"$@\"", "sh"]);
    let mut vm = host.run("touch=16 full dirty=1 tick=20", &[]);
    tick(&mut vm);
    let file = host.path("vm.sterna");
    for more in [&[][..], &["--compress"]] {
        let said = host.fails(1, &[&["save", NAME, &file], more].concat());
        assert_says(&said, &["the save of 'vm' to", "guest: The guest runs here."]);
        assert_eq!(names(&host.path(".")), [""; 0], "{said}");
        tick(&mut vm);
    }
    verify(&mut vm, 16 * PAGES);
    vm.power_off();
}

/// A volume that is unmounted under a save: what is written there nobody would find, so the guest runs on, with a sandbox that sees
/// it and without.
pub fn a_volume_that_vanishes_in_mid_save_leaves_the_guest_running() {
    for (sandbox, cause) in [("on", "naming the file"), ("off", "finding the file under its name")] {
        let (volume, host) = volume("size=1G", sandbox);
        let mut vm = host.run(LARGE, &LARGE_RAM);
        tick(&mut vm);
        let (path, file) = (volume.path().to_str().unwrap(), volume.path().join("vm.sterna"));
        // A process in the mount namespace of the VM sees what it sees.
        let root = format!("/proc/{}/root{path}", vm.pid());
        let save = Vm::start(host.command(&["save", NAME, file.to_str().unwrap(), "--compress"]), "save");
        await_writing(&root);
        vm.signal(Signal::STOP);
        assert!(!Path::new(&root).join("vm.sterna").exists(), "it was over too soon");
        let mut unmount = Command::new("nsenter");
        unmount.args(["--target", &vm.pid().to_string(), "--mount", "umount", "--lazy", path]);
        let unmounted = finish(unmount, "umount");
        assert!(unmounted.status.success(), "{unmounted:?}");
        vm.signal(Signal::CONT);
        let (code, said) = save.wait_exit();
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(cause) || said.contains("finding the file under its name"), "{said}");
        assert_says(&said, &["guest: The guest runs here."]);
        tick(&mut vm);
        verify(&mut vm, LARGE_PAGES);
        vm.power_off();
    }
}
