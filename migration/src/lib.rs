//! What a machine is outside its process: named, versioned sections of bytes.
//!
//! This crate moves bytes it does not understand: it never names a device, a register or KVM. Whatever it decodes comes from a
//! file or a peer and is hostile: every length has a limit here, and none sizes an allocation before it is checked.

#![forbid(unsafe_code)]

pub mod section;

pub use section::{Section, SectionError, Sections};
