//! What of a virtio function moves with a machine, and how a function that has never run takes it over.
//!
//! Saved after a pause, it is complete. Work in flight was finished; notifications that nobody has looked at are not kept,
//! because [`VirtioPci::resume`] looks at every queue; an interrupt is pending in the vector table, or it was handed to the
//! interrupt controllers before the call that raised it returned, so save those after the devices' pause. Saved on a
//! running function it is good for a rehearsal: what it holds is right for its moment.
//!
//! Doorbell bindings, what the event loop waits for and whether the model was activated follow from the rest and are not
//! kept. Doorbells are bound here and not in `resume`, which is part of the guest's stand-still, and by comparison, so
//! that a second state costs what is different in it. The model is activated in `resume`: it may write to guest memory
//! then, which a machine that is still being filled would lose.

use super::VirtioPci;
use super::registers::{self, Registers, status};
use crate::pci::msix::EntryState;
use crate::state::{Saved, StateError};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};

/// Newest layout.
const VERSION: u16 = 1;
/// Longest reason of a fault that is kept, characters.
const MAX_FAULT_CHARS: usize = 512;

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// Configuration space, with MSI-X message control in it.
    pub config: Vec<u8>,
    /// The vector table.
    pub vectors: Vec<EntryState>,
    /// The common configuration structure.
    pub registers: registers::State,
    /// How far each queue has come; without meaning where the driver is not up.
    pub rings: Vec<Ring>,
    /// Why the device waits for a reset.
    pub fault: Option<String>,
}

/// How far a queue has come.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ring {
    /// Index of the next chain to take from the available ring.
    pub next_available: u16,
    /// Index of the next chain to give back in the used ring.
    pub next_used: u16,
}

impl VirtioPci {
    /// The transport's state. See the module for when it is complete.
    pub fn save(&self) -> Saved {
        let ring = |queue: &Queue| Ring { next_available: queue.next_avail(), next_used: queue.next_used() };
        let state = State {
            config: self.config.save(),
            vectors: self.msix.save(),
            registers: self.registers.save(),
            rings: self.queues.iter().map(ring).collect(),
            fault: self.fault.as_deref().map(|reason| reason.chars().map(printable).take(MAX_FAULT_CHARS).collect()),
        };
        Saved::of(VERSION, &state)
    }

    /// The model's state.
    pub fn save_model(&self) -> Saved {
        self.device.save()
    }

    /// Takes over the state of a function of the same kind, on a machine that has never run. The function stands still
    /// from here to [`Self::resume`]. May be repeated with other states.
    ///
    /// # Errors
    /// States that no such function can have saved, or that do not fit what this one has of its host. It is as it was.
    pub fn restore(&mut self, transport: &Saved, model: &Saved) -> Result<(), StateError> {
        if self.active {
            return Err(StateError::Value("the device is at work already".into()));
        }
        let state: State = transport.decode(VERSION)?;
        self.config.check(&state.config)?;
        let control = [0, 1].map(|byte| state.config.get(self.capabilities.msix_control + byte).copied().unwrap_or(0));
        let control = u16::from_le_bytes(control);
        self.msix.check(control, &state.vectors)?;
        let registers = self.registers.restored(&state.registers, self.offered())?;
        check_fault(&registers, state.fault.as_deref())?;
        let queues = self.restored_queues(&registers, &state.rings)?;
        self.device.restore(model)?;
        self.paused = true;
        self.config.restore(&state.config);
        self.msix.restore(control, &state.vectors);
        self.registers = registers;
        self.queues = queues;
        self.fault = state.fault;
        self.bind_doorbells();
        Ok(())
    }

    /// The queues as they stood, ready where the driver uses them.
    fn restored_queues(&self, registers: &Registers, rings: &[Ring]) -> Result<Vec<Queue>, StateError> {
        if rings.len() != self.queues.len() {
            let (theirs, ours) = (rings.len(), self.queues.len());
            return Err(StateError::Value(format!("it has {theirs} queues, and the device {ours}")));
        }
        let sizes = self.device.queue_sizes().iter();
        let queues = sizes.map(|size| Queue::new(*size)).collect::<Result<Vec<_>, _>>();
        // Cannot fail: the function was made with these sizes.
        let mut queues = queues.map_err(|error| StateError::Value(error.to_string()))?;
        if !registers.has(status::DRIVER_OK) || registers.has(status::NEEDS_RESET) {
            return Ok(queues);
        }
        super::set_up_queues(&mut queues, registers, &self.ram)
            .map_err(|fault| StateError::Value(super::with_causes(&fault)))?;
        for (queue, ring) in queues.iter_mut().zip(rings).filter(|(queue, _)| queue.ready()) {
            queue.set_next_avail(ring.next_available);
            queue.set_next_used(ring.next_used);
        }
        Ok(queues)
    }
}

/// A fault is there exactly when the driver was told so.
fn check_fault(registers: &Registers, fault: Option<&str>) -> Result<(), StateError> {
    let told = registers.has(status::NEEDS_RESET);
    match fault {
        None if told => Err(StateError::Value("it waits for a reset and does not say why".into())),
        Some(_) if !told => Err(StateError::Value("it has a fault that its driver was not told of".into())),
        Some(reason) if reason.chars().count() > MAX_FAULT_CHARS || reason.contains(char::is_control) => {
            Err(StateError::Value(format!("its fault's reason is no line of up to {MAX_FAULT_CHARS} characters")))
        }
        _ => Ok(()),
    }
}

/// A reason goes to a log and a terminal.
fn printable(character: char) -> char {
    if character.is_control() { ' ' } else { character }
}
