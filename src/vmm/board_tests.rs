//! A machine's devices give their states and take them, where there is no KVM.

use super::Board;
use super::parts::PartError;
use std::io;
use std::sync::{Arc, Mutex};
use sterna_devices::legacy::{Power, PvPanic, Serial, VmGenId};
use sterna_devices::pci::PciSegment;
use sterna_devices::virtio::pci::VirtioPci;
use sterna_devices::virtio::rng::Rng;
use sterna_devices::{IrqLine, LevelLine, MsiMessage, Wiring};
use sterna_migration::{Section, SectionError, Sections};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// A hypervisor that has no guest.
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

impl Wiring for Nowhere {
    fn signal(&self, _message: MsiMessage) -> io::Result<()> {
        Ok(())
    }
    fn bind_notify(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
    fn unbind_notify(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

fn board() -> Board {
    let ram = sterna_devices::virtio::GuestRam::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let on_fault = Arc::new(|_: &str, _: &str| {});
    let function = VirtioPci::new("rng", Box::new(Rng), Arc::new(ram), Arc::new(Nowhere), on_fault).unwrap();
    let function = Arc::new(Mutex::new(function));
    let mut segment = PciSegment::new(0xc000_0000..0xc010_0000);
    segment.add(function.clone()).unwrap();
    Board {
        functions: vec![function],
        segment: Arc::new(segment),
        serial: Arc::new(Mutex::new(Serial::new(Arc::new(Nowhere), Box::new(io::sink())))),
        rtc: Arc::default(),
        power: Arc::new(Mutex::new(Power::new(Arc::new(Nowhere)))),
        panic: Arc::new(Mutex::new(PvPanic)),
        vmgenid: Arc::new(Mutex::new(VmGenId::new(GuestAddress(0x1000), [7; 16]))),
    }
}

fn without(sections: &Sections, name: &str) -> Sections {
    let mut rest = sections.clone();
    rest.take(name).unwrap();
    rest
}

/// The sections' names are read for ever too, and their order is that of restoring.
#[test]
fn the_devices_have_their_names_in_their_order() {
    let saved = board().save().unwrap();
    let names: Vec<_> = saved.iter().map(|section| section.name.as_str()).collect();
    assert_eq!(names, ["pci", "serial", "rtc", "pvpanic", "power", "vmgenid", "rng.pci", "rng.model"]);
    let functions = board().save_functions().unwrap();
    assert_eq!(functions.iter().map(|section| section.name.as_str()).collect::<Vec<_>>(), ["rng.pci", "rng.model"]);
}

#[test]
fn each_section_must_be_there_and_none_besides() {
    let saved = board().save().unwrap();
    board().restore(saved.clone()).unwrap();
    for section in saved.iter() {
        let error = board().restore(without(&saved, &section.name)).unwrap_err();
        let PartError::Sections(SectionError::Missing(missing)) = error else { panic!("{error:?}") };
        assert_eq!(missing, section.name);
        let mut newer = without(&saved, &section.name);
        newer.push(Section { version: 2, ..section.clone() }).unwrap();
        let error = board().restore(newer).unwrap_err();
        let PartError::Refused { part, source } = error else { panic!("{error:?}") };
        assert_eq!(source.to_string(), "it has version 2, and this program reads up to 1", "{}", section.name);
        assert_eq!(part, section.name.split('.').next().unwrap());
    }
    let mut more = saved.clone();
    more.push(Section { name: "usb".into(), version: 1, contents: vec![] }).unwrap();
    let error = board().restore(more).unwrap_err();
    assert!(matches!(error, PartError::Sections(SectionError::Unknown(names)) if names == ["usb"]));
    let functions = board().save_functions().unwrap();
    board().rehearse(saved).unwrap_err();
    board().rehearse(functions).unwrap();
}
