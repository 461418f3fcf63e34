//! A group of processes whose memory is limited, so that a target can be out of memory and this machine is not. Needs root.

use crate::host_pair::LOOK;
use crate::vm::LONG;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{process, thread};

/// See the module. Removed when dropped; its processes must have ended.
pub struct MemoryGroup {
    dir: PathBuf,
    limit_file: &'static str,
}

impl MemoryGroup {
    /// A group that may have `limit_bytes`. Control groups of version 2 or, where memory is still there, of version 1.
    pub fn new(limit_bytes: u64) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let (parent, limit_file) = if root.join("memory/memory.limit_in_bytes").exists() {
            (root.join("memory"), "memory.limit_in_bytes")
        } else {
            // The root group always may; where it has handed nothing down yet, it does now.
            fs::write(root.join("cgroup.subtree_control"), "+memory").unwrap();
            (root.to_owned(), "memory.max")
        };
        let group = Self { dir: parent.join(format!("sterna-test-{}", process::id())), limit_file };
        fs::create_dir(&group.dir).unwrap();
        // Where the machine has swap, it is not for this group: one of these is there then.
        for no_swap in ["memory.swap.max", "memory.swappiness"].map(|name| group.dir.join(name)) {
            if no_swap.exists() {
                fs::write(no_swap, "0").unwrap();
            }
        }
        group.set_limit(limit_bytes);
        group
    }

    /// Another limit.
    pub fn set_limit(&self, limit_bytes: u64) {
        fs::write(self.dir.join(self.limit_file), limit_bytes.to_string()).unwrap();
    }

    /// What stands ahead of a command, which then runs in the group.
    pub fn wrapper(&self) -> [String; 4] {
        let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.dir.display());
        ["sh", "-c", &script, "sh"].map(str::to_owned)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + LONG;
        // A process that has answered that it ends is a member until it has.
        while let Err(error) = fs::remove_dir(&self.dir) {
            if Instant::now() > deadline {
                return eprintln!("{} stays: {error}", self.dir.display());
            }
            thread::sleep(LOOK);
        }
    }
}
