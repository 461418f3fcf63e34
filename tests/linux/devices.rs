//! What a stock kernel's drivers do with our devices, on the shared guest.

use crate::world::{Held, LIMIT, Result, ensure, world};
use sterna_testbed::{Guest, Node};

/// Both vCPUs and the clock source are what they should be, and the kernel has nothing to complain about.
pub fn the_kernel_is_content() -> Result {
    let mut world = world()?;
    let guest = world.shared()?;
    let seen = guest.check("nproc; cat /sys/devices/system/clocksource/clocksource0/current_clocksource", LIMIT)?;
    ensure!(seen == "2\nkvm-clock" || seen == "2\ntsc", "{seen}");
    let complaints =
        guest.check("dmesg | grep -E 'BUG|WARNING|Oops|lockup|ACPI.*(rror|xception)|FAILED' || true", LIMIT)?;
    ensure!(complaints.is_empty(), "the kernel complains:\n{complaints}");
    Ok(())
}

/// Sizes, order and serial numbers of three disks.
pub fn disks_are_what_they_were_said_to_be() -> Result {
    let mut world = world()?;
    let guest = world.shared()?;
    let seen = guest.check(
        "for d in vda vdb vdc; do cat /sys/block/$d/size /sys/block/$d/serial; echo; cat /sys/block/$d/ro; done",
        LIMIT,
    )?;
    let words: Vec<&str> = seen.split_whitespace().collect();
    let expected = ["524288", "first", "0", "131072", "second", "0"];
    ensure!(words.get(..6) == Some(&expected), "{seen}");
    ensure!(words.get(7..9) == Some(&["tools", "1"]), "{seen}");
    Ok(())
}

/// A read-only disk reads, and refuses to be written.
pub fn a_read_only_disk_is_not_written() -> Result {
    let mut world = world()?;
    let guest = world.shared()?;
    guest.check("dd if=/dev/vdc of=/dev/null bs=1M count=4", LIMIT)?;
    let output = guest.run("dd if=/dev/zero of=/dev/vdc bs=512 count=1", LIMIT)?;
    ensure!(output.status != 0, "a write to a read-only disk succeeded");
    Ok(())
}

/// fio writes and verifies both disks at the same time.
pub fn fio_verifies_two_disks() -> Result {
    let mut world = world()?;
    let guest = world.shared()?;
    guest.check("mkdir -p /tools && mount -o ro /dev/vdc /tools", LIMIT)?;
    let output = guest.run(
        "/tools/bin/fio --ioengine=libaio --direct=1 --rw=randwrite --bsrange=4k-64k --iodepth=16 --size=24m --verify=crc32c \
         --do_verify=1 --verify_fatal=1 --group_reporting --minimal --name=one --filename=/dev/vda --name=two --filename=/dev/vdb",
        LIMIT,
    )?;
    guest.check("umount /tools", LIMIT)?;
    ensure!(output.status == 0, "fio: {}", output.stdout);
    Ok(())
}

/// Discarded blocks leave the image, and a filesystem's contents stay.
pub fn discard_shrinks_the_image() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let blocks = || -> Result<u64> { Ok(host.check("stat -c %b /data/one.img")?.parse()?) };
    let guest = world.shared()?;
    guest.check("dd if=/dev/urandom of=/dev/vda bs=1M count=64 oflag=direct", LIMIT)?;
    let full = blocks()?;
    guest.check("blkdiscard -o 16777216 -l 33554432 /dev/vda", LIMIT)?;
    let after = blocks()?;
    ensure!(full - after >= 60_000, "32 MiB discarded, but {full} blocks became {after}");
    let sum = guest.check("dd if=/dev/vda bs=1M skip=16 count=32 iflag=direct | tr -d '\\000' | wc -c", LIMIT)?;
    ensure!(sum.ends_with('0'), "discarded blocks read as {sum} bytes that are not zero");
    Ok(())
}

/// The guest's kernel has the disk write zeros: they are in the image, with its blocks or without them as it said, and around them
/// is what was there.
pub fn write_zeroes_makes_zeros_of_a_range() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let blocks = || -> Result<u64> { Ok(host.check("stat -c %b /data/one.img")?.parse()?) };
    let guest = world.shared()?;
    let most = guest.check("cat /sys/block/vda/queue/write_zeroes_max_bytes", LIMIT)?;
    ensure!(most != "0", "the disk offers no write-zeroes");
    guest.check("dd if=/dev/urandom of=/dev/vda bs=1M count=64 oflag=direct", LIMIT)?;
    let around = "(dd if=/dev/vda bs=1M count=16 iflag=direct; dd if=/dev/vda bs=1M skip=48 count=16 iflag=direct) 2>/dev/null \
                  | md5sum";
    let (full, before) = (blocks()?, guest.check(around, LIMIT)?);
    let inside = "dd if=/data/one.img bs=1M skip=16 count=32 iflag=direct 2>/dev/null | tr -d '\\000' | wc -c";
    ensure!(host.check(inside)? != "0", "noise that is zero");

    guest.check("guest-tool write-zeroes /dev/vda 16777216 33554432", LIMIT)?;
    ensure!(host.check(inside)? == "0", "the image holds something else than zeros");
    let kept = blocks()?;
    ensure!(full.abs_diff(kept) < 1000, "{full} blocks became {kept}, and none were to be given up");

    guest.check("guest-tool write-zeroes --unmap /dev/vda 16777216 33554432", LIMIT)?;
    ensure!(host.check(inside)? == "0", "the image holds something else than zeros");
    let after = blocks()?;
    ensure!(kept.saturating_sub(after) >= 60_000, "32 MiB of zeros with unmap, but {kept} blocks became {after}");
    ensure!(guest.check(around, LIMIT)? == before, "what lies around the zeros has changed");
    Ok(())
}

/// The host pings the guest through the tap.
pub fn the_host_pings_the_guest() -> Result {
    let mut world = world()?;
    world.shared()?;
    pings(&mut world)
}

fn pings(world: &mut Held) -> Result {
    let ping = world.host(Node::A)?.check("ping -c 5 -i 0.2 -W 10 10.9.0.20")?;
    ensure!(ping.contains(" 0% packet loss"), "{ping}");
    Ok(())
}

/// 100 MB each way through the tap, with checksums.
pub fn tcp_carries_100_mb_each_way() -> Result {
    tcp(&mut world()?, 100)
}

/// Ping, and `mb` MB of TCP each way.
pub fn the_network_carries(world: &mut Held, mb: u32) -> Result {
    pings(world)?;
    tcp(world, mb)
}

fn tcp(world: &mut Held, mb: u32) -> Result {
    let host = world.host(Node::A)?;
    let guest = world.shared()?;
    let mut receiver = host.spawn("guest-tool tcp-receive 9100")?;
    receiver.wait_for("listening", LIMIT)?;
    let out = guest.check(&format!("guest-tool tcp-send 10.9.0.1 9100 {mb}"), LIMIT)?;
    ensure!(out.starts_with("same"), "guest to host: {out}");
    listen(guest, "tcp-receive 9101")?;
    let back = host.run_for(&format!("guest-tool tcp-send 10.9.0.20 9101 {mb}"), LIMIT)?;
    ensure!(back.status == 0 && back.stdout.starts_with("same"), "host to guest: {back:?}");
    Ok(())
}

/// Starts what listens in the guest, and waits until it does.
fn listen(guest: &mut Guest, tool: &str) -> Result {
    let wait = "for i in $(seq 100); do grep -q listening /tmp/listener && break; sleep 0.1; done";
    guest.check(&format!("rm -f /tmp/listener; (guest-tool {tool} >/tmp/listener 2>&1 &); {wait}"), LIMIT)?;
    Ok(())
}

/// vsock, both directions, with everything compared.
pub fn vsock_echoes_both_ways() -> Result {
    vsock_carries(&mut world()?, 8)
}

/// `mb` MB over vsock, to the host and back, and to the guest and back.
pub fn vsock_carries(world: &mut Held, mb: u32) -> Result {
    let host = world.host(Node::A)?;
    let guest = world.shared()?;
    let mut echo = host.spawn("rm -f /run/shared.vsock_5000; exec guest-tool unix-echo /run/shared.vsock_5000")?;
    echo.wait_for("listening", LIMIT)?;
    let out = guest.check(&format!("guest-tool vsock-send 2 5000 {mb}"), LIMIT)?;
    ensure!(out.starts_with("same"), "guest to host: {out}");
    guest.check("pkill guest-tool || true", LIMIT)?;
    listen(guest, "vsock-echo 6000")?;
    let back = host.run_for(&format!("guest-tool unix-send /run/shared.vsock 6000 {mb}"), LIMIT)?;
    ensure!(back.status == 0 && back.stdout.starts_with("same"), "host to guest: {back:?}");
    Ok(())
}

/// The guest's entropy device gives bytes, and its clock chip the host's time.
pub fn entropy_and_clock_chip_answer() -> Result {
    let mut world = world()?;
    let guest = world.shared()?;
    let rng = guest.check(
        "cat /sys/class/misc/hw_random/rng_current; dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c",
        LIMIT,
    )?;
    ensure!(rng.starts_with("virtio_rng") && rng.ends_with("64"), "{rng}");
    let skew =
        guest.check("modprobe rtc-cmos; echo $(($(date +%s) - $(cat /sys/class/rtc/rtc0/since_epoch)))", LIMIT)?;
    let skew: i64 = skew.lines().last().unwrap_or_default().parse()?;
    ensure!(skew.abs() <= 2, "clock chip and system clock are {skew} s apart");
    Ok(())
}

/// The balloon takes memory from the guest, and the guest gets it back.
pub fn the_balloon_moves_memory() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let free = |world: &mut Held| -> Result<i64> {
        let mib = world.shared()?.check("awk '/MemFree/ {print int($2/1024)}' /proc/meminfo", LIMIT)?;
        Ok(mib.parse()?)
    };
    let before = free(&mut world)?;
    host.check("sterna balloon shared 64M")?;
    world.wait_shown("/status/balloon/actual_bytes", |actual| actual == 64 << 20)?;
    let during = free(&mut world)?;
    ensure!(before - during >= 50, "free memory in the guest went from {before} to {during} MiB");
    world.wait_shown("/status/balloon/guest/total_bytes", |total| total > 100 << 20)?;
    host.check("sterna balloon shared 0")?;
    world.wait_shown("/status/balloon/actual_bytes", |actual| actual == 0)?;
    let after = free(&mut world)?;
    ensure!(after - during >= 50, "free memory in the guest went from {during} to {after} MiB");
    Ok(())
}

/// A guest that runs out of memory takes it back from the balloon instead of killing its programs.
pub fn the_balloon_yields_when_memory_runs_out() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    world.shared()?;
    host.check("sterna balloon shared 140M")?;
    world.wait_shown("/status/balloon/actual_bytes", |actual| actual == 140 << 20)?;
    let filled = world.shared()?.run("guest-tool memory 130 1", LIMIT)?;
    ensure!(filled.status == 0, "a program that needs the balloon's memory: {}", filled.stdout);
    host.check("sterna balloon shared 0")?;
    world.wait_shown("/status/balloon/actual_bytes", |actual| actual == 0)
}

/// Free pages that the guest reports leave the host's memory. Linux reports two seconds after they were freed, a few at a time.
pub fn free_pages_return_to_the_host() -> Result {
    let mut world = world()?;
    // The tool holds it while it is looked at: it may be back sooner than the prompt.
    let hold = "rm -f /tmp/enough; guest-tool memory 120 1000000 --until /tmp/enough >/tmp/held 2>&1 & \
                until grep -q 'round 1 ' /tmp/held; do sleep 1; done";
    world.shared()?.check(hold, LIMIT)?;
    let full = world.shown("/status/resident_bytes")?;
    world.shared()?.check("touch /tmp/enough", LIMIT)?;
    world.wait_shown("/status/resident_bytes", |resident| resident + (60 << 20) < full)
}
