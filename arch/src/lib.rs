//! What a Sterna machine is made of below its devices: address map, boot protocols, ACPI, CPUID, first vCPU state.
//!
//! It refuses to know devices, streams and configuration: it takes guest RAM, a vCPU and an open kernel file.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
