//! A host dies while a guest is on its way: the other ends in a named state within seconds. Each test ends a host; the last one the
//! guest's.

use crate::world::{LIMIT, Result, ensure, world};
use std::time::{Duration, Instant};
use sterna_testbed::{Link, Node};

/// "Within seconds", where a lost host says nothing and has to be missed.
const MISSED: Duration = Duration::from_secs(45);
/// Slow enough that a host can be killed in the middle of the copying.
const SLOW: &str = "tbf rate 8mbit burst 64kb latency 50ms";

/// The guest is back on A, and on its way to B: copying.
fn on_its_way() -> Result<(sterna_testbed::Running, crate::world::Held)> {
    let mut world = world()?;
    let travel = world.travel()?;
    if travel.vm.site().node() == Node::B {
        let a = travel.site(Node::A).clone();
        travel.vm.migrate(&a, "--mode quick")?;
    }
    world.shape(Link::Hosts, Some(SLOW))?;
    let travel = world.travel()?;
    let migrate = travel.vm.start_migrate(&travel.other().clone(), "")?;
    travel.vm.wait_status(|status| status["phase"] == "copying" && status["ram"]["transferred"].as_u64() > Some(0))?;
    Ok((migrate, world))
}

/// The target's host crashes: the guest goes on at the source, and the move says what it has lost.
pub fn the_target_host_dies_while_copying() -> Result {
    let (mut migrate, mut world) = on_its_way()?;
    let began = Instant::now();
    world.kill(Node::B)?;
    let end = migrate.wait(LIMIT)?;
    let took = began.elapsed();
    println!("  the source knew after {:.1} s: {}", took.as_secs_f32(), end.stderr.trim().replace('\n', ";"));
    ensure!(
        end.status == 1 && end.stderr.contains("guest: The guest runs here"),
        "exit {}: {}",
        end.status,
        end.stderr
    );
    ensure!(took < MISSED, "the source needed {took:?}");
    world.travel()?.vm.check("true")?;
    world.host(Node::A)?.check("tc qdisc del dev eth1 root")?;
    world.restart(Node::B)
}

/// The source's host crashes, and the guest with it: the target discards what it has, and takes the next machine.
pub fn the_source_host_dies_while_copying() -> Result {
    let (_migrate, mut world) = on_its_way()?;
    let b = world.host(Node::B)?;
    let began = Instant::now();
    world.kill(Node::A)?;
    let gone = "for i in $(seq 600); do sterna list | grep -q web || exit 0; sleep 0.1; done; exit 1";
    let listed = b.run_for(gone, LIMIT)?;
    let took = began.elapsed();
    let log = b.check("tail -n 3 /run/sterna/web.log")?;
    println!("  the target knew after {:.1} s: {}", took.as_secs_f32(), log.lines().last().unwrap_or_default());
    ensure!(listed.status == 0 && took < MISSED, "the target still has it after {took:?}: {log}");
    ensure!(b.run("kill -0 $(pidof sterna)")?.status == 0, "the receiver has ended");
    world.forget();
    Ok(())
}
