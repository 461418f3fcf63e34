//! Disks: what the guest writes is in the image, whoever may use an image, and I/O across pauses.

use crate::vm::{Host, LONG, Vm};
use rustix::fs::{FlockOperation, fcntl_lock};
use std::fs::{self, File};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SECTOR: usize = 512;

/// What the guest writes into the first `sectors` of a disk (tests/guest/image/blk.rs).
fn pattern(sectors: usize) -> Vec<u8> {
    let words = 0..(sectors * SECTOR / 8) as u64;
    words.flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// The number behind `key` in a line of the guest.
fn figure(line: &str, key: &str) -> u64 {
    let value = line.split(' ').find_map(|word| word.strip_prefix(key));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key} in {line:?}"))
}

fn assert_clean_end(vm: Vm) {
    let (code, said) = vm.wait_exit();
    assert_eq!(code, Some(0), "{said}");
}

/// Written, flushed, read back and compared by the guest, by interrupts and by polling, past the page cache and through
/// it; then found in the image, and nothing else.
pub fn what_the_guest_writes_is_in_the_image() {
    for (words, options) in [("disk irq off", ""), ("disk irq off", ",direct=off"), ("disk off", "")] {
        let host = Host::new();
        let image = host.disk("image", MIB);
        let mut vm = host.run(words, &["--disk", &format!("path={image}{options}")]);
        let outcome = vm.wait_for("disk ");
        assert!(outcome.starts_with("disk ok sectors=64 capacity=2048 beyond-status=1 "), "{outcome}");
        assert_eq!(figure(&outcome, "interrupts=") > 0, words.contains("irq"), "{outcome}");
        assert_clean_end(vm);
        let bytes = fs::read(&image).unwrap();
        assert!(bytes[..64 * SECTOR] == pattern(64), "{words} {options}: the image holds something else");
        assert!(bytes[64 * SECTOR..].iter().all(|&byte| byte == 0), "{words} {options}: written past the end");
    }
}

/// Disks are found in the order of the command line, and a write goes to one of them.
pub fn several_disks_keep_their_order() {
    let host = Host::new();
    let images: Vec<_> = (0..3).map(|index| host.disk(&format!("image{index}"), (index + 1) * MIB)).collect();
    let disks: Vec<_> = images.iter().map(|image| format!("path={image}")).collect();
    let arguments: Vec<_> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
    for index in [2, 0, 1] {
        let mut vm = host.run(&format!("disk=8 disk-index={index} irq off"), &arguments);
        let outcome = vm.wait_for("disk ok");
        assert_eq!(figure(&outcome, "capacity="), (index as u64 + 1) * 2048, "{outcome}");
        assert_clean_end(vm);
        assert!(fs::read(&images[index]).unwrap()[..8 * SECTOR] == pattern(8));
        File::create(&images[index]).unwrap().set_len((index as u64 + 1) * MIB).unwrap();
        let others = images.iter().map(|image| fs::read(image).unwrap());
        assert!(others.flatten().all(|byte| byte == 0), "disk {index}: another disk was written");
    }
}

/// The guest is told that a disk is read-only; a write all the same fails and changes nothing.
pub fn a_read_only_disk_refuses_writes() {
    let host = Host::new();
    let (first, second) = (host.disk("first", MIB), host.path("second"));
    fs::write(&second, vec![0xa5; 2 * MIB as usize]).unwrap();
    let disks = [format!("path={first}"), format!("path={second},readonly=on")];
    let mut vm = host.run("disk disk-index=1 irq off", &["--disk", &disks[0], "--disk", &disks[1]]);
    let outcome = vm.wait_for("disk ");
    assert_eq!(outcome, "disk read-only sectors=4096 write-status=1");
    assert_clean_end(vm);
    assert!(fs::read(&second).unwrap().iter().all(|&byte| byte == 0xa5));
}

/// A second VM on an image is refused and told who has it, by name and process, however the holder was started; the
/// holder runs on.
pub fn an_image_in_use_is_refused_by_its_holders_name() {
    let host = Host::new();
    let image = host.disk("image", MIB);
    let (kernel, disk) = (sterna_guest::GUEST_ELF, format!("path={image}"));
    let second = |more: &str| {
        let disk = format!("path={image}{more}");
        host.fails(3, &["run", "--name", "second", "--kernel", kernel, "--memory", "64M", "--disk", &disk])
    };
    let mut first = host.run_named("first", "tick=50", &["--disk", &disk]);
    first.wait_for("tick 1 ");
    for said in [second(""), second(",readonly=on"), second(",direct=off")] {
        let holder = format!("disk image {image} is locked by VM first (sterna, process {})", first.pid());
        assert!(said.contains("cannot make disk0") && said.contains(&holder), "{said}");
        assert!(said.contains("guest: none was started"), "{said}");
    }
    assert_eq!(host.left_behind().len(), 2, "only the first VM's socket and lock: {:?}", host.left_behind());
    first.wait_for("tick ");
    first.power_off();

    host.ok(&[
        "run",
        "--detach",
        "--name",
        "far",
        "--kernel",
        kernel,
        "--cmdline",
        "halt",
        "--memory",
        "64M",
        "--disk",
        &disk,
    ]);
    let said = second("");
    assert!(said.contains("is locked by VM far (sterna, process "), "{said}");
    host.ok(&["stop", "far", "--force"]);
    assert_eq!(host.left_behind(), [""; 0]);
}

/// Any number of VMs read an image together, and none may write it meanwhile.
pub fn readers_share_an_image() {
    let host = Host::new();
    let image = host.disk("image", MIB);
    let disk = format!("path={image},readonly=on");
    let mut readers = ["one", "two"].map(|name| host.run_named(name, "disk tick=50", &["--disk", &disk]));
    for vm in &mut readers {
        vm.wait_for("disk read-only sectors=2048 write-status=1");
    }
    let kernel = sterna_guest::GUEST_ELF;
    let writer = ["run", "--name", "writer", "--kernel", kernel, "--disk", &format!("path={image}")];
    let said = host.fails(3, &writer);
    assert!(said.contains("is locked by VM one (") || said.contains("is locked by VM two ("), "{said}");
    readers.into_iter().for_each(Vm::power_off);
}

/// While a guest reboots, over and over, nobody gets its image.
pub fn the_lock_is_held_across_a_reboot() {
    let host = Host::new();
    let image = host.disk("image", MIB);
    let mut vm = host.run("disk=8 tick=20", &["--disk", &format!("path={image}")]);
    vm.wait_for("tick 1 ");
    let over = AtomicBool::new(false);
    let file = File::options().read(true).write(true).open(&image).unwrap();
    thread::scope(|scope| {
        let thief = scope.spawn(|| {
            let mut attempts = 0;
            while !over.load(Ordering::Relaxed) {
                // A POSIX lock, which collides with the open file description's that a VM holds.
                if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                    return Err(attempts);
                }
                attempts += 1;
            }
            Ok(attempts)
        });
        for _ in 0..5 {
            vm.type_in("r");
            vm.wait_for("disk ok");
            vm.wait_for("tick 1 ");
        }
        over.store(true, Ordering::Relaxed);
        let attempts = thief.join().unwrap().unwrap_or_else(|n| panic!("attempt {n} had the lock"));
        assert!(attempts > 100, "only {attempts} attempts: nothing was tested");
    });
    vm.power_off();
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
}

/// A guest that is paused again and again while its disk works completes every request, and reads what it wrote.
pub fn pauses_in_the_middle_of_disk_io_lose_nothing() {
    let host = Host::new();
    let image = host.disk("image", 16 * MIB);
    let mut vm = host.run("disk=32768 irq tick=1000", &["--disk", &format!("path={image}")]);
    vm.wait_for("Sterna-guest ready");
    let deadline = Instant::now() + LONG;
    let mut pauses = 0;
    let outcome = loop {
        host.ok(&["pause", "vm"]);
        let said = vm.lines_within(Duration::from_millis(20));
        host.ok(&["resume", "vm"]);
        pauses += 1;
        let said = [said, vm.lines_within(Duration::from_millis(20))].concat();
        if let Some(line) = said.into_iter().find(|line| line.contains("disk")) {
            break line;
        }
        assert!(Instant::now() < deadline, "no end of the disk's work after {pauses} pauses");
    };
    assert!(outcome.starts_with("disk ok sectors=32768 "), "{outcome}");
    assert!(pauses > 3, "over after {pauses} pauses: nothing was tested");
    vm.power_off();
    assert!(fs::read(&image).unwrap() == pattern(32768), "the image holds something else");
}
