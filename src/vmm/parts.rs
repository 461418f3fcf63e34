//! Every part of a machine that has state, in one list: saving walks it, restoring walks it, and nothing else knows what there is.
//! What is KVM's is here, the devices' end of the list is [`Board`]'s.
//!
//! The order is that of restoring. Interrupt controllers come before all that raises interrupts, the clock before the vCPUs,
//! whose clocks are told by it, devices last: the power button's level must be driven into an I/O APIC that has been restored.

use super::board::{self, Board, Device};
use super::kick::SharedVcpu;
use super::machine::lock;
use kvm_ioctls::VmFd;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use sterna_arch::state::{self, ClockState, IrqchipState, Msr, MsrPlan, VcpuState};
use sterna_devices::{Saved, StateError};
use sterna_migration::{SectionError, Sections};

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
    /// Its devices.
    pub board: Board,
}

/// One part.
enum Part<'a> {
    Irqchip,
    Clock,
    Vcpu(&'a SharedVcpu),
    Device(Device<'a>),
}

impl Parts {
    /// The one list.
    fn list(&self) -> Vec<(String, Part<'_>)> {
        let mut list = vec![("irqchip".to_owned(), Part::Irqchip)];
        list.push(("clock".into(), Part::Clock));
        list.extend(self.vcpus.iter().enumerate().map(|(index, vcpu)| (format!("vcpu{index}"), Part::Vcpu(vcpu))));
        list.extend(self.board.list().into_iter().map(|(name, device)| (name, Part::Device(device))));
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
                Part::Device(device) => {
                    self.board.save_one(&name, device, &mut sections)?;
                    continue;
                }
            };
            board::push(&mut sections, &name, saved)?;
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

    /// Gives every part of a machine that has never run its state; each section must be there, and none besides.
    ///
    /// # Errors
    /// The first that is missing or is not taken. The machine is of no use then.
    pub fn restore(&self, mut sections: Sections) -> Result<(), PartError> {
        let mut elapsed = None;
        for (name, part) in self.list() {
            let refused = |source| PartError::Refused { part: name.clone(), source };
            let failed = |source| PartError::Processor { part: name.clone(), done: "restored", source };
            match part {
                Part::Irqchip => {
                    let saved = board::take(&mut sections, &name)?;
                    let state: IrqchipState = decode(&saved, IrqchipState::VERSION).map_err(refused)?;
                    state::restore_irqchip(&self.vm, &state).map_err(failed)?;
                }
                Part::Vcpu(vcpu) => {
                    let saved = board::take(&mut sections, &name)?;
                    let state: VcpuState = decode(&saved, VcpuState::VERSION).map_err(refused)?;
                    // The clock comes before them in the list.
                    let elapsed = elapsed.as_ref().ok_or_else(|| SectionError::Missing("clock".into()))?;
                    state::restore_vcpu(&lock(vcpu), &state, elapsed).map_err(failed)?;
                }
                Part::Clock => {
                    let saved = board::take(&mut sections, &name)?;
                    let state: ClockState = decode(&saved, ClockState::VERSION).map_err(refused)?;
                    elapsed = Some(state::restore_clock(&self.vm, &state).map_err(failed)?);
                }
                Part::Device(device) => self.board.restore_one(&name, device, &mut sections)?,
            }
        }
        Ok(sections.finish()?)
    }
}

fn decode<T: DeserializeOwned>(saved: &Saved, version: u16) -> Result<T, StateError> {
    saved.decode(version)
}
