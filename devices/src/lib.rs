//! Device models of a Sterna machine.
//!
//! A device is plain data plus reactions: it answers register accesses and consumes virtqueues. It refuses to know
//! KVM (interrupts and doorbells come in as traits), other devices, and any stream. What a register write asks of
//! the machine as a whole is *returned* as an [`Effect`], so no device holds a handle that ends the VM.

pub mod bus;
pub mod irq;
pub mod legacy;
pub mod listener;
pub mod pci;
pub mod state;
pub mod virtio;

pub use bus::{BusDevice, Effect, SharedBusDevice};
pub use irq::{IrqLine, LevelLine, MsiMessage, Wiring};
pub use state::{Saved, StateError};
