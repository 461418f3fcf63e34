//! What there is beside the two sides: the guest's copies, its disk locks, and the memory on both hosts.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use sterna_migration::ram::GuestRam;
use sterna_migration::{PageSet, Ram, Run, Section, Sections};
use vm_memory::{Bytes, GuestAddress};

/// Pages of RAM. Most are never written.
const PAGES: u64 = 64;
/// Written before the move, and before the guest stops.
pub const FIRST: u64 = 3;
pub const LAST: u64 = 9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source,
    Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    Running,
    Standing,
    Gone,
}

/// Of the guest.
#[derive(Debug)]
pub struct State {
    pub source: Copy,
    pub target: Copy,
    pub locks: Option<Side>,
    /// What must not be has been.
    pub twice: Option<&'static str>,
    /// The target has the state that the source saved.
    pub state_came: bool,
    /// The target runs, or never will.
    pub decided: bool,
}

/// See the module.
pub struct World {
    state: Mutex<State>,
    changed: Condvar,
    pub here: Ram,
    pub there: Ram,
}

fn ram() -> Ram {
    Ram::new(Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), PAGES as usize * 4096)]).unwrap()))
}

/// Some of the pages.
pub fn set(pages: &[u64]) -> Arc<PageSet> {
    let mut set = PageSet::none(PAGES);
    pages.iter().for_each(|first| set.insert(Run { first: *first, pages: 1 }));
    Arc::new(set)
}

/// The state of the machine, or a rehearsal of it.
pub fn sections(last: bool) -> Sections {
    let mut sections = Sections::default();
    let contents = if last { vec![1, 2, 3] } else { vec![0] };
    sections.push(Section { name: "vcpu0".into(), version: 1, contents }).unwrap();
    sections
}

impl World {
    pub fn new() -> Self {
        let (source, target) = (Copy::Running, Copy::Gone);
        let state = State { source, target, locks: Some(Side::Source), twice: None, state_came: false, decided: false };
        let world = Self { state: Mutex::new(state), changed: Condvar::new(), here: ram(), there: ram() };
        world.write(FIRST, 0x11);
        world
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes a page.
    pub fn write(&self, page: u64, byte: u8) {
        self.here.memory().write_slice(&[byte; 4096], self.here.address(page).unwrap()).unwrap();
    }

    pub fn set_copy(&self, side: Side, copy: Copy) {
        let mut state = self.lock();
        match side {
            Side::Source => state.source = copy,
            Side::Target => state.target = copy,
        }
        if (state.source, state.target) == (Copy::Running, Copy::Running) {
            state.twice = Some("two copies ran");
        }
        if copy == Copy::Running && state.locks != Some(side) {
            state.twice = Some("a copy ran without its locks");
        }
    }

    pub fn take_locks(&self, side: Side) -> bool {
        let mut state = self.lock();
        let taken = state.locks.is_none_or(|holder| holder == side);
        if taken {
            state.locks = Some(side);
        }
        taken
    }

    /// The target runs, or never will.
    pub fn decide(&self) {
        self.lock().decided = true;
        self.changed.notify_all();
    }

    /// Waits until it does.
    pub fn await_target(&self, patience: Duration) {
        let waited = self.changed.wait_timeout_while(self.lock(), patience, |state| !state.decided);
        assert!(waited.unwrap().0.decided, "the target has not made up its mind");
    }

    /// Pages that the two hosts do not have the same.
    pub fn differences(&self) -> Vec<u64> {
        let (mut here, mut there) = ([0; 4096], [0; 4096]);
        let differ = |page: &u64| {
            self.here.copy_page(*page, &mut here);
            self.there.copy_page(*page, &mut there);
            here != there
        };
        (0..PAGES).filter(differ).collect()
    }
}
