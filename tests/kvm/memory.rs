//! Memory that the host gives: what a VM costs beside its guest, and the balloon's figures.

use crate::vm::{Host, Vm, is_shipped};

const MIB: u64 = 1 << 20;

/// A guest without a balloon driver gives nothing; what it was asked for is shown, and more than it has is refused.
pub fn a_guest_without_a_balloon_driver_gives_nothing() {
    let host = Host::new();
    let mut vm = host.run("tick=50", &[]);
    vm.wait_for("tick 1 ");
    assert_eq!(host.ok(&["balloon", "vm"]), "vm: 0B given up of 0B asked for\n");
    assert_eq!(host.ok(&["balloon", "vm", "16M"]), "vm: 0B given up of 16M asked for\n");
    let shown: serde_json::Value = serde_json::from_str(&host.ok(&["show", "vm", "--json"])).unwrap();
    let balloon = &shown["status"]["balloon"];
    assert_eq!(balloon["target_bytes"], 16 * MIB, "{balloon}");
    assert_eq!(balloon["actual_bytes"], 0, "{balloon}");
    let said = host.fails(1, &["balloon", "vm", "64M"]);
    assert!(said.contains("the balloon must be smaller than the guest's memory of 64M"), "{said}");
    assert_eq!(host.ok(&["balloon", "vm", "0"]), "vm: 0B given up of 0B asked for\n");
    vm.wait_for("tick ");
    vm.power_off();
}

/// Resident bytes of a VM's process, by what they are for.
struct Resident {
    /// The mapping that is the guest's RAM.
    guest: u64,
    /// Everything else that is not a page of a file: heap, stacks, rings.
    anonymous: u64,
    /// Everything else.
    all: u64,
}

impl Resident {
    fn of(vm: &Vm, ram_bytes: u64) -> Self {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
        let mut resident = Self { guest: 0, anonymous: 0, all: 0 };
        let mut is_guest = false;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
            if let Some((start, end)) = key.split_once('-') {
                let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
                is_guest = end - start >= ram_bytes;
            }
            let bytes = || value.parse::<u64>().unwrap() * 1024;
            match (key, is_guest) {
                ("Rss:", true) => resident.guest += bytes(),
                ("Rss:", false) => resident.all += bytes(),
                ("Anonymous:", false) => resident.anonymous += bytes(),
                _ => {}
            }
        }
        resident
    }
}

/// An idle VM of 256 MiB occupies at most 6 MiB beside what its guest has touched. The program's own pages are those of
/// the build that is shipped only in a release build; a debug build, several times the size, is held to what it
/// allocates, which is the same in both.
pub fn a_vm_costs_little_beside_its_guest() {
    let host = Host::new();
    let image = host.disk("image", MIB);
    let mut vm = host.run("disk halt", &["--memory", "256M", "--disk", &format!("path={image}")]);
    vm.wait_for("halted");
    let Resident { guest, anonymous, all } = Resident::of(&vm, 256 * MIB);
    assert!((1..64 * MIB).contains(&guest), "the guest's RAM was not found: {guest} bytes resident");
    let (what, bytes, most) = if is_shipped() { ("resident", all, 6 * MIB) } else { ("allocated", anonymous, 2 * MIB) };
    assert!(bytes <= most, "{bytes} bytes {what} beside the guest's {guest}");
}
