//! What a machine is outside its process: a stream or a file of named sections of bytes and ranges of RAM.
//!
//! This crate moves bytes it does not understand: it never names a device, a register or KVM. Whatever it decodes comes from a
//! file or a peer and is hostile: every length has a limit here, and none sizes an allocation before it is checked.
//!
//! ```text
//! preamble | frame | frame | ...          a stream, one for each connection of a move
//! preamble | frames | RAM in place | end  a file: a recorded move whose RAM can be mapped
//! ```

pub mod file;
pub mod handover;
pub mod pages;
pub mod policy;
pub mod present;
pub mod ram;
pub mod section;
pub mod stream;
pub mod wire;

pub use pages::{PAGE_BYTES, PageSet, Run};
pub use present::present;
pub use ram::Ram;
pub use section::{Section, SectionError, Sections};
