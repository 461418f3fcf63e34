//! A listening Unix socket and the file it leaves in the file system.
//!
//! Only a socket that nobody answers on is replaced; anything else at the path is left alone and an error. The file
//! goes with the listener, unless someone has put another in its place. It refuses to know what is spoken.

use rustix::fs::{FileType, Mode, fchmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Connections the kernel holds for us between two `accept`s.
const BACKLOG: i32 = 16;

/// Why a path cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Something that is no socket is there.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another process answers there.
    #[error("{} is in use by another process", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Longer than a socket address can be (107 bytes).
    #[error("socket path {} is longer than 107 bytes", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot listen on {}", path.display())]
    System {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A non-blocking listener that only its owner may connect to.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, to know it again.
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let system = |source: Errno| ListenError::System { path: path.into(), source: source.into() };
        let address = SocketAddrUnix::new(path).map_err(|errno| match errno {
            Errno::NAMETOOLONG => ListenError::PathTooLong { path: path.into() },
            other => system(other),
        })?;
        clear(path, &address)?;
        let socket = stream_socket().map_err(system)?;
        // Before bind: the file is never open to others, whatever the umask.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(system)?;
        bind(&socket, &address).map_err(system)?;
        let identity = lstat(path).map(|stat| (stat.st_dev, stat.st_ino)).map_err(system)?;
        let listener = Self { socket: socket.into(), path: path.into(), identity };
        listen(&listener.socket, BACKLOG).map_err(system)?;
        Ok(listener)
    }

    /// Takes a waiting connection, made non-blocking; `None` if there is none.
    ///
    /// # Errors
    /// What accept(2) says, for example too many open files.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => stream.set_nonblocking(true).map(|()| Some(stream)),
            // Gone again before we looked counts as none.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(None)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if lstat(&self.path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.identity) {
            let _gone_already = unlink(&self.path);
        }
    }
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Connects to `path` without waiting for whoever listens there.
///
/// # Errors
/// What socket(2) and connect(2) say; `WouldBlock` when the listener's queue is full.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let socket = stream_socket()?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Removes a socket file that nobody answers on.
fn clear(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let system = |source: Errno| ListenError::System { path: path.into(), source: source.into() };
    match lstat(path) {
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(system(errno)),
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
            return Err(ListenError::NotASocket { path: path.into() });
        }
        Ok(_) => {}
    }
    match connect(&stream_socket().map_err(system)?, address) {
        Err(Errno::CONNREFUSED) => unlink(path).map_err(system),
        // Answered, or would be if its queue were not full.
        Ok(()) | Err(Errno::AGAIN) => Err(ListenError::InUse { path: path.into() }),
        Err(errno) => Err(system(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_file_is_private_and_goes_with_the_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listener.accept().unwrap().is_none());
        let _client = connect_now(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse { .. })));
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
        let _other = Listener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists(), "the other listener's file");
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        let error = Listener::bind(&path).unwrap_err().to_string();
        assert!(error.contains("precious exists and is not a socket"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        assert!(matches!(Listener::bind(directory.path()), Err(ListenError::NotASocket { .. })));
    }

    #[test]
    fn a_long_path_is_named_as_such() {
        let path = PathBuf::from(format!("/tmp/{}", "x".repeat(108)));
        assert!(matches!(Listener::bind(&path), Err(ListenError::PathTooLong { .. })));
    }
}
