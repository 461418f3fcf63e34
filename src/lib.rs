//! Sterna: a minimal KVM hypervisor with migration built in. `src/main.rs` is the program; this is what it is made of.

pub mod clock;
pub mod config;
pub mod console;
pub mod control;
pub mod events;
pub mod exit;
pub mod registry;
pub mod units;
pub mod vmm;
