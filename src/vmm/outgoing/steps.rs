//! What the source does in each phase.

use super::super::description::{Description, RunSection};
use super::super::dirty::DirtyLog;
use super::super::machine::lock;
use super::super::move_error::MoveError;
use super::super::movement::{Movement, micros};
use super::super::vm::Vm;
use super::peer::Peer;
use super::peer::printable;
use super::way::{probe, transfer_time};
use super::{Mover, RUNNING_PATIENCE, check_caches, check_msrs, flush_disks, millis_up};
use crate::control::machine::MachineError;
use crate::control::movement::{MigrateOrder, OnTimeout, Phase, Stall};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use sterna_migration::handover::SourceEvent;
use sterna_migration::policy::{Limits, Policy, Round, Verdict};
use sterna_migration::stream::{Hooks, Pace, PassFigures, Sender, hash};
use sterna_migration::wire::message::{Machine as MachineMessage, Mode};
use sterna_migration::wire::{Purpose, ToSource, ToTarget};
use sterna_migration::{PageSet, Run};

/// How long a receiver may take to be there.
pub(super) const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long the target may take to build the machine.
pub(super) const READY_PATIENCE: Duration = Duration::from_secs(60);
/// How long it may take to restore the state.
const LOADED_PATIENCE: Duration = Duration::from_secs(20);
/// How much of memory it may take a second to hash, bytes, at the least.
const HASH_RATE: u64 = 100 << 20;
/// Warnings of the target that are passed on.
const MAX_WARNINGS: usize = 16;
/// How long somebody else may hold the dirty log, and how often it is asked for.
const LOG_PATIENCE: Duration = Duration::from_secs(3);
const LOG_RETRY: Duration = Duration::from_millis(20);
/// What a stop costs beside memory, where it was not rehearsed.
pub(super) const FIXED_GUESS: Duration = Duration::from_millis(5);
/// Longest standstill that is wanted where nothing is said.
const DEFAULT_DOWNTIME: Duration = Duration::from_millis(50);
/// Pages of a huge page: less is not made at the target anyway.
const HUGE_PAGE: u64 = 512;
/// Pages in a run that the target is to make, and runs in a message: 4 GiB, moments, and room for a cancel.
const MAKE_PAGES: u64 = 16 << 10;
const MAKE_RUNS: usize = 64;
/// Threads that hash memory.
const HASHERS: usize = 4;

/// What the sender asks and tells while it sends.
pub(super) struct Sending {
    movement: Arc<Movement>,
    /// There while the guest runs.
    log: Mutex<Option<Arc<DirtyLog>>>,
    /// How long KVM was held up so far.
    stall: Mutex<Stall>,
    /// When time is over for a guest that still runs.
    deadline: Option<Instant>,
    on_timeout: OnTimeout,
}

impl Hooks for Sending {
    fn before(&self, chunk: Run, words: &[u64]) -> io::Result<()> {
        let Some(log) = lock(&self.log).clone() else { return Ok(()) };
        let began = Instant::now();
        let cleared = log.clear(chunk, words);
        let held_us = micros(began.elapsed());
        let mut stall = lock(&self.stall);
        stall.longest_us = stall.longest_us.max(held_us);
        stall.total_us += held_us;
        cleared
    }

    fn sent(&self, pages: u64, bytes: u64) {
        self.movement.sent(pages, bytes);
    }

    fn cancelled(&self) -> bool {
        let is_late = self.deadline.is_some_and(|deadline| Instant::now() > deadline);
        if is_late && lock(&self.log).is_some() {
            match self.on_timeout {
                OnTimeout::Cancel => drop(self.movement.call_off(super::Off::TimedOut)),
                // The guest stops after this pass, which no limit is to hold up any more.
                OnTimeout::Pause => self.movement.throttle().set(None),
            }
        }
        self.movement.off().is_some()
    }
}

impl Mover<'_> {
    /// Connects, has the machine built, and rehearses.
    pub(super) fn prepare(&mut self) -> Result<SourceEvent, MoveError> {
        check_caches(self.vm, self.order.unsafe_cache)?;
        let ram = self.vm.host.memory.pages();
        // What cannot be said is found before anybody is asked.
        machine_message(self.vm, &self.order, self.describe()?)?;
        let connect = |place| Peer::connect(&self.address, place, self.this_move, CONNECT_PATIENCE, || self.off());
        let peer = connect((Purpose::Move, 0))?;
        // Described once more, since it may have taken its time to connect: the target compares the clocks.
        let machine = machine_message(self.vm, &self.order, self.describe()?)?;
        let first = peer.send(&ToTarget::Machine(machine)).and_then(|()| {
            let ready = peer.receive("a target that is ready", READY_PATIENCE, || self.off())?;
            let mut sockets = vec![peer.socket().clone()];
            for connection in 1..self.order.connections {
                sockets.push(connect((Purpose::Join, connection))?.socket().clone());
            }
            Ok((ready, sockets))
        });
        let peer = self.peer.insert(peer);
        let (said, sockets) = first?;
        let ToSource::Ready(ready) = &said else {
            return Err(MoveError::Unexpected { peer: "the target", wanted: "that it is ready" });
        };
        let warnings = ready.warnings.iter().take(MAX_WARNINGS).map(|text| printable(text.as_bytes())).collect();
        self.movement.update(|status| status.warnings = warnings);
        check_msrs(self.vm, &ready.unknown_msrs)?;
        let bandwidth = if self.order.quick { probe(peer, || self.movement.off().map(MoveError::Off))? } else { 0 };
        self.rehearse()?;
        self.make_there()?;
        let timeout = Duration::from_millis(self.order.timeout_ms);
        let deadline = self.movement.began().checked_add(timeout);
        let on_timeout = self.order.on_timeout;
        let hooks = Arc::new(Sending {
            movement: Arc::clone(self.movement),
            log: Mutex::default(),
            stall: Mutex::default(),
            deadline,
            on_timeout,
        });
        self.hooks = Some(Arc::clone(&hooks));
        self.sender = Some(Sender::new(ram, sockets, Arc::clone(self.movement.throttle()), hooks)?);
        self.foretell(bandwidth)?;
        self.heard(said).ok_or(MoveError::Unexpected { peer: "the target", wanted: "that it is ready" })
    }

    /// Flushes the disks and sends the devices' state as it is now: what the target cannot take is refused while the guest
    /// runs, what it can is done before the guest stops, and it is known how long that takes.
    fn rehearse(&mut self) -> Result<(), MoveError> {
        let (Some(machine), Some(peer)) = (self.vm.machine(), &self.peer) else { return Ok(()) };
        // What has gathered by now is not for the guest to wait for.
        flush_disks(self.vm)?;
        let began = Instant::now();
        flush_disks(self.vm)?;
        peer.rehearse(&machine.parts().board.save_functions()?, || self.off())?;
        // The real thing has vCPUs too, and goes to and fro once more, with Go.
        self.fixed = began.elapsed() * 2;
        Ok(())
    }

    /// Quick: has the target make the pages that will come, which takes it as long as to receive them, while the guest runs.
    fn make_there(&self) -> Result<(), MoveError> {
        let (Some(peer), true) = (&self.peer, self.order.quick) else { return Ok(()) };
        let mut parts = Vec::new();
        for run in self.existing()?.blocks(HUGE_PAGE) {
            let firsts = (run.first..run.end()).step_by(MAKE_PAGES as usize);
            parts.extend(firsts.map(|first| (first, MAKE_PAGES.min(run.end() - first))));
        }
        for part in parts.chunks(MAKE_RUNS) {
            peer.send(&ToTarget::Make(part.to_vec()))?;
            let ToSource::Made = peer.receive("word that memory is there", READY_PATIENCE, || self.off())? else {
                return Err(MoveError::Unexpected { peer: "the target", wanted: "word that memory is there" });
            };
        }
        Ok(())
    }

    /// Tells what the standstill will be, by what is there to be carried and what the way carries.
    fn foretell(&self, bandwidth: u64) -> Result<(), MoveError> {
        let bytes = self.existing()?.count() * sterna_migration::PAGE_BYTES;
        let whole = self.fixed + transfer_time(bytes, bandwidth);
        self.movement.update(|status| {
            status.ram.present = bytes;
            status.ram.bandwidth = bandwidth;
            if self.order.quick {
                status.expected_downtime = Some(millis_up(whole));
            }
        });
        Ok(())
    }

    /// Pages that exist.
    fn existing(&self) -> Result<PageSet, MoveError> {
        self.vm.host.memory.existing().map_err(MoveError::host("ask which memory exists"))
    }

    /// Live: pass after pass while the guest runs, until it can be stopped. Quick: nothing.
    pub(super) fn copy(&mut self) -> Result<SourceEvent, MoveError> {
        if self.order.quick {
            return Ok(SourceEvent::Converged);
        }
        let (log, existing) = self.start_log()?;
        self.log = Some(Arc::new(log));
        let mut pages = Arc::new(existing);
        if let Some(hooks) = &self.hooks {
            *lock(&hooks.log) = self.log.clone();
        }
        let mut policy = Policy::default();
        loop {
            let began = Instant::now();
            let figures = self.send_pass(&pages, false)?;
            self.landed()?;
            if self.fixed > self.max_downtime() / 2 {
                // Something may have been in its way.
                self.rehearse()?;
            }
            let mut dirty = PageSet::none(pages.ram_pages());
            self.read_log(&mut dirty)?;
            if self.judge(&mut policy, &figures, began.elapsed(), &dirty)? {
                self.left = dirty;
                return Ok(SourceEvent::Converged);
            }
            pages = Arc::new(dirty);
        }
    }

    /// Switches the dirty log on, and says which pages exist. A check that is just watching it lets go within moments.
    fn start_log(&self) -> Result<(DirtyLog, PageSet), MoveError> {
        let Some(machine) = self.vm.machine() else { return Err(MoveError::Stop(MachineError::Ended)) };
        let (vm_fd, manual_protect) = (Arc::clone(&machine.parts().vm), machine.manual_protect);
        drop(machine);
        let deadline = Instant::now() + LOG_PATIENCE;
        loop {
            let started = DirtyLog::start(Arc::clone(&vm_fd), &self.vm.host.memory, manual_protect);
            match started {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    std::thread::sleep(LOG_RETRY);
                }
                started => return started.map_err(MoveError::host("switch the dirty log on")),
            }
        }
    }

    /// Sends what was dirtied while the record was written, so that a guest that is stopped now does not wait for it.
    pub(super) fn catch_up(&mut self) -> Result<(), MoveError> {
        if self.log.is_none() {
            return Ok(());
        }
        let none = PageSet::none(self.left.ram_pages());
        let mut pages = std::mem::replace(&mut self.left, none);
        self.read_log(&mut pages)?;
        self.send_pass(&Arc::new(pages), false)?;
        self.landed()
    }

    /// Waits until what was sent has landed. What lies in the sockets' buffers is neither carried, as far as bandwidth goes, nor to
    /// be waited for by a guest that stands still.
    fn landed(&self) -> Result<(), MoveError> {
        let Some(peer) = &self.peer else { return Ok(()) };
        peer.send(&ToTarget::Probe { bytes: 0 })?;
        match peer.receive("word that a pass has landed", READY_PATIENCE, || self.off())? {
            ToSource::Probed => Ok(()),
            _ => Err(MoveError::Unexpected { peer: "the target", wanted: "word that a pass has landed" }),
        }
    }

    /// Whether the guest is to be stopped now.
    fn judge(
        &mut self,
        policy: &mut Policy,
        figures: &PassFigures,
        took: Duration,
        dirty: &PageSet,
    ) -> Result<bool, MoveError> {
        let round = Round {
            sent_bytes: figures.bytes,
            elapsed: took,
            remaining_bytes: dirty.count() * sterna_migration::PAGE_BYTES,
            fixed: self.fixed,
            since_start: self.movement.began().elapsed(),
        };
        let limits =
            Limits { max_downtime: self.max_downtime(), timeout: Some(Duration::from_millis(self.order.timeout_ms)) };
        let (verdict, outlook) = policy.judge(&round, &limits);
        self.outlook = Some(outlook);
        let stall = self.hooks.as_ref().map(|hooks| *lock(&hooks.stall));
        self.movement.update(|status| {
            status.precopy_stall = stall;
            status.ram.bandwidth = outlook.bandwidth_bytes_per_s.unwrap_or_default() as u64;
            status.ram.dirty_rate = outlook.dirty_bytes_per_s.unwrap_or_default() as u64;
            status.expected_downtime = outlook.expected.map(millis_up);
            status.verdict = match verdict {
                Verdict::Another | Verdict::Press => None,
                Verdict::StopNow { .. } => Some("converges".to_owned()),
                Verdict::Stalled { .. } | Verdict::TimedOut => Some(outlook.to_string()),
            };
        });
        match (verdict, self.order.on_timeout) {
            (Verdict::StopNow { .. }, _) | (Verdict::TimedOut, OnTimeout::Pause) => Ok(true),
            (Verdict::TimedOut, OnTimeout::Cancel) => Err(MoveError::Stalled(outlook.to_string())),
            (Verdict::Press, _) => {
                self.pace = Pace::Pressed;
                Ok(false)
            }
            (Verdict::Another | Verdict::Stalled { .. }, _) => Ok(false),
        }
    }

    /// How long the guest may stand still.
    fn max_downtime(&self) -> Duration {
        self.movement.limits().max_downtime_us.map_or(DEFAULT_DOWNTIME, Duration::from_micros)
    }

    fn read_log(&self, into: &mut PageSet) -> Result<(), MoveError> {
        let read = self.log.as_ref().map_or(Ok(()), |log| log.read(into));
        read.map_err(MoveError::host("read the dirty log"))
    }

    fn send_pass(&mut self, pages: &Arc<PageSet>, last: bool) -> Result<PassFigures, MoveError> {
        self.passes += 1;
        let passes = self.passes;
        self.movement.begin_pass(pages.count() * sterna_migration::PAGE_BYTES);
        self.movement.note(|status| status.ram.dirty_sync_count = passes);
        let pace = if last { Pace::Full } else { self.pace };
        if let (true, Some(hooks)) = (last, &self.hooks) {
            *lock(&hooks.log) = None;
        }
        let Some(sender) = &mut self.sender else {
            return Err(MoveError::Unexpected { peer: "the target", wanted: "a connection for memory" });
        };
        match sender.send_pass(pages, pace) {
            Err(_) if self.movement.off().is_some() => Err(self.off().unwrap_or(MoveError::Off(super::Off::Cancelled))),
            result => Ok(result?),
        }
    }

    /// Brings the guest to a stand and sends all that is left of it.
    pub(super) fn stop(&mut self) -> Result<(), MoveError> {
        let msrs = &self.vm.host.processor()?.msrs;
        self.clock.stopped = Some(Instant::now());
        let stopped = self.vm.stop_for_move().map_err(MoveError::Stop)?;
        let machine = Arc::clone(stopped.machine());
        let run = RunSection::of(self.vm, stopped.was_paused());
        self.stopped = Some(stopped);
        flush_disks(self.vm)?;
        let stood = self.lap();
        self.clock.parts.stop_us = stood;
        // The state first: what saving it writes to memory is in the last pages.
        let mut sections = machine.parts().save(msrs)?;
        run.push(&mut sections)?;
        let saved = self.lap();
        if self.order.quick {
            self.movement.enter(Phase::Transferring);
        }
        let mut pages = std::mem::replace(&mut self.left, PageSet::none(0));
        match &self.log {
            Some(_) => self.read_log(&mut pages)?,
            None => pages = self.existing()?,
        }
        self.send_pass(&Arc::new(pages), true)?;
        self.clock.parts.pages_us = self.lap();
        if let Some(peer) = &self.peer {
            peer.send_state(&sections, true)?;
        }
        self.clock.parts.state_us = saved + self.lap();
        if self.order.verify {
            let existing = self.existing()?;
            self.ram_hash = Some(hash(&self.vm.host.memory.pages(), &existing, HASHERS));
        }
        Ok(())
    }

    /// Microseconds since the last call, or since the guest began to stand still.
    fn lap(&mut self) -> u64 {
        let now = Instant::now();
        let since = self.clock.sent.replace(now).or(self.clock.stopped).unwrap_or(now);
        micros(now - since)
    }

    /// Microseconds from the last [`Self::lap`] to `then`.
    fn lap_until(&self, then: Instant) -> u64 {
        self.clock.sent.map_or(0, |since| micros(then.saturating_duration_since(since)))
    }

    pub(super) fn await_loaded(&mut self) -> Result<SourceEvent, MoveError> {
        let Some(peer) = &self.peer else {
            return Ok(SourceEvent::Lost);
        };
        let hashing = Duration::from_secs(if self.order.verify { self.vm.config.memory_bytes / HASH_RATE } else { 0 });
        let patience = LOADED_PATIENCE + hashing;
        let said = peer.receive("a target that has loaded everything", patience, || self.off())?;
        let ToSource::Loaded(loaded) = &said else {
            return Err(MoveError::Unexpected { peer: "the target", wanted: "that it has loaded everything" });
        };
        self.clock.parts.restore_us = loaded.restore_ns / 1000;
        if let (Some(here), Some(there)) = (self.ram_hash, loaded.ram_hash)
            && here != there
        {
            return Err(MoveError::Differs { here, there });
        }
        self.movement.commit().map_err(MoveError::Off)?;
        // What was waited for beyond the restoring was on the way.
        self.clock.parts.hand_over_us = self.lap().saturating_sub(self.clock.parts.restore_us);
        self.heard(said).ok_or(MoveError::Unexpected { peer: "the target", wanted: "that it has loaded everything" })
    }

    /// The commit point: nothing on this machine resumes by itself from here on, and its disks are free.
    pub(super) fn release_locks(&mut self) {
        self.committed = self.stopped.take().map(super::Stopped::commit);
        self.vm.host.release_disks();
    }

    pub(super) fn await_running(&mut self) -> Result<SourceEvent, MoveError> {
        let Some(peer) = &self.peer else { return Ok(SourceEvent::Lost) };
        let said = peer.receive("a guest that runs there", RUNNING_PATIENCE, || None)?;
        if let (ToSource::Running(started), Some(stopped), Some(go)) = (&said, self.clock.stopped, self.clock.go) {
            // The guest runs before the answer is out: half of what was spent on the way is Go's.
            let way_us = micros(go.elapsed()).saturating_sub(started.answered_ns / 1000);
            let handed_over = go.duration_since(stopped);
            self.clock.parts.start_us = started.start_ns / 1000;
            self.clock.parts.hand_over_us += self.lap_until(go) + way_us / 2;
            self.clock.parts.total_us = micros(handed_over) + way_us / 2 + started.start_ns / 1000;
        }
        self.heard(said).ok_or(MoveError::Unexpected { peer: "the target", wanted: "that it runs" })
    }

    /// Takes all disk locks back, or none.
    pub(super) fn take_locks(&mut self) -> SourceEvent {
        match lock_all(&self.vm.host.images) {
            Ok(()) => SourceEvent::LocksTaken,
            Err(error) => {
                log::error!("{}", super::super::chain(&error));
                SourceEvent::LocksRefused
            }
        }
    }

    /// Lets the guest go on here.
    pub(super) fn resume(&mut self) {
        let stopped = self.stopped.take().or_else(|| self.committed.take().map(super::Committed::come_back));
        self.movement.uncommit();
        drop(stopped);
    }
}

/// What the target needs to build the machine of `description`, with names and paths as they are to be there.
pub(super) fn machine_message(
    vm: &Vm,
    order: &MigrateOrder,
    mut description: Description,
) -> Result<MachineMessage, MoveError> {
    let problems = description.rehome(order.name.as_deref(), &order.map);
    problems.none_or(()).map_err(|problems| MoveError::Refused(problems.list().to_vec()))?;
    Ok(MachineMessage {
        description: description.encode().map_err(|source| MoveError::Description { done: "written", source })?,
        layout: vm.host.memory.pages().layout(),
        mode: if order.quick { Mode::Quick } else { Mode::Live },
        connections: order.connections,
        verify: order.verify,
    })
}

/// Locks every image, or none. What the page cache holds of them may be older than what the other host wrote.
pub fn lock_all(images: &[sterna_devices::virtio::blk::Image]) -> Result<(), sterna_devices::virtio::blk::ImageError> {
    for (count, image) in images.iter().enumerate() {
        if let Err(error) = image.lock() {
            for image in &images[..count] {
                if let Err(error) = image.unlock() {
                    log::warn!("disk image {} stays locked: {error}", image.path().display());
                }
            }
            return Err(error);
        }
    }
    images.iter().for_each(sterna_devices::virtio::blk::Image::drop_cache);
    Ok(())
}
