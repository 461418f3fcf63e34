//! The two system calls of the check that no safe wrapper covers.
#![expect(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION and userfaultfd")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use std::io;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// A VM together with the memory it has been given, so that the memory lives at least as long.
pub struct ProbeVm {
    /// Dropped first.
    pub vm: VmFd,
    /// Only held.
    _memory: GuestMemoryMmap,
}

impl ProbeVm {
    /// Gives `memory` to `vm`, one slot a region.
    ///
    /// # Errors
    /// KVM's.
    pub fn new(vm: VmFd, memory: GuestMemoryMmap) -> io::Result<Self> {
        for (slot, region) in (0u32..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping has `memory_size` bytes; `ProbeVm` and the vCPU thread's share of it keep it mapped until
            // every descriptor of the VM is closed.
            unsafe { vm.set_user_memory_region(slot) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        }
        Ok(Self { vm, _memory: memory })
    }
}

/// Opens a userfaultfd as Sterna would, and closes it.
///
/// # Errors
/// The kernel's.
pub fn try_userfaultfd() -> io::Result<()> {
    // SAFETY: nothing is registered with the descriptor, so no memory access can come to depend on it.
    let _descriptor = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?;
    Ok(())
}
