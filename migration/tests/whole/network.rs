//! Connections from the source to the target's host, which can be cut after any byte.

use super::world::World;
use std::io::{Read, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use sterna_migration::stream::Socket;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToTarget,
    ToSource,
}

/// A connection, by its number, is no more once so many bytes have passed in a direction.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub connection: usize,
    pub direction: Direction,
    pub after: usize,
}

/// Whether a source that has lost its connection can connect again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// At once.
    None,
    /// Not before the target has waited for it in vain, or runs.
    Long,
}

/// See the module.
pub struct Network<'a> {
    world: &'a World,
    cuts: Vec<Cut>,
    state: Mutex<State>,
    outage: Outage,
    /// Connections of the move itself, which can always be made.
    always: usize,
}

struct State {
    /// To the target's host, until nobody comes any more.
    host: Option<Sender<Socket>>,
    made: usize,
    relays: Vec<JoinHandle<usize>>,
}

impl<'a> Network<'a> {
    /// A network, and the host's end of it.
    pub fn new(world: &'a World, cuts: Vec<Cut>, outage: Outage, always: usize) -> (Self, Receiver<Socket>) {
        let (host, far) = channel();
        let state = State { host: Some(host), made: 0, relays: Vec::new() };
        (Self { world, cuts, state: Mutex::new(state), outage, always }, far)
    }

    /// A connection to the target's host, if one can be had.
    pub fn connect(&self) -> Option<Socket> {
        let mut state = self.state.lock().unwrap();
        if state.made >= self.always && self.outage == Outage::Long {
            self.world.await_target(super::LONG);
        }
        let (near, one) = Socket::pair().unwrap();
        let (other, far) = Socket::pair().unwrap();
        let number = state.made;
        state.made += 1;
        let limit = |direction| {
            let cut = self.cuts.iter().find(|cut| (cut.connection, cut.direction) == (number, direction));
            cut.map_or(usize::MAX, |cut| cut.after)
        };
        let ends = Arc::new([one, other]);
        for (direction, from) in [(Direction::ToTarget, 0), (Direction::ToSource, 1)] {
            let (ends, limit) = (Arc::clone(&ends), limit(direction));
            state.relays.push(thread::spawn(move || relay(&ends, from, limit)));
        }
        state.host.as_ref()?.send(far).ok()?;
        Some(near)
    }

    /// Nobody connects any more.
    pub fn close(&self) {
        self.state.lock().unwrap().host = None;
    }

    /// Bytes that passed, by connection, once all have ended.
    pub fn passed(&self) -> Vec<[usize; 2]> {
        let relays = std::mem::take(&mut self.state.lock().unwrap().relays);
        let passed: Vec<_> = relays.into_iter().map(|relay| relay.join().unwrap()).collect();
        passed.as_chunks().0.to_vec()
    }
}

/// Carries up to `limit` bytes, then cuts the connection both ways.
fn relay(ends: &[Socket; 2], from: usize, limit: usize) -> usize {
    let (mut input, mut output) = (&ends[from], &ends[1 - from]);
    let (mut buffer, mut passed) = ([0; 16384], 0);
    while passed < limit {
        let room = buffer.len().min(limit - passed);
        match input.read(&mut buffer[..room]) {
            Ok(read @ 1..) if output.write_all(&buffer[..read]).is_ok() => passed += read,
            Ok(0) => {
                // Its writer is done; what comes the other way still does.
                output.shut_write();
                return passed;
            }
            _ => break,
        }
    }
    ends.iter().for_each(Socket::shut);
    passed
}
