//! A VM as its controllers see it: one [`Vm`] for the life of the process, whatever machine is inside it.
//!
//! A guest's reboot replaces the machine; name, disks, network and console stay.

use super::host::Host;
use super::machine::{Machine, lock};
use super::move_error::MoveError;
use super::movement::{Movement, Off};
use super::stopped::Stopped;
use super::vcpu::Outcome;
use super::{outgoing, save};
use crate::config::VmConfig;
use crate::control::machine::{self as control, BalloonStatus, Ended, GuestMemory, MachineError, RunState, Status};
use crate::control::movement::{CheckReport, Limits, MigrateOrder, MoveStatus, Phase, Resolution, SaveOrder};
use crate::events::{Event, EventBus};
use crate::units::format_size;
use serde::{Deserialize, Serialize};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use sterna_arch::state::Msr;
use uuid::Uuid;

/// Longest time that a move which was called off may take to let go of the machine.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(30);

/// What a machine is beside its configuration and keeps wherever it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The machine.
    pub uuid: Uuid,
    /// Grows with every move.
    pub epoch: u64,
}

impl Identity {
    /// Of a machine that boots for the first time.
    pub fn new() -> Self {
        Self { uuid: random_id(), epoch: 0 }
    }
}

/// An id that no other machine or move has.
#[expect(clippy::expect_used, reason = "Linux had getrandom before it had what else is needed here")]
pub fn random_id() -> Uuid {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).expect("getrandom is there");
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// See the module.
pub struct Vm {
    /// What it was built from.
    pub(super) config: VmConfig,
    /// What it holds of its host.
    pub(super) host: Arc<Host>,
    pub(super) identity: Identity,
    pub(super) events: Arc<EventBus>,
    /// Ends the run from outside.
    outcomes: Sender<Outcome>,
    inner: Mutex<Inner>,
    /// For the threads that move it.
    me: Weak<Vm>,
}

struct Inner {
    state: RunState,
    /// When vCPUs first ran, less the time that they ran elsewhere.
    started: Option<Instant>,
    /// None before the first build, between two machines, and at the end.
    machine: Option<Arc<Machine>>,
    /// The move under way, or the last one.
    movement: Option<Arc<Movement>>,
}

impl Inner {
    /// The machine, or why there is none: it may be on its way, which is no end.
    fn present(&self) -> Result<&Arc<Machine>, MachineError> {
        self.machine.as_ref().ok_or_else(|| hands_off(self.state).unwrap_or(MachineError::Ended))
    }
}

impl Vm {
    /// A VM with no machine in it yet.
    pub fn new(
        config: VmConfig,
        host: Arc<Host>,
        identity: Identity,
        events: Arc<EventBus>,
        outcomes: Sender<Outcome>,
    ) -> Arc<Self> {
        let inner = Inner { state: RunState::Created, started: None, machine: None, movement: None };
        Arc::new_cyclic(|me| Self {
            config,
            host,
            identity,
            events,
            outcomes,
            inner: Mutex::new(inner),
            me: Weak::clone(me),
        })
    }

    /// Puts a machine in, which stands still, and lets it run unless it is to wait for `resume`.
    pub fn insert(&self, machine: Machine, paused: bool) {
        let mut inner = lock(&self.inner);
        if !paused {
            machine.resume();
            let first = inner.started.is_none();
            inner.started.get_or_insert_with(Instant::now);
            inner.state = RunState::Running;
            if first {
                self.events.publish(Event::Started);
            }
        }
        inner.machine = Some(Arc::new(machine));
    }

    /// A machine is on its way to here.
    pub fn expect(&self, movement: Arc<Movement>) {
        let mut inner = lock(&self.inner);
        inner.state = RunState::Incoming;
        inner.movement = Some(movement);
    }

    /// Puts the machine in that was on its way; it stands still until [`Self::arrive`].
    pub fn fill(&self, machine: Machine) -> Arc<Machine> {
        Arc::clone(lock(&self.inner).machine.insert(Arc::new(machine)))
    }

    /// The machine that has come from elsewhere goes on as it was there: `paused` or not.
    pub fn arrive(&self, paused: bool, uptime: Duration) {
        let mut inner = lock(&self.inner);
        if let (Some(machine), false) = (&inner.machine, paused) {
            machine.resume_moved();
        }
        inner.started = Instant::now().checked_sub(uptime).or_else(|| Some(Instant::now()));
        inner.state = if paused { RunState::Paused } else { RunState::Running };
    }

    /// Takes the machine out and ends it; says whether it stood still. A move under way is called off first, and waited for:
    /// `None` where it does not let go of the machine, so that none may take its place.
    pub fn remove(&self, reason: &Outcome) -> Option<bool> {
        let mut is_free = true;
        if let Ok(movement) = self.moving() {
            let why = match reason {
                Outcome::Reset => Off::Guest("the guest has rebooted".to_owned()),
                Outcome::Ended(ended) => Off::Ended(ended.to_string()),
            };
            if !movement.call_off(why) {
                // Given away already: nothing is left here, and nobody has said what became of it there.
                movement.abandon();
            }
            is_free = movement.wait_over(LET_GO_TIMEOUT);
        }
        let mut inner = lock(&self.inner);
        let was_paused = inner.state == RunState::Paused;
        let machine = inner.machine.take();
        if let Outcome::Ended(_) = reason {
            inner.state = RunState::Ended;
        }
        // Ended outside the lock: its event loop may be about to take it, to press the power button.
        drop(inner);
        if let Some(machine) = machine {
            machine.end();
        }
        if let Outcome::Ended(_) = reason {
            self.host.release_disks();
            // Not left to the last who holds this VM: that may be a thread that the end of the process cuts off.
            lock(&self.host.console).close();
        }
        is_free.then_some(was_paused)
    }

    /// The machine in it, if there is one.
    pub fn machine(&self) -> Option<Arc<Machine>> {
        lock(&self.inner).machine.clone()
    }

    fn publish(&self, event: Event) {
        self.events.publish(event);
    }

    /// How long it has been running.
    pub fn uptime(&self) -> Duration {
        lock(&self.inner).started.map_or(Duration::ZERO, |at| at.elapsed())
    }

    /// Ends the VM from one of its own threads.
    pub fn end(&self, ended: Ended) {
        // The receiver goes only when the VM has ended anyway.
        let _told = self.outcomes.send(Outcome::Ended(ended));
    }

    /// Brings the machine to a stand for a move. What it was doing is taken up again when the answer is dropped.
    ///
    /// # Errors
    /// A guest that has ended, or vCPUs that do not stop: it runs on then.
    pub fn stop_for_move(&self) -> Result<Stopped, MachineError> {
        let mut inner = lock(&self.inner);
        let (Some(machine), Some(vm)) = (inner.machine.clone(), self.me.upgrade()) else {
            return Err(MachineError::Ended);
        };
        let was = inner.state;
        match was {
            RunState::Running | RunState::Stopping => machine.pause()?,
            RunState::Created | RunState::Paused => {}
            RunState::Moving | RunState::InDoubt | RunState::Incoming | RunState::Ended => {
                return Err(MachineError::Ended);
            }
        }
        inner.state = RunState::Moving;
        drop(inner);
        let stopped = Stopped::new(vm, machine, was);
        // A vCPU that has just reset or powered off the machine has told the main thread, which will see to it.
        if stopped.machine().has_ended() { Err(MachineError::Ended) } else { Ok(stopped) }
    }

    /// Those of the MSRs `among` that hold anything, by vCPU. The guest stands still while they are read.
    ///
    /// # Errors
    /// A guest that has ended or is handed over, vCPUs that do not stop, and what KVM does not read.
    pub fn used_msrs(&self, among: &[u32]) -> Result<Vec<(usize, Msr)>, MoveError> {
        let inner = lock(&self.inner);
        let machine = inner.present().map_err(MoveError::Stop)?;
        let runs = matches!(inner.state, RunState::Running | RunState::Stopping);
        if runs {
            machine.pause().map_err(MoveError::Stop)?;
        }
        let used = machine.parts().used_msrs(&self.host.processor()?.msrs, among);
        if runs {
            machine.resume();
        }
        Ok(used?)
    }

    /// Takes up again what `machine`, which stood still for a move, was doing.
    pub(super) fn go_on(&self, machine: &Arc<Machine>, was: RunState) {
        let mut inner = lock(&self.inner);
        if matches!(was, RunState::Running | RunState::Stopping) {
            machine.resume_moved();
        }
        inner.state = was;
    }

    /// What a move makes of it.
    pub(super) fn set_state(&self, state: RunState) {
        lock(&self.inner).state = state;
    }

    /// Puts a move in, unless there is one.
    fn begin_move(&self, movement: impl FnOnce() -> Arc<Movement>) -> Result<(Arc<Movement>, Arc<Vm>), MachineError> {
        let mut inner = lock(&self.inner);
        let under_way =
            inner.movement.as_ref().filter(|movement| !movement.is_over()).map(|movement| movement.status());
        // A guest that has arrived may leave at once: its source's figures need nobody here.
        if let Some(status) = under_way.filter(|status| !status.incoming || inner.state == RunState::Incoming) {
            return Err(MachineError::Moving(format!("a {} to {} is under way", status.kind, status.peer)));
        }
        let (_, Some(vm)) = (inner.present()?, self.me.upgrade()) else { return Err(MachineError::Ended) };
        let movement = movement();
        inner.movement = Some(Arc::clone(&movement));
        Ok((movement, vm))
    }

    /// Whether a move is under way.
    pub fn is_moving(&self) -> bool {
        self.moving().is_ok()
    }

    fn moving(&self) -> Result<Arc<Movement>, MachineError> {
        let movement = lock(&self.inner).movement.clone().filter(|movement| !movement.is_over());
        movement.ok_or_else(|| MachineError::Refused("it is not moving".into()))
    }
}

/// Why the guest is not to be touched.
fn hands_off(state: RunState) -> Option<MachineError> {
    let text = match state {
        RunState::Moving => "the guest stands still, being moved; `sterna migration cancel` calls it off",
        RunState::InDoubt => "the guest was handed over and may run elsewhere; see `sterna migration status`",
        RunState::Incoming => "the guest is on its way to here and does not run here yet",
        _ => return None,
    };
    Some(MachineError::Moving(text.to_owned()))
}

impl control::Machine for Vm {
    fn status(&self) -> Status {
        let inner = lock(&self.inner);
        let mut devices = Vec::new();
        let mut balloon = BalloonStatus::default();
        if let Some(machine) = &inner.machine {
            devices = machine.device_status();
            balloon = balloon_status(machine);
        }
        Status {
            state: inner.state,
            uptime_ms: inner.started.map_or(0, |at| u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)),
            vcpus: self.config.cpus,
            memory_bytes: self.config.memory_bytes,
            resident_bytes: resident_bytes(),
            balloon,
            devices,
        }
    }

    fn pause(&self) -> Result<(), MachineError> {
        let mut inner = lock(&self.inner);
        let machine = inner.present()?;
        if matches!(inner.state, RunState::Paused | RunState::Created) {
            return Ok(());
        }
        if let Some(refusal) = hands_off(inner.state) {
            return Err(refusal);
        }
        machine.pause()?;
        inner.state = RunState::Paused;
        self.publish(Event::Paused);
        Ok(())
    }

    fn resume(&self) -> Result<(), MachineError> {
        let mut inner = lock(&self.inner);
        let machine = inner.present()?;
        let event = match inner.state {
            RunState::Created => Event::Started,
            RunState::Paused => Event::Resumed,
            state => return hands_off(state).map_or(Ok(()), Err),
        };
        machine.resume();
        inner.started.get_or_insert_with(Instant::now);
        inner.state = RunState::Running;
        self.publish(event);
        Ok(())
    }

    fn press_power_button(&self) -> Result<(), MachineError> {
        let mut inner = lock(&self.inner);
        let machine = inner.present()?;
        if matches!(inner.state, RunState::Paused | RunState::Created) {
            return Err(MachineError::Paused);
        }
        if let Some(refusal) = hands_off(inner.state) {
            return Err(refusal);
        }
        machine.press_power_button().map_err(|source| MachineError::Failed {
            attempted: "pressing the power button".into(),
            source: source.into(),
        })?;
        inner.state = RunState::Stopping;
        self.publish(Event::PowerButton);
        Ok(())
    }

    fn kill(&self) {
        // Of a machine that is still on its way nobody waits for an end but the move.
        if lock(&self.inner).state == RunState::Incoming
            && let Ok(movement) = self.moving()
        {
            movement.call_off(Off::Cancelled);
        }
        self.end(Ended::Killed);
    }

    fn set_balloon(&self, target_bytes: u64) -> Result<(), MachineError> {
        let inner = lock(&self.inner);
        let machine = inner.present()?;
        if target_bytes >= self.config.memory_bytes {
            let memory = format_size(self.config.memory_bytes);
            let text = format!("the balloon must be smaller than the guest's memory of {memory}");
            return Err(MachineError::Refused(text));
        }
        if let Some(refusal) = hands_off(inner.state) {
            return Err(refusal);
        }
        machine.balloon().set_target(target_bytes);
        Ok(())
    }

    fn save(&self, order: SaveOrder) -> Result<(), MachineError> {
        let (movement, vm) = self.begin_move(|| save::begin(self, &order))?;
        spawn_mover(&Arc::clone(&movement), move || save::run(&vm, &movement, &order))
    }

    fn migrate(&self, order: MigrateOrder) -> Result<(), MachineError> {
        let (movement, vm) = self.begin_move(|| outgoing::begin(self, &order))?;
        spawn_mover(&Arc::clone(&movement), move || outgoing::run(&vm, &movement, order))
    }

    fn check_move(&self, order: MigrateOrder) -> Result<CheckReport, MachineError> {
        if self.is_moving() {
            return Err(MachineError::Moving("a move is under way; see `sterna migration status`".into()));
        }
        Ok(outgoing::check(self, &order))
    }

    fn movement(&self) -> Option<MoveStatus> {
        let movement = lock(&self.inner).movement.clone();
        movement.map(|movement| movement.status())
    }

    fn cancel_move(&self) -> Result<(), MachineError> {
        if self.moving()?.call_off(Off::Cancelled) {
            return Ok(());
        }
        Err(MachineError::Moving("it is too late to cancel: the target was told to start the guest".into()))
    }

    fn set_move(&self, limits: Limits) -> Result<(), MachineError> {
        self.moving()?.set_limits(limits);
        Ok(())
    }

    fn resolve_move(&self, resolution: Resolution) -> Result<(), MachineError> {
        let movement = self.moving()?;
        if lock(&self.inner).state != RunState::InDoubt {
            return Err(MachineError::Refused(
                "the move is not in doubt; `sterna migration cancel` calls it off".into(),
            ));
        }
        movement.resolve(resolution);
        Ok(())
    }
}

fn spawn_mover(movement: &Movement, run: impl FnOnce() + Send + 'static) -> Result<(), MachineError> {
    let spawned = std::thread::Builder::new().name("mover".into()).spawn(run);
    spawned.map(drop).map_err(|source| {
        movement.end(|status| {
            status.phase = Phase::Failed;
            status.error = Some(source.to_string());
        });
        MachineError::Failed { attempted: "starting a thread".into(), source: source.into() }
    })
}

fn balloon_status(machine: &Machine) -> BalloonStatus {
    let snapshot = machine.balloon().snapshot();
    machine.balloon().request_stats();
    let stat = |name: &str| snapshot.stats.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
    BalloonStatus {
        target_bytes: snapshot.target_bytes,
        actual_bytes: snapshot.actual_bytes,
        guest: GuestMemory {
            swap_in_bytes: stat("swap-in"),
            swap_out_bytes: stat("swap-out"),
            major_faults: stat("major-faults"),
            minor_faults: stat("minor-faults"),
            free_bytes: stat("free-memory"),
            total_bytes: stat("total-memory"),
            available_bytes: stat("available-memory"),
            disk_caches_bytes: stat("disk-caches"),
        },
    }
}

/// Host memory that this process occupies, from `/proc/self/statm`; 0 where there is no /proc.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}
