//! Directory of one run of the testbed: logs, sockets, disks, and a note by which another process finds the hosts.

use crate::{Error, Host, Node, Result};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::fd::AsRawFd,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

/// Finished runs whose logs are kept.
const KEPT_RUNS: usize = 8;

/// The directory; dropping it removes everything but logs.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Makes one below `testbed`, named after this process, and removes those of runs long past.
    pub fn create(testbed: &Path) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = testbed.join(format!("run-{}-{number}", process::id()));
        fs::create_dir_all(testbed).map_err(Error::io(format!("make {}", testbed.display())))?;
        prune(testbed);
        // Process numbers come again.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).map_err(Error::io(format!("make {}", path.display())))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new, empty file.
    pub fn file(&self, name: &str) -> Result<File> {
        File::create(self.path.join(name)).map_err(Error::io(format!("make {name} of the testbed")))
    }

    /// A new file of holes; returns its path.
    pub fn sparse(&self, name: &str, size_bytes: u64) -> Result<PathBuf> {
        self.file(name)?.set_len(size_bytes).map_err(Error::io(format!("size {name} of the testbed")))?;
        Ok(self.path.join(name))
    }

    /// What a log says so far; nothing if it is not there yet.
    pub fn read(&self, name: &str) -> String {
        fs::read(self.path.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Removes a file that may be there.
    pub fn remove(&self, name: &str) {
        let _ = fs::remove_file(self.path.join(name));
    }

    /// Moves a log that may be there out of the way, keeping it.
    pub fn rotate(&self, name: &str) {
        let older = (1..).map(|n| self.path.join(format!("{name}.{n}"))).find(|path| !path.exists());
        if let Some(older) = older {
            let _ = fs::rename(self.path.join(name), older);
        }
    }

    /// Leaves a note by which [`attach`] finds the hosts.
    pub fn note(&self, ports: impl Iterator<Item = (Node, u16)>) -> Result<()> {
        let ports: BTreeMap<&str, u16> = ports.map(|(node, port)| (node.name(), port)).collect();
        let note = serde_json::to_vec(&ports).map_err(|error| Error::io("write the run's note")(error.into()))?;
        fs::write(self.path.join("hosts.json"), note).map_err(Error::io("write the run's note"))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| !entry.file_name().to_string_lossy().contains(".log")) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Hosts of a testbed that another process runs: the newest with a living owner below `testbed`.
pub fn attach(testbed: &Path) -> Result<(PathBuf, Vec<(Node, Host)>)> {
    let mut living =
        runs(testbed).into_iter().filter(|(path, owner)| owner_lives(*owner) && path.join("hosts.json").exists());
    let (path, _) = living.next_back().ok_or_else(|| Error::Down("of any testbed".into()))?;
    let note = fs::read(path.join("hosts.json")).map_err(Error::io("read the run's note"))?;
    let ports: BTreeMap<String, u16> =
        serde_json::from_slice(&note).map_err(|error| Error::io("read the run's note")(error.into()))?;
    let hosts = ports.iter().filter_map(|(name, port)| Some((Node::from_name(name)?, Host::new(name, *port))));
    let hosts = hosts.collect();
    Ok((path, hosts))
}

/// Connects to a host's console. By way of the directory's descriptor: a Unix socket's path has 107 bytes at most.
pub fn console(dir: &Path, node: Node) -> Result<UnixStream> {
    let doing = || format!("connect to the console of host {}", node.name());
    let handle = File::open(dir).map_err(Error::io(doing()))?;
    let path = format!("/proc/self/fd/{}/{}.sock", handle.as_raw_fd(), node.name());
    UnixStream::connect(path).map_err(Error::io(doing()))
}

/// Directories of runs with the process that owns each, oldest first.
fn runs(testbed: &Path) -> Vec<(PathBuf, u32)> {
    let entries = fs::read_dir(testbed).into_iter().flatten().flatten();
    let mut runs: Vec<_> = entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let owner = name.strip_prefix("run-")?.split('-').next()?.parse().ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path(), owner))
        })
        .collect();
    runs.sort();
    runs.into_iter().map(|(_, path, owner)| (path, owner)).collect()
}

fn owner_lives(owner: u32) -> bool {
    Path::new(&format!("/proc/{owner}")).exists()
}

fn prune(testbed: &Path) {
    let over: Vec<_> = runs(testbed).into_iter().filter(|(_, owner)| !owner_lives(*owner)).collect();
    for (index, (path, _)) in over.iter().rev().enumerate() {
        if index >= KEPT_RUNS {
            let _ = fs::remove_dir_all(path);
        } else {
            // A killed run could not remove its disks.
            drop(RunDir { path: path.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_stay_and_disks_go() {
        let testbed = tempfile::tempdir().unwrap();
        let dir = RunDir::create(testbed.path()).unwrap();
        let path = dir.path().to_owned();
        dir.sparse("lun.img", 1 << 20).unwrap();
        fs::write(path.join("a.log"), "first").unwrap();
        dir.rotate("a.log");
        fs::write(path.join("a.log"), "second").unwrap();
        drop(dir);
        let mut left: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a.log", "a.log.1"]);
    }

    #[test]
    fn another_process_finds_the_hosts() {
        let testbed = tempfile::tempdir().unwrap();
        let nobody = attach(testbed.path()).unwrap_err().to_string();
        assert_eq!(nobody, "host of any testbed is not running");
        let dir = RunDir::create(testbed.path()).unwrap();
        dir.note([(Node::A, 1234)].into_iter()).unwrap();
        let (path, hosts) = attach(testbed.path()).unwrap();
        assert_eq!((path.as_path(), hosts.len()), (dir.path(), 1));
    }

    #[test]
    fn runs_of_dead_processes_are_pruned_to_the_newest() {
        let testbed = tempfile::tempdir().unwrap();
        // Process numbers end far below this one.
        for number in 0..KEPT_RUNS + 3 {
            fs::create_dir(testbed.path().join(format!("run-4000000000-{number}"))).unwrap();
        }
        prune(testbed.path());
        assert_eq!(runs(testbed.path()).len(), KEPT_RUNS);
    }
}
