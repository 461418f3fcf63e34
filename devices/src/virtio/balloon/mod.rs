//! Memory balloon (virtio 1.2, section 5.5): pages the guest lends the host, free pages it reports, and statistics.
//!
//! A page put into the balloon or reported free is given back to the host at once. The device keeps no list of them: a
//! page that the guest takes back is simply touched again. It refuses to know policy: how much to ask for is the host's
//! business, through [`BalloonHandle`].

mod discard;
mod handle;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
mod tests;

pub use discard::GiveBack;
pub use handle::{BalloonHandle, BalloonStatus};

use super::{BUDGET, Backend, Chain, Fault, GuestRam, Io, VirtioDevice};
use crate::state::{Saved, StateError};
use discard::{PAGE_BYTES, discard};
use handle::{Shared, lock};
use serde::{Deserialize, Serialize};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// VIRTIO_BALLOON_F_STATS_VQ.
const F_STATS: u32 = 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the driver may take pages back when it runs out of memory.
const F_DEFLATE_ON_OOM: u32 = 2;
/// VIRTIO_BALLOON_F_PAGE_POISON: the driver says what it fills free pages with.
const F_PAGE_POISON: u32 = 4;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const F_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;

/// Offset of `actual` in the configuration.
const ACTUAL: u64 = 4;
/// Offset of `poison_val` in the configuration.
const POISON: u64 = 12;

/// Most page frames in one chain. Linux sends 256, FreeBSD 1024.
const MAX_FRAMES: usize = 4096;
/// Most pages or ranges given back in one reaction, give or take a chain.
const MAX_DISCARDS: usize = 4096;
/// Most times that anonymous memory takes the place of a file's, each of which may cost two mappings: a process has 65530.
const MAX_REPLACED: u32 = 16384;
/// Bytes of one statistic: a 16-bit tag and a 64-bit value, packed.
const STAT_BYTES: usize = 10;
/// Most statistics read from one chain; the standard knows 10.
const MAX_STATS: usize = 64;

/// What a balloon takes along, version 1. Which pages are in it, its driver knows.
#[derive(Serialize, Deserialize)]
struct State {
    target_pages: u32,
    actual_pages: u32,
    stats: [Option<u64>; 10],
    stats_updates: u64,
    stats_wanted: bool,
    stats_known: bool,
    target_news: bool,
    reported_bytes: u64,
    poison: u32,
}

/// The device.
pub struct Balloon {
    /// Shared with the host's side, which wakes the device after a change.
    host: BalloonHandle,
    /// DRIVER_OK was set.
    active: bool,
    /// The driver's statistics buffer, kept until the host asks for the next ones.
    stats_head: Option<u16>,
    /// What is in the next statistics buffer was read before it went back into the ring.
    stats_known: bool,
    /// What the driver fills free pages with (`poison_val`).
    poison: u32,
    /// The host refused to take pages back, and the log says so.
    refused: bool,
    /// Asks RAM's owner how pages are given back.
    how: Box<dyn Fn() -> GiveBack + Send>,
    /// How often anonymous memory took the place of a file's. No reset makes those mappings fewer.
    replaced: u32,
}

impl Balloon {
    /// An empty balloon on RAM that is anonymous or shared memory, and the host's side of it.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn new() -> std::io::Result<(Self, BalloonHandle)> {
        Self::of_ram(|| GiveBack::Release)
    }

    /// The same on RAM whose owner is asked each time how pages are given back.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn of_ram(how: impl Fn() -> GiveBack + Send + 'static) -> std::io::Result<(Self, BalloonHandle)> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let host = BalloonHandle { shared: Arc::default(), wake: Arc::new(wake) };
        let device = Self {
            host: host.clone(),
            active: false,
            stats_head: None,
            stats_known: false,
            poison: 0,
            refused: false,
            how: Box::new(how),
            replaced: 0,
        };
        Ok((device, host))
    }

    /// Gives the chains of `queue` to `take`, which returns what each cost; past the budget, asks for another turn.
    fn drain(
        &mut self,
        queue: usize,
        io: &mut Io,
        mut take: impl FnMut(&mut Self, &Chain, &GuestRam) -> Result<usize, Fault>,
    ) -> Result<(), Fault> {
        let (mut taken, mut cost) = (0, 0);
        while let Some(chain) = io.pop(queue)? {
            cost += take(self, &chain, io.ram)?;
            io.complete(queue, chain.head, 0)?;
            taken += 1;
            if taken == BUDGET || cost >= MAX_DISCARDS {
                io.again(queue);
                break;
            }
        }
        if taken != 0 { io.signal(queue) } else { Ok(()) }
    }

    /// Gives back the pages a chain of 32-bit page frame numbers names.
    fn inflate(&mut self, chain: &Chain, ram: &GuestRam) -> Result<usize, Fault> {
        let malformed = |what| Fault::Malformed { queue: INFLATE, what };
        if chain.readable_bytes() > 4 * MAX_FRAMES as u64 {
            return Err(malformed("too many page frame numbers in one chain"));
        }
        let mut bytes = vec![0; chain.readable_bytes() as usize];
        chain.read_at(ram, 0, &mut bytes);
        let mut frames: Vec<u32> =
            bytes.chunks_exact(4).filter_map(|b| Some(u32::from_le_bytes(b.try_into().ok()?))).collect();
        frames.sort_unstable();
        frames.dedup();
        let adjacent = |a: &u32, b: &u32| a.checked_add(1) == Some(*b);
        for run in frames.chunk_by(adjacent) {
            let first = run.first().copied().unwrap_or(0);
            self.give_back(ram, u64::from(first) * PAGE_BYTES, run.len() as u64 * PAGE_BYTES)
                .ok_or(malformed("a page frame outside guest RAM"))?;
        }
        Ok(frames.len())
    }

    /// Gives back the free pages a chain's writable segments are. A driver that fills free pages with anything but
    /// zeroes wants to find that again, so it keeps them (virtio 1.2, section 5.5.6.6).
    fn report(&mut self, chain: &Chain, ram: &GuestRam, poisoned: bool) -> usize {
        if !poisoned {
            for segment in &chain.writable {
                // Chains are checked to lie in RAM.
                let bytes = self.give_back(ram, segment.address.0, u64::from(segment.length)).unwrap_or(0);
                let mut shared = lock(&self.host.shared);
                shared.reported_bytes = shared.reported_bytes.saturating_add(bytes);
            }
        }
        chain.writable.len()
    }

    /// [`discard`], where a refusal by the host (locked or huge pages) costs memory but not the device.
    fn give_back(&mut self, ram: &GuestRam, start: u64, bytes: u64) -> Option<u64> {
        let how = match (self.how)() {
            GiveBack::Replace if self.replaced == MAX_REPLACED => GiveBack::Keep,
            GiveBack::Replace => {
                self.replaced += 1;
                GiveBack::Replace
            }
            how => how,
        };
        match discard(ram, start, bytes, how)? {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                if !self.refused {
                    log::warn!("balloon: the host cannot take pages back ({error})");
                    self.refused = true;
                }
                Some(0)
            }
        }
    }

    /// Reads what statistics came, keeps the last buffer, and answers with it when more are wanted.
    fn take_stats(&mut self, io: &mut Io) -> Result<(), Fault> {
        for taken in 0.. {
            if taken == BUDGET {
                io.again(STATS);
                break;
            }
            let Some(chain) = io.pop(STATS)? else { break };
            if !std::mem::take(&mut self.stats_known) {
                self.read_stats(&chain, io.ram);
            }
            if let Some(earlier) = self.stats_head.replace(chain.head) {
                io.complete(STATS, earlier, 0)?;
                io.signal(STATS)?;
            }
        }
        self.ask_stats(io)
    }

    fn read_stats(&mut self, chain: &Chain, ram: &GuestRam) {
        let mut bytes = [0; STAT_BYTES * MAX_STATS];
        let length = chain.read_at(ram, 0, &mut bytes);
        let mut shared = lock(&self.host.shared);
        for entry in bytes.get(..length).unwrap_or_default().chunks_exact(STAT_BYTES) {
            let Some((tag, value)) = entry.split_first_chunk() else { continue };
            let (Some(slot), Ok(value)) =
                (shared.stats.get_mut(usize::from(u16::from_le_bytes(*tag))), value.try_into())
            else {
                continue;
            };
            *slot = Some(u64::from_le_bytes(value));
        }
        shared.stats_updates = shared.stats_updates.saturating_add(1);
    }

    /// Returns the kept buffer, which is how the driver is asked for the next statistics.
    fn ask_stats(&mut self, io: &mut Io) -> Result<(), Fault> {
        if !lock(&self.host.shared).stats_wanted {
            return Ok(());
        }
        let Some(head) = self.stats_head.take() else { return Ok(()) };
        lock(&self.host.shared).stats_wanted = false;
        io.complete(STATS, head, 0)?;
        io.signal(STATS)
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn pci_class(&self) -> u32 {
        0x00_ff00
    }

    /// Inflate, deflate, statistics, and two for reporting: the standard numbers it 4 whether or not there is a queue
    /// 3 for hints, and Linux until 6.10 counts only the queues it uses. Whichever the driver enables reports.
    fn queue_sizes(&self) -> &[u16] {
        &[128, 128, 128, 128, 128]
    }

    fn features(&self) -> u64 {
        1 << F_STATS | 1 << F_DEFLATE_ON_OOM | 1 << F_PAGE_POISON | 1 << F_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let shared = lock(&self.host.shared);
        let fields = [shared.target_pages, shared.actual_pages, 0, self.poison];
        let skipped = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        data.iter_mut()
            .zip(fields.into_iter().flat_map(u32::to_le_bytes).skip(skipped))
            .for_each(|(to, from)| *to = from);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            ACTUAL => lock(&self.host.shared).actual_pages = value,
            POISON => self.poison = value,
            _ => {}
        }
    }

    fn activate(&mut self, io: &mut Io) -> Result<(), Fault> {
        self.active = true;
        self.backend_ready(io)
    }

    fn queue_notified(&mut self, queue: usize, io: &mut Io) -> Result<(), Fault> {
        let stats = io.has_feature(F_STATS);
        match queue {
            _ if !self.active => Ok(()),
            INFLATE => self.drain(queue, io, Self::inflate),
            // What comes out of the balloon is backed again when the guest touches it.
            DEFLATE => self.drain(queue, io, |_, _, _| Ok(1)),
            STATS if stats => self.take_stats(io),
            _ if io.has_feature(F_REPORTING) => {
                let poisoned = io.has_feature(F_PAGE_POISON) && self.poison != 0;
                self.drain(queue, io, |balloon, chain, ram| Ok(balloon.report(chain, ram, poisoned)))
            }
            _ => Ok(()),
        }
    }

    fn backend(&self) -> Option<Backend> {
        self.active.then(|| Backend { fd: self.host.wake.as_raw_fd(), events: EventSet::IN })
    }

    fn backend_ready(&mut self, io: &mut Io) -> Result<(), Fault> {
        // Empty when called spuriously; what to do stands in the shared fields.
        let _empty = self.host.wake.read();
        if std::mem::take(&mut lock(&self.host.shared).target_news) {
            io.config_changed();
        }
        self.ask_stats(io)
    }

    /// The statistics buffer goes back into the ring, and is taken again after a resume.
    fn quiesce(&mut self, io: &mut Io) -> Result<(), Fault> {
        if self.stats_head.take().is_some() {
            self.stats_known = true;
            io.put_back(STATS);
        }
        Ok(())
    }

    fn moved(&mut self, _io: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    /// The host's target stands; what the driver said does not.
    fn reset(&mut self) {
        self.active = false;
        self.stats_head = None;
        self.stats_known = false;
        self.poison = 0;
        self.refused = false;
        let mut shared = lock(&self.host.shared);
        *shared = Shared { target_pages: shared.target_pages, ..Default::default() };
    }

    fn save(&self) -> Saved {
        let Self { host, active: _, stats_head: _, stats_known, poison, refused: _, how: _, replaced: _ } = self;
        let Shared { target_pages, actual_pages, stats, stats_updates, stats_wanted, target_news, reported_bytes } =
            lock(&host.shared).clone();
        let (stats_known, poison) = (*stats_known, *poison);
        let state = State {
            target_pages,
            actual_pages,
            stats,
            stats_updates,
            stats_wanted,
            stats_known,
            target_news,
            reported_bytes,
            poison,
        };
        Saved::of(1, &state)
    }

    /// Takes any numbers: they are shown and compared, and none is a size.
    fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        let State {
            target_pages,
            actual_pages,
            stats,
            stats_updates,
            stats_wanted,
            stats_known,
            target_news,
            reported_bytes,
            poison,
        } = saved.decode(1)?;
        *lock(&self.host.shared) =
            Shared { target_pages, actual_pages, stats, stats_updates, stats_wanted, target_news, reported_bytes };
        (self.stats_known, self.poison) = (stats_known, poison);
        Ok(())
    }
}
