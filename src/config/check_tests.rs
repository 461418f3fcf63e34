//! Each wrong configuration is refused by name, and all at once.

use super::*;
use std::fs::File;

/// A directory with a kernel and a disk image, and a machine that uses them and is right.
fn good() -> (tempfile::TempDir, VmConfig) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("vmlinuz"), "kernel").unwrap();
    File::create(path("disk")).unwrap().set_len(1 << 20).unwrap();
    let config = VmConfig {
        name: "web".into(),
        kernel: path("vmlinuz"),
        initrd: None,
        cmdline: "console=ttyS0".into(),
        memory_bytes: 64 << 20,
        cpus: 2,
        cpu: sterna_arch::CpuModel::Host,
        disks: vec![disk("disk0", &path("disk"))],
        nets: vec![net("net0", "tap0", 1)],
        vsock: Some(VsockConfig { cid: 3, socket: path("vsock") }),
        serial: SerialConfig::Socket(path("console")),
    };
    (dir, config)
}

fn disk(id: &str, path: &Path) -> DiskConfig {
    DiskConfig { id: id.into(), path: path.into(), readonly: false, direct: true, serial: id.into() }
}

fn net(id: &str, tap: &str, last: u8) -> NetConfig {
    NetConfig { id: id.into(), tap: tap.into(), create: false, mac: [2, 0, 0, 0, 0, last] }
}

/// The one problem that `change` makes in a right machine.
fn problem_of(change: impl FnOnce(&mut VmConfig, &Path)) -> String {
    let (dir, mut config) = good();
    change(&mut config, dir.path());
    match config.validate().list() {
        [one] => one.replace(&dir.path().display().to_string(), "DIR"),
        other => panic!("expected one problem, got {other:#?}"),
    }
}

#[test]
fn a_right_machine_has_no_problems() {
    let (_dir, config) = good();
    assert_eq!(config.validate(), Problems::default());
}

#[test]
fn sizes_outside_their_limits_are_refused() {
    let memory = |bytes| problem_of(|config, _| config.memory_bytes = bytes);
    assert_eq!(memory(0), "memory is 0B; a guest needs 4M or more");
    assert_eq!(memory(1024), "memory is 1K; a guest needs 4M or more");
    assert_eq!(memory((4 << 20) + 1), "memory is 4194305 bytes; it must be a multiple of 4K");
    assert!(memory(1 << 60).starts_with("memory is 1048576T; this host has "));
    assert_eq!(problem_of(|config, _| config.cpus = 0), "cpus is 0; it must be 1 to 32");
    assert_eq!(problem_of(|config, _| config.cpus = 1000), "cpus is 1000; it must be 1 to 32");
    let crowd =
        problem_of(|config, _| config.nets = (0..40).map(|i| net(&format!("n{i}"), &format!("t{i}"), i)).collect());
    assert_eq!(crowd, "42 disks, networks and vsock are given; a machine has room for 29");
}

#[test]
fn kernel_and_initrd_must_be_files() {
    let kernel = |name: &str| problem_of(|config, dir| config.kernel = dir.join(name));
    assert_eq!(kernel("none"), "kernel DIR/none: No such file or directory");
    assert_eq!(kernel(""), "kernel DIR/ is a directory");
    assert_eq!(problem_of(|config, _| config.kernel = "/dev/null".into()), "kernel /dev/null is not a file");
    assert!(problem_of(|config, _| config.kernel = "".into()).starts_with("no kernel is given"));
    assert_eq!(
        problem_of(|config, dir| config.initrd = Some(dir.join("none"))),
        "initrd DIR/none: No such file or directory"
    );
    assert!(problem_of(|config, _| config.cmdline = "a\nb".into()).contains("control character"));
}

#[test]
fn a_disk_must_be_an_image() {
    let path = |name: &str| problem_of(|config, dir| config.disks[0].path = dir.join(name));
    assert_eq!(path("none"), "disk0: DIR/none: No such file or directory");
    assert_eq!(path(""), "disk0: DIR/ is a directory; it must be a raw image or a block device");
    assert_eq!(path("vmlinuz"), "disk0: DIR/vmlinuz has 6 bytes, less than a sector (512)");
    assert_eq!(
        problem_of(|config, _| config.disks[0].path = "/dev/null".into()),
        "disk0: /dev/null is neither a file nor a block device"
    );
    assert_eq!(problem_of(|config, _| config.disks[0].path = "".into()), "disk0: no image is given; add path=FILE");
    assert!(problem_of(|config, _| config.disks[0].serial = "x".repeat(21)).contains("at most 20"));
}

#[test]
fn one_image_has_one_writer_or_only_readers() {
    let twice = |readonly: bool| {
        let (dir, mut config) = good();
        std::os::unix::fs::symlink(dir.path().join("disk"), dir.path().join("link")).unwrap();
        config.disks.push(disk("other", &dir.path().join("link")));
        config.disks[0].readonly = true;
        config.disks[1].readonly = readonly;
        config.validate()
    };
    assert!(twice(false).to_string().starts_with("disk0 and other are the same image, "), "{}", twice(false));
    assert_eq!(twice(true), Problems::default());
}

#[test]
fn a_tap_needs_a_possible_name() {
    let tap = |name: &str| problem_of(|config, _| config.nets[0].tap = name.into());
    assert_eq!(tap(""), "net0: no tap device is given; add tap=NAME");
    assert_eq!(tap("a-name-too-long0"), "net0: tap 'a-name-too-long0' has 16 characters; at most 15 are possible");
    for name in ["..", "a/b", "a b", "tap%d"] {
        assert!(tap(name).ends_with("is not a possible name of a network interface"), "{name}");
    }
    assert!(problem_of(|config, _| config.nets[0].mac[0] = 1).contains("not one of a single interface"));
}

#[test]
fn nothing_is_given_twice() {
    let second = |id: &str, tap: &str, mac| problem_of(|config, _| config.nets.push(net(id, tap, mac)));
    assert_eq!(second("disk0", "tap1", 2), "id 'disk0' is given to 2 devices; each needs its own");
    assert_eq!(second("net1", "tap0", 2), "tap 'tap0' is given to 2 interfaces; each needs its own");
    assert_eq!(second("net1", "tap1", 1), "MAC address 02:00:00:00:00:01 is given to 2 interfaces; each needs its own");
    assert!(second("rng", "tap1", 2).contains("belongs to a device that every machine has"));
    assert!(second("a/b", "tap1", 2).contains("must be 1 to 20 letters"));
}

#[test]
fn sockets_need_room_and_a_directory() {
    let cid = |cid| problem_of(|config, _| config.vsock.as_mut().unwrap().cid = cid);
    assert_eq!(cid(2), "vsock: cid is 2; 3 is the first that a guest can have");
    assert_eq!(cid(u32::MAX), "vsock: cid is 4294967295; 3 is the first that a guest can have");
    assert_eq!(
        problem_of(|config, dir| config.serial = SerialConfig::Socket(dir.join("no/console"))),
        "serial: socket DIR/no/console: DIR/no is not a directory"
    );
    let long = format!("/tmp/{}", "x".repeat(103));
    assert_eq!(
        problem_of(|config, _| config.serial = SerialConfig::Socket(long.clone().into())),
        format!("serial: socket {long} has 108 bytes; a socket's path has at most 107 here")
    );
}

#[test]
fn all_problems_are_reported_at_once() {
    let config = VmConfig {
        name: "a/b".into(),
        kernel: "/nowhere".into(),
        initrd: Some("/nowhere".into()),
        cmdline: String::new(),
        memory_bytes: 0,
        cpus: 0,
        cpu: sterna_arch::CpuModel::Host,
        disks: vec![disk("disk0", Path::new("/nowhere"))],
        nets: vec![net("disk0", "", 1)],
        vsock: Some(VsockConfig { cid: 0, socket: "".into() }),
        serial: SerialConfig::Null,
    };
    let problems = config.validate();
    assert_eq!(problems.list().len(), 10, "{problems}");
    assert!(problems.to_string().starts_with("10 things are wrong:\n  - name 'a/b' "), "{problems}");
}

#[test]
fn only_parts_with_nothing_wrong_are_tried_and_told_at_their_place() {
    let (_dir, mut config) = good();
    config.memory_bytes = 0;
    config.disks.push(disk("disk1", Path::new("/nowhere")));
    config.nets.push(net("net1", "a/b", 2));
    let problems = config.validate_trying(true, &mut |part| {
        Some(match part {
            Part::Boot(_) => "boot".into(),
            Part::Disk(disk) => disk.id.clone(),
            Part::Net(net) => net.id.clone(),
            Part::Vsock(_) => "vsock".into(),
            Part::Serial(_) => "serial".into(),
        })
    });
    assert_eq!(
        problems.list(),
        [
            "boot",
            "memory is 0B; a guest needs 4M or more",
            "disk0",
            "disk1: /nowhere: No such file or directory",
            "net0",
            "net1: tap 'a/b' is not a possible name of a network interface",
            "vsock",
            "serial",
        ]
    );
}
