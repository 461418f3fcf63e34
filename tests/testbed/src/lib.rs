//! Testbed: Sterna hosts as virtual machines on this machine, so that real Linux guests can be run and moved where /dev/kvm
//! cannot run them.
//!
//! Two hosts A and B boot the host image under QEMU (hardware KVM where it works, else QEMU's software CPU with nested SVM),
//! joined by a network; a third, N, exports a volume over NFSv4 that both mount at `/shared`; a raw disk that both see
//! (`/dev/vdb`) stands for a LUN. Knows nothing of Sterna's insides: it drives hosts by shell commands, as an operator would.
//!
//! Every wait has a deadline and its error says what was waited for. Nothing outlives the [`Testbed`], nor a killed test.

pub mod accel;
mod control;
mod error;
mod files;
mod guest;
mod host;
mod keeper;
mod local;
pub mod protocol;
mod qemu;
mod run_dir;
mod running;
pub mod terminal;
mod testbed;
mod tsc;
mod vm;

pub use control::{Control, ControlRunning};
pub use error::{Error, Result};
pub use files::Files;
pub use guest::Guest;
pub use host::{Host, Output};
pub use local::run_here;
pub use qemu::Node;
pub use run_dir::{attach, console};
pub use running::Running;
pub use testbed::{HostOptions, Link, Options, Testbed};
pub use vm::{Clocks, Moved, Site, Vm};
