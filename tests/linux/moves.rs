//! A stock guest moves between two hosts with kernels of their own, its disk on a volume that both see, while it works.

use crate::world::{LIMIT, Result, TRAVELLER, Travel, ensure, world};
use sterna_testbed::{Link, Node, Running, Vm};

/// How far a guest's clocks may be from where they were, beside what the measurement itself may be wrong by.
const CLOCK_TOLERANCE_US: i64 = 10_000;
/// A standstill that a software CPU's links and hosts can keep.
const DOWNTIME: &str = "--max-downtime 2s";

/// What works in the guest while it moves.
struct Load {
    /// Numbered records over TCP, from host B to the guest and back.
    pulse: Running,
}

impl Load {
    /// fio writes and verifies, memory is filled and verified, both at `pace`, and a TCP stream with numbered records goes on.
    fn start(travel: &mut Travel, pace: &str) -> Result<Self> {
        let vm = &mut travel.vm;
        let (fio_pace, memory_pace) = pace.rsplit_once(' ').unwrap_or_default();
        vm.check(&format!(
            "rm -f /tmp/stop; (while [ ! -e /tmp/stop ]; do /tools/bin/fio --name=v --filename=/dev/vda --ioengine=libaio --direct=1 \
             --rw=randwrite --bsrange=4k-32k --iodepth=8 --size=2m --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal {fio_pace} \
             || exit; done; echo all right) >/tmp/fio 2>&1 & \
             guest-tool memory 16 1000000 {memory_pace} --until /tmp/stop >/tmp/memory 2>&1 & \
             netstat -tln | grep -q :9300 || {{ guest-tool tcp-echo 9300 >/tmp/echo 2>&1 & }}"
        ))?;
        for file in ["memory", "echo"] {
            vm.check(&format!("for i in $(seq 600); do [ -s /tmp/{file} ] && exit; sleep 0.1; done; exit 1"))?;
        }
        let b = travel.site(Node::B).host();
        let mut pulse = b.spawn(&format!("guest-tool tcp-pulse {TRAVELLER} 9300 10"))?;
        pulse.wait_for("connected", LIMIT)?;
        Ok(Self { pulse })
    }

    /// Ends it: everything that was compared was right. Returns what the TCP stream says.
    fn end(mut self, vm: &mut Vm) -> Result<String> {
        self.pulse.close_stdin()?;
        let pulse = self.pulse.wait(LIMIT)?;
        ensure!(pulse.status == 0, "the TCP stream: {} {}", pulse.stdout, pulse.stderr);
        vm.check("touch /tmp/stop")?;
        for (file, good) in [("memory", "right"), ("fio", "all right")] {
            let wait =
                format!("for i in $(seq 600); do tail -n 1 /tmp/{file} | grep -q '{good}' && exit; sleep 0.2; done");
            let ended = vm.check(&format!("{wait}; tail -n 3 /tmp/{file}; exit 1"));
            ensure!(ended.is_ok(), "{file}: {ended:?}");
        }
        let complaints = vm.check("dmesg | grep -E -A 40 'BUG:|WARNING|Oops|lockup|stall|I/O error' || true")?;
        ensure!(complaints.is_empty(), "the kernel complains:\n{complaints}");
        Ok(pulse.stdout.lines().last().unwrap_or_default().to_owned())
    }
}

/// Moves the guest to the other host: its uptime and both its clocks go on as if nothing had been.
fn moved(travel: &mut Travel, arguments: &str) -> Result {
    let (to, from) = (travel.other().clone(), travel.vm.site().clone());
    let set = to.set_clock_by(&from)?;
    let generation = travel.vm.generation()?;
    let before = travel.vm.clocks()?;
    let figures = travel.vm.migrate(&to, arguments)?;
    let after = travel.vm.clocks()?;
    let (wall_us, steady_us) = (after.realtime_us - before.realtime_us, after.monotonic_us - before.monotonic_us);
    let error_us = (set.rtt_us + before.rtt_us + after.rtt_us) / 2;
    println!(
        "  {} to {} {arguments}: {} ms in all, {} ms standstill, {} KiB in {} passes; wall clock moved by {wall_us} us, \
         monotonic clock by {steady_us} us, measured to {error_us} us",
        from.node().name(),
        to.node().name(),
        figures.total_time,
        figures.downtime,
        figures.ram.transferred >> 10,
        figures.ram.dirty_sync_count
    );
    for (clock, by_us) in [("wall", wall_us), ("monotonic", steady_us)] {
        ensure!(
            by_us.abs() <= CLOCK_TOLERANCE_US + error_us,
            "the {clock} clock moved by {by_us} us, known to {error_us} us"
        );
    }
    ensure!(travel.vm.generation()? == generation, "the generation id changed in a move");
    let left = from.host().check("sterna list")?;
    ensure!(!left.contains("web"), "left behind: {left}");
    let here = to.host().check("sterna list")?;
    ensure!(here.contains("web") && here.contains("running"), "at the target: {here}");
    Ok(())
}

/// Quick to B and back while fio verifies, memory is verified and a TCP stream goes on; the disk is its owner's on either host.
pub fn quick_there_and_back_under_load() -> Result {
    let mut world = world()?;
    let travel = world.travel()?;
    let load = Load::start(travel, " ")?;
    moved(travel, "--mode quick")?;
    let old = travel.other().host().clone();
    let second = old.run_for(
        "sterna run --name second --kernel /tools/guest/vmlinuz --disk path=/shared/web.img --cmdline sterna.job=idle",
        LIMIT,
    )?;
    ensure!(
        second.status == 3 && second.stderr.contains("/shared/web.img"),
        "a second start of the disk: {} {}",
        second.status,
        second.stderr
    );
    moved(travel, "--mode quick")?;
    println!("  TCP: {}", load.end(&mut travel.vm)?);
    Ok(())
}

/// The story: live there, quick back, live again; at most one ping in a second is lost in a live move.
pub fn live_there_quick_back_live_again_under_ping() -> Result {
    let mut world = world()?;
    let travel = world.travel()?;
    let load = Load::start(travel, "--rate_iops=10 --size=1m --pace=1")?;
    for (name, arguments) in [("live", DOWNTIME), ("quick", "--mode quick"), ("live", DOWNTIME)] {
        let watcher = travel.site(Node::B).clone();
        let mut pings = [watcher.ping(TRAVELLER, 1000)?, watcher.ping(TRAVELLER, 10)?];
        moved(travel, arguments)?;
        let mut said = Vec::new();
        // Each waits for late answers: both at once.
        pings.iter_mut().try_for_each(Running::close_stdin)?;
        for ping in &mut pings {
            said.push(ping.wait(LIMIT)?.stdout.lines().last().unwrap_or_default().to_owned());
        }
        println!("  {name}: each second: {}; each 10 ms: {}", said[0], said[1]);
        ensure!(name != "live" || said[0].contains("lost=0") || said[0].contains("lost=1 "), "pings: {}", said[0]);
    }
    println!("  TCP: {}", load.end(&mut travel.vm)?);
    Ok(())
}

/// Fills and verifies so many MiB of the guest's memory again and again, until [`remembered`].
fn remember(vm: &mut Vm, mib_and_pace: &str) -> Result {
    let line = format!("rm -f /tmp/stop; guest-tool memory {mib_and_pace} --until /tmp/stop >/tmp/memory 2>&1 &");
    Ok(vm.check(&line).map(drop)?)
}

/// All of it was right all the time.
fn remembered(vm: &mut Vm) -> Result {
    let line = "touch /tmp/stop; for i in $(seq 600); do grep -q right /tmp/memory && exit; sleep 0.2; done; exit 1";
    Ok(vm.check(line).map(drop)?)
}

/// Saved on one host and restored on another whose clock is a day ahead: the wall clock is right at once, the monotonic clock does not
/// go back, and nothing that ran noticed.
pub fn a_saved_guest_wakes_on_the_other_host_a_day_later() -> Result {
    const DAY_S: i64 = 86_400;
    let mut world = world()?;
    let travel = world.travel()?;
    let (to, from) = (travel.other().clone(), travel.vm.site().clone());
    let vm = &mut travel.vm;
    remember(vm, "16 1000000 --pace 1")?;
    let (before, generation) = (vm.clocks()?, vm.generation()?);
    from.host().check("sterna save web /shared/web.sterna")?;
    to.set_clock_by(&from)?;
    to.host().check(&format!("date -s @$(($(date +%s) + {DAY_S}))"))?;
    to.host().check("sterna restore /shared/web.sterna")?;
    vm.arrived(&to)?;
    let after = vm.clocks()?;
    let (wall_us, error_us) = (after.realtime_us - before.realtime_us, (before.rtt_us + after.rtt_us) / 2);
    println!("  wall clock moved by {wall_us} us against the host's, measured to {error_us} us");
    ensure!(wall_us.abs() <= CLOCK_TOLERANCE_US + error_us, "after a day the wall clock is off by {wall_us} us");
    ensure!(after.monotonic_us - before.monotonic_us < CLOCK_TOLERANCE_US + error_us, "{before:?} {after:?}");
    ensure!(vm.generation()? == generation, "a machine that was restored once is taken for a copy");
    remembered(vm)?;
    from.host().check("rm /shared/web.sterna")?;
    Ok(to.set_clock_by(&from).map(drop)?)
}

/// A file that was restored is refused, and with `--again` makes a second copy with a generation id of its own.
pub fn a_second_copy_has_a_generation_of_its_own() -> Result {
    let mut world = world()?;
    let travel = world.travel()?;
    let (site, from) = (travel.other().clone(), travel.vm.site().clone());
    let host = site.host();
    from.host().check("sterna save web /shared/web.sterna && sterna restore /shared/web.sterna")?;
    travel.vm.arrived(&from)?;
    let map = "--name copy --map disk0=/shared/copy.img,net0=copy0";
    host.check("cp /shared/web.img /shared/copy.img && ip tuntap add copy0 mode tap && ip link set copy0 up")?;
    let refused = host.run(&format!("sterna restore /shared/web.sterna {map}"))?;
    ensure!(refused.status == 3 && refused.stderr.contains("--again"), "{} {}", refused.status, refused.stderr);
    host.check(&format!("sterna restore /shared/web.sterna {map} --again"))?;
    let mut copy = Vm::join(&site, "copy")?;
    let (of_copy, of_first) = (copy.generation()?, travel.vm.generation()?);
    host.check("sterna stop copy --force && rm /shared/web.sterna /shared/copy.img && ip link del copy0")?;
    ensure!(of_copy != of_first, "both have the generation id {of_first}");
    Ok(())
}

/// 1 Gbit/s, and a link that loses and delays.
pub fn shaped_and_lossy_links_carry_a_move() -> Result {
    let mut world = world()?;
    world.travel()?;
    for shape in ["tbf rate 1gbit burst 1mb latency 50ms", "netem delay 2ms loss 1%"] {
        world.shape(Link::Hosts, Some(shape))?;
        let done = moved(world.travel()?, DOWNTIME);
        world.shape(Link::Hosts, None)?;
        println!("  over {shape}");
        done?;
    }
    Ok(())
}

/// On 100 Mbit/s: the stall is named with figures, and ends as was chosen.
pub fn a_guest_that_dirties_faster_than_the_link_is_named_and_left_or_stopped() -> Result {
    let mut world = world()?;
    remember(&mut world.travel()?.vm, "48 1000000")?;
    world.shape(Link::Hosts, Some("tbf rate 100mbit burst 64kb latency 50ms"))?;
    let done = dirty_faster(world.travel()?);
    world.shape(Link::Hosts, None)?;
    done
}

fn dirty_faster(travel: &mut Travel) -> Result {
    let to = travel.other().clone();
    let mut left = travel.vm.start_migrate(&to, "--timeout 25s --on-timeout cancel --max-downtime 50ms")?;
    let left = left.wait(LIMIT)?;
    ensure!(left.status == 5, "exit code {}: {}", left.status, left.stderr);
    ensure!(left.stderr.contains("dirties") && left.stderr.contains("carries"), "said: {}", left.stderr);
    println!("  {}", left.stderr.lines().find(|line| line.contains("dirties")).unwrap_or_default().trim());
    let figures = travel.vm.migrate(&to, "--timeout 12s --on-timeout pause --max-downtime 50ms")?;
    println!("  paused: {} ms in all, {} ms standstill", figures.total_time, figures.downtime);
    remembered(&mut travel.vm)
}
