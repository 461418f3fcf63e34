//! What a user may ask of a move before and while it goes: trials, limits, a time to give up.

use crate::host_pair::{ANY_PORT, NAME, Pair, Receiver, assert_says, await_equal, tick, verify};
use crate::vm::{Host, Vm};
use crate::wire::{Wire, Word};
use serde_json::Value;
use std::fs;

const MIB: u64 = 1 << 20;
/// Pages of a MiB.
const PAGES: u64 = 256;
const REFUSED: i32 = 3;
const CANCELLED: i32 = 4;
const TIMED_OUT: i32 = 5;
const UNREACHABLE: i32 = 7;

/// A pair whose VM dirties 32 MiB as fast as it can.
fn busy() -> Pair {
    let pair = Pair::new();
    pair.a().boot("touch=48 dirty=32 tick=20", &["--memory", "128M"]);
    tick(&mut pair.a().console(NAME));
    pair
}

/// A trial names everything that would refuse the move, in one go, and touches nothing; without the problems it foretells.
pub fn a_check_names_every_problem() {
    let pair = Pair::new();
    let image = pair.a().disk("image", MIB);
    let disk = format!("path={image}");
    pair.a().boot("touch=16 tick=20", &["--disk", &disk]);
    let mut console = pair.a().console(NAME);
    tick(&mut console);
    let check = ["migrate", NAME, pair.to_b(), "--check"];
    assert_says(&pair.a().ok(&check), &["verdict     it can move", "live ", "quick "]);
    let told = pair.a().json(&check);
    assert_eq!(told["problems"].as_array().unwrap().len(), 0, "{told}");
    assert!(told["bandwidth"].as_u64().unwrap() > 0 && told["quick"]["downtime"].as_u64().is_some(), "{told}");

    let (missing, other) = (pair.b().path("missing"), pair.b().disk("other", MIB));
    let refused = |more: &[&str], parts: &[&str]| {
        let output = pair.a().sterna(&[&check[..], more].concat());
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(REFUSED), "{said}");
        assert_says(&said, &["guest: it was not touched"]);
        assert_says(&said, parts);
        // And the move itself is refused for the same.
        let moved = pair.a().fails(REFUSED, &[&["migrate", NAME, pair.to_b()], more].concat());
        assert_says(&moved, parts);
        assert_says(&moved, &["guest: The guest runs here"]);
    };
    refused(&["--map", &format!("disk0={missing}")], &[&missing, "No such file or directory"]);
    refused(&["--map", &format!("disk0={other}")], &[&other, "is not the same disk"]);
    let short = pair.b().disk("short", 4096);
    refused(&["--map", &format!("disk0={short}")], &[&short, "it has 4K here and 1M at the source"]);
    refused(&["--map", "net7=tap0"], &["the machine has no 'net7'"]);
    let mut taken = pair.b().run_named("taken", "tick=20", &[]);
    // Its name is registered by then.
    tick(&mut taken);
    refused(&["--as", "taken"], &["the name 'taken' is in use by process "]);
    refused(&["--as", "a/b"], &["must not contain a slash"]);
    drop(taken);
    tick(&mut console);
    assert_eq!(pair.b().state(NAME), None);
    pair.go(&["--as", NAME]);
}

/// No receiver: 7, for a trial and for a move, and the next command to type.
pub fn no_receiver_is_said() {
    let (host, gone) = (Host::new(), Host::new());
    host.boot("touch=16 tick=20", &[]);
    let address = Receiver::start(&gone, ANY_PORT, &[]).address;
    let said = host.fails(UNREACHABLE, &["migrate", NAME, &address]);
    assert_says(
        &said,
        &["cannot connect to", &address, "guest: The guest runs here", "next: sterna receive --listen "],
    );
    assert_says(&host.fails(2, &["migrate", NAME, "nowhere"]), &["'nowhere' is not an address"]);
    let said = host.fails(UNREACHABLE, &["migrate", NAME, &address, "--check"]);
    assert_says(&said, &["guest: it was not touched", "next: sterna receive --listen "]);
    tick(&mut host.console(NAME));
}

/// Another name there.
pub fn a_vm_may_have_another_name_there() {
    let pair = Pair::new();
    pair.a().boot("touch=16 tick=20", &[]);
    tick(&mut pair.a().console(NAME));
    pair.a().ok(&["migrate", NAME, pair.to_b(), "--as", "renamed"]);
    assert_eq!((pair.a().state(NAME), pair.b().state(NAME)), (None, None));
    verify(&mut pair.b().console("renamed"), 16 * PAGES);
}

/// A limit is kept, seen by how long what is there takes, until it is lifted in mid-move.
pub fn bandwidth_is_limited_and_the_limit_changed() {
    let pair = Pair::new();
    pair.a().boot("touch=64 tick=20", &["--memory", "128M"]);
    tick(&mut pair.a().console(NAME));
    let status = pair.go(&["--max-bandwidth", "32M/s"]);
    let ms = status["total-time"].as_u64().unwrap();
    assert!((1500..30_000).contains(&ms), "64 MiB at 32 MiB/s took {ms} ms");
    let migrate = ["migrate", NAME, &pair.receivers[0].address, "--max-bandwidth", "1M/s"];
    let slow = Vm::start(pair.b().command(&migrate), "migrate");
    pair.b().await_phase("copying");
    pair.b().ok(&["migration", "set", NAME, "--max-bandwidth", "0", "--max-downtime", "100ms"]);
    let (code, said) = slow.wait_exit();
    assert_eq!(code, Some(0), "{said}");
    verify(&mut pair.a().console(NAME), 64 * PAGES);
}

/// Threads of the VM `name` on `host` whose names begin with `prefix`, with how nice each is (proc_pid_stat(5), field 19).
fn niceness(host: &Host, name: &str, prefix: &str) -> Vec<(String, i32)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", host.pid(name).as_raw_nonzero())).unwrap();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("stat")).ok());
    let mut threads: Vec<_> = stats
        .map(|stat| {
            let (named, rest) = stat.rsplit_once(") ").unwrap();
            let (_, thread) = named.split_once('(').unwrap();
            (thread.to_owned(), rest.split(' ').nth(16).unwrap().parse().unwrap())
        })
        .filter(|(thread, _)| thread.starts_with(prefix))
        .collect();
    threads.sort();
    threads
}

/// What copies beside a running guest is nicer than its vCPUs, on both sides; what copies while it waits is not.
pub fn who_copies_beside_a_guest_steps_back() {
    let pair = Pair::new();
    pair.a().boot("touch=64 tick=20", &["--memory", "128M"]);
    tick(&mut pair.a().console(NAME));
    let migrate = ["migrate", NAME, pair.to_b(), "--connections", "2", "--max-bandwidth", "1M/s"];
    let slow = Vm::start(pair.a().command(&migrate), "migrate");
    let threads = |host, prefix, expected: &[(&str, i32)]| {
        let expected: Vec<_> = expected.iter().map(|(thread, nice)| ((*thread).to_owned(), *nice)).collect();
        await_equal("niceness of threads", &expected, || niceness(host, NAME, prefix));
    };
    threads(pair.a(), "vcpu", &[("vcpu0", 0)]);
    threads(pair.a(), "move-beside", &[("move-beside-0", 10), ("move-beside-1", 10)]);
    threads(pair.a(), "move-send", &[("move-send-1", 0)]);
    threads(pair.b(), "move-first", &[("move-first-0", 10), ("move-first-1", 10)]);
    threads(pair.b(), "move-receive", &[("move-receive-1", 0)]);
    pair.a().ok(&["migration", "set", NAME, "--max-bandwidth", "0", "--max-downtime", "100ms"]);
    let (code, said) = slow.wait_exit();
    assert_eq!(code, Some(0), "{said}");
    verify(&mut pair.b().console(NAME), 64 * PAGES);
}

/// Time runs out for a guest that dirties faster than the way carries: with figures it is said why, and it runs on.
pub fn a_guest_that_does_not_converge_is_left_where_it_is() {
    let pair = Pair::new();
    pair.a().boot("touch=4 dirty=4 tick=20", &["--memory", "128M"]);
    tick(&mut pair.a().console(NAME));
    // So slow that a guest which hardly gets a processor still dirties faster.
    let limits = ["--max-bandwidth", "2M/s", "--timeout", "6s", "--max-downtime", "10ms"];
    let said = pair.a().fails(TIMED_OUT, &[&["migrate", NAME, pair.to_b()], &limits[..]].concat());
    assert_says(
        &said,
        &["the guest dirties ", "the link carries ", "and 10 ms are allowed", "guest: The guest runs here"],
    );
    pair.await_states(Some("running"), None);
    let mut console = pair.a().console(NAME);
    tick(&mut console);
    verify(&mut console, 4 * PAGES);
    pair.go(&["--on-timeout", "pause", "--timeout", "4s", "--max-downtime", "1ms", "--max-bandwidth", "2M/s"]);
    verify(&mut pair.b().console(NAME), 4 * PAGES);
}

/// `pause` stops the guest when time is over, also in the middle of a pass that would take minutes.
pub fn a_timeout_that_pauses_does_not_wait_for_a_slow_pass() {
    let pair = busy();
    pair.go(&["--on-timeout", "pause", "--timeout", "4s", "--max-bandwidth", "512K/s"]);
    verify(&mut pair.b().console(NAME), 48 * PAGES);
}

/// Called off at every word before Go, also when nothing moves on the wire, by the command and by Ctrl-C: the guest is where
/// it was.
pub fn a_move_is_cancelled_in_every_phase() {
    for word in [Word::Machine, Word::Ready, Word::Rehearsed, Word::Ram, Word::State, Word::Loaded] {
        for mode in ["live", "quick"] {
            let pair = Pair::new();
            pair.a().boot("touch=32 dirty=8 tick=20", &[]);
            let mut console = pair.a().console(NAME);
            tick(&mut console);
            let wire = Wire::to(pair.to_b());
            wire.hold(word);
            let migrate = Vm::start(pair.a().command(&["migrate", NAME, &wire.address, "--mode", mode]), "migrate");
            wire.await_held();
            if mode == "live" {
                assert_says(&pair.a().ok(&["migration", "cancel", NAME]), &["The guest runs here"]);
            } else {
                migrate.signal(rustix::process::Signal::INT);
            }
            let (code, said) = migrate.wait_exit();
            assert_eq!(code, Some(CANCELLED), "{word:?} {mode}: {said}");
            assert_says(&said, &["guest: The guest runs here"]);
            tick(&mut console);
            wire.release();
            pair.await_states(Some("running"), None);
        }
    }
}

/// Time runs out while the other side says nothing.
pub fn a_silent_target_is_given_up() {
    for word in [Word::Machine, Word::Ram] {
        let pair = Pair::new();
        pair.a().boot("touch=32 tick=20", &[]);
        tick(&mut pair.a().console(NAME));
        let wire = Wire::to(pair.to_b());
        wire.hold(word);
        let said = pair.a().fails(TIMED_OUT, &["migrate", NAME, &wire.address, "--timeout", "2s"]);
        assert_says(&said, &["guest: The guest runs here"]);
        tick(&mut pair.a().console(NAME));
    }
}

/// Figures of a move are the same on both sides afterwards.
pub fn the_target_keeps_the_figures() {
    let pair = Pair::new();
    pair.a().boot("touch=16 tick=20", &[]);
    tick(&mut pair.a().console(NAME));
    let there = pair.go(&[]);
    await_equal("phase at the target", &"done".into(), || pair.b().migration()["phase"].clone());
    await_equal("figures", &there["downtime-parts"], || pair.b().migration()["downtime-parts"].clone());
    let here = pair.b().migration();
    for key in ["id", "epoch", "kind", "ram", "downtime"] {
        assert_eq!(here[key], there[key], "{key}");
    }
    assert_eq!(here["incoming"], true);
    assert_says(&pair.b().ok(&["migration", "status", NAME]), &["vm came here from", "downtime ", "hand-over "]);
}

/// A quick move foretells its standstill while the guest runs, goes through its phases in their order, and sets what it foretold beside
/// what was measured: for programs, and in lines for people.
pub fn a_quick_move_foretells_its_standstill() {
    let pair = Pair::new();
    pair.a().boot("touch=64 dirty=8 rate=50 tick=20", &["--memory", "128M"]);
    tick(&mut pair.a().console(NAME));
    let text = pair.a().ok(&["migrate", NAME, pair.to_b(), "--mode", "quick", "--json"]);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut phases: Vec<_> = lines.iter().map(|line| line["phase"].as_str().unwrap()).collect();
    phases.dedup();
    assert_eq!(phases, ["preparing", "saving", "transferring", "restoring", "done"], "{text}");
    assert!(lines.is_sorted_by_key(|line| line["percent"].as_u64().unwrap()), "{text}");
    let foretold = lines.iter().find(|line| line["expected-downtime"].is_u64()).unwrap();
    assert_eq!(foretold["phase"], "preparing", "foretold when the guest stood still already:\n{text}");
    let last = lines.last().unwrap();
    assert_eq!((&last["percent"], &last["expected-downtime"]), (&100.into(), &foretold["expected-downtime"]), "{text}");
    assert!(last["downtime"].is_u64(), "{text}");

    let output = pair.b().sterna(&["migrate", NAME, &pair.receivers[0].address, "--mode", "quick"]);
    let (told, progress) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    let before = progress.split("saving").next().unwrap();
    assert!(
        before.lines().any(|line| line.starts_with("preparing ") && line.ends_with(" standstill expected")),
        "{progress}"
    );
    let compared = told.lines().find(|line| line.starts_with("  downtime ")).unwrap_or_else(|| panic!("{told}"));
    assert!(compared.contains(" ms (") && compared.ends_with(" expected)"), "{told}");
    verify(&mut pair.a().console(NAME), 64 * PAGES);
}
