//! Where the build leaves what the testbed boots.

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The build's files, below `build/` of the repository.
#[derive(Clone, Debug)]
pub struct Files {
    build: PathBuf,
}

impl Files {
    /// Those of this repository; `STERNA_BUILD` names another `build` directory.
    pub fn new() -> Self {
        let default = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../build"));
        let build = std::env::var_os("STERNA_BUILD").map_or_else(default, PathBuf::from);
        Self { build: build.canonicalize().unwrap_or(build) }
    }

    /// Stock kernel as the distribution ships it.
    pub fn kernel(&self) -> Result<PathBuf> {
        self.made("kernel/vmlinuz", "kernel")
    }

    /// The same kernel as an ELF file.
    pub fn kernel_elf(&self) -> Result<PathBuf> {
        self.made("kernel/vmlinux", "kernel")
    }

    /// The guest's initramfs.
    pub fn initramfs(&self) -> Result<PathBuf> {
        self.made("guest/initramfs.cpio", "initramfs")
    }

    /// The host image.
    pub fn image(&self) -> Result<PathBuf> {
        self.made("image/host.cpio", "image")
    }

    /// What is appended to the host image to make it an NFS server.
    pub fn nfs(&self) -> Result<PathBuf> {
        self.made("testbed/nfs.cpio", "testbed-files")
    }

    /// The read-only disk with guest kernels, fio and QEMU.
    pub fn tools(&self) -> Result<PathBuf> {
        self.made("testbed/tools.img", "testbed-files")
    }

    /// Directory for runs and caches of the testbed.
    pub fn testbed(&self) -> PathBuf {
        self.build.join("testbed")
    }

    fn made(&self, path: impl AsRef<Path>, target: &'static str) -> Result<PathBuf> {
        let path = self.build.join(path);
        if path.is_file() { Ok(path) } else { Err(Error::Missing { path, target }) }
    }
}

impl Default for Files {
    fn default() -> Self {
        Self::new()
    }
}
