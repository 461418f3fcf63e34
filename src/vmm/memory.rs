//! Guest RAM: mapped once for the life of the process, given to KVM slot by slot.
//!
//! Anonymous private memory: pages exist once somebody touches them, and the kernel knows which those are. The mapping is
//! aligned so that a 2 MiB page of the guest can be one of the host's.
#![expect(unsafe_code, reason = "mapping guest RAM and telling KVM about it")]

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::Arc;
use sterna_arch::ram_ranges;
use sterna_devices::virtio::GuestRam;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap, MmapRegion,
};

const HUGE_PAGE_BYTES: usize = 2 << 20;
/// How RAM is mapped, as vm-memory notes it down.
const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// The process's guest RAM.
pub struct Memory {
    ram: Arc<GuestRam>,
}

impl Memory {
    /// Maps `bytes` of RAM at the guest physical addresses of the address map. Nothing is touched.
    ///
    /// # Errors
    /// The kernel's, when it does not grant the address space.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let regions =
            ram_ranges(bytes).into_iter().map(|(base, length)| region(base, length)).collect::<io::Result<Vec<_>>>()?;
        let ram = GuestRegionCollection::from_regions(regions).map_err(io::Error::other)?;
        Ok(Self { ram: Arc::new(ram) })
    }

    /// The RAM, as devices and loaders see it.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Drops every page, so that the RAM reads as zeros again.
    pub fn clear(&self) -> io::Result<()> {
        self.advise(Advice::LinuxDontNeed)
    }

    /// Lets the kernel back what is touched from now on with huge pages. Not before the boot structures are written: they are a
    /// few pages, and should not cost a huge page each to zero and to hold.
    pub fn prefer_huge_pages(&self) -> io::Result<()> {
        match self.advise(Advice::LinuxHugepage) {
            // A kernel built without transparent huge pages.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        }
    }

    fn advise(&self, advice: Advice) -> io::Result<()> {
        for region in self.ram.iter() {
            // SAFETY: the range is exactly one mapping that this type owns for ever. Its contents are guest memory, which is
            // only ever accessed through volatile copies and may change at any moment.
            unsafe { madvise(region.as_ptr().cast::<c_void>(), region.len() as usize, advice) }?;
        }
        Ok(())
    }

    /// Gives every region to `vm` as a memory slot.
    ///
    /// # Errors
    /// KVM's.
    pub fn attach(&self, vm: &VmFd) -> io::Result<()> {
        for (slot, region) in (0u32..).zip(self.ram.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping is `memory_size` bytes long and never unmapped, so it outlives the VM.
            unsafe { vm.set_user_memory_region(slot) }.map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        }
        Ok(())
    }
}

/// Maps one region for the life of the process.
fn region(base: GuestAddress, length: usize) -> io::Result<GuestRegionMmap<AtomicBitmap>> {
    let address = map_aligned(length)?;
    // SAFETY: the mapping is `length` bytes long, readable, writable and never unmapped.
    let mapping =
        unsafe { MmapRegion::build_raw(address.cast(), length, PROTECTION, FLAGS) }.map_err(io::Error::other)?;
    GuestRegionMmap::new(mapping, base).ok_or_else(|| io::Error::other("guest RAM ends past the address space"))
}

/// Reserves a huge page more than needed, and starts at the first boundary. The rest stays reserved and untouched.
fn map_aligned(length: usize) -> io::Result<*mut c_void> {
    let reserved = length.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            reserved,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?;
    let offset = start.align_offset(HUGE_PAGE_BYTES);
    Ok(start.wrapping_byte_add(offset))
}
