//! Why a machine could not be built or run.

use super::parts::PartError;
use crate::exit;
use kvm_bindings::KVM_API_VERSION;
use std::io;
use std::path::{Path, PathBuf};

/// What was attempted on the way to a running machine. The guest has not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// /dev/kvm does not open.
    #[error("cannot open /dev/kvm; {remedy}")]
    OpenKvm {
        /// What to do about it.
        remedy: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else is at /dev/kvm.
    #[error("/dev/kvm is not KVM (version {KVM_API_VERSION} of its interface); `ls -l /dev/kvm` shows what it is")]
    NotKvm,
    /// A call to KVM failed.
    #[error("KVM: {attempt} failed; `sterna host check` tells what this host can do")]
    Kvm {
        /// What was asked of it.
        attempt: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host does not give the memory.
    #[error("cannot map {bytes} bytes of guest memory")]
    Memory {
        /// Size of guest RAM.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A kernel or initrd does not open.
    #[error("cannot open {what} {path}")]
    OpenFile {
        /// Kernel or initrd.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel, initrd or command line cannot be booted.
    #[error("cannot boot {path}")]
    Boot {
        /// The kernel.
        path: PathBuf,
        /// Why.
        #[source]
        source: sterna_arch::BootError,
    },
    /// The firmware tables do not fit.
    #[error("cannot write the ACPI tables")]
    Acpi {
        /// Why.
        #[source]
        source: sterna_arch::AcpiError,
    },
    /// KVM does not say what its vCPUs can be.
    #[error("cannot decide what the vCPUs are; `sterna host check` tells what this host can do")]
    Cpuid {
        /// Why.
        #[source]
        source: sterna_arch::CpuidError,
    },
    /// A vCPU does not take its first state.
    #[error("cannot set up vCPU {index}; `sterna host check` tells what this host can do")]
    Vcpu {
        /// Which.
        index: u32,
        /// Why.
        #[source]
        source: sterna_arch::VcpuSetupError,
    },
    /// A device or its backend cannot be had.
    #[error("cannot make {device}")]
    Device {
        /// Its id in the configuration.
        device: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// More than one of the above, all of what a user can mend.
    #[error("{} things are in the way:{}", .0.len(), list(.0))]
    Several(Vec<Error>),
    /// A new VM does not become one that can be saved whole.
    #[error("cannot prepare the VM; `sterna host check` tells what this host can do")]
    VmState {
        /// Why.
        #[source]
        source: sterna_arch::state::StateError,
    },
    /// This host cannot take a machine from elsewhere; a sentence each.
    #[error("this host cannot take the machine: {}", .0.join("; "))]
    Refused(Vec<String>),
    /// A saved machine cannot be used.
    #[error("cannot restore from {}", path.display())]
    Saved {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: sterna_migration::file::Error,
    },
    /// What a file says of its machine is not understood.
    #[error("the description of the machine in {} cannot be read", path.display())]
    Description {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A part of the machine does not take its saved state.
    #[error("the machine in {} cannot go on here", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: PartError,
    },
    /// Its disks have moved on.
    #[error(
        "the machine in {} was restored before, {before}, and its disks have moved on since",
        path.display()
    )]
    RestoredBefore {
        /// The file.
        path: PathBuf,
        /// When and where.
        before: String,
    },
    /// The process cannot make a thread, an event or the like.
    #[error("cannot make {what}")]
    Host {
        /// What was to be made.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The exit code that tells a script what kind of failure it is.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::OpenKvm { .. } | Self::NotKvm => exit::UNREACHABLE,
            // The host has been asked for more than it is.
            Self::Cpuid { source: sterna_arch::CpuidError::Level { .. } } => exit::REFUSED,
            Self::Kvm { .. }
            | Self::VmState { .. }
            | Self::Cpuid { .. }
            | Self::Vcpu { .. }
            | Self::Host { .. }
            | Self::Acpi { .. } => exit::FAILED,
            Self::Memory { .. }
            | Self::OpenFile { .. }
            | Self::Boot { .. }
            | Self::Device { .. }
            | Self::Refused(_)
            | Self::Saved { .. }
            | Self::Description { .. }
            | Self::State { .. }
            | Self::RestoredBefore { .. } => exit::REFUSED,
            Self::Several(errors) => errors.first().map_or(exit::REFUSED, Self::exit_code),
        }
    }

    /// Wraps what is wrong with the saved machine at `path`.
    pub fn saved(path: &Path, source: sterna_migration::file::Error) -> Self {
        Self::Saved { path: path.to_owned(), source }
    }

    /// Wraps a device's error.
    pub(super) fn device(device: &str, error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Device { device: device.to_owned(), source: Box::new(error) }
    }
}

/// Each of `errors` with its causes, on a line of its own.
fn list(errors: &[Error]) -> String {
    errors.iter().map(|error| format!("\n    - {}", super::chain(error))).collect()
}
