//! Pause, reboot and power button of a stock kernel, on the shared guest; the last of them ends it.

use crate::world::{LIMIT, Result, ensure, world};
use std::time::Duration;
use sterna_testbed::Node;

const PAUSE: Duration = Duration::from_secs(10);

/// After ten seconds of standing still the clock is right, and nothing reports a lock-up.
pub fn a_pause_of_ten_seconds_is_no_lockup_and_the_clock_is_right() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let guest = world.shared()?;
    let uptime = |text: String| -> Result<f64> { Ok(text.split_whitespace().next().unwrap_or_default().parse()?) };
    let before = uptime(guest.check("cat /proc/uptime", LIMIT)?)?;
    host.check("sterna pause shared")?;
    let cpu = format!("awk '{{print $14 + $15}}' /proc/{}/stat", world.shown("/pid")?);
    let used_before: u64 = host.check(&cpu)?.parse()?;
    std::thread::sleep(PAUSE);
    let used = host.check(&cpu)?.parse::<u64>()? - used_before;
    ensure!(used <= 10, "the paused VM used {used} ticks of CPU in 10 s");
    host.check("sterna resume shared")?;
    let guest = world.shared()?;
    let after = uptime(guest.check("cat /proc/uptime", LIMIT)?)?;
    ensure!(after >= before, "uptime went back from {before} to {after}");
    // Both clocks are read within one round trip of the serial console and of the host's agent.
    let host_clock: f64 = host.check("date +%s")?.parse()?;
    let guest_clock: f64 = guest.check("date +%s", LIMIT)?.parse()?;
    let skew = guest_clock - host_clock;
    ensure!((-2.0..=4.0).contains(&skew), "the guest's clock is {skew} s from the host's");
    let complaints = guest.check("dmesg | grep -iE 'lockup|stall' || true", LIMIT)?;
    ensure!(complaints.is_empty(), "after the pause: {complaints}");
    Ok(())
}

/// A reboot from inside starts the same machine again, with its disks.
pub fn a_reboot_comes_back_with_everything() -> Result {
    let mut world = world()?;
    let guest = world.shared()?;
    guest.check("echo kept across | dd of=/dev/vdb bs=512 conv=sync oflag=direct", LIMIT)?;
    guest.start("reboot -f")?;
    guest.console().wait_for("STERNA-GUEST agent ready", LIMIT)?;
    let seen = guest.check("dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | tr -d '\\000'; nproc", LIMIT)?;
    ensure!(seen == "kept across\n2", "{seen}");
    Ok(())
}

/// The pulse of a machine with every device: disks keep their contents and can be written, ping, TCP and vsock carry again, the
/// balloon is as large as it was and still obeys.
pub fn a_pulse_keeps_every_device_at_work() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let guest = world.shared()?;
    guest.check("dd if=/dev/urandom of=/dev/vda bs=1M count=8 oflag=direct && sync", LIMIT)?;
    let sums = "for d in vda vdb; do dd if=/dev/$d bs=1M count=8 iflag=direct 2>/dev/null | sha256sum; done";
    let before = guest.check(sums, LIMIT)?;
    host.check("sterna balloon shared 64M")?;
    world.wait_shown("/status/balloon/actual_bytes", |actual| actual == 64 << 20)?;
    world.pulse_shared()?;
    let guest = world.shared()?;
    let after = guest.check(sums, LIMIT)?;
    ensure!(after == before, "the disks had\n{before}\nand have\n{after}");
    guest.check("dd if=/dev/vda of=/dev/vdb bs=1M count=8 iflag=direct oflag=direct", LIMIT)?;
    guest.check("cmp -n 8388608 /dev/vda /dev/vdb && nproc | grep -x 2", LIMIT)?;
    world.wait_shown("/status/balloon/actual_bytes", |actual| actual == 64 << 20)?;
    host.check("sterna balloon shared 0")?;
    world.wait_shown("/status/balloon/actual_bytes", |actual| actual == 0)?;
    crate::devices::the_network_carries(&mut world, 8)?;
    crate::devices::vsock_carries(&mut world, 1)
}

/// `sterna stop` presses the power button, the guest powers off, and the VM is gone.
pub fn stop_powers_the_guest_off() -> Result {
    let mut world = world()?;
    let host = world.host(Node::A)?;
    let mut guest = world.take_shared()?;
    let stopped = host.run_for("sterna stop shared --timeout 120s", LIMIT)?;
    ensure!(stopped.status == 0, "stop: {stopped:?}");
    let end = guest.console().wait(LIMIT)?;
    ensure!(end.status == 0, "exit code {}: {}", end.status, end.stderr);
    let left = host.check("sterna list")?;
    ensure!(!left.contains("shared"), "{left}");
    Ok(())
}
