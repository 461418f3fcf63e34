//! Every part of a machine that has state, in one list: saving walks it, restoring walks it, and nothing else knows what there is.
//!
//! The order is that of restoring. Interrupt controllers come before all that raises interrupts, the clock before the vCPUs,
//! whose clocks are told by it, devices last: the power button's level must be driven into an I/O APIC that has been restored.

use super::kick::SharedVcpu;
use super::machine::{Function, lock};
use kvm_ioctls::VmFd;
use serde::de::DeserializeOwned;
use std::sync::{Arc, Mutex};
use sterna_arch::state::{self, ClockState, IrqchipState, Msr, MsrPlan, VcpuState};
use sterna_devices::legacy::{Power, PvPanic, Rtc, Serial, VmGenId};
use sterna_devices::pci::PciSegment;
use sterna_devices::{Saved, StateError};
use sterna_migration::{Section, SectionError, Sections};

/// Why a state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PartError {
    /// The list of sections.
    #[error("the list of states is malformed")]
    Sections(#[from] SectionError),
    /// A part does not take its state.
    #[error("'{part}' does not take the state that was saved of it")]
    Refused {
        /// The part.
        part: String,
        /// Why.
        #[source]
        source: StateError,
    },
    /// The processor's state.
    #[error("'{part}' cannot be {done}")]
    Processor {
        /// The part.
        part: String,
        /// Saved or restored.
        done: &'static str,
        /// Why.
        #[source]
        source: state::StateError,
    },
}

/// The parts of one machine. See the module.
pub struct Parts {
    /// KVM's side of it.
    pub vm: Arc<VmFd>,
    /// By index.
    pub vcpus: Vec<SharedVcpu>,
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

/// One part.
enum Part<'a> {
    Irqchip,
    Vcpu(&'a SharedVcpu),
    Clock,
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

impl Parts {
    /// The one list.
    fn list(&self) -> Vec<(String, Part<'_>)> {
        let mut list = vec![("irqchip".to_owned(), Part::Irqchip)];
        list.push(("clock".into(), Part::Clock));
        list.extend(self.vcpus.iter().enumerate().map(|(index, vcpu)| (format!("vcpu{index}"), Part::Vcpu(vcpu))));
        list.push(("pci".into(), Part::Pci));
        list.push(("serial".into(), Part::Serial));
        list.push(("rtc".into(), Part::Rtc));
        list.push(("pvpanic".into(), Part::Panic));
        list.push(("power".into(), Part::Power));
        list.push(("vmgenid".into(), Part::Generation));
        list.extend(self.functions.iter().map(|function| (lock(function).name().to_owned(), Part::Function(function))));
        list
    }

    /// The state of every part of a machine that stands still.
    ///
    /// # Errors
    /// KVM's, or more state than the format holds.
    pub fn save(&self, msrs: &MsrPlan) -> Result<Sections, PartError> {
        let mut sections = Sections::default();
        let mut list = self.list();
        // The clock is read last: it is what the vCPUs' time stamp counters are told by.
        list.sort_by_key(|(_, part)| matches!(part, Part::Clock));
        for (name, part) in list {
            let failed = |source| PartError::Processor { part: name.clone(), done: "saved", source };
            let saved = match part {
                Part::Irqchip => Saved::of(IrqchipState::VERSION, &state::save_irqchip(&self.vm).map_err(failed)?),
                Part::Vcpu(vcpu) => {
                    let vcpu = lock(vcpu);
                    Saved::of(VcpuState::VERSION, &state::save_vcpu(&vcpu, msrs).map_err(failed)?)
                }
                Part::Clock => Saved::of(ClockState::VERSION, &state::save_clock(&self.vm).map_err(failed)?),
                Part::Pci => self.segment.save(),
                Part::Serial => lock(&self.serial).save(),
                Part::Rtc => lock(&self.rtc).save(),
                Part::Panic => lock(&self.panic).save(),
                Part::Power => lock(&self.power).save(),
                Part::Generation => lock(&self.vmgenid).save(),
                Part::Function(function) => {
                    let function = lock(function);
                    push(&mut sections, &transport_of(&name), function.save())?;
                    push(&mut sections, &model_of(&name), function.save_model())?;
                    continue;
                }
            };
            push(&mut sections, &name, saved)?;
        }
        Ok(sections)
    }

    /// Those of the MSRs `among` that hold anything, by vCPU. The vCPUs stand still.
    ///
    /// # Errors
    /// What KVM does not read.
    pub fn used_msrs(&self, msrs: &MsrPlan, among: &[u32]) -> Result<Vec<(usize, Msr)>, PartError> {
        let mut used = Vec::new();
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let found = msrs.used(&lock(vcpu), among).map_err(|source| PartError::Processor {
                part: format!("vcpu{index}"),
                done: "read",
                source,
            })?;
            used.extend(found.into_iter().map(|msr| (index, msr)));
        }
        Ok(used)
    }

    /// The state of the devices of a machine that may be running: what a rehearsal consists of.
    ///
    /// # Errors
    /// More state than the format holds.
    pub fn save_functions(&self) -> Result<Sections, PartError> {
        let mut sections = Sections::default();
        for function in &self.functions {
            let function = lock(function);
            push(&mut sections, &transport_of(function.name()), function.save())?;
            push(&mut sections, &model_of(function.name()), function.save_model())?;
        }
        Ok(sections)
    }

    /// Gives every part of a machine that has never run its state; each section must be there, and none besides.
    ///
    /// # Errors
    /// The first that is missing or is not taken. The machine is of no use then.
    pub fn restore(&self, mut sections: Sections) -> Result<(), PartError> {
        let mut elapsed = None;
        for (name, part) in self.list() {
            let refused = |source| PartError::Refused { part: name.clone(), source };
            let failed = |source| PartError::Processor { part: name.clone(), done: "restored", source };
            if let Part::Function(function) = part {
                restore_function(function, &mut sections)?;
                continue;
            }
            let saved = taken(sections.take(&name)?);
            match part {
                Part::Irqchip => {
                    let state: IrqchipState = decode(&saved, IrqchipState::VERSION).map_err(refused)?;
                    state::restore_irqchip(&self.vm, &state).map_err(failed)?;
                }
                Part::Vcpu(vcpu) => {
                    let state: VcpuState = decode(&saved, VcpuState::VERSION).map_err(refused)?;
                    // The clock comes before them in the list.
                    let elapsed = elapsed.as_ref().ok_or_else(|| SectionError::Missing("clock".into()))?;
                    state::restore_vcpu(&lock(vcpu), &state, elapsed).map_err(failed)?;
                }
                Part::Clock => {
                    let state: ClockState = decode(&saved, ClockState::VERSION).map_err(refused)?;
                    elapsed = Some(state::restore_clock(&self.vm, &state).map_err(failed)?);
                }
                Part::Pci => self.segment.restore(&saved).map_err(refused)?,
                Part::Serial => lock(&self.serial).restore(&saved).map_err(refused)?,
                Part::Rtc => lock(&self.rtc).restore(&saved).map_err(refused)?,
                Part::Panic => lock(&self.panic).restore(&saved).map_err(refused)?,
                Part::Power => lock(&self.power).restore(&saved).map_err(refused)?,
                Part::Generation => lock(&self.vmgenid).restore(&saved).map_err(refused)?,
                Part::Function(_) => {}
            }
        }
        Ok(sections.finish()?)
    }

    /// Gives the devices what a rehearsal consists of.
    ///
    /// # Errors
    /// The first that is missing or is not taken.
    pub fn rehearse(&self, mut sections: Sections) -> Result<(), PartError> {
        self.functions.iter().try_for_each(|function| restore_function(function, &mut sections))?;
        Ok(sections.finish()?)
    }
}

fn restore_function(function: &Function, sections: &mut Sections) -> Result<(), PartError> {
    let mut function = lock(function);
    let name = function.name().to_owned();
    let transport = taken(sections.take(&transport_of(&name))?);
    let model = taken(sections.take(&model_of(&name))?);
    function.restore(&transport, &model).map_err(|source| PartError::Refused { part: name, source })
}

fn push(sections: &mut Sections, name: &str, saved: Saved) -> Result<(), SectionError> {
    sections.push(Section { name: name.to_owned(), version: saved.version, contents: saved.contents })
}

fn taken(section: Section) -> Saved {
    Saved { version: section.version, contents: section.contents }
}

fn decode<T: DeserializeOwned>(saved: &Saved, version: u16) -> Result<T, StateError> {
    saved.decode(version)
}
