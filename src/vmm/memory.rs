//! Guest RAM: mapped once for the life of the process, given to KVM slot by slot.
//!
//! Anonymous private memory: pages exist once somebody touches them, and the kernel knows which those are. The mapping is
//! aligned so that a 2 MiB page of the guest can be one of the host's.
#![expect(unsafe_code, reason = "mapping guest RAM and telling KVM about it")]

use super::machine::lock;
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use std::ffi::c_void;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use sterna_arch::ram_ranges;
use sterna_devices::virtio::GuestRam;
use sterna_devices::virtio::balloon::GiveBack;
use sterna_migration::file::Lazy;
use sterna_migration::present::present;
use sterna_migration::{PageSet, Ram};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestRegionMmap, MmapRegion,
};

const HUGE_PAGE_BYTES: usize = 2 << 20;
/// How RAM is mapped, as vm-memory notes it down.
const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// The process's guest RAM; clones are the same RAM.
#[derive(Clone)]
pub struct Memory {
    ram: Arc<GuestRam>,
    /// Pages of the file that RAM was mapped from.
    mapped: Arc<Mutex<Option<PageSet>>>,
    /// Somebody has the dirty log on.
    logged: Arc<AtomicBool>,
    /// Reads the rest of a file in the background; what is not there yet blocks whoever touches it.
    lazy: Arc<Mutex<Option<Lazy>>>,
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
        Ok(Self { ram: Arc::new(ram), mapped: Arc::default(), logged: Arc::default(), lazy: Arc::default() })
    }

    /// The RAM, as devices and loaders see it.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The RAM, as a move sees it.
    pub fn pages(&self) -> Ram {
        Ram::new(Arc::clone(&self.ram))
    }

    /// The pages that exist: those that somebody has touched, and those of a file that RAM was mapped from.
    ///
    /// # Errors
    /// The kernel's.
    pub fn existing(&self) -> io::Result<PageSet> {
        let mut pages = present(&self.pages())?;
        if let Some(mapped) = &*lock(&self.mapped) {
            pages.insert_all(mapped);
        }
        Ok(pages)
    }

    /// Notes that RAM was mapped from a file that has `pages`, touched or not.
    pub fn note_mapped(&self, pages: PageSet) {
        *lock(&self.mapped) = Some(pages);
    }

    /// Takes the right to have the dirty log on; says whether nobody else has it.
    pub fn take_log(&self) -> bool {
        !self.logged.swap(true, Ordering::AcqRel)
    }

    /// Gives the right back.
    pub fn release_log(&self) {
        self.logged.store(false, Ordering::Release);
    }

    /// Keeps what reads RAM from a file in the background.
    pub fn keep(&self, lazy: Lazy) {
        *lock(&self.lazy) = Some(lazy);
    }

    /// How a page that the guest does not need is given back, so that it reads as zeros.
    pub fn give_back(&self) -> GiveBack {
        match (&*lock(&self.lazy), &*lock(&self.mapped)) {
            (Some(lazy), _) if !lazy.is_done() => GiveBack::Keep,
            (None, Some(_)) => GiveBack::Replace,
            _ => GiveBack::Release,
        }
    }

    /// Drops every page, so that the RAM reads as zeros again. What was mapped from a file, or is still read from one, makes way
    /// for anonymous memory; memory slots name addresses, so they hold.
    ///
    /// # Errors
    /// The kernel's; what is in RAM then is of no use.
    pub fn clear(&self) -> io::Result<()> {
        let lazy = lock(&self.lazy).take();
        // Ended before anything is dropped: it would bring a page again.
        drop(lazy);
        if lock(&self.mapped).take().is_none() {
            return self.advise(Advice::LinuxDontNeed);
        }
        for region in self.ram.iter() {
            let (protection, flags) =
                (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED);
            // SAFETY: as for `advise`; the mapping that takes its place is as long and as accessible.
            unsafe { mmap_anonymous(region.as_ptr().cast(), region.len() as usize, protection, flags) }?;
        }
        Ok(())
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

    /// Gives every region to `vm` as a memory slot, and switches its dirty log on or off.
    ///
    /// # Errors
    /// KVM's.
    pub fn attach(&self, vm: &VmFd, log: bool) -> io::Result<()> {
        for (slot, region) in (0u32..).zip(self.ram.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use sterna_migration::Sections;
    use sterna_migration::file::{Contents, Hooks, Options, Saved, SavedFile, save};
    use vm_memory::Bytes;

    const BYTES: u64 = 4 << 20;

    /// RAM of which the first 1024 pages were saved, each full of 0xf1.
    fn saved() -> (tempfile::TempDir, PathBuf, Memory) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("saved");
        let memory = Memory::new(BYTES).unwrap();
        memory.ram().write_slice(&vec![0xf1; BYTES as usize], GuestAddress(0)).unwrap();
        let who = String::from("test");
        let saved = Saved {
            program: who.clone(),
            host: who.clone(),
            time: who.clone(),
            time_unix_ns: 0,
            machine: who,
            uuid: uuid::Uuid::nil(),
        };
        let (id, sections) = (uuid::Uuid::nil(), Sections::default());
        let contents = Contents { id, epoch: 1, saved, description: b"{}".to_vec(), sections };
        let (pages, options) = (memory.existing().unwrap(), Options::default());
        save(&path, &contents, &memory.pages(), &pages, &options, Hooks::none()).unwrap();
        (dir, path, Memory::new(BYTES).unwrap())
    }

    fn bytes(memory: &Memory) -> [u8; 2] {
        [0, BYTES - 1].map(|at| memory.ram().read_obj(GuestAddress(at)).unwrap())
    }

    #[test]
    fn a_reboot_after_a_mapped_restore_finds_zeros_and_not_the_file() {
        let (_dir, path, memory) = saved();
        assert_eq!(memory.give_back(), GiveBack::Release);
        let file = SavedFile::open(&path).unwrap();
        file.map(&memory.pages()).unwrap();
        memory.note_mapped(file.pages());
        memory.ram().write_obj(7u8, GuestAddress(0)).unwrap();
        assert_eq!((bytes(&memory), memory.give_back()), ([7, 0xf1], GiveBack::Replace));
        memory.clear().unwrap();
        assert_eq!((bytes(&memory), memory.give_back()), ([0, 0], GiveBack::Release));
        // And the next one too.
        memory.ram().write_obj(7u8, GuestAddress(0)).unwrap();
        memory.clear().unwrap();
        assert_eq!(bytes(&memory), [0, 0]);
        assert!(memory.existing().unwrap().count() <= 2, "RAM that was cleared is still said to exist");
    }

    #[test]
    fn a_reboot_while_pages_are_read_in_the_background_finds_zeros() {
        let (_dir, path, memory) = saved();
        let file = SavedFile::open(&path).unwrap();
        memory.keep(file.load_lazily(&memory.pages(), 1, |error| panic!("{error}")).unwrap());
        memory.note_mapped(file.pages());
        memory.clear().unwrap();
        assert_eq!((bytes(&memory), memory.give_back()), ([0, 0], GiveBack::Release));
    }
}
