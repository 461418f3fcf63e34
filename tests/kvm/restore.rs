//! A machine that goes on from a file.

use crate::serial::read_until;
use crate::vm::Host;
use std::io::{BufReader, Read, Write};

const RAM_BYTES: u64 = 64 << 20;

/// Bytes of the mappings of `file` in a VM's process.
fn mapped(pid: u64, file: &str) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let bytes = |line: &str| {
        let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        u64::from_str_radix(end, 16).unwrap() - u64::from_str_radix(start, 16).unwrap()
    };
    maps.lines().filter(|line| line.ends_with(file)).map(bytes).sum()
}

/// A reboot gives the guest memory that is empty and no longer the file's, and all that it then writes there stays.
pub fn a_reboot_after_a_mapped_restore_finds_empty_memory() {
    let host = Host::new();
    let mut vm = host.run("touch=16 full tick=50", &[]);
    vm.wait_for("tick 2 ");
    let file = host.path("saved");
    host.ok(&["save", "vm", &file]);
    let (code, said) = vm.wait_exit();
    assert_eq!(code, Some(0), "{said}");
    host.ok(&["restore", &file]);
    let listed: serde_json::Value = serde_json::from_str(&host.ok(&["list", "--json"])).unwrap();
    let pid = listed[0]["pid"].as_u64().unwrap_or_else(|| panic!("no pid in {listed}"));
    assert_eq!(mapped(pid, &file), RAM_BYTES);
    let mut serial = BufReader::new(host.connect("vm.console"));
    read_until(&mut serial, "tick ");
    serial.get_mut().write_all(b"r").unwrap();
    read_until(&mut serial, "Sterna-guest ready");
    read_until(&mut serial, "tick 1 ");
    assert_eq!(mapped(pid, &file), 0, "the guest still has the file's pages");
    serial.get_mut().write_all(b"v").unwrap();
    read_until(&mut serial, "verified pages=4096 ");
    serial.get_mut().write_all(b"q").unwrap();
    let mut rest = String::new();
    serial.read_to_string(&mut rest).unwrap();
}
