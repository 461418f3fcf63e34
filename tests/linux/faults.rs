//! A host dies while a guest is on its way, in each phase: the other ends in a named state within seconds, and the guest runs in one
//! place at most. Each test ends a host.

use crate::world::{Held, LIMIT, Result, ensure, world};
use std::time::{Duration, Instant};
use sterna_testbed::{Link, Node, Running};

/// "Within seconds", where a lost host says nothing and has to be missed.
const MISSED: Duration = Duration::from_secs(45);
/// Slow enough that a host can be killed in the middle of the copying.
const SLOW: &str = "tbf rate 8mbit burst 64kb latency 50ms";

/// The guest is back on A, and on its way to B: copying.
fn on_its_way() -> Result<(Running, Held)> {
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

/// The source's host crashes, and the guest with it: the target discards what it has, the guest can be booted there, and the receiver
/// takes the next machine.
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
    let refused = world.travel()?.boot_again(Node::B)?;
    println!("  booted on the other host; the dead host's lock refused it {refused} times");
    b.check("tc qdisc del dev eth1 root")?;
    world.restart(Node::A)?;
    // The next test brings the guest to A, and sends it to B's receiver.
    lives(&mut world, Node::B, "running")
}

/// The guest answers on this host, which is the only one that has it; there its state is `state`.
fn lives(world: &mut Held, node: Node, state: &str) -> Result {
    let travel = world.travel()?;
    travel
        .vm
        .check("echo alive | dd of=/dev/vda bs=512 conv=sync oflag=direct && ip addr show eth0 | grep 10.9.0.30")?;
    let listed = travel.site(node).host().check("sterna list")?;
    ensure!(listed.contains("web") && listed.contains(state), "on {}: {listed}", node.name());
    Ok(())
}

/// The guest was on its way from A to B, and the source has said Go: the target wants the lock of its disk, but its way to the storage
/// carries nothing, so that it stands right there. The source has missed its word and is in doubt.
fn given_away() -> Result<(Running, Held)> {
    let (migrate, mut world) = on_its_way()?;
    world.shape(Link::StorageB, Some("netem loss 100%"))?;
    world.shape(Link::Hosts, None)?;
    world.travel()?.vm.wait_status(|status| status["phase"] == "in-doubt")?;
    Ok((migrate, world))
}

/// The target's host crashes at the hand-over, before it could start the guest: the source stands still, and on a person's word that
/// the host is off, goes on.
pub fn the_target_host_dies_at_the_hand_over() -> Result {
    let (mut migrate, mut world) = given_away()?;
    world.kill(Node::B)?;
    let end = migrate.wait(LIMIT)?;
    ensure!(end.status == 6 && end.stderr.contains("resolve web --here"), "exit {}: {}", end.status, end.stderr);
    let a = world.host(Node::A)?;
    let listed = a.check("sterna list")?;
    ensure!(listed.contains("in doubt"), "nobody has said where it runs: {listed}");
    ensure!(a.run("sterna resume web")?.status != 0, "a guest in doubt was resumed without a person's word");
    a.check("sterna migration resolve web --here")?;
    lives(&mut world, Node::A, "running")?;
    world.host(Node::N)?.check("tc qdisc del dev eth2 root")?;
    world.restart(Node::B)
}

/// The source's host crashes right after Go: the guest starts at the target, and when the old host is back, its record keeps a second
/// copy from booting there until a person has looked.
pub fn the_source_host_dies_right_after_go() -> Result {
    let (_migrate, mut world) = given_away()?;
    world.kill(Node::A)?;
    world.shape(Link::StorageB, None)?;
    let b = world.host(Node::B)?;
    let running = "for i in $(seq 600); do sterna list | grep web | grep -q running && exit 0; sleep 0.1; done; exit 1";
    let started = b.run_for(running, LIMIT)?;
    ensure!(started.status == 0, "the guest did not start: {}", b.check("sterna list; tail -n 5 /run/sterna/web.log")?);
    let travel = world.travel()?;
    let site = travel.site(Node::B).clone();
    travel.vm.arrived(&site)?;
    lives(&mut world, Node::B, "running")?;
    world.restart(Node::A)?;
    let a = world.host(Node::A)?;
    let listed = a.check("sterna list")?;
    ensure!(listed.contains("web") && listed.contains("in doubt"), "the record says nothing: {listed}");
    let second =
        "sterna run --name web --kernel /tools/guest/vmlinuz --disk path=/shared/web.img --cmdline sterna.job=idle";
    let second = a.run_for(second, LIMIT)?;
    ensure!(
        second.status == 3 && second.stderr.contains("resolve web --there"),
        "a second copy: {} {}",
        second.status,
        second.stderr
    );
    a.check("sterna migration resolve web --there")?;
    let listed = a.check("sterna list")?;
    ensure!(!listed.contains("web"), "after the person's word: {listed}");
    lives(&mut world, Node::B, "running")
}

/// The target's host crashes right after it has said that the guest runs: the guest died with it, the source knows that it was given
/// away and keeps no copy, and an operator boots it again there.
pub fn the_target_host_dies_right_after_the_guest_started_there() -> Result {
    let (mut migrate, mut world) = on_its_way()?;
    world.shape(Link::Hosts, None)?;
    let end = migrate.wait(LIMIT)?;
    world.kill(Node::B)?;
    ensure!(end.status == 0, "exit {}: {}", end.status, end.stderr);
    let a = world.host(Node::A)?;
    let said = a.check("sterna migration status web")?;
    ensure!(said.contains("moved to"), "the record says: {said}");
    let refused = world.travel()?.boot_again(Node::A)?;
    println!("  booted on the source again; the dead host's lock refused it {refused} times");
    lives(&mut world, Node::A, "running")?;
    world.forget();
    Ok(())
}
