//! What a user may get wrong: the sentence, the exit code, and nothing left behind.

use crate::vm::{Host, sterna};
use std::fs;
use std::os::unix::fs::chown;

const KERNEL: &str = sterna_guest::GUEST_ELF;
/// Exit codes of the contract.
const USAGE: i32 = 2;
const REFUSED: i32 = 3;
const UNREACHABLE: i32 = 7;
/// A user and group without rights: nobody's.
const NOBODY: u32 = 65534;

/// Runs a VM that must fail with `code` and leave nothing, and returns what was said.
fn refused(host: &Host, code: i32, arguments: &[&str]) -> String {
    let mut words = vec!["run", "--name", "vm"];
    if !arguments.contains(&"--kernel") {
        words.extend(["--kernel", KERNEL]);
    }
    words.extend(arguments);
    let said = host.fails(code, &words);
    assert_eq!(host.left_behind(), [""; 0], "{said}");
    assert!(said.starts_with("error: ") && said.contains("\n  guest: none was started"), "{said}");
    said
}

fn assert_said(said: &str, part: &str) {
    assert!(said.contains(part), "{part:?} is not in:\n{said}");
}

/// The test guest with `bytes` in the place of those at `offset`.
fn changed_kernel(host: &Host, offset: usize, bytes: &[u8]) -> String {
    let mut elf = sterna_guest::elf().to_vec();
    elf[offset..offset + bytes.len()].copy_from_slice(bytes);
    let path = host.path("changed.elf");
    fs::write(&path, elf).unwrap();
    path
}

/// Each kind of file that is no kernel for this machine is told apart.
pub fn a_file_that_is_no_kernel_is_refused_by_what_it_is() {
    let host = Host::new();
    let file = |name: &str, bytes: &[u8]| {
        let path = host.path(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let elf = sterna_guest::elf();
    let mut arm_image = vec![0; 4096];
    arm_image[56..60].copy_from_slice(b"ARM\x64");
    for (path, part) in [
        (file("text", b"#!/bin/sh\necho no kernel\n"), "the kernel is a text file, not a bzImage or an ELF vmlinux"),
        (file("empty", b""), "the kernel file is empty"),
        (file("noise", &[0xe5; 8192]), "the kernel is neither a bzImage nor an ELF vmlinux"),
        (file("cut", &elf[..elf.len() / 2]), "the kernel is truncated: its headers describe "),
        (file("head", &elf[..64]), "the kernel is truncated: its headers describe "),
        (file("gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"), "gzip-compressed"),
        // e_machine: EM_AARCH64.
        (changed_kernel(&host, 18, &183u16.to_le_bytes()), "the kernel is built for "),
        (file("Image", &arm_image), "the kernel is built for "),
    ] {
        let said = refused(&host, REFUSED, &["--kernel", &path, "--memory", "64M"]);
        assert_said(&said, &format!("cannot boot {path}\n"));
        assert_said(&said, part);
    }
    let missing = host.path("missing");
    let said = refused(&host, USAGE, &["--kernel", &missing]);
    assert_said(&said, &format!("kernel {missing}: No such file or directory"));
    let said = refused(&host, USAGE, &["--kernel", "/"]);
    assert_said(&said, "kernel / is a directory");
}

/// What does not fit into RAM is refused with both sizes.
pub fn what_does_not_fit_into_ram_is_refused() {
    let host = Host::new();
    let elf = sterna_guest::elf();
    let headers = u64::from_le_bytes(elf[32..40].try_into().unwrap()) as usize;
    // p_memsz of the first program header.
    let kernel = changed_kernel(&host, headers + 40, &(1u64 << 30).to_le_bytes());
    let said = refused(&host, REFUSED, &["--kernel", &kernel, "--memory", "64M"]);
    assert_said(&said, "but RAM ends at 0x4000000: give the machine more memory");
    let initrd = host.disk("initrd", 200 << 20);
    let said = refused(&host, REFUSED, &["--initrd", &initrd, "--memory", "64M"]);
    assert_said(&said, "the initrd is 209715200 bytes long, but only ");
    fs::write(&initrd, "").unwrap();
    assert_said(&refused(&host, REFUSED, &["--initrd", &initrd]), "the initrd is empty");
    let said = refused(&host, REFUSED, &["--cmdline", &"x".repeat(5000)]);
    assert_said(&said, "the kernel command line is 5000 bytes long; this kernel takes ");
}

/// Sizes and numbers outside their limits, each way to write them.
pub fn sizes_outside_their_limits_are_refused() {
    let host = Host::new();
    for (flag, value, part) in [
        ("--memory", "0", "memory is 0B; a guest needs 4M or more"),
        ("--memory", "1K", "memory is 1K; a guest needs 4M or more"),
        ("--memory", "-1", "memory: '-1' is not a size; write it like 512M or 2GiB"),
        ("--memory", "lots", "memory: 'lots' is not a size"),
        ("--memory", "1000T", "memory is 1000T; this host has "),
        ("--memory", "99999999999999999999", "memory: '99999999999999999999' is too large"),
        ("--cpus", "0", "cpus is 0; it must be 1 to 32"),
        ("--cpus", "1000", "cpus is 1000; it must be 1 to 32"),
        ("--cpus", "-1", "cpus: '-1' is not a whole number"),
        ("--serial", "modem", "serial: 'modem' must be stdio, null, file=PATH or socket=PATH"),
        ("--vsock", "cid=2,socket=/tmp/v", "vsock: cid is 2; 3 is the first that a guest can have"),
    ] {
        assert_said(&refused(&host, USAGE, &[flag, value]), part);
    }
}

/// Each file that cannot be a disk.
pub fn a_disk_that_is_none_is_refused() {
    let host = Host::new();
    let (short, ragged) = (host.disk("short", 511), host.disk("ragged", 4096 + 100));
    let disk = |code, keys: &str| refused(&host, code, &["--disk", keys]);
    let missing = host.path("missing");
    assert_said(&disk(USAGE, &format!("path={missing}")), &format!("disk0: {missing}: No such file or directory"));
    assert_said(&disk(USAGE, "path=/tmp"), "disk0: /tmp is a directory; it must be a raw image or a block device");
    assert_said(&disk(USAGE, "path=/dev/null"), "disk0: /dev/null is neither a file nor a block device");
    let said = disk(USAGE, &format!("path={short}"));
    assert_said(&said, &format!("disk0: {short} has 511 bytes, less than a sector (512)"));
    let said = disk(REFUSED, &format!("path={ragged}"));
    assert_said(&said, &format!("disk image {ragged} has 4196 bytes, not a multiple of "));
    assert_said(&said, "grow it with `truncate -s %");
    assert_said(&disk(USAGE, &format!("path={short},redonly=on")), "unknown key `redonly`; did you mean `readonly`?");
    let good = host.disk("good", 1 << 20);
    let twice = format!("path={good}");
    let said = refused(&host, USAGE, &["--disk", &twice, "--disk", &twice]);
    assert_said(&said, "disk0 and disk1 are the same image");
}

/// Names that no VM can have, or that one has.
pub fn a_name_that_cannot_be_is_refused() {
    let host = Host::new();
    let run = |name: &str| host.fails(USAGE, &["run", "--name", name, "--kernel", KERNEL]);
    assert_said(&run("a/b"), "name 'a/b' must not contain a slash");
    assert_said(&run("../up"), "name '../up' must not contain a slash");
    assert_said(&run(""), "no name is given; add --name NAME");
    let long = "x".repeat(120);
    let said = run(&long);
    assert_said(&said, &format!("the socket path {}", host.path(&long)));
    assert_said(
        &said,
        "a socket's path has at most 107; choose a shorter name or set STERNA_DIR to a shorter directory",
    );
    let socket = format!("socket=/tmp/{long}");
    assert_said(&refused(&host, USAGE, &["--serial", &socket]), "has 125 bytes; a socket's path has at most 107 here");
    let vsock = format!("cid=3,{socket}");
    assert_said(&refused(&host, USAGE, &["--vsock", &vsock]), "has 125 bytes; a socket's path has at most 96 here");
    assert_eq!(host.left_behind(), [""; 0]);

    let mut vm = host.run_named("taken", "tick=50", &[]);
    vm.wait_for("tick 1 ");
    let said = run("taken");
    assert_said(&said, &format!("the name 'taken' is in use by process {}", vm.pid()));
    assert_said(&said, "guest: the one of that name runs on, a new one was not started");
    assert_said(&said, "next: sterna show taken, or another --name");
    vm.wait_for("tick ");
    vm.power_off();
}

/// Everything wrong with a file and a command line is said in one go, in the words of whoever wrote it.
pub fn everything_wrong_is_said_at_once() {
    let host = Host::new();
    let file = host.path("vm.toml");
    let text = "kernal = \"k\"\nmemory = \"1K\"\ncpus = 1000\n[[disk]]\npath = \"/nowhere\"\nredonly = true\n\
                [[net]]\ntap = \"much-too-long-a-name\"\nmac = \"zz\"\n";
    fs::write(&file, text).unwrap();
    let said = host.fails(USAGE, &["run", "--config", &file, "--name", "a/b", "--kernel", "/missing"]);
    for part in [
        "error: 9 things are wrong:\n".to_owned(),
        format!("{file}: unknown key `kernal`; did you mean `kernel`?"),
        "name 'a/b' must not contain a slash".to_owned(),
        "kernel /missing: No such file or directory".to_owned(),
        "memory is 1K; a guest needs 4M or more".to_owned(),
        "cpus is 1000; it must be 1 to 32".to_owned(),
        "disk 0: unknown key `redonly`; did you mean `readonly`?".to_owned(),
        "disk0: /nowhere: No such file or directory".to_owned(),
        "net 0: 'zz' is not a MAC address; write it like 02:00:00:00:00:01".to_owned(),
        "net0: tap 'much-too-long-a-name' has 20 characters; at most 15 are possible".to_owned(),
    ] {
        assert_said(&said, &part);
    }
    assert_eq!(host.left_behind(), [""; 0]);
    fs::write(&file, "name = \"vm\"\ncpus = = 2\n").unwrap();
    assert_said(&host.fails(USAGE, &["run", "--config", &file]), &format!("{file}, line 2: "));
}

/// What only shows when it is opened is said at once as well.
pub fn everything_that_does_not_open_is_said_at_once() {
    let host = Host::new();
    let (image, ragged, text) = (host.disk("image", 1 << 20), host.disk("ragged", 4196), host.path("text"));
    fs::write(&text, "no kernel\n").unwrap();
    let disks = [format!("path={image}"), format!("path={ragged}")];
    let mut vm = host.run_named("holder", "tick=50", &["--disk", &disks[0]]);
    vm.wait_for("tick 1 ");
    let (net, serial) = ("tap=sterna-none,id=lan", "file=/dev/full/log");
    let words = ["run", "--name", "vm", "--kernel", &text, "--disk", &disks[0], "--disk", &disks[1], "--net", net];
    let said = host.fails(REFUSED, &[&words[..], &["--serial", serial]].concat());
    for part in [
        "error: the VM 'vm' cannot start\n  cause: 5 things are in the way:\n".to_owned(),
        format!("\n    - cannot make disk0: disk image {image} is locked by VM holder (sterna, process {})", vm.pid()),
        format!("\n    - cannot make disk1: disk image {ragged} has 4196 bytes, not a multiple of "),
        "\n    - cannot make lan: tap interface sterna-none does not exist; to make it: ip tuntap add".to_owned(),
        "\n    - cannot make serial: cannot open /dev/full/log for the console's output: Not a directory".to_owned(),
        format!("\n    - cannot boot {text}: the kernel is a text file"),
    ] {
        assert_said(&said, &part);
    }
    vm.power_off();
    assert_eq!(host.left_behind(), [""; 0]);
}

/// What is wrong with the words and what only shows when it is opened is said by one start, in the order of the configuration, and the
/// trying leaves nothing.
pub fn what_is_wrong_and_what_does_not_open_is_said_by_one_start() {
    let host = Host::new();
    let (ragged, free, held) = (host.disk("ragged", 4196), host.disk("free", 1 << 20), host.disk("held", 1 << 20));
    let (text, log) = (host.path("text"), host.path("console.log"));
    fs::write(&text, "no kernel\n").unwrap();
    let mut holder = host.run_named("holder", "tick=50", &["--disk", &format!("path={held}")]);
    holder.wait_for("tick 1 ");
    let disk = |path: &str| format!("path={path}");
    let (vsock, serial) = (format!("cid=3,socket={text}"), format!("file={log}"));
    let words = ["run", "--name", "vm", "--kernel", &text, "--cpus", "0", "--memory", "1K", "--serial", &serial];
    let devices =
        ["--disk", &disk(&ragged), "--disk", &disk(&free), "--disk", &disk(&held), "--net", "tap=sterna-none"];
    let made = ["--net", "tap=sterna-made,create=on", "--vsock", &vsock];
    let said = host.fails(USAGE, &[&words[..], &devices, &made].concat());
    let mut place = 0;
    for part in [
        "error: 7 things are wrong:".to_owned(),
        format!("\n  - cannot boot {text}: the kernel is a text file"),
        "\n  - memory is 1K; a guest needs 4M or more".to_owned(),
        "\n  - cpus is 0; it must be 1 to 32".to_owned(),
        format!("\n  - cannot make disk0: disk image {ragged} has 4196 bytes, not a multiple of "),
        format!("\n  - cannot make disk2: disk image {held} is locked by VM holder (sterna, process {})", holder.pid()),
        "\n  - cannot make net0: tap interface sterna-none does not exist".to_owned(),
        format!("\n  - cannot make vsock: cannot make the vsock device: {text} exists and is not a socket"),
    ] {
        place += said[place..].find(&part).unwrap_or_else(|| panic!("{part:?} is not behind {place} in:\n{said}"));
    }
    holder.power_off();
    assert_eq!(host.left_behind(), [""; 0]);
    assert!(!fs::exists(&log).unwrap() && !fs::exists("/sys/class/net/sterna-made").unwrap());
    let (code, said) = host.run("off", &["--disk", &disk(&free)]).wait_exit();
    assert_eq!(code, Some(0), "{said}");
}

/// A vsock's socket is made when the machine is built, and the kernel is read after it: one start tells of both.
pub fn a_vsock_and_a_kernel_that_cannot_be_are_said_at_once() {
    let host = Host::new();
    let text = host.path("text");
    fs::write(&text, "no kernel\n").unwrap();
    let said = refused(&host, REFUSED, &["--kernel", &text, "--vsock", &format!("cid=3,socket={text}")]);
    assert_said(&said, "2 things are in the way:\n    - cannot boot ");
    assert_said(&said, "\n    - cannot make vsock: ");
}

/// A failure of a detached VM reaches whoever started it, with its exit code.
pub fn a_detached_failure_is_told_to_its_parent() {
    let host = Host::new();
    let text = host.path("text");
    fs::write(&text, "no kernel\n").unwrap();
    let said = refused(&host, REFUSED, &["--detach", "--kernel", &text]);
    assert_said(&said, "the kernel is a text file");
    let said = refused(&host, USAGE, &["--detach", "--serial", "stdio"]);
    assert_said(&said, "serial: stdio is not there with --detach; choose null, file=PATH or socket=PATH");
}

/// A host in whose /dev there is only what `script` makes; the rest of the machine is as it is. Needs root.
fn host_with_dev(script: &str) -> Host {
    let script = format!("mount -t tmpfs none /dev && {script} \"$@\"");
    Host::within(&["unshare", "--mount", "sh", "-c", &script, "sh"])
}

/// A host without KVM says what to load.
pub fn without_kvm_the_module_to_load_is_named() {
    let host = host_with_dev("exec");
    let said = refused(&host, UNREACHABLE, &[]);
    assert_said(&said, "cannot open /dev/kvm; load the module: modprobe kvm-intel or kvm-amd");
    assert_said(&said, "cause: No such file or directory");
    assert_said(&said, "next: sterna host check");
}

/// Something else at its place is told to be none.
pub fn a_dev_kvm_that_is_none_is_refused() {
    let host = host_with_dev("mknod -m 666 /dev/kvm c 1 3 && exec");
    let said = refused(&host, UNREACHABLE, &[]);
    assert_said(&said, "/dev/kvm is not KVM (version 12 of its interface); `ls -l /dev/kvm` shows what it is");
    assert_said(&said, "next: sterna host check");
}

/// A user who may not open /dev/kvm is told which group may.
pub fn without_the_right_to_kvm_the_group_is_named() {
    let user = format!("setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups");
    let host = host_with_dev(&format!("mknod -m 600 /dev/kvm c 10 232 && exec {user}"));
    // Where this user can read both, whoever owns the build directory.
    let (program, kernel) = (host.path("sterna"), host.path("guest.elf"));
    fs::copy(sterna(), &program).unwrap();
    fs::copy(KERNEL, &kernel).unwrap();
    chown(host.path("."), Some(NOBODY), Some(NOBODY)).unwrap();
    let words = ["run", "--name", "vm", "--kernel", &kernel];
    let output = crate::vm::finish(host.program(&program, &words), "sterna run as nobody");
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(UNREACHABLE), "{said}");
    assert_said(&said, "cannot open /dev/kvm; run as root or join the group that owns it: usermod -aG kvm $USER");
    assert_said(&said, "cause: Permission denied");
    assert_eq!(host.left_behind(), [""; 0]);
}
