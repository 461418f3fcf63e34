//! Machines of every shape boot the stock kernel.

use crate::world::{LIMIT, Result, boot, ensure, power_off, pulse, start, world};
use std::time::Duration;
use sterna_testbed::{Control, Files, Host, Node};

/// What a kernel says of who loaded it: the kernel's own PVH entry, or a loader without a number of its own (boot protocol,
/// type_of_loader).
const BY_PVH: &str = "176";
const BY_64_BIT: &str = "255";

/// The host image has all that a Sterna host needs, by its own check, and stock kernels are proven to run on it.
pub fn the_host_image_passes_its_own_check() -> Result {
    let mut world = world()?;
    let checked = world.host(Node::A)?.run_for("sterna host check", Duration::from_secs(60))?;
    ensure!(checked.status == 0, "host check: {}", checked.stdout);
    ensure!(checked.stdout.contains("Stock kernels run here."), "host check: {}", checked.stdout);
    Ok(())
}

/// ELF vmlinux by PVH, one vCPU, a pulse, and the guest's own power-off.
pub fn vmlinux_boots_with_one_vcpu() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let mut guest = boot(&host, "elf", "--kernel /tools/guest/vmlinux --cpus 1 --memory 256M", "")?;
    let seen = guest.check("nproc; cat /proc/sys/kernel/bootloader_type", LIMIT)?;
    ensure!(seen == format!("1\n{BY_PVH}"), "processors and loader: {seen}");
    power_off(pulse(&host, "elf", guest)?)
}

/// The same file without its PVH note: by the 64-bit protocol, at its own entry point.
pub fn vmlinux_boots_by_the_64_bit_protocol() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let vmlinux = std::fs::read(Files::new().kernel_elf()?)?;
    // An ELF note: size of its name, of its contents, and its type, 18 for a PVH entry; then the name (Xen elfnote.h).
    let is_note = |bytes: &[u8]| bytes.starts_with(&[4, 0, 0, 0]) && bytes.ends_with(b"\x12\0\0\0Xen\0");
    let note = vmlinux.windows(16).step_by(4).position(is_note).ok_or("vmlinux has no PVH note")?;
    let kind = note * 4 + 8;
    host.check(&format!(
        "cp /tools/guest/vmlinux /data/elf64 && printf '\\377' | dd of=/data/elf64 bs=1 seek={kind} conv=notrunc 2>/dev/null"
    ))?;
    let mut guest = boot(&host, "elf64", "--kernel /data/elf64 --cpus 1 --memory 256M", "")?;
    let loader = guest.check("cat /proc/sys/kernel/bootloader_type", LIMIT)?;
    ensure!(loader == BY_64_BIT, "loader: {loader}");
    power_off(guest)?;
    Ok(host.check("rm /data/elf64").map(drop)?)
}

/// bzImage with four vCPUs, all of which do work, before a pulse and after it.
pub fn four_vcpus_come_up() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let mut guest = boot(&host, "four", "--cpus 4 --memory 256M", "")?;
    let work = "nproc; for cpu in 0 1 2 3; do taskset $((1 << cpu)) true && echo ran; done";
    let seen = guest.check(work, LIMIT)?;
    ensure!(seen == "4\nran\nran\nran\nran", "{seen}");
    let mut guest = pulse(&host, "four", guest)?;
    let seen = guest.check(work, LIMIT)?;
    ensure!(seen == "4\nran\nran\nran\nran", "after the pulse: {seen}");
    power_off(guest)
}

/// RAM above 4 GiB is there and holds what is written, over a pulse too.
pub fn five_gib_reach_above_the_hole() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let free_mib: u64 = host.check("awk '/MemAvailable/ {print int($2/1024)}' /proc/meminfo")?.parse()?;
    ensure!(free_mib > 5300, "the host has {free_mib} MiB, too little for this test");
    let mut guest = boot(&host, "big", "--cpus 1 --memory 5G", "")?;
    let total_kib: u64 = guest.check("awk '/MemTotal/ {print $2}' /proc/meminfo", LIMIT)?.parse()?;
    ensure!(total_kib > 4_800_000, "the guest has {total_kib} KiB");
    let above = guest.check("grep 'System RAM' /proc/iomem | tail -n 1", LIMIT)?;
    ensure!(above.trim().starts_with("100000000-"), "RAM above 4 GiB: {above}");
    // Linux fills from the top, so this is above 4 GiB.
    guest.check("guest-tool memory 64 1", LIMIT)?;
    guest.check("dd if=/dev/urandom of=/tmp/kept bs=1M count=16 2>/dev/null; sha256sum /tmp/kept >/tmp/sum", LIMIT)?;
    let mut guest = pulse(&host, "big", guest)?;
    guest.check("sha256sum -c /tmp/sum && guest-tool memory 64 1", LIMIT)?;
    power_off(guest)
}

/// A panic of the guest's kernel ends the VM with exit code 8 and a sentence.
pub fn a_kernel_panic_ends_the_vm() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let mut guest = boot(&host, "doomed", "--cpus 1 --memory 256M", "")?;
    guest.start("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger")?;
    let end = guest.console().wait(LIMIT)?;
    ensure!(end.status == 8, "exit code {}: {}", end.status, end.stderr);
    ensure!(end.stderr.contains("panicked"), "said: {}", end.stderr);
    Ok(())
}

/// A name that is taken, and an image that is locked, on this host and on another over NFSv4, before a pulse and after it.
pub fn an_image_in_use_is_refused_on_both_hosts() -> Result {
    let mut world = world()?;
    let (a, b) = (world.host(Node::A)?, world.host(Node::B)?);
    a.check("truncate -s 16M /shared/locked.img")?;
    let arguments = "--cpus 1 --memory 192M --disk path=/shared/locked.img";
    let guest = boot(&a, "holder", arguments, "")?;
    refused_on_both(&a, &b, arguments)?;
    // The lock went with the old process; the new one has its own.
    let guest = pulse(&a, "holder", guest)?;
    refused_on_both(&a, &b, arguments)?;
    power_off(guest)
}

/// A machine with the disk of the one named "holder" starts on neither host.
fn refused_on_both(a: &Host, b: &Host, arguments: &str) -> Result {
    let mut second = start(a, "second", arguments, "sterna.job=idle")?;
    let end = second.wait(LIMIT)?;
    ensure!(end.status == 3 && end.stderr.contains("holder"), "on the same host: {} {}", end.status, end.stderr);
    let mut other = start(b, "other", arguments, "sterna.job=idle")?;
    let end = other.wait(LIMIT)?;
    ensure!(
        end.status == 3 && end.stderr.contains("/shared/locked.img"),
        "on the other: {} {}",
        end.status,
        end.stderr
    );
    Ok(())
}

/// The control: QEMU boots the same kernel and initramfs, so what fails above is ours.
pub fn qemu_boots_the_same_guest() -> Result {
    let files = Files::new();
    let mut guest = Control { memory_mib: 256, ..Control::default() }.start(&files)?.ready(LIMIT)?;
    let seen = guest.check("nproc", LIMIT)?;
    ensure!(seen == "2", "{seen} processors");
    guest.start("poweroff -f")?;
    guest.console().wait(LIMIT)?;
    Ok(())
}
