//! Who holds a tap interface, read from the kernel's description of open descriptors.

use std::fs;
use std::path::PathBuf;

/// Most holders named, so that the message stays one sentence.
const MOST: usize = 3;

/// The processes with a descriptor on tap interface `name`: "process 42 (qemu)", or that none can be seen.
pub(super) fn holders(name: &str) -> String {
    let mut found = Vec::new();
    let here = namespace("self");
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(id) = process.file_name().to_str().and_then(|text| text.parse::<u32>().ok()) else { continue };
        // The same name in another namespace is another interface.
        if found.len() < MOST && namespace(&id.to_string()) == here && holds(id, name) {
            let command = fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
            found.push(format!("process {id} ({})", command.trim()));
        }
    }
    if found.is_empty() {
        "a process that cannot be seen from here (another user's, or in another namespace)".into()
    } else {
        found.join(" and ")
    }
}

/// The process's network namespace, if it can be seen.
fn namespace(process: &str) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{process}/ns/net")).ok()
}

/// Whether one of the process's descriptors is a tun file attached to `name`: drivers/net/tun.c shows it as `iff:`.
fn holds(process: u32, name: &str) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{process}/fdinfo")).into_iter().flatten().flatten();
    descriptors
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .any(|text| text.lines().any(|line| line.strip_prefix("iff:").is_some_and(|attached| attached.trim() == name)))
}
