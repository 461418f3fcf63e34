//! Which pages were written since they were last sent: KVM's dirty log, and the monitor's own writes beside it.
//!
//! With manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM API 7.15) reading the log clears nothing: each chunk is
//! cleared, and its pages protected again, just before it is sent, so that what is written while other chunks are sent
//! costs no second copy, and KVM's lock is held for a chunk at a time. With INITIALLY_SET switching the log on protects nothing at
//! all: every page counts as written until its chunk is cleared for the first time.
#![expect(unsafe_code, reason = "KVM_CLEAR_DIRTY_LOG, which kvm-ioctls does not have")]

use super::machine::lock;
use super::memory::Memory;
use kvm_bindings::{KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVMIO, kvm_clear_dirty_log, kvm_enable_cap};
use kvm_ioctls::VmFd;
use std::io;
use std::sync::{Arc, Mutex};
use sterna_migration::present::can_scan;
use sterna_migration::{PageSet, Ram, Run};
use vm_memory::{GuestMemoryBackend, MmapRegion};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Pages in one clearing: KVM holds its lock for so long.
const CLEAR_PAGES: u64 = 64 << 10;
/// KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE and KVM_DIRTY_LOG_INITIALLY_SET.
const MANUAL_PROTECT: u64 = 3;

/// Asks for manual protection, on a VM whose log has never been on. Says whether all of it is there.
pub fn prepare(vm: &VmFd) -> bool {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = MANUAL_PROTECT;
    vm.enable_cap(&cap).is_ok()
}

/// The log of a machine while it is on; dropping it switches it off.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    memory: Memory,
    ram: Ram,
    /// Reading clears nothing.
    manual: bool,
    /// Pages that have not existed since the log is on, although it began with them as written: taken out of what is read. To
    /// clear them instead takes KVM 3 ms a GiB where it keeps shadow page tables, and is done where asking is slower still.
    absent: Mutex<Option<PageSet>>,
}

impl DirtyLog {
    /// Switches the log on, and says which pages exist: the first pass. From here on every write is noted.
    ///
    /// # Errors
    /// KVM's; `ResourceBusy` where somebody else has the log on: it tells each page once, to one.
    pub fn start(vm: Arc<VmFd>, memory: &Memory, manual: bool) -> io::Result<(Self, PageSet)> {
        if !memory.take_log() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "a move or a check has it on already"));
        }
        // From here on dropping it gives the right back.
        let log = Self { ram: memory.pages(), memory: memory.clone(), vm, manual, absent: Mutex::default() };
        // What the monitor has written so far is sent in the first pass.
        log.own_writes(|_, _| {});
        log.memory.attach(&log.vm, true)?;
        let existing = log.memory.existing()?;
        let mut absent = PageSet::all(existing.ram_pages());
        absent.remove_all(&existing);
        if can_scan() {
            *lock(&log.absent) = Some(absent);
        } else {
            log.forget(&absent)?;
        }
        Ok((log, existing))
    }

    /// Notes `pages` as unwritten from here on.
    ///
    /// # Errors
    /// KVM's.
    pub fn forget(&self, pages: &PageSet) -> io::Result<()> {
        for region in self.ram.regions() {
            for first in (region.first..region.end()).step_by(CLEAR_PAGES as usize) {
                let chunk = Run { first, pages: CLEAR_PAGES.min(region.end() - first) };
                let words = pages.words(chunk.first, chunk.pages);
                if words.iter().any(|word| *word != 0) {
                    self.clear(chunk, words)?;
                }
            }
        }
        Ok(())
    }

    /// Adds what was written since each page's chunk was cleared. The monitor's own writes, and without manual protection the
    /// guest's too, are told this once: what is read must be sent, or kept.
    ///
    /// # Errors
    /// KVM's.
    pub fn read(&self, into: &mut PageSet) -> io::Result<()> {
        for (slot, region) in (0u32..).zip(self.ram.regions()) {
            let bitmap = self.vm.get_dirty_log(slot, region.bytes() as usize).map_err(os_error)?;
            into.insert_bitmap(region.first, &bitmap);
        }
        self.own_writes(|first, bitmap| into.insert_bitmap(first, bitmap));
        if let Some(absent) = &mut *lock(&self.absent)
            && !absent.is_empty()
        {
            absent.remove_all(&self.memory.existing()?);
            into.remove_all(absent);
        }
        Ok(())
    }

    /// Notes the pages of `chunk` whose bits are set in `words` as unwritten from here on: call it just before they are read.
    /// The chunk lies in one region and begins at a multiple of 64 pages of it, as KVM wants.
    ///
    /// # Errors
    /// KVM's.
    pub fn clear(&self, chunk: Run, words: &[u64]) -> io::Result<()> {
        if !self.manual {
            return Ok(());
        }
        let places = (0u32..).zip(self.ram.regions());
        let Some((slot, region)) = { places }.find(|(_, region)| (region.first..region.end()).contains(&chunk.first))
        else {
            return Ok(());
        };
        let pages = chunk.pages.min(region.end() - chunk.first).min(words.len() as u64 * 64);
        let mut order = kvm_clear_dirty_log { slot, first_page: chunk.first - region.first, ..Default::default() };
        order.num_pages = u32::try_from(pages).unwrap_or(u32::MAX);
        order.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
        // SAFETY: KVM reads `num_pages` bits from `words`, which has a word for each 64 of them and outlives the call.
        let result = unsafe { ioctl_with_ref(&*self.vm, KVM_CLEAR_DIRTY_LOG(), &order) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Takes what the monitor itself has written, region by region.
    fn own_writes(&self, mut take: impl FnMut(u64, &[u64])) {
        for (place, region) in self.ram.regions().iter().zip(self.ram.memory().iter()) {
            take(place.first, &MmapRegion::bitmap(region).get_and_reset());
        }
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        if let Err(error) = self.memory.attach(&self.vm, false) {
            log::warn!("the dirty log stays on: {error}");
        }
        self.memory.release_log();
    }
}

fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
