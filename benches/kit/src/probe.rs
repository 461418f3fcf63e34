//! What the ground takes without a monitor: plain TCP, and plain writing to a file.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use sterna_migration::stream::{Listener, Socket, connect};

const PIECE: usize = 8 << 20;
const MIB: usize = 1 << 20;
const O_DIRECT: i32 = 0o40000;
const WRITERS: u64 = 4;

/// Connections over loopback TCP, set up as a move sets them up, with buffers that are resident.
pub struct Network {
    from: Vec<u8>,
    to: Vec<u8>,
    ours: Vec<Socket>,
    theirs: Vec<Socket>,
}

impl Network {
    /// For transfers of up to `mib` over `connections`.
    pub fn new(mib: usize, connections: usize) -> Self {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let pair = |_| {
            let ours = connect(listener.address(), super::LIMIT).unwrap();
            (ours, listener.accept(Some(super::LIMIT)).unwrap())
        };
        let (ours, theirs) = (0..connections).map(pair).unzip();
        Self { from: vec![1; mib * MIB], to: vec![2; mib * MIB], ours, theirs }
    }

    /// How long `mib` take from resident memory to resident memory.
    pub fn transfer(&mut self, mib: usize) -> Duration {
        let share = (mib * MIB).div_ceil(self.ours.len());
        let (from, to) = (&self.from[..mib * MIB], &mut self.to[..mib * MIB]);
        let began = Instant::now();
        thread::scope(|scope| {
            for (mut socket, part) in self.ours.iter().zip(from.chunks(share)) {
                scope.spawn(move || part.chunks(PIECE).for_each(|piece| socket.write_all(piece).unwrap()));
            }
            for (mut socket, part) in self.theirs.iter().zip(to.chunks_mut(share)) {
                scope.spawn(move || socket.read_exact(part).unwrap());
            }
        });
        began.elapsed()
    }
}

/// How long `mib` that are no zeros take to a new file, past the page cache and to the disk, in pieces of 4 MiB.
pub fn write_direct(file: &Path, mib: u64) -> Duration {
    const PIECE: usize = 4 << 20;
    // O_DIRECT wants an aligned buffer.
    let noise: Vec<u8> =
        (0..PIECE as u64 + 4096).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 29) as u8).collect();
    let from = noise.as_ptr().align_offset(4096);
    let piece = &noise[from..from + PIECE];
    let began = Instant::now();
    let output = OpenOptions::new().write(true).create_new(true).custom_flags(O_DIRECT).open(file).unwrap();
    let next = AtomicU64::new(0);
    let write = || {
        loop {
            let at = next.fetch_add(PIECE as u64, Ordering::Relaxed);
            if at >= mib << 20 {
                return;
            }
            output.write_all_at(piece, at).unwrap();
        }
    };
    thread::scope(|scope| (0..WRITERS).for_each(|_| _ = scope.spawn(write)));
    output.sync_all().unwrap();
    let took = began.elapsed();
    std::fs::remove_file(file).unwrap();
    took
}
