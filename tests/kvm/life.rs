//! The life of a VM: start, pause, reboot, every way to end.

use crate::serial::read_until;
use crate::vm::{Host, LONG};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use std::fs;
use std::io::{BufReader, Write};
use std::time::Duration;

/// The guest's own power-off is a clean end.
pub fn power_off_ends_with_success() {
    let host = Host::new();
    let mut vm = host.run("tick=100", &[]);
    vm.wait_for("tick 2 ");
    vm.power_off();
}

/// A reset starts the same guest again in the same process.
pub fn reset_starts_the_guest_again() {
    let host = Host::new();
    let mut vm = host.run("tick=100", &[]);
    vm.wait_for("tick 1 ");
    vm.type_in("r");
    vm.wait_for("Sterna-guest ready");
    vm.wait_for("tick 1 ");
    vm.type_in("r");
    vm.wait_for("tick 1 ");
    vm.power_off();
}

/// A guest that triple faults is lost, and the exit code says so.
pub fn triple_fault_is_told() {
    let host = Host::new();
    let mut vm = host.run("tick=100", &[]);
    vm.wait_for("tick 1 ");
    vm.type_in("t");
    let (code, said) = vm.wait_exit();
    assert_eq!(code, Some(8), "{said}");
    assert!(said.contains("triple fault"), "{said}");
}

/// A guest that panics is lost, and the exit code says so.
pub fn panic_is_told() {
    let host = Host::new();
    let mut vm = host.run("tick=100", &[]);
    vm.wait_for("tick 1 ");
    vm.type_in("p");
    let (code, said) = vm.wait_exit();
    assert_eq!(code, Some(8), "{said}");
    assert!(said.contains("panicked"), "{said}");
}

/// Nothing of the guest runs while it is paused, and it goes on afterwards with every interrupt.
pub fn pause_stops_everything_and_resume_goes_on() {
    let host = Host::new();
    let mut vm = host.run("tick=50", &["--cpus", "2"]);
    vm.wait_for("tick 3 ");
    host.ok(&["pause", "vm"]);
    vm.lines_within(Duration::from_millis(300));
    let before = vm.cpu_time();
    let silent = vm.lines_within(Duration::from_secs(2));
    assert!(silent.is_empty(), "a paused guest said {silent:?}");
    let used = vm.cpu_time() - before;
    assert!(used <= Duration::from_millis(20), "a paused VM used {used:?} of CPU in 2 s");
    assert!(host.ok(&["show", "vm"]).contains("paused"));
    host.ok(&["resume", "vm"]);
    vm.wait_for("tick ");
    vm.power_off();
}

/// A guest that halts costs nothing.
pub fn an_idle_guest_uses_no_cpu() {
    let host = Host::new();
    let mut vm = host.run("halt", &["--cpus", "2"]);
    vm.wait_for("halted");
    vm.lines_within(Duration::from_millis(300));
    let before = vm.cpu_time();
    vm.lines_within(Duration::from_secs(2));
    let used = vm.cpu_time() - before;
    assert!(used <= Duration::from_millis(20), "an idle VM used {used:?} of CPU in 2 s");
}

/// `stop` presses the button; a guest that listens powers off.
pub fn stop_presses_the_power_button() {
    let host = Host::new();
    let mut vm = host.run("tick=100 button", &[]);
    vm.wait_for("tick 1 ");
    host.ok(&["stop", "vm"]);
    let (code, said) = vm.wait_exit();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("power button"), "{said}");
}

/// A guest that does not listen is said not to, and `--force` ends it.
pub fn stop_says_when_the_guest_does_not_react() {
    let host = Host::new();
    let mut vm = host.run("tick=100", &[]);
    vm.wait_for("tick 1 ");
    let said = host.fails(5, &["stop", "vm", "--timeout", "500ms"]);
    assert!(said.contains("--force"), "{said}");
    vm.wait_for("tick ");
    host.ok(&["stop", "vm", "--force"]);
    let (code, _) = vm.wait_exit();
    assert_eq!(code, Some(0));
}

/// SIGTERM does as `stop`.
pub fn sigterm_presses_the_power_button() {
    let host = Host::new();
    let mut vm = host.run("tick=100 button", &[]);
    vm.wait_for("tick 1 ");
    vm.signal(Signal::TERM);
    let (code, said) = vm.wait_exit();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("power button"), "{said}");
}

/// A VM that died without a word leaves nothing in the way of the next of its name.
pub fn a_crash_leaves_the_name_free() {
    let host = Host::new();
    let mut vm = host.run("tick=100", &[]);
    vm.wait_for("tick 1 ");
    vm.signal(Signal::KILL);
    drop(vm);
    assert!(!host.ok(&["list"]).contains("running"));
    let mut vm = host.run("tick=100", &[]);
    vm.wait_for("tick 1 ");
    vm.power_off();
}

/// Every vCPU comes up, by INIT and SIPI.
pub fn every_vcpu_comes_up() {
    let host = Host::new();
    for cpus in ["2", "4", "32"] {
        let mut vm = host.run(&format!("cpus={cpus} tick=100"), &["--cpus", cpus]);
        vm.wait_for(&format!("cpus running={cpus} "));
        vm.wait_for("tick 1 ");
        vm.power_off();
    }
}

/// RAM above the hole below 4 GiB holds what is written into it.
pub fn ram_above_4_gib_is_usable() {
    let host = Host::new();
    let mut vm = host.run("at=2900 touch=600 tick=500", &["--memory", "5G"]);
    vm.wait_for("tick 1 ");
    vm.type_in("v");
    let verified = vm.wait_for("verified pages=");
    assert!(verified.contains("pages=153600 "), "{verified}");
    vm.power_off();
}

/// `--paused` builds the machine and runs nothing of it until it is told to.
pub fn a_vm_may_start_paused() {
    let host = Host::new();
    let mut vm = host.run("tick=100", &["--paused"]);
    let said = vm.lines_within(Duration::from_secs(1));
    assert!(!said.iter().any(|line| line.contains("Sterna-guest")), "{said:?}");
    assert!(host.ok(&["show", "vm"]).contains("created"));
    host.ok(&["resume", "vm"]);
    vm.wait_for("tick 1 ");
    vm.power_off();
}

/// Dirtying from several vCPUs goes on over many pauses without losing a write.
pub fn memory_is_whole_after_many_pauses() {
    let host = Host::new();
    let mut vm = host.run("cpus=2 touch=16 dirty=16 pattern=rand tick=50", &["--cpus", "2"]);
    vm.wait_for("tick 1 ");
    for _ in 0..20 {
        host.ok(&["pause", "vm"]);
        host.ok(&["resume", "vm"]);
    }
    vm.type_in("v");
    let verified = vm.wait_for("pages=");
    assert!(verified.contains("verified pages=4096 "), "{verified}");
    vm.power_off();
}

/// `--detach` returns when vCPUs run; console, log and stop work by name.
pub fn a_detached_vm_is_found_by_its_name() {
    let host = Host::new();
    let kernel = sterna_guest::GUEST_ELF;
    host.ok(&[
        "run",
        "--name",
        "far",
        "--kernel",
        kernel,
        "--cmdline",
        "tick=100 button",
        "--memory",
        "64M",
        "--detach",
    ]);
    assert!(host.ok(&["list"]).contains("far"));
    let shown: serde_json::Value = serde_json::from_str(&host.ok(&["show", "far", "--json"])).unwrap();
    assert_eq!(shown["status"]["state"], "running", "{shown}");
    host.ok(&["stop", "far"]);
    assert!(!host.ok(&["list"]).contains("far"));
}

/// The parent of a detached VM ends when vCPUs run, and names a log in which is how the guest ended.
pub fn a_detached_vm_leaves_its_words_in_its_log() {
    let host = Host::new();
    let (kernel, console) = (sterna_guest::GUEST_ELF, format!("socket={}", host.path("serial")));
    let words = ["run", "--detach", "--json", "--name", "far", "--kernel", kernel, "--memory", "64M"];
    let told = host.ok(&[&words[..], &["--cmdline", "tick=50", "--serial", &console]].concat());
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    // Whoever hears of it finds vCPUs that run, without waiting: by name, and in the process that it was told of.
    let shown: serde_json::Value = serde_json::from_str(&host.ok(&["show", "far", "--json"])).unwrap();
    assert_eq!((&shown["status"]["state"], &shown["pid"]), (&"running".into(), &told["pid"]), "{shown}");
    let log = told["log"].as_str().unwrap();
    assert_eq!(log, host.path("far.log"));
    let pid = Pid::from_raw(told["pid"].as_i64().unwrap().try_into().unwrap()).unwrap();
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let mut serial = BufReader::new(host.connect("serial"));
    read_until(&mut serial, "tick 1 ");
    serial.get_mut().write_all(b"p").unwrap();
    let limit = Timespec { tv_sec: LONG.as_secs().try_into().unwrap(), tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ended, 1, "process {pid:?} has not ended within {LONG:?}");
    let said = fs::read_to_string(log).unwrap();
    assert!(said.contains("error: VM 'far': the guest's kernel has panicked\n"), "{said}");
}

/// `--paused` with `--detach`: the parent goes when the VM can be told to run, which it does not before.
pub fn a_detached_vm_may_start_paused() {
    let host = Host::new();
    let kernel = sterna_guest::GUEST_ELF;
    host.ok(&["run", "--detach", "--paused", "--name", "far", "--kernel", kernel, "--memory", "64M"]);
    assert!(host.ok(&["show", "far"]).contains("created"));
    host.ok(&["stop", "far", "--force"]);
}
