//! The kernel command line in guest memory. It refuses to know what is in it.

use super::BootError;
use super::layout::CMDLINE;
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::load_cmdline;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Writes `cmdline` and its NUL; at most `max_bytes` bytes without the NUL.
pub fn write<M: GuestMemoryBackend>(ram: &M, cmdline: &str, max_bytes: usize) -> Result<(), BootError> {
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    if cmdline.len() > max_bytes {
        return Err(BootError::CmdlineTooLong { bytes: cmdline.len(), max_bytes });
    }
    let mut line = Cmdline::new(max_bytes.saturating_add(1)).map_err(BootError::Cmdline)?;
    line.insert_str(cmdline).map_err(BootError::Cmdline)?;
    load_cmdline(ram, GuestAddress(CMDLINE), &line).map_err(BootError::LoadKernel)
}
