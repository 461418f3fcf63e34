//! The description of a machine as a peer or a file has it: it is refused in words or can be worked with, and nothing is opened or
//! made on its behalf.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io::Write;
use std::path::PathBuf;
use sterna::control::movement::Map;
use sterna::vmm::{Arrival, Description, has_own_console};
use sterna_arch::{HostProfile, incompatibilities};
use sterna_fuzz::format_logs;
use sterna_migration::stream::Socket;
use sterna_migration::wire::message::{Machine, Mode, send};
use sterna_migration::wire::{Preamble, Purpose, ToTarget};
use uuid::Uuid;

/// Descriptors that are open, and files in the directory that relative paths lead to.
fn world() -> (usize, usize) {
    let count = |path: &std::path::Path| std::fs::read_dir(path).expect("a directory").count();
    (count("/proc/self/fd".as_ref()), count(".".as_ref()))
}

fn use_it(mut description: Description) {
    let before = world();
    let bytes = description.encode().expect("what was read can be written");
    assert_eq!(Description::decode(&bytes).expect("what was written can be read"), description);
    let _contradiction = description.inconsistency();
    let config = &description.config;
    let ids = config.disks.iter().map(|disk| &disk.id).chain(config.nets.iter().map(|net| &net.id)).cloned();
    let map: Map =
        ids.map(|id| (id, "else/where".to_owned())).chain([("serial".to_owned(), "null".to_owned())]).collect();
    let _console = has_own_console(config);
    description.settle(|name| PathBuf::from(format!("/run/sterna/{name}.console")));
    let problems = description.rehome(Some("other"), &map);
    assert!(problems.list().is_empty(), "{problems}");
    let _problems = description.config.validate_arrival().to_string();
    let guest = &description.cpu;
    if let Ok(cpuid) = guest.cpuid() {
        assert_eq!(cpuid.as_slice().len(), guest.leaves.len());
    }
    let host = HostProfile { cpu: guest.clone(), scales_tsc: false };
    assert!(incompatibilities(guest, &host).is_empty());
    let _problems = (guest.vendor(), host);
    assert_eq!(world(), before, "something was opened or made");
}

fuzz_target!(|bytes: &[u8]| {
    format_logs();
    let decoded = Description::decode(bytes);
    let (mut near, far) = Socket::pair().expect("a descriptor");
    let machine = Machine {
        description: bytes.to_vec(),
        layout: vec![(0, 4096)],
        mode: Mode::Live,
        connections: 1,
        verify: false,
    };
    send(&mut near, &ToTarget::Machine(machine)).expect("it fits");
    near.flush().expect("nothing is kept");
    let arrived = Arrival::read(far, &Preamble::new(Purpose::Move, 0, Uuid::nil(), 1));
    match (&decoded, &arrived) {
        (Ok(description), Ok(arrival)) => assert_eq!(*description, arrival.description),
        (Ok(description), Err(_)) => assert!(description.inconsistency().is_some()),
        (Err(error), Err(_)) => assert!(!error.to_string().is_empty()),
        (Err(_), Ok(_)) => panic!("what cannot be read has arrived"),
    }
    drop((arrived, near));
    if let Ok(description) = decoded {
        use_it(description);
    }
});
