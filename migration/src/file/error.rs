//! Why a file was not saved or cannot be restored.

use crate::wire::WireError;
use std::io;
use std::path::{Path, PathBuf};

/// Why a file was not saved or cannot be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is a file of this name.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// The file system is full, or would be.
    #[error("{} does not fit: it needs up to {needed_bytes} bytes, {free_bytes} are free", path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// What it needs at most.
        needed_bytes: u64,
        /// What the file system has.
        free_bytes: u64,
    },
    /// The caller wanted it.
    #[error("cancelled")]
    Cancelled,
    /// The save did not come to its end.
    #[error("the file is not whole: its end record is missing or damaged")]
    NotWhole,
    /// A head or table that is damaged, or not ours.
    #[error("the file cannot be read")]
    Wire(#[from] WireError),
    /// Numbers that contradict each other.
    #[error("the file is damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: &'static str,
    },
    /// Pages that are not those that were saved.
    #[error("the file is damaged: pages {first} to {last} are not those that were saved")]
    Pages {
        /// First page of the chunk.
        first: u64,
        /// Last page of the chunk.
        last: u64,
    },
    /// The machine is not the one that was saved.
    #[error("the file is of a machine with other RAM than this one")]
    Layout,
    /// RAM that cannot be mapped.
    #[error("the file is compressed: its RAM can be loaded, not mapped")]
    Compressed,
    /// Another process restores from it, or has it mapped.
    #[error("the file is in use: by another restore, or by a VM that was restored from it and has it mapped")]
    Claimed,
    /// The mark cannot be written.
    #[error("the file is read-only: that it was restored cannot be noted in it")]
    ReadOnly,
    /// userfaultfd is not allowed.
    #[error("this process may not use userfaultfd: run as root, or set sysctl vm.unprivileged_userfaultfd=1")]
    FaultsNotAllowed(#[source] io::Error),
    /// The system.
    #[error("{attempt}")]
    Io {
        /// What was tried: "reading the file".
        attempt: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// Wraps the cause of a failed `attempt`.
    pub(super) fn io(attempt: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { attempt, source }
    }

    /// Whether the system says that there is no room: full, over the quota, or longer than files may be.
    pub(super) fn is_no_space(&self) -> bool {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge))
    }

    /// There is a file at `path`.
    pub(super) fn exists(path: &Path) -> Self {
        Self::Exists(path.to_owned())
    }
}
