//! The x86-64 machine: one folder, so that a second architecture is an addition.

pub mod acpi;
mod boot_params;
mod boot_tables;
mod bzimage;
mod cmdline;
pub mod cpuid;
mod elf;
mod error;
mod features;
mod fields;
mod identify;
mod initrd;
pub mod kernel;
mod lapic;
pub mod layout;
mod memory_map;
pub mod model;
mod msrs;
pub mod profile;
mod pvh;
mod regs;
mod reset_vector;
pub mod state;
mod vcpu;

#[cfg(test)]
mod kernel_tests;
#[cfg(test)]
mod sample;

pub use acpi::{AcpiError, write_acpi_tables};
pub use cpuid::{CpuidError, supported_cpuid, vcpu_cpuid};
pub use error::BootError;
pub use kernel::{BootSource, Entry, Protocol, load_kernel};
pub use layout::ram_ranges;
pub use model::{CpuModel, UnknownCpuModel, model_cpuid};
pub use profile::{CpuProfile, HostProfile, incompatibilities};
pub use vcpu::{VcpuSetupError, setup_vcpu};
