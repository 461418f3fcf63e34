//! Why a machine could not be built or run.

use crate::exit;
use std::io;
use std::path::PathBuf;

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
            Self::OpenKvm { .. } => exit::UNREACHABLE,
            Self::Kvm { .. } | Self::Cpuid { .. } | Self::Vcpu { .. } | Self::Host { .. } | Self::Acpi { .. } => {
                exit::FAILED
            }
            Self::Memory { .. }
            | Self::OpenFile { .. }
            | Self::Boot { .. }
            | Self::Device { .. }
            | Self::Several(_) => exit::REFUSED,
        }
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
