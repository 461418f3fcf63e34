//! Connections: TCP between hosts, Unix sockets on one. Every wait on one has an end that says what was waited for.

use super::StreamError;
use super::address::Address;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a peer may send nothing, or take nothing, unless [`Socket::set_timeout`] says otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// A connection on which nothing moves is probed after this, and then as often.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// Probes without an answer that end it.
const KEEPALIVE_PROBES: u32 = 5;
/// The bandwidth that a move needs is there or not; guessing at it, as bbr does, costs a fifth of it on a fast way.
const CONGESTION: &str = "cubic";
/// How often a receiver that does not listen yet is asked again.
const RETRY: Duration = Duration::from_millis(20);

/// A connection. A clone is the same one; it closes with the last of them.
#[derive(Clone, Debug)]
pub enum Socket {
    /// To another host.
    Tcp(Arc<TcpStream>),
    /// On this one.
    Unix(Arc<UnixStream>),
}

/// A connection that is read from until a deadline, however small the pieces are that come: [`Socket::until`].
#[derive(Debug)]
pub struct Until<'a> {
    socket: &'a Socket,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if Instant::now() > self.deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer took too long over one message"));
        }
        self.socket.read(bytes)
    }
}

impl Socket {
    /// To read one message, all of which is here by `deadline`; where nothing more comes, the connection's time-out ends it.
    pub fn until(&self, deadline: Instant) -> Until<'_> {
        Until { socket: self, deadline }
    }

    /// A TCP connection, tuned for a move.
    ///
    /// # Errors
    /// The kernel's.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        sockopt::set_tcp_nodelay(&stream, true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
        sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
        sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
        if let Err(error) = sockopt::set_tcp_congestion(&stream, CONGESTION) {
            log::debug!("TCP congestion control stays what it is: no {CONGESTION}: {error}");
        }
        let socket = Self::Tcp(Arc::new(stream));
        socket.set_timeout(TIMEOUT)?;
        Ok(socket)
    }

    /// A Unix connection.
    ///
    /// # Errors
    /// The kernel's.
    pub fn unix(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        let socket = Self::Unix(Arc::new(stream));
        socket.set_timeout(TIMEOUT)?;
        Ok(socket)
    }

    /// Both ends of a connection within this process.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((Self::unix(one)?, Self::unix(other)?))
    }

    /// How long the peer may from now on send nothing, or take nothing, until that is an error.
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        sockopt::set_socket_timeout(self, Timeout::Recv, Some(timeout))?;
        sockopt::set_socket_timeout(self, Timeout::Send, Some(timeout))?;
        if matches!(self, Self::Tcp(_)) {
            let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
            sockopt::set_tcp_user_timeout(self, millis)?;
        }
        Ok(())
    }

    /// Ends it both ways: whoever waits on it, here and there, wakes up. Not an error where it has ended before.
    pub fn shut(&self) {
        self.end(Shutdown::Both);
    }

    /// Ends what is read here: whoever waits for that wakes up. What was written still goes out, and more can.
    pub fn shut_read(&self) {
        self.end(Shutdown::Read);
    }

    /// Ends what is written here: the peer sees the end, and whoever waits to write wakes up. The peer can still be heard.
    pub fn shut_write(&self) {
        self.end(Shutdown::Write);
    }

    fn end(&self, how: Shutdown) {
        // ENOTCONN: the peer was faster.
        if let Err(error) = rustix::net::shutdown(self, how) {
            log::trace!("a connection had ended before: {error}");
        }
    }

    /// `error`, met while reading from this socket's descriptor, in words: what was waited for and how long.
    pub fn explain_read(&self, error: io::Error) -> io::Error {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "the peer closed the connection"),
            _ => self.explain(error, Timeout::Recv, "the peer sent nothing"),
        }
    }

    /// `error`, met while writing to this socket's descriptor, in words: what was waited for and how long.
    pub fn explain_write(&self, error: io::Error) -> io::Error {
        self.explain(error, Timeout::Send, "the peer took nothing")
    }

    fn explain(&self, error: io::Error, side: Timeout, what: &str) -> io::Error {
        if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) || error.get_ref().is_some() {
            return error;
        }
        let timeout = sockopt::socket_timeout(self, side).ok().flatten().unwrap_or(TIMEOUT);
        io::Error::new(io::ErrorKind::TimedOut, format!("{what} for {timeout:?}"))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let done = match self {
            Socket::Tcp(stream) => (&**stream).read(bytes),
            Socket::Unix(stream) => (&**stream).read(bytes),
        };
        done.map_err(|error| self.explain_read(error))
    }

    fn read_exact(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.read(bytes) {
                Ok(0) => return Err(self.explain_read(io::ErrorKind::UnexpectedEof.into())),
                Ok(done) => bytes = &mut bytes[done..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let done = match self {
            Socket::Tcp(stream) => (&**stream).write(bytes),
            Socket::Unix(stream) => (&**stream).write(bytes),
        };
        done.map_err(|error| self.explain_write(error))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        (&*self).read(bytes)
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        (&*self).read_exact(bytes)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Connects to `address`. A peer that does not listen yet is asked again until `timeout` is over.
///
/// # Errors
/// The last that the kernel said, and for how long.
pub fn connect(address: &Address, timeout: Duration) -> Result<Socket, StreamError> {
    let deadline = Instant::now() + timeout;
    loop {
        let error = match attempt(address, deadline) {
            Ok(socket) => return Ok(socket),
            Err(error) => error,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let source = match error.kind() {
            // A Unix socket's file that is not there yet, or its full queue, is the same: nobody accepts.
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound | io::ErrorKind::WouldBlock => {
                if !left.is_zero() {
                    thread::sleep(RETRY.min(left));
                    continue;
                }
                io::Error::new(error.kind(), format!("nobody accepted for {timeout:?}: {error}"))
            }
            io::ErrorKind::TimedOut => io::Error::new(error.kind(), format!("no answer for {timeout:?}")),
            _ => error,
        };
        return Err(StreamError::Connect { address: address.clone(), source });
    }
}

/// One round through what `address` stands for.
fn attempt(address: &Address, deadline: Instant) -> io::Result<Socket> {
    // At least a moment: a zero would mean no limit.
    let left = || deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    match address {
        Address::Unix(path) => {
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            sockopt::set_socket_timeout(&socket, Timeout::Send, Some(left()))?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
            Socket::unix(UnixStream::from(socket))
        }
        Address::Tcp { host, port } => {
            let mut last = io::Error::new(io::ErrorKind::InvalidInput, "the name stands for no address");
            for number in (host.as_str(), *port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&number, left()) {
                    Ok(stream) => return Socket::tcp(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

/// A place where peers can connect. The file of a Unix socket goes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// With the port that it really has.
    address: Address,
}

impl Listener {
    /// Listens at `address`. A Unix socket's file on which nobody listens any more is replaced.
    ///
    /// # Errors
    /// The kernel's.
    pub fn bind(address: &Address) -> Result<Self, StreamError> {
        let bound = match address {
            Address::Unix(path) => bind_unix(path).map(|listener| (OwnedFd::from(listener), address.clone())),
            Address::Tcp { host, port } => bind_tcp(host, *port),
        };
        match bound {
            Ok((socket, address)) => Ok(Self { socket, address }),
            Err(source) => Err(StreamError::Listen { address: address.clone(), source }),
        }
    }

    /// Where it listens; a port that was given as 0 is told.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The next peer; waits for one until `timeout` is over, or without an end.
    ///
    /// # Errors
    /// The kernel's; `TimedOut` where nobody came.
    pub fn accept(&self, timeout: Option<Duration>) -> Result<Socket, StreamError> {
        self.take(timeout).map_err(|source| StreamError::Listen { address: self.address.clone(), source })
    }

    fn take(&self, timeout: Option<Duration>) -> io::Result<Socket> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], left.as_ref()) {
                Ok(0) => {
                    let text = format!("nobody connected for {:?}", timeout.unwrap_or_default());
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text));
                }
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            return match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(peer) => match self.address {
                    Address::Tcp { .. } => Socket::tcp(TcpStream::from(peer)),
                    Address::Unix(_) => Socket::unix(UnixStream::from(peer)),
                },
                // Gone again before it was taken.
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address
            && let Err(error) = std::fs::remove_file(path)
        {
            log::debug!("the file of {} stays: {error}", self.address);
        }
    }
}

fn bind_tcp(host: &str, port: u16) -> io::Result<(OwnedFd, Address)> {
    let listener = TcpListener::bind((host, port))?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    Ok((listener.into(), Address::Tcp { host: host.to_owned(), port }))
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let stale = UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if !stale {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

#[cfg(test)]
#[path = "socket_tests.rs"]
mod tests;
