//! Both ends of the line between a receiver and its VM's process, given other bytes and descriptors than they expect.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use sterna::vmm::{KeeperLink, Word};
use sterna_fuzz::format_logs;
use sterna_fuzz::patch::{Patch, spoil};
use sterna_migration::handover::Move;
use sterna_migration::wire::{Preamble, Purpose};
use uuid::Uuid;

#[derive(Arbitrary, Debug)]
enum Part {
    /// A preamble, right but for some bytes, cut, with so many descriptors of some kind.
    Preamble { epoch: u64, patches: Vec<Patch>, cut: Option<u8>, fds: Vec<Kind> },
    /// Whatever, with no descriptor.
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    Unix,
    Memory,
}

const MOST_FDS: usize = 8;

fn open(kind: Kind) -> OwnedFd {
    match kind {
        Kind::Unix => UnixStream::pair().expect("a descriptor").0.into(),
        Kind::Memory => memfd_create("x", MemfdFlags::CLOEXEC).expect("a descriptor"),
    }
}

fn say(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).expect("it fits");
}

fuzz_target!(|parts: Vec<Part>| {
    format_logs();
    let open_before = std::fs::read_dir("/proc/self/fd").expect("a directory").count();
    for hears in [false, true] {
        let (near, far) = UnixStream::pair().expect("a descriptor");
        for part in &parts {
            match part {
                Part::Preamble { epoch, patches, cut, fds } => {
                    let mut bytes = Preamble::new(Purpose::Join, 1, Uuid::nil(), *epoch).encode();
                    spoil(&mut bytes, patches);
                    let end = cut.map_or(bytes.len(), |cut| usize::from(cut).clamp(1, bytes.len()));
                    let fds: Vec<_> = fds.iter().take(MOST_FDS).map(|kind| open(*kind)).collect();
                    say(&near, &bytes[..end], &fds);
                }
                Part::Bytes(bytes) => say(&near, bytes, &[]),
            }
        }
        drop(near);
        let link = KeeperLink::new(far);
        let mut words = 0;
        while hears && link.hear() != Word::End {
            words += 1;
            assert!(words < 1 << 20);
        }
        // What is not a preamble with a connection ends the process that takes it.
        while let Ok(Some((preamble, _socket))) = link.take() {
            let this_move = Move { id: Uuid::nil(), epoch: 1 };
            assert_eq!(KeeperLink::belongs(&preamble, this_move), preamble.id.is_nil() && preamble.epoch == 1);
        }
    }
    assert_eq!(
        std::fs::read_dir("/proc/self/fd").expect("a directory").count(),
        open_before,
        "a descriptor stayed open"
    );
});
