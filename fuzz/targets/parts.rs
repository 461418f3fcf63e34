//! The state of every device of a machine, as a list of sections from elsewhere: what another machine saved, changed on the way.
//!
//! It is refused, and the part that refused it is as it was; or it is taken, is a state that the machine can save and take again,
//! and the machine goes on: no access and no ring of its guest is more than an error.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use std::io;
use std::sync::{Arc, Mutex};
use sterna::vmm::{Board, PartError};
use sterna_devices::legacy::{Power, PvPanic, Serial, VmGenId};
use sterna_devices::{BusDevice, IrqLine, LevelLine};
use sterna_fuzz::bus::{Bus, Step, guest};
use sterna_fuzz::guest::Guest;
use sterna_fuzz::patch::{Patch, spoil};
use sterna_migration::{Section, Sections};
use vm_memory::GuestAddress;

/// Steps before and after the move.
const MAX_STEPS: usize = 16;
const MAX_CHANGES: usize = 16;

#[derive(Arbitrary, Debug)]
struct Input {
    before: Vec<Doing>,
    /// The functions' states that are given to the target first.
    rehearsal: Option<Vec<Change>>,
    changes: Vec<Change>,
    /// The target's hypervisor binds no doorbell.
    refuses: bool,
    after: Vec<Doing>,
}

#[derive(Arbitrary, Debug)]
enum Doing {
    Bus(Step),
    Write { device: Legacy, offset: u8, value: u32, bytes: u8 },
    Read { device: Legacy, offset: u8, bytes: u8 },
    Input(Vec<u8>),
    PressButton,
    NewGeneration([u8; 16]),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Legacy {
    Serial,
    Clock,
    Power,
    Panic,
}

/// What happens to a list of sections on the way; sections by number, modulo how many there are.
#[derive(Arbitrary, Debug)]
enum Change {
    Spoil(u8, Vec<Patch>),
    Contents(u8, Vec<u8>),
    Append(u8, Vec<u8>),
    Cut(u8, u16),
    Version(u8, u16),
    Drop(u8),
    Rename(u8, String),
    Swap(u8, u8),
    SwapContents(u8, u8),
    More(String, Vec<u8>),
}

/// Interrupt lines that lead nowhere.
struct Nowhere;

impl IrqLine for Nowhere {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

impl LevelLine for Nowhere {
    fn set(&self, _high: bool) -> io::Result<()> {
        Ok(())
    }
}

struct Machine {
    bus: Bus,
    board: Board,
}

impl Machine {
    fn new(guest: Guest) -> Self {
        let bus = Bus::new(guest);
        let board = Board {
            functions: bus.functions.clone(),
            segment: bus.segment.clone(),
            serial: Arc::new(Mutex::new(Serial::new(Arc::new(Nowhere), Box::new(io::sink())))),
            rtc: Arc::default(),
            power: Arc::new(Mutex::new(Power::new(Arc::new(Nowhere)))),
            panic: Arc::new(Mutex::new(PvPanic)),
            vmgenid: Arc::new(Mutex::new(VmGenId::new(GuestAddress(0x1000), [7; 16]))),
        };
        Self { bus, board }
    }

    fn legacy(&self, device: Legacy, access: impl FnOnce(&mut dyn BusDevice)) {
        match device {
            Legacy::Serial => access(&mut *self.board.serial.lock().expect("no panic so far")),
            Legacy::Clock => access(&mut *self.board.rtc.lock().expect("no panic so far")),
            Legacy::Power => access(&mut *self.board.power.lock().expect("no panic so far")),
            Legacy::Panic => access(&mut *self.board.panic.lock().expect("no panic so far")),
        }
    }

    fn happen(&mut self, doings: Vec<Doing>) {
        for doing in doings.into_iter().take(MAX_STEPS) {
            match doing {
                Doing::Bus(step) => self.bus.step(step),
                Doing::Write { device, offset, value, bytes } => self.legacy(device, |device| {
                    device.write((offset % 16).into(), &value.to_le_bytes()[..usize::from(bytes % 4) + 1]);
                }),
                Doing::Read { device, offset, bytes } => self.legacy(device, |device| {
                    device.read((offset % 16).into(), &mut [0; 8][..usize::from(bytes % 8) + 1]);
                }),
                Doing::Input(bytes) => {
                    self.board.serial.lock().expect("no panic so far").enqueue(&bytes);
                }
                Doing::PressButton => {
                    self.board.power.lock().expect("no panic so far").press_power_button().expect("a line");
                }
                Doing::NewGeneration(id) => {
                    let mut vmgenid = self.board.vmgenid.lock().expect("no panic so far");
                    vmgenid.set_generation(&self.bus.guest.ram, id).expect("inside RAM");
                }
            }
        }
    }

    /// What has moved is what it was. How far a function with a fault had come in its rings is forgotten: until its driver resets
    /// it, nobody looks at them.
    fn check_same(&self, before: &Sections, after: &Sections) {
        let faulted: Vec<_> = self
            .board
            .functions
            .iter()
            .map(|function| function.lock().expect("no panic so far"))
            .filter(|function| function.fault().is_some())
            .map(|function| format!("{}.pci", function.name()))
            .collect();
        assert_eq!(before.iter().count(), after.iter().count());
        for (before, after) in before.iter().zip(after.iter()) {
            assert!(
                before == after || faulted.contains(&after.name),
                "{} is {after:?}, and was {before:?}",
                before.name
            );
        }
    }

    fn save(&self) -> Sections {
        self.board.save().expect("the format holds any state")
    }
}

fn changed(sections: &Sections, changes: Vec<Change>) -> Sections {
    let mut list: Vec<Section> = sections.iter().cloned().collect();
    for change in changes.into_iter().take(MAX_CHANGES).filter(|_| !list.is_empty()).collect::<Vec<_>>() {
        let count = list.len().max(1);
        let at = |number: u8| usize::from(number) % count;
        match change {
            _ if list.is_empty() => {}
            Change::Spoil(number, patches) => spoil(&mut list[at(number)].contents, &patches),
            Change::Contents(number, bytes) => list[at(number)].contents = bytes,
            Change::Append(number, bytes) => list[at(number)].contents.extend(bytes),
            Change::Cut(number, length) => list[at(number)].contents.truncate(length.into()),
            Change::Version(number, version) => list[at(number)].version = version,
            Change::Drop(number) => drop(list.remove(at(number))),
            Change::Rename(number, name) => list[at(number)].name = name,
            Change::Swap(one, other) => list.swap(at(one), at(other)),
            Change::SwapContents(one, other) => {
                let contents = std::mem::take(&mut list[at(one)].contents);
                let contents = std::mem::replace(&mut list[at(other)].contents, contents);
                list[at(one)].contents = contents;
            }
            Change::More(name, contents) => list.push(Section { name, version: 1, contents }),
        }
    }
    let mut sections = Sections::default();
    for section in list {
        let _what_the_format_cannot_hold = sections.push(section);
    }
    Sections::decode(&sections.encode()).expect("what was encoded")
}

/// The part that refused is as it was.
fn check_refused(error: &PartError, before: &Sections, after: &Sections) {
    assert!(!error.to_string().is_empty());
    let PartError::Refused { part, source } = error else { return };
    assert!(!source.to_string().is_empty());
    let of = |sections: &Sections| {
        let names = [part.clone(), format!("{part}.pci"), format!("{part}.model")];
        sections.iter().filter(|section| names.contains(&section.name)).cloned().collect::<Vec<_>>()
    };
    assert_eq!(of(before), of(after), "{part} has refused a state and is not as it was");
}

fuzz_target!(|input: Input| {
    sterna_fuzz::format_logs();
    let mut source = Machine::new(guest());
    source.happen(input.before);
    source.bus.set_refuses(false);
    source.bus.pause();
    let (saved, functions) = (source.save(), source.board.save_functions().expect("the format holds any state"));
    let mut target = Machine::new(source.bus.into_guest());
    drop(source.board);
    target.bus.set_refuses(input.refuses);
    let mut unchanged = input.changes.is_empty();
    if let Some(changes) = input.rehearsal {
        let before = target.save();
        if let Err(error) = target.board.rehearse(changed(&functions, changes)) {
            check_refused(&error, &before, &target.save());
            unchanged = false;
        }
    }
    let before = target.save();
    if let Err(error) = target.board.restore(changed(&saved, input.changes)) {
        assert!(!unchanged, "what a machine saved is refused: {error:?}");
        return check_refused(&error, &before, &target.save());
    }
    let taken = target.save();
    if unchanged {
        target.check_same(&saved, &taken);
    }
    target.board.restore(taken.clone()).expect("what it saves it takes");
    assert_eq!(target.save(), taken);
    target.bus.resume();
    target.happen(input.after);
    target.bus.recovers();
});
