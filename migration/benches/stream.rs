//! The data path over loopback TCP against plain writes and reads of as many bytes; and what a small last pass takes.

#![expect(clippy::unwrap_used, reason = "a measurement that cannot be made has failed")]

use rustix::time::{ClockId, clock_gettime};
use std::fmt;
use std::io::{Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use sterna_migration::ram::GuestRam;
use sterna_migration::stream::{Event, FIRST_PASS, Hooks, Listener, Pace, Receiver, Sender, Socket, Throttle, connect};
use sterna_migration::{PageSet, Ram, Run};
use vm_memory::{Bytes, GuestAddress};

const RAM_BYTES: u64 = 1 << 30;
const ROUNDS: u32 = 5;
const LONG: Duration = Duration::from_secs(60);

struct Quiet;

impl Hooks for Quiet {
    fn before(&self, _: Run, _: &[u64]) -> std::io::Result<()> {
        Ok(())
    }
    fn sent(&self, _: u64, _: u64) {}
    fn cancelled(&self) -> bool {
        false
    }
}

/// RAM without a zero page, resident.
fn ram() -> Ram {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).unwrap();
    let mebibyte = vec![0x5a; 1 << 20];
    for at in (0..RAM_BYTES).step_by(1 << 20) {
        memory.write_slice(&mebibyte, GuestAddress(at)).unwrap();
    }
    Ram::new(Arc::new(memory))
}

fn sockets(number: usize) -> (Vec<Socket>, Vec<Socket>) {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
    let pair = |_| (connect(listener.address(), LONG).unwrap(), listener.accept(Some(LONG)).unwrap());
    (0..number).map(pair).unzip()
}

/// What moving all of RAM takes: on a machine that is busy with other things the second number is the better one.
#[derive(Clone, Copy)]
struct Cost {
    elapsed: Duration,
    cpu: Duration,
}

impl Cost {
    const MOST: Self = Self { elapsed: Duration::MAX, cpu: Duration::MAX };

    fn of(work: impl FnOnce()) -> Self {
        let cpu = || Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap();
        let (start, start_cpu) = (Instant::now(), cpu());
        work();
        Self { elapsed: start.elapsed(), cpu: cpu() - start_cpu }
    }

    fn min(self, other: Self) -> Self {
        Self { elapsed: self.elapsed.min(other.elapsed), cpu: self.cpu.min(other.cpu) }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gigabytes = RAM_BYTES as f64 / 1e9;
        let (rate, cpu) = (gigabytes / self.elapsed.as_secs_f64(), self.cpu.as_secs_f64() / gigabytes);
        write!(f, "{rate:.2} GB/s with {cpu:.2} s of CPU for a GB")
    }
}

/// Plain writes of 8 MiB from resident memory and reads into it.
fn plain(ours: &[Socket], theirs: &[Socket], from: &[u8], to: &mut [u8]) {
    let share = from.len() / ours.len();
    thread::scope(|scope| {
        for (mut socket, part) in ours.iter().zip(from.chunks(share)) {
            scope.spawn(move || part.chunks(8 << 20).for_each(|piece| socket.write_all(piece).unwrap()));
        }
        for (mut socket, part) in theirs.iter().zip(to.chunks_mut(share)) {
            scope.spawn(move || socket.read_exact(part).unwrap());
        }
    });
}

/// All of RAM by turns: plainly, and as a move. The least that each took.
fn whole(from: &Ram, to: &Ram, number: usize) -> (Cost, Cost) {
    let (ours, theirs) = sockets(number);
    let (source, mut sink) = (vec![1; RAM_BYTES as usize], vec![2; RAM_BYTES as usize]);
    let mut all = PageSet::none(from.pages());
    all.insert(Run { first: 0, pages: from.pages() });
    let all = Arc::new(all);
    let (mut plainly, mut moved) = (Cost::MOST, Cost::MOST);
    for _ in 0..ROUNDS {
        plainly = plainly.min(Cost::of(|| plain(&ours, &theirs, &source, &mut sink)));
        moved = moved.min(Cost::of(|| _ = passes(from, to, number, &all, 1)));
    }
    (plainly, moved)
}

/// Passes of `pages`, from the call to the word from the other side that all has landed: the shortest and the middle one.
fn passes(from: &Ram, to: &Ram, number: usize, pages: &Arc<PageSet>, rounds: u32) -> (Duration, Duration) {
    let (ours, theirs) = sockets(number);
    let mut receiver = Receiver::new(to.clone(), theirs).unwrap();
    let target = thread::spawn(move || {
        for pass in 0..rounds {
            assert_eq!(receiver.next_event().unwrap(), Event::PassEnd(pass + FIRST_PASS));
            receiver.control().write_all(b"!").unwrap();
        }
    });
    let mut sender = Sender::new(from.clone(), ours, Arc::new(Throttle::new(None)), Arc::new(Quiet)).unwrap();
    let round = |_| {
        let start = Instant::now();
        sender.send_pass(pages, Pace::Full).unwrap();
        sender.control().read_exact(&mut [0]).unwrap();
        start.elapsed()
    };
    let mut times: Vec<_> = (0..rounds).map(round).collect();
    target.join().unwrap();
    times.sort_unstable();
    (times[0], times[times.len() / 2])
}

fn main() {
    let (from, to) = (ram(), ram());
    for number in [1, 2] {
        let (plainly, moved) = whole(&from, &to, number);
        let part = plainly.elapsed.as_secs_f64() / moved.elapsed.as_secs_f64() * 100.0;
        println!("{number} connections: {moved}; plain TCP {plainly}: {part:.0} %");
    }
    for kib in [16, 256, 1024, 2048, 2052, 4096] {
        let mut some = PageSet::none(from.pages());
        (0..kib / 4).for_each(|page| some.insert(Run { first: page * 7, pages: 1 }));
        let some = Arc::new(some);
        for number in [1, 2, 4] {
            let (best, middle) = passes(&from, &to, number, &some, 200);
            println!("last pass of {kib} KiB, {number} connections: {middle:?}, at best {best:?}");
        }
    }
}
