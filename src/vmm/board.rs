//! The devices of a machine, and their part of the one list: it knows no KVM, so every state can be given to it anywhere.

use super::machine::{Function, lock};
use super::parts::PartError;
use std::sync::{Arc, Mutex};
use sterna_devices::legacy::{Power, PvPanic, Rtc, Serial, VmGenId};
use sterna_devices::pci::PciSegment;
use sterna_devices::{Saved, StateError};
use sterna_migration::{Section, SectionError, Sections};

/// See the module.
pub struct Board {
    /// In slot order.
    pub functions: Vec<Function>,
    /// The bus they are on.
    pub segment: Arc<PciSegment>,
    /// The serial port.
    pub serial: Arc<Mutex<Serial>>,
    /// The clock with a battery.
    pub rtc: Arc<Mutex<Rtc>>,
    /// The power button, reset and sleep.
    pub power: Arc<Mutex<Power>>,
    /// The panic port.
    pub panic: Arc<Mutex<PvPanic>>,
    /// The generation id.
    pub vmgenid: Arc<Mutex<VmGenId>>,
}

/// One device of a board.
#[derive(Clone, Copy)]
pub(super) enum Device<'a> {
    Pci,
    Serial,
    Rtc,
    Panic,
    Power,
    Generation,
    /// The transport and the model of a function: two sections.
    Function(&'a Function),
}

/// Section of a function's transport.
fn transport_of(function: &str) -> String {
    format!("{function}.pci")
}

/// Section of a function's model.
fn model_of(function: &str) -> String {
    format!("{function}.model")
}

impl Board {
    /// The devices' part of the one list, in the order of restoring.
    pub(super) fn list(&self) -> Vec<(String, Device<'_>)> {
        let mut list = vec![("pci".to_owned(), Device::Pci)];
        list.push(("serial".into(), Device::Serial));
        list.push(("rtc".into(), Device::Rtc));
        list.push(("pvpanic".into(), Device::Panic));
        list.push(("power".into(), Device::Power));
        list.push(("vmgenid".into(), Device::Generation));
        list.extend(
            self.functions.iter().map(|function| (lock(function).name().to_owned(), Device::Function(function))),
        );
        list
    }

    /// The state of every device.
    ///
    /// # Errors
    /// More state than the format holds.
    pub fn save(&self) -> Result<Sections, SectionError> {
        let mut sections = Sections::default();
        self.list().into_iter().try_for_each(|(name, device)| self.save_one(&name, device, &mut sections))?;
        Ok(sections)
    }

    /// Gives every device of a machine that has never run its state; each section must be there, and none besides.
    ///
    /// # Errors
    /// The first that is missing or is not taken. The machine is of no use then.
    pub fn restore(&self, mut sections: Sections) -> Result<(), PartError> {
        self.list().into_iter().try_for_each(|(name, device)| self.restore_one(&name, device, &mut sections))?;
        Ok(sections.finish()?)
    }

    /// The state of the functions of a machine that may be running: what a rehearsal consists of.
    ///
    /// # Errors
    /// More state than the format holds.
    pub fn save_functions(&self) -> Result<Sections, SectionError> {
        let mut sections = Sections::default();
        self.functions.iter().try_for_each(|function| save_function(function, &mut sections))?;
        Ok(sections)
    }

    /// Gives the functions what a rehearsal consists of.
    ///
    /// # Errors
    /// The first that is missing or is not taken.
    pub fn rehearse(&self, mut sections: Sections) -> Result<(), PartError> {
        self.functions.iter().try_for_each(|function| restore_function(function, &mut sections))?;
        Ok(sections.finish()?)
    }

    pub(super) fn save_one(&self, name: &str, device: Device<'_>, sections: &mut Sections) -> Result<(), SectionError> {
        let saved = match device {
            Device::Pci => self.segment.save(),
            Device::Serial => lock(&self.serial).save(),
            Device::Rtc => lock(&self.rtc).save(),
            Device::Panic => lock(&self.panic).save(),
            Device::Power => lock(&self.power).save(),
            Device::Generation => lock(&self.vmgenid).save(),
            Device::Function(function) => return save_function(function, sections),
        };
        push(sections, name, saved)
    }

    pub(super) fn restore_one(&self, name: &str, device: Device<'_>, sections: &mut Sections) -> Result<(), PartError> {
        if let Device::Function(function) = device {
            return restore_function(function, sections);
        }
        let saved = take(sections, name)?;
        let restored = match device {
            Device::Pci => self.segment.restore(&saved),
            Device::Serial => lock(&self.serial).restore(&saved),
            Device::Rtc => lock(&self.rtc).restore(&saved),
            Device::Panic => lock(&self.panic).restore(&saved),
            Device::Power => lock(&self.power).restore(&saved),
            Device::Generation => lock(&self.vmgenid).restore(&saved),
            Device::Function(_) => Ok(()),
        };
        restored.map_err(|source| refused(name, source))
    }
}

fn save_function(function: &Function, sections: &mut Sections) -> Result<(), SectionError> {
    let function = lock(function);
    push(sections, &transport_of(function.name()), function.save())?;
    push(sections, &model_of(function.name()), function.save_model())
}

fn restore_function(function: &Function, sections: &mut Sections) -> Result<(), PartError> {
    let mut function = lock(function);
    let name = function.name().to_owned();
    let transport = take(sections, &transport_of(&name))?;
    let model = take(sections, &model_of(&name))?;
    function.restore(&transport, &model).map_err(|source| refused(&name, source))
}

fn refused(part: &str, source: StateError) -> PartError {
    PartError::Refused { part: part.to_owned(), source }
}

/// Adds what was saved of part `name`.
pub(super) fn push(sections: &mut Sections, name: &str, saved: Saved) -> Result<(), SectionError> {
    sections.push(Section { name: name.to_owned(), version: saved.version, contents: saved.contents })
}

/// Takes out what was saved of part `name`.
pub(super) fn take(sections: &mut Sections, name: &str) -> Result<Saved, SectionError> {
    let Section { version, contents, .. } = sections.take(name)?;
    Ok(Saved { version, contents })
}
