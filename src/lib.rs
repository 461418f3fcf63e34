//! Sterna: a minimal KVM hypervisor with migration built in. `src/main.rs` is the program; this is what it is made of.

pub mod allocator;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod config;
pub mod console;
pub mod control;
pub mod error;
pub mod events;
pub mod exit;
pub mod host_check;
pub mod log;
pub mod records;
pub mod registry;
pub mod sandbox;
pub mod units;
pub mod vmm;
