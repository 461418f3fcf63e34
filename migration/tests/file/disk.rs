//! Saves that do not come to their end leave nothing behind.

use crate::{compressed, contents, fill, names, ram, save_to};
use rustix::fs::{FlockOperation, fcntl_lock};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use sterna_migration::file::{Error, Hooks, Options, SavedFile, save};

/// A small file system in a mount namespace of its own, reached through the process that holds it.
pub struct SmallDisk {
    child: Child,
    output: BufReader<ChildStdout>,
    folder: PathBuf,
}

impl SmallDisk {
    pub fn new(size: &str) -> Self {
        let namespaces: &[&str] = if rustix::process::geteuid().is_root() { &["-m"] } else { &["-U", "-r", "-m"] };
        let script = format!(
            "mount -t tmpfs -o size={size} none /mnt && echo up && read x && mount -o remount,ro /mnt && echo ro && read x"
        );
        let mut child = Command::new("unshare")
            .args(namespaces)
            .args(["sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let folder = PathBuf::from(format!("/proc/{}/root/mnt", child.id()));
        let mut disk = Self { child, output, folder };
        disk.expect("up\n");
        disk
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn make_read_only(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        self.expect("ro\n");
    }

    fn expect(&mut self, line: &str) {
        let mut found = String::new();
        self.output.read_line(&mut found).unwrap();
        assert_eq!(found, line, "a mount namespace with a tmpfs cannot be had here");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

#[test]
fn a_file_that_will_not_fit_is_refused_before_it_is_written() {
    let disk = SmallDisk::new("1m");
    let source = ram(1000, 100);
    let error = save_to(&disk.folder().join("a"), &source, &fill(&source, 0..1000), &Options::default()).unwrap_err();
    let Error::NoSpace { needed_bytes, free_bytes, .. } = error else { panic!("{error}") };
    assert!(needed_bytes >= 1000 * 4096 && free_bytes <= 1 << 20, "{needed_bytes} {free_bytes}");
    assert_eq!(names(disk.folder()), [""; 0]);
}

/// How well RAM compresses is known only when the disk is full.
#[test]
fn a_full_disk_is_told_and_left_as_it_was() {
    let disk = SmallDisk::new("1m");
    let source = ram(1000, 100);
    let error = save_to(&disk.folder().join("a"), &source, &fill(&source, 0..1000), &compressed()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::NoSpace { .. }) && text.contains("does not fit: it needs up to 4"), "{text}");
    assert_eq!(names(disk.folder()), [""; 0]);
}

#[test]
fn a_file_that_is_there_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let source = ram(1000, 100);
    let pages = fill(&source, [1]);
    std::fs::write(&path, "mine").unwrap();
    let refused = save_to(&path, &source, &pages, &Options::default()).unwrap_err();
    assert_eq!(refused.to_string(), format!("{} exists already", path.display()));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");

    save_to(&path, &source, &pages, &Options { overwrite: true, ..Options::default() }).unwrap();
    SavedFile::open(&path).unwrap();
    assert_eq!(names(folder.path()), ["a"]);
}

#[test]
fn a_file_that_comes_meanwhile_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let source = ram(1000, 100);
    let hooks = Hooks { progress: &|_, _| std::fs::write(&path, "mine").unwrap(), ..Hooks::none() };
    let refused = save(&path, &contents(), &source, &fill(&source, [1]), &Options::default(), hooks);
    assert!(matches!(refused, Err(Error::Exists(_))), "{refused:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    assert_eq!(names(folder.path()), ["a"]);
}

#[test]
fn a_cancelled_save_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let source = ram(8000, 100);
    let pages = fill(&source, (0..8000).step_by(100));
    let cancel = AtomicBool::new(false);
    let cancel_now = |done: u64, of: u64| {
        assert!(done < of, "it came to its end");
        assert_eq!(names(folder.path()).len(), 1);
        cancel.store(true, Ordering::Relaxed);
    };
    let hooks = Hooks { progress: &cancel_now, cancel: &cancel };
    let options = Options { threads: 1, ..Options::default() };
    let result = save(&folder.path().join("a"), &contents(), &source, &pages, &options, hooks);
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    assert_eq!(names(folder.path()), [""; 0]);
}

/// A process that is killed while it saves can take nothing away.
#[test]
fn what_a_killed_save_left_is_swept_and_what_another_writes_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let others =
        [".a.abcdef.partial", ".a.abcde.partial", ".ab.abcdef.partial", ".a.ABCDEF.partial", ".a.writes.partial"];
    for name in others {
        std::fs::write(folder.path().join(name), "x").unwrap();
    }
    let written = std::fs::File::options().write(true).open(folder.path().join(others[4])).unwrap();
    fcntl_lock(&written, FlockOperation::NonBlockingLockExclusive).unwrap();
    let source = ram(1000, 100);
    let pages = fill(&source, [1]);
    let path = folder.path().join("a");
    save_to(&path, &source, &pages, &Options::default()).unwrap();
    let mut left = names(folder.path());
    left.sort();
    assert_eq!(left, [".a.ABCDEF.partial", ".a.abcde.partial", ".a.writes.partial", ".ab.abcdef.partial", "a"]);
    // Its lock does not stay with its name.
    SavedFile::open(&path).unwrap().claim().unwrap();
}

#[test]
fn a_folder_that_is_not_there_is_told() {
    let source = ram(8, 4);
    let error = save_to(Path::new("/nowhere/a"), &source, &fill(&source, [1]), &Options::default()).unwrap_err();
    assert_eq!(error.to_string(), "opening the folder");
}
