//! The target of a move: a guest arrives here. The phases are those of [`Target`], which decides; this performs, and tells it what
//! came of each step.
//!
//! Everything that can be done before the guest stops is done by then: the machine is built, its threads stand at the gate, its
//! taps are open, its disks are open without their locks, its devices have had a rehearsal of their state.

mod arrival;
mod wait;

pub use arrival::Arrival;

use super::build::Parked;
use super::description::RunSection;
use super::keeper_link::KeeperLink;
use super::machine::Machine;
use super::move_error::MoveError;
use super::movement::Movement;
use super::outgoing::{lock_all, printable};
use super::vm::Vm;
use crate::control::movement::{MoveStatus, Phase};
use crate::records::Records;
use arrival::{SOURCE, refuse, rehearsed, sections, take_probe, wire};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use sterna_migration::handover::{
    Answer, Move, Order, Phase as RecordPhase, Record, TARGET_WAIT, Target, TargetAction, TargetEvent, TargetState,
};
use sterna_migration::stream::{Event, Receiver, Socket, hash};
use sterna_migration::wire::frame::{Frame, FrameKind};
use sterna_migration::wire::message::{
    FINAL_STATE, Loaded, MAX_MAKE_RUNS, Machine as MachineMessage, Mode, Ready, Started, decode, read_frame, send,
};
use sterna_migration::wire::{ToSource, ToTarget};
use sterna_migration::{Run, Sections};
use wait::JOIN_PATIENCE;

/// Threads that hash memory.
const HASHERS: usize = 4;
/// How long the source may be silent: it flushes its disks in one go. That it is gone shows sooner, by the connection.
const SILENCE: Duration = Duration::from_secs(30);
/// How long the figures may take to be read once they begin to come.
const REPORT_READ: Duration = Duration::from_secs(2);
/// How long the figures may take to come once the guest runs.
const REPORT_PATIENCE: Duration = Duration::from_secs(10);

/// The receiving side of one machine.
pub struct Taker<'a> {
    pub vm: &'a Arc<Vm>,
    pub movement: &'a Arc<Movement>,
    pub keeper: KeeperLink,
    pub main: Socket,
    pub this_move: Move,
    pub message: MachineMessage,
    /// Where the machine comes from, for the record.
    pub from: String,
    /// There until it has its state.
    pub parked: Option<Parked>,
    /// There from then on.
    pub machine: Option<Arc<Machine>>,
    ready: Ready,
    receiver: Option<Receiver>,
    /// The final state's sections, until they are restored.
    sections: Option<Sections>,
    run: RunSection,
    loaded: Loaded,
    started: Started,
    /// When Go came.
    go: Option<Instant>,
    deadline: Option<Instant>,
    error: Option<MoveError>,
}

impl<'a> Taker<'a> {
    /// For the machine of `arrival`, built as `parked`.
    pub fn new(
        vm: &'a Arc<Vm>,
        movement: &'a Arc<Movement>,
        keeper: KeeperLink,
        arrival: Arrival,
        parked: Parked,
        ready: Ready,
    ) -> Self {
        Self {
            vm,
            movement,
            keeper,
            this_move: arrival.this_move,
            from: printable(arrival.description.host.as_bytes()),
            main: arrival.main,
            message: arrival.message,
            parked: Some(parked),
            machine: None,
            ready,
            receiver: None,
            sections: None,
            run: RunSection::default(),
            loaded: Loaded { restore_ns: 0, ram_hash: None },
            started: Started { locks_ns: 0, start_ns: 0, answered_ns: 0 },
            go: None,
            deadline: None,
            error: None,
        }
    }

    /// Takes the machine in, or discards it.
    ///
    /// # Errors
    /// Why it did not arrive.
    pub fn run(mut self) -> Result<(), MoveError> {
        let mut target = Target::new(self.this_move);
        let main = self.main.clone();
        self.movement.wake_with(move || main.shut());
        let mut event = Some(TargetEvent::Built);
        loop {
            while let Some(happened) = event.take() {
                let actions = match target.on(happened) {
                    Ok(actions) => actions,
                    Err(refusal) => {
                        log::warn!("{refusal}");
                        self.main.shut();
                        break;
                    }
                };
                for action in actions {
                    event = self.perform(action).or(event);
                }
            }
            match target.state() {
                TargetState::Running => {
                    self.linger(target);
                    return Ok(());
                }
                TargetState::Discarded => {
                    let reason = self.error.take().unwrap_or(MoveError::Off(super::Off::Cancelled));
                    self.movement.end(|status| {
                        status.phase = Phase::Failed;
                        status.error = Some(reason.line());
                        status.guest = TargetState::Discarded.to_string();
                    });
                    return Err(reason);
                }
                state => event = Some(self.step(state)),
            }
        }
    }

    fn step(&mut self, state: TargetState) -> TargetEvent {
        if let Some(off) = self.movement.off() {
            return self.failed(MoveError::Off(off));
        }
        let result = match state {
            TargetState::Ready => self.take_in(),
            TargetState::Loaded => self.await_go(),
            // Left by what their actions tell.
            _ => Ok(TargetEvent::Failed("this host has lost its thread".into())),
        };
        result.unwrap_or_else(|error| self.failed(error))
    }

    fn failed(&mut self, error: MoveError) -> TargetEvent {
        let event = match &error {
            MoveError::Stream(_) | MoveError::Wire { .. } | MoveError::Peer { .. } => TargetEvent::Lost,
            MoveError::Off(_) => TargetEvent::Order(self.this_move, Order::Cancel),
            error => TargetEvent::Failed(error.line()),
        };
        // A stream that is malformed is told so; one that is gone does not hear it.
        let off = self.movement.off().filter(|_| self.go.is_none());
        let (event, error) = match off {
            Some(off) => (TargetEvent::Order(self.this_move, Order::Cancel), MoveError::Off(off)),
            None => (event, error),
        };
        if matches!(event, TargetEvent::Lost) || off_here(&error) {
            refuse(&self.main, &error.line());
        }
        log::warn!("{}", error.line());
        self.error.get_or_insert(error);
        event
    }

    fn perform(&mut self, action: TargetAction) -> Option<TargetEvent> {
        match action {
            TargetAction::Send(answer) => self.say(answer),
            TargetAction::Load => {
                let loaded = self.load().map(|()| TargetEvent::StateLoaded);
                return Some(loaded.unwrap_or_else(|error| self.failed(error)));
            }
            TargetAction::ArmWait => self.deadline = Some(Instant::now() + TARGET_WAIT),
            TargetAction::TakeLocks => {
                // From here on it cannot be called off here.
                if let Err(off) = self.movement.commit() {
                    return Some(TargetEvent::LocksRefused(off.to_string()));
                }
                let began = Instant::now();
                self.go = Some(began);
                let locked = lock_all(&self.vm.host.images);
                self.started.locks_ns = nanos(began.elapsed());
                return Some(match locked {
                    Ok(()) => TargetEvent::LocksTaken,
                    Err(error) => {
                        let reason = super::chain(&error);
                        self.error.get_or_insert(MoveError::Refused(vec![reason.clone()]));
                        TargetEvent::LocksRefused(reason)
                    }
                });
            }
            TargetAction::TellKeeper => self.keeper.starting(),
            TargetAction::Start => {
                self.vm.arrive(self.run.paused, self.run.uptime());
                self.started.start_ns = self.go.map_or(0, |go| nanos(go.elapsed()));
            }
            // Starting has told the devices and set the network's announcements off.
            TargetAction::Announce => {}
            TargetAction::WriteRecord => self.write_record(),
            TargetAction::Discard => {
                // The first connection stays, for what is to be said on it.
                if let Some(Err(error)) = self.receiver.take().map(Receiver::finish) {
                    log::debug!("{error}");
                }
                self.parked = None;
                self.machine = None;
            }
        }
        None
    }

    fn say(&mut self, answer: Answer) {
        let message = match answer {
            Answer::Ready => ToSource::Ready(self.ready.clone()),
            Answer::Loaded => ToSource::Loaded(self.loaded.clone()),
            Answer::Running => {
                self.started.answered_ns = self.go.map_or(0, |go| nanos(go.elapsed()));
                ToSource::Running(self.started.clone())
            }
            Answer::NotStarted(reason) => ToSource::NotStarted(reason),
            Answer::Discarded => ToSource::Discarded,
            Answer::Pending => ToSource::Pending,
            Answer::Ended => ToSource::Ended,
            Answer::Unknown => ToSource::Unknown,
            Answer::Fail(reason) => return refuse(&self.main, &reason),
        };
        if let Err(error) = send(&mut &self.main, &message) {
            log::warn!("the source does not hear {message:?}: {error}");
        }
    }

    /// The first connection and the further ones, by number: they are made one after the other and may come in any order.
    fn connections(&mut self) -> Result<Vec<Socket>, MoveError> {
        let mut sockets = vec![None; self.message.connections.into()];
        if let Some(first) = sockets.first_mut() {
            *first = Some(self.main.clone());
        }
        let deadline = Instant::now() + JOIN_PATIENCE;
        while sockets.iter().any(Option::is_none) {
            self.await_connection(deadline)?;
            let Some((preamble, socket)) = self.keeper.take().map_err(MoveError::host("take a connection"))? else {
                return Err(MoveError::Unexpected { peer: "the receiver", wanted: "the move's further connections" });
            };
            let place = sockets.get_mut(usize::from(preamble.connection)).filter(|place| place.is_none());
            match place {
                Some(place) if KeeperLink::belongs(&preamble, self.this_move) => *place = Some(socket),
                _ => log::warn!("a connection that this move does not have is dropped"),
            }
        }
        Ok(sockets.into_iter().flatten().collect())
    }

    /// Ready: RAM and rehearsals come in, and at last the state.
    fn take_in(&mut self) -> Result<TargetEvent, MoveError> {
        self.main.set_timeout(SILENCE).map_err(MoveError::host("set a time-out"))?;
        let sockets = self.connections()?;
        let ram = self.vm.host.memory.pages();
        let receiver = if self.message.mode == Mode::Quick { Receiver::new } else { Receiver::low_at_first };
        self.receiver = Some(receiver(ram, sockets)?);
        loop {
            let Some(receiver) = &mut self.receiver else { return Ok(TargetEvent::Lost) };
            match receiver.next_event()? {
                Event::PassEnd(pass) => {
                    let (bytes, zeros) = (&receiver.counters().bytes, &receiver.counters().zero_pages);
                    let (bytes, zeros) = (bytes.load(Ordering::Relaxed), zeros.load(Ordering::Relaxed));
                    self.movement.note(|status| {
                        status.phase = Phase::Copying;
                        status.ram.dirty_sync_count = pass;
                        (status.ram.transferred, status.ram.duplicate) = (bytes, zeros);
                    });
                }
                Event::Frame(frame) => match frame.header.kind {
                    FrameKind::State if frame.header.flags & FINAL_STATE != 0 => {
                        self.sections = Some(sections(&frame)?);
                        return Ok(TargetEvent::StateArrived);
                    }
                    FrameKind::State => self.rehearse(&frame)?,
                    _ => {
                        if let Some(event) = self.message(&frame)? {
                            return Ok(event);
                        }
                    }
                },
            }
        }
    }

    fn message(&mut self, frame: &Frame) -> Result<Option<TargetEvent>, MoveError> {
        if frame.header.kind == FrameKind::Failure {
            let reason = printable(&frame.contents);
            self.error.get_or_insert(MoveError::Peer { peer: SOURCE, reason });
            return Ok(Some(TargetEvent::Order(self.this_move, Order::Cancel)));
        }
        match decode(frame).map_err(wire)? {
            ToTarget::Probe { bytes } => take_probe(&self.main, bytes).map(|()| None),
            ToTarget::Order(order) => Ok(Some(TargetEvent::Order(self.this_move, order))),
            ToTarget::Make(runs) if runs.len() <= MAX_MAKE_RUNS => self.make(&runs).map(|()| None),
            _ => Err(MoveError::Unexpected { peer: SOURCE, wanted: "memory, state or an order" }),
        }
    }

    /// Makes pages that will come while the guest stands still.
    fn make(&self, runs: &[(u64, u64)]) -> Result<(), MoveError> {
        let ram = self.vm.host.memory.pages();
        let made = runs.iter().try_for_each(|(first, pages)| ram.make(Run { first: *first, pages: *pages }));
        made.map_err(MoveError::host("make its memory"))?;
        send(&mut &self.main, &ToSource::Made).map_err(wire)
    }

    fn rehearse(&mut self, frame: &Frame) -> Result<(), MoveError> {
        let began = Instant::now();
        if let Some(parked) = &self.parked {
            parked.rehearse(sections(frame)?)?;
        }
        rehearsed(&self.main, began)
    }

    /// Applies the state to the machine.
    fn load(&mut self) -> Result<(), MoveError> {
        let began = Instant::now();
        let (Some(parked), Some(mut sections)) = (self.parked.take(), self.sections.take()) else {
            return Err(MoveError::Unexpected { peer: SOURCE, wanted: "one state" });
        };
        self.run = RunSection::take(&mut sections)?;
        // Before the state: restoring it writes the guest's clocks into its memory.
        if let (true, Some(receiver)) = (self.message.verify, &self.receiver) {
            let pages = receiver.received();
            self.loaded.ram_hash = Some(hash(&self.vm.host.memory.pages(), &pages, HASHERS));
        }
        let machine = parked.restore(sections)?;
        self.machine = Some(self.vm.fill(machine));
        self.loaded.restore_ns = nanos(began.elapsed());
        Ok(())
    }

    fn write_record(&self) {
        let disks = self.vm.config.disks.iter().filter(|disk| !disk.readonly);
        let record = Record {
            move_id: self.this_move.id,
            epoch: self.this_move.epoch,
            vm: self.vm.config.name.clone(),
            peer: self.from.clone(),
            phase: RecordPhase::Arrived,
            time: crate::clock::rfc3339(std::time::SystemTime::now()),
            disks: disks.map(|disk| disk.path.display().to_string()).collect(),
        };
        if let Err(error) = Records::from_env().write(&record) {
            log::warn!("the record of the arrival cannot be written: {error}");
        }
    }

    /// The guest runs: takes the source's figures, and answers whoever still asks, for as long as the keeper lives.
    fn linger(self, mut target: Target) {
        let Self { movement, keeper, main, this_move, started, receiver, .. } = self;
        // The further connections end; the first is still to bring the figures.
        if let Some(Err(error)) = receiver.map(Receiver::finish) {
            log::debug!("after the move: {error}");
        }
        movement.end(|status| {
            status.phase = Phase::Done;
            status.percent = 100;
            status.guest = TargetState::Running.to_string();
        });
        let movement = Arc::clone(movement);
        let answer = move |socket: &Socket| {
            if let Err(error) = send(&mut &*socket, &ToSource::Running(started.clone())) {
                log::debug!("the source does not hear that the guest runs: {error}");
            }
        };
        let rest = move || {
            // The source's figures, and whoever still asks, whichever comes first.
            let deadline = Instant::now() + REPORT_PATIENCE;
            let mut settled = false;
            loop {
                if !settled && (Instant::now() >= deadline || wait::first_readable(&main, &keeper, deadline)) {
                    take_report(&main, &movement);
                    keeper.settled();
                    settled = true;
                    continue;
                }
                let Ok(Some((preamble, socket))) = keeper.take() else { break };
                let order = read_frame(&mut &socket).and_then(|frame| decode::<ToTarget>(&frame));
                if let (true, Ok(ToTarget::Order(order))) = (KeeperLink::belongs(&preamble, this_move), order) {
                    match target.on(TargetEvent::Order(this_move, order)) {
                        Ok(_) => answer(&socket),
                        Err(refusal) => log::warn!("{refusal}"),
                    }
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("move-answers".into()).spawn(rest) {
            log::warn!("nobody answers questions about the move: {error}");
        }
    }
}

/// Whether it was this side that called the move off.
fn off_here(error: &MoveError) -> bool {
    matches!(error, MoveError::Off(_))
}

/// Keeps the source's figures beside what is known here.
fn take_report(main: &Socket, movement: &Movement) {
    let report = main.set_timeout(REPORT_READ).ok().and_then(|()| {
        let frame = read_frame(&mut &*main).ok()?;
        match decode::<ToTarget>(&frame).ok()? {
            ToTarget::Report(report) => serde_json::from_slice::<MoveStatus>(&report).ok(),
            _ => None,
        }
    });
    movement.note(|status| {
        if let Some(report) = report {
            status.ram = report.ram;
            status.total_time = report.total_time;
            status.expected_downtime = report.expected_downtime;
            status.downtime = report.downtime;
            status.downtime_parts = report.downtime_parts;
            status.precopy_stall = report.precopy_stall;
            status.verdict = report.verdict.map(|text| printable(text.as_bytes()));
        }
    });
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
