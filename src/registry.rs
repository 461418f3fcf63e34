//! Which VMs there are on this host: a directory with a lock, a socket and a log for each name.
//!
//! Whoever holds the lock of a name is that VM. The kernel drops the lock with the process, so whatever a crashed VM
//! has left is recognised by its free lock. This file refuses to know what is said over a socket.

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Longest path of a Unix socket: `sun_path` less its NUL (unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
/// The longest of the suffixes that a name gets.
const LONGEST_SUFFIX: &str = ".console";

/// Why a name cannot be taken or looked up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No directory to keep sockets in.
    #[error("there is no place for sockets: neither STERNA_DIR nor XDG_RUNTIME_DIR is set")]
    NoDirectory,
    /// The directory cannot be made or read.
    #[error("cannot use the directory {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A name that no VM can have.
    #[error("{0}")]
    BadName(String),
    /// The socket would have a path that the kernel does not take.
    #[error(
        "the socket path {} has {} bytes, and a socket's path has at most {MAX_SOCKET_PATH_BYTES}; choose a shorter \
         name or set STERNA_DIR to a shorter directory",
        path.display(), path.as_os_str().len()
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// A VM of this name runs.
    #[error("the name '{name}' is in use by process {}", pid.map_or("unknown".to_owned(), |pid| pid.to_string()))]
    InUse {
        /// Name of the VM.
        name: String,
        /// Process that is the VM, if it has said so.
        pid: Option<u32>,
    },
    /// The lock of a name cannot be used.
    #[error("cannot lock {}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The directory of this host's VMs.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// `$STERNA_DIR`, else `/run/sterna` for root and `$XDG_RUNTIME_DIR/sterna` for others.
    pub fn from_env() -> Result<Self, Error> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let dir = match set("STERNA_DIR") {
            Some(dir) => dir,
            None if rustix::process::geteuid().is_root() => PathBuf::from("/run/sterna"),
            None => set("XDG_RUNTIME_DIR").ok_or(Error::NoDirectory)?.join("sterna"),
        };
        let dir = std::path::absolute(&dir).map_err(|source| Error::Directory { path: dir, source })?;
        Ok(Registry::at(dir))
    }

    /// The VMs of `dir`, which need not exist yet.
    pub fn at(dir: PathBuf) -> Self {
        Registry { dir }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Control socket of `name`.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.sock"))
    }

    /// Serial port of `name` if it runs detached.
    pub fn console(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}{LONGEST_SUFFIX}"))
    }

    /// What `name` writes to standard error if it runs detached.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    fn lock(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.lock"))
    }

    /// Names that have a control socket, sorted; whether a VM stands behind one shows when it is asked.
    pub fn names(&self) -> Result<Vec<String>, Error> {
        let error = |source| Error::Directory { path: self.dir.clone(), source };
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(error(source)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let file_name = entry.map_err(error)?.file_name();
            let name = file_name.to_str().and_then(|file| file.strip_suffix(".sock"));
            names.extend(name.filter(|name| name_problem(name).is_none()).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// Makes sure that `name` can be used in this directory, which is made if it is not there.
    pub fn prepare(&self, name: &str) -> Result<(), Error> {
        if let Some(problem) = name_problem(name) {
            return Err(Error::BadName(problem));
        }
        let longest = self.console(name);
        if longest.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
            return Err(Error::PathTooLong { path: longest });
        }
        self.make_dir()
    }

    /// Makes the directory if it is not there.
    pub fn make_dir(&self) -> Result<(), Error> {
        // A confined process makes no directories, and finds this one.
        if self.dir.is_dir() {
            return Ok(());
        }
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(|source| Error::Directory { path: self.dir.clone(), source })
    }

    /// Takes `name` for this process and removes what a crashed VM of that name has left.
    pub fn claim(&self, name: &str) -> Result<Claim, Error> {
        self.prepare(name)?;
        let path = self.lock(name);
        let error = |source| Error::Lock { path: path.clone(), source };
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        loop {
            let mut lock = open().map_err(error)?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Err(Error::InUse { name: name.to_owned(), pid: read_pid(&mut lock) }),
                Err(errno) => return Err(error(errno.into())),
            }
            // A VM that has just ended removes its lock file while it holds the lock: what is locked here may have no
            // name any more, and protects nothing then.
            if !same_file(&lock, &path).map_err(error)? {
                continue;
            }
            write_pid(&lock).map_err(error)?;
            let claim = Claim { registry: self.clone(), name: name.to_owned(), lock };
            claim.remove_sockets();
            return Ok(claim);
        }
    }
}

/// A name that belongs to this process until dropped.
#[derive(Debug)]
pub struct Claim {
    registry: Registry,
    name: String,
    /// Open file description that holds the lock.
    lock: File,
}

impl Claim {
    /// Where the control socket goes.
    pub fn socket(&self) -> PathBuf {
        self.registry.socket(&self.name)
    }

    /// The directory of its sockets and files.
    pub fn dir(&self) -> &Path {
        self.registry.dir()
    }

    /// Leaves the name to a child that was forked while it was held: its lock is the child's as well.
    pub fn leave(self) {
        std::mem::forget(self);
    }

    /// Says that it is this process, forked from the one that took it, whose name it is.
    pub fn adopt(&self) -> Result<(), Error> {
        write_pid(&self.lock).map_err(|source| Error::Lock { path: self.registry.lock(&self.name), source })
    }

    fn remove_sockets(&self) {
        for path in [self.registry.socket(&self.name), self.registry.console(&self.name)] {
            remove_if_there(&path);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.remove_sockets();
        remove_if_there(&self.registry.lock(&self.name));
    }
}

fn remove_if_there(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("cannot remove {}: {error}", path.display());
        }
        _ => {}
    }
}

fn same_file(file: &File, path: &Path) -> io::Result<bool> {
    let mine = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((mine.dev(), mine.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn read_pid(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// What a crashed VM has left is written over and never emptied first: ext4 brings a file that was emptied to the disk at once,
/// which takes a start most of a millisecond.
fn write_pid(lock: &File) -> io::Result<()> {
    let text = format!("{}\n", std::process::id());
    lock.write_all_at(text.as_bytes(), 0)?;
    lock.set_len(text.len() as u64)
}

/// Whether `byte` may stand in a name.
pub fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

/// What is wrong with `name`, if anything.
pub fn name_problem(name: &str) -> Option<String> {
    let wrong = if name.is_empty() {
        "must not be empty"
    } else if name.contains('/') {
        "must not contain a slash"
    } else if !name.bytes().all(is_name_byte) {
        "must consist of letters, digits, '.', '_' and '-'"
    } else if name.starts_with(['.', '-']) {
        "must begin with a letter, a digit or '_'"
    } else {
        return None;
    };
    Some(format!("name '{name}' {wrong}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().join("run/sterna"));
        (dir, registry)
    }

    #[test]
    fn a_name_has_one_holder() {
        let (_dir, registry) = registry();
        let claim = registry.claim("web").unwrap();
        let error = registry.claim("web").unwrap_err();
        assert_eq!(error.to_string(), format!("the name 'web' is in use by process {}", std::process::id()));
        registry.claim("db").unwrap();
        drop(claim);
        registry.claim("web").unwrap();
    }

    #[test]
    fn what_a_crash_has_left_is_removed() {
        let (_dir, registry) = registry();
        registry.prepare("web").unwrap();
        drop(UnixListener::bind(registry.socket("web")).unwrap());
        fs::write(registry.lock("web"), "99999999\n").unwrap();
        assert_eq!(registry.names().unwrap(), ["web"]);
        let claim = registry.claim("web").unwrap();
        assert!(!registry.socket("web").exists());
        let pid = fs::read_to_string(registry.lock("web")).unwrap();
        assert_eq!(pid, format!("{}\n", std::process::id()));
        drop(claim);
        assert_eq!(fs::read_dir(registry.dir()).unwrap().count(), 0);
    }

    #[test]
    fn a_lock_file_that_lost_its_name_protects_nothing() {
        let (_dir, registry) = registry();
        registry.prepare("web").unwrap();
        let old = File::create(registry.lock("web")).unwrap();
        assert!(same_file(&old, &registry.lock("web")).unwrap());
        fs::remove_file(registry.lock("web")).unwrap();
        assert!(!same_file(&old, &registry.lock("web")).unwrap());
        File::create(registry.lock("web")).unwrap();
        assert!(!same_file(&old, &registry.lock("web")).unwrap());
    }

    #[test]
    fn bad_names_are_refused_in_words() {
        let (_dir, registry) = registry();
        for (name, why) in [
            ("", "must not be empty"),
            ("a/b", "must not contain a slash"),
            ("..", "must begin with a letter"),
            ("-x", "must begin with a letter"),
            ("a b", "must consist of letters"),
            ("ä", "must consist of letters"),
        ] {
            let error = registry.claim(name).unwrap_err().to_string();
            assert!(error.contains(why), "{name}: {error}");
        }
        assert_eq!(name_problem("web-1.example_org"), None);
    }

    #[test]
    fn a_socket_path_must_fit() {
        let (dir, registry) = registry();
        let room = MAX_SOCKET_PATH_BYTES - registry.dir().as_os_str().len() - "/.console".len();
        registry.claim(&"x".repeat(room)).unwrap();
        let error = registry.claim(&"x".repeat(room + 1)).unwrap_err().to_string();
        assert!(error.contains("has 108 bytes, and a socket's path has at most 107"), "{error}");
        drop(dir);
    }
}
