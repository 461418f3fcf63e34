//! A receiving VM's line to its keeper, the `sterna receive` that started it: connections of the move come in over it, and
//! one word goes out, "starting", before the guest's first instruction.

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use sterna_migration::handover::Move;
use sterna_migration::stream::Socket;
use sterna_migration::wire::{Preamble, preamble};

/// What the VM's process says before the guest's first instruction.
const STARTING: u8 = b'S';
/// What it says when the source has heard that the guest runs.
const SETTLED: u8 = b'D';

/// What a keeper hears from a VM's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The guest is about to start.
    Starting,
    /// The source knows that it runs, or has had its time to hear it.
    Settled,
    /// The process has ended.
    End,
}

/// Either end of the line.
pub struct KeeperLink {
    stream: UnixStream,
}

impl KeeperLink {
    /// An end of a connected pair.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// The keeper gives away a connection whose preamble it has read. Never waits.
    ///
    /// # Errors
    /// The VM's process has gone, or takes no connections.
    pub fn pass(&self, preamble: &Preamble, socket: &Socket) -> io::Result<()> {
        let bytes = preamble.encode();
        let fds = [socket.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = match sendmsg(&self.stream, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
            Err(Errno::AGAIN) => return Err(io::Error::other("the process of this move takes no more connections")),
            sent => sent?,
        };
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The VM's process takes a connection; `None` when the keeper has gone.
    ///
    /// # Errors
    /// A line that carries something else.
    pub fn take(&self) -> io::Result<Option<(Preamble, Socket)>> {
        let mut bytes = [0; preamble::BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let received = loop {
            match recvmsg(&self.stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                received => break received?,
            }
        };
        if received.bytes == 0 {
            return Ok(None);
        }
        let fds = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let malformed = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let fd = fds.flatten().next().ok_or_else(|| malformed("no descriptor came with a preamble"))?;
        if received.bytes != bytes.len() {
            return Err(malformed("a preamble came in pieces"));
        }
        let preamble = Preamble::decode(&bytes).map_err(io::Error::other)?;
        Ok(Some((preamble, adopt(fd)?)))
    }

    /// The VM's process says that the guest is about to start. That the keeper is gone is no failure.
    pub fn starting(&self) {
        self.say(STARTING);
    }

    /// The VM's process says that the source has nothing more to ask.
    pub fn settled(&self) {
        self.say(SETTLED);
    }

    fn say(&self, word: u8) {
        if let Err(error) = (&self.stream).write_all(&[word]) {
            log::debug!("the receiver that started this process has gone: {error}");
        }
    }

    /// The keeper waits for the next word.
    pub fn hear(&self) -> Word {
        let mut word = [0];
        match (&self.stream).read_exact(&mut word) {
            Ok(()) if word == [STARTING] => Word::Starting,
            Ok(()) if word == [SETTLED] => Word::Settled,
            _ => Word::End,
        }
    }

    /// This move's connections only.
    pub fn belongs(preamble: &Preamble, this_move: Move) -> bool {
        preamble.id == this_move.id && preamble.epoch == this_move.epoch
    }
}

impl AsFd for KeeperLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// A connection from its descriptor.
fn adopt(fd: OwnedFd) -> io::Result<Socket> {
    match rustix::net::sockopt::socket_domain(&fd)? {
        rustix::net::AddressFamily::UNIX => Socket::unix(UnixStream::from(fd)),
        _ => Socket::tcp(TcpStream::from(fd)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sterna_migration::wire::Purpose;
    use uuid::Uuid;

    #[test]
    fn a_process_that_takes_no_connections_does_not_hold_its_keeper_up() {
        let (one, _other) = UnixStream::pair().unwrap();
        let keeper = KeeperLink::new(one);
        let (_near, far) = Socket::pair().unwrap();
        let preamble = Preamble::new(Purpose::Join, 3, Uuid::from_u128(7), 2);
        let refused = (0..100_000).find_map(|_| keeper.pass(&preamble, &far).err());
        assert!(refused.is_some());
    }

    #[test]
    fn connections_and_the_one_word_pass() {
        let (one, other) = UnixStream::pair().unwrap();
        let (keeper, child) = (KeeperLink::new(one), KeeperLink::new(other));
        let (near, far) = Socket::pair().unwrap();
        let preamble = Preamble::new(Purpose::Join, 3, Uuid::from_u128(7), 2);
        keeper.pass(&preamble, &far).unwrap();
        drop(far);
        let (taken, mut socket) = child.take().unwrap().unwrap();
        assert_eq!(taken, preamble);
        (&near).write_all(b"x").unwrap();
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        child.starting();
        child.settled();
        assert_eq!([keeper.hear(), keeper.hear()], [Word::Starting, Word::Settled]);
        drop(child);
        assert_eq!(keeper.hear(), Word::End);
    }
}
