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
