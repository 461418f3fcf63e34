//! The source of a move to another host: the guest leaves here. The phases are those of [`Source`], which decides; this
//! performs, and tells it what came of each step.
//!
//! ```text
//! preparing    connect, describe the machine, measure the way, rehearse the state        the guest runs
//! copying      live: dirty log on, pass after pass until the policy says stop            the guest runs
//! arming       the record is written                                                     the guest runs
//! stopping     vCPUs and devices stand, disks flushed; last pages, state                 standstill
//! loading      the target restores                                                       standstill
//! committing   disk locks released, Go                                                   standstill; no way back alone
//! moved        the copy here ends
//! ```

mod check;
mod peer;
mod steps;
mod subject;
mod way;

pub use check::check;
pub use peer::printable;

use super::description::{Description, unix_ns};
use super::dirty::DirtyLog;
use super::move_error::MoveError;
use super::movement::{Movement, Off, millis};
use super::stopped::{Committed, Stopped};
use super::vm::{Vm, random_id};
use crate::control::machine::Ended;
use crate::control::movement::{Downtime, Failure, Kind, MigrateOrder, MoveStatus, OnTimeout, Phase, Resolution};
use crate::records::Records;
use peer::Peer;
use std::sync::Arc;
use std::time::{Duration, Instant};
use steps::Sending;
pub use steps::lock_all;
use sterna_migration::PageSet;
use sterna_migration::handover::{Answer, Move, Record, Source, SourceAction, SourceEvent, SourceState};
use sterna_migration::handover::{Order, Phase as RecordPhase};
use sterna_migration::policy::Outlook;
use sterna_migration::stream::{Address, Pace, Sender};
use sterna_migration::wire::Purpose;
use sterna_migration::wire::message::Started;
pub use subject::{check_caches, check_msrs, describe, flush_disks};

/// How long the target may take to say that it runs, before that is in doubt.
const RUNNING_PATIENCE: Duration = Duration::from_secs(10);
/// How long one question about a move in doubt may take.
const ASK_PATIENCE: Duration = Duration::from_secs(5);
/// Longest time between two questions, and between two looks for a person's word.
const ASK_INTERVAL: Duration = Duration::from_secs(10);

/// The first status of a move to another host.
pub fn begin(vm: &Vm, order: &MigrateOrder) -> Arc<Movement> {
    let kind = if order.quick { Kind::Quick } else { Kind::Live };
    let (id, epoch) = (random_id(), vm.identity.epoch.saturating_add(1));
    let begun = MoveStatus::begin(id, epoch, kind, order.to.clone(), vm.config.memory_bytes);
    let status = MoveStatus { guest: SourceState::Preparing.to_string(), ..begun };
    Movement::begin(status, order.limits.clone(), Arc::clone(&vm.events))
}

/// What stands between the guest's last instruction here and its first there.
#[derive(Default)]
struct Clock {
    /// When the guest began to stand still.
    stopped: Option<Instant>,
    parts: Downtime,
    /// When the last bytes were on their way.
    sent: Option<Instant>,
    /// When Go was.
    go: Option<Instant>,
}

/// The mover of one machine.
struct Mover<'a> {
    vm: &'a Arc<Vm>,
    movement: &'a Arc<Movement>,
    order: MigrateOrder,
    address: Address,
    this_move: Move,
    records: Records,
    peer: Option<Peer>,
    sender: Option<Sender>,
    hooks: Option<Arc<Sending>>,
    log: Option<Arc<DirtyLog>>,
    /// What the stop will take beside memory.
    fixed: Duration,
    /// Passes so far.
    passes: u32,
    /// Pages that were read from the log and have not been sent: the log tells each only once.
    left: PageSet,
    /// There while the guest stands still and may go on.
    stopped: Option<Stopped>,
    /// There from Go on.
    committed: Option<Committed>,
    clock: Clock,
    started: Option<Started>,
    /// Hash of RAM, where one was asked for.
    ram_hash: Option<u64>,
    /// Questions asked in doubt.
    asked: u32,
    /// The first thing that went wrong.
    error: Option<MoveError>,
    /// What the last pass told.
    outlook: Option<Outlook>,
    /// Of passes beside the running guest.
    pace: Pace,
    /// It went wrong before anything was moved.
    refused: bool,
}

/// Moves the machine, or leaves it as it was, or in a named state.
pub fn run(vm: &Arc<Vm>, movement: &Arc<Movement>, order: MigrateOrder) {
    let address = match order.to.parse::<Address>() {
        Ok(address) => address,
        Err(error) => return give_back(movement, &MoveError::from(error)),
    };
    let MoveStatus { id, epoch, .. } = movement.status();
    let mut mover = Mover {
        vm,
        movement,
        order,
        address,
        this_move: Move { id, epoch },
        records: Records::from_env(),
        peer: None,
        sender: None,
        hooks: None,
        log: None,
        fixed: steps::FIXED_GUESS,
        passes: 0,
        left: PageSet::none(vm.host.memory.pages().pages()),
        stopped: None,
        committed: None,
        clock: Clock::default(),
        started: None,
        ram_hash: None,
        asked: 0,
        error: None,
        outlook: None,
        pace: Pace::Limited,
        refused: false,
    };
    let mut source = Source::new(mover.this_move);
    mover.drive(&mut source);
    mover.finish(source.state());
}

/// Ends a move that has come to nothing before anything was touched.
fn give_back(movement: &Movement, error: &MoveError) {
    log::warn!("{}", error.line());
    movement.end(|status| {
        status.phase = Phase::Failed;
        status.error = Some(error.line());
        status.failure = Some(error.failure());
        status.guest = SourceState::Here.to_string();
    });
}

impl Mover<'_> {
    /// The dispatcher: a step for each phase, and what the phase machine makes of it.
    fn drive(&mut self, source: &mut Source) {
        while !source.state().is_end() && !self.movement.is_abandoned() {
            let mut event = Some(self.step(source.state()));
            while let Some(happened) = event.take().filter(|_| !self.movement.is_abandoned()) {
                let actions = match source.on(happened) {
                    Ok(actions) => actions,
                    Err(refusal) => {
                        // The other side speaks out of turn: as good as a broken connection.
                        log::warn!("{refusal}");
                        self.peer = None;
                        vec![]
                    }
                };
                self.show(source.state());
                for action in actions {
                    event = self.perform(action).or(event);
                }
            }
        }
    }

    /// What is done in a phase until something happens.
    fn step(&mut self, state: SourceState) -> SourceEvent {
        let result = match state {
            SourceState::Preparing => self.prepare(),
            SourceState::Copying => self.copy(),
            SourceState::Loading => self.await_loaded(),
            SourceState::Committing => self.await_running(),
            SourceState::InDoubt => return self.doubt(),
            SourceState::LostThere => return self.await_person(),
            // Left by what their actions tell; to be here means that one told nothing.
            SourceState::Arming | SourceState::Stopping | SourceState::Retaking => Ok(SourceEvent::Failed),
            SourceState::Moved | SourceState::Here | SourceState::GivenUp => Ok(SourceEvent::Lost),
        };
        result.unwrap_or_else(|error| {
            self.refused |= state == SourceState::Preparing;
            self.failed(error)
        })
    }

    /// Notes what went wrong and says what kind of event that is.
    fn failed(&mut self, error: MoveError) -> SourceEvent {
        let event = match &error {
            MoveError::Off(Off::TimedOut) | MoveError::Stalled(_) => SourceEvent::TimedOut,
            MoveError::Off(_) => SourceEvent::Cancel,
            MoveError::NoAnswer { .. } => SourceEvent::TimedOut,
            MoveError::Stream(_) | MoveError::Wire { .. } => SourceEvent::Lost,
            _ => SourceEvent::Failed,
        };
        log::warn!("{}", error.line());
        self.error.get_or_insert(error);
        event
    }

    fn perform(&mut self, action: SourceAction) -> Option<SourceEvent> {
        let result = match action {
            SourceAction::WriteRecord => {
                let written = self.write_record(RecordPhase::OnItsWay).and_then(|()| self.catch_up());
                written.map(|()| SourceEvent::Recorded)
            }
            SourceAction::Stop => self.stop().map(|()| SourceEvent::Sent),
            SourceAction::ReleaseLocks => {
                self.release_locks();
                return None;
            }
            SourceAction::Send(order) => {
                self.say(order);
                return None;
            }
            SourceAction::Ask => return Some(self.ask()),
            SourceAction::TakeLocks => return Some(self.take_locks()),
            SourceAction::Resume => {
                self.resume();
                return None;
            }
            SourceAction::RemoveRecord => {
                if let Err(error) = self.records.remove(&self.vm.config.name) {
                    log::warn!("the record of the move stays: {error}");
                }
                return None;
            }
            SourceAction::RecordMoved => {
                if let Err(error) = self.write_record(RecordPhase::Moved) {
                    log::warn!("{}", error.line());
                }
                return None;
            }
            SourceAction::Destroy => return None, // `finish` does it, after the figures
        };
        Some(result.unwrap_or_else(|error| self.failed(error)))
    }

    /// Says where the guest is, and the phase in words for people.
    fn show(&self, state: SourceState) {
        let quick = self.order.quick;
        let phase = match state {
            SourceState::Preparing => Phase::Preparing,
            SourceState::Copying | SourceState::Arming => {
                if quick {
                    Phase::Preparing
                } else {
                    Phase::Copying
                }
            }
            SourceState::Stopping => Phase::Saving,
            SourceState::Loading | SourceState::Committing | SourceState::Retaking => Phase::Restoring,
            SourceState::InDoubt | SourceState::LostThere => Phase::InDoubt,
            SourceState::Moved | SourceState::Here | SourceState::GivenUp => return,
        };
        let change = |status: &mut MoveStatus| {
            status.phase = phase;
            status.guest = state.to_string();
        };
        // In the stopped window of a live move nothing takes time that can wait.
        match state {
            SourceState::InDoubt | SourceState::LostThere => {
                if let Some(committed) = &self.committed {
                    committed.doubt();
                }
                self.movement.update(change);
            }
            SourceState::Preparing | SourceState::Copying => self.movement.update(change),
            _ if quick => self.movement.update(change),
            _ => self.movement.note(change),
        }
    }

    /// Why the move is to stop, if it is.
    fn off(&self) -> Option<MoveError> {
        let timeout = Duration::from_millis(self.order.timeout_ms);
        let gives_up = self.order.on_timeout == OnTimeout::Cancel || self.sender.is_none();
        if gives_up && self.movement.began().elapsed() > timeout && self.clock.stopped.is_none() {
            self.movement.call_off(Off::TimedOut);
        }
        self.movement.off().map(MoveError::Off)
    }

    fn write_record(&self, phase: RecordPhase) -> Result<(), MoveError> {
        let disks = self.vm.config.disks.iter().filter(|disk| !disk.readonly);
        let record = Record {
            move_id: self.this_move.id,
            epoch: self.this_move.epoch,
            vm: self.vm.config.name.clone(),
            peer: self.order.to.clone(),
            phase,
            time: crate::clock::rfc3339(std::time::SystemTime::now()),
            disks: disks.map(|disk| disk.path.display().to_string()).collect(),
        };
        self.records.write(&record).map_err(MoveError::host("write the record of the move"))
    }

    fn say(&mut self, order: Order) {
        match (&self.peer, order) {
            (Some(peer), Order::Cancel) => {
                let reason = self.error.as_ref().map_or("the move is off".to_owned(), MoveError::line);
                peer.give_up(&reason);
                self.peer = None;
            }
            (Some(peer), order) => {
                self.clock.go = Some(Instant::now());
                if let Err(error) = peer.order(order) {
                    log::warn!("{}", error.line());
                }
            }
            (None, _) => {}
        }
    }

    /// The target was told to start and has not said that it runs: it answers on the connection there is, or is asked anew.
    fn doubt(&mut self) -> SourceEvent {
        if self.peer.is_none() {
            return SourceEvent::TimedOut;
        }
        self.await_running().unwrap_or_else(|error| {
            log::info!("{}", error.line());
            self.peer = None;
            SourceEvent::Lost
        })
    }

    fn await_person(&mut self) -> SourceEvent {
        loop {
            match self.word(ASK_INTERVAL) {
                Some(event) => return event,
                None if self.movement.is_abandoned() => return SourceEvent::TimedOut,
                None => {}
            }
        }
    }

    /// A person's word, if there is one within `wait`.
    fn word(&self, wait: Duration) -> Option<SourceEvent> {
        Some(match self.movement.resolution(wait)? {
            Resolution::Here => SourceEvent::ResolveHere,
            Resolution::There => SourceEvent::ResolveThere,
        })
    }

    /// Waits a growing while, then asks on a connection of its own what became of the move.
    fn ask(&mut self) -> SourceEvent {
        let wait = ASK_INTERVAL.min(Duration::from_millis(100) * 2u32.pow(self.asked.min(8)));
        self.asked += 1;
        self.peer = None;
        if let Some(event) = self.word(wait) {
            return event;
        }
        let asked =
            Peer::connect(&self.address, (Purpose::Ask, 0), self.this_move, ASK_PATIENCE, || None).and_then(|peer| {
                peer.order(Order::Ask)?;
                let answer = peer.receive("what became of the move", ASK_PATIENCE, || None)?;
                Ok((peer, answer))
            });
        match asked {
            Ok((peer, said)) => {
                self.peer = Some(peer);
                self.heard(said).unwrap_or(SourceEvent::Lost)
            }
            Err(error) => {
                log::info!("the target does not say what became of the move: {}", error.line());
                SourceEvent::Lost
            }
        }
    }

    /// What the target says as an event of the hand-over, with its figures kept.
    fn heard(&mut self, said: sterna_migration::wire::ToSource) -> Option<SourceEvent> {
        use sterna_migration::wire::ToSource;
        let answer: Answer = said.answer()?;
        match said {
            ToSource::Running(started) => self.started = Some(started),
            ToSource::NotStarted(reason) => {
                let reason = printable(reason.as_bytes());
                self.error.get_or_insert(MoveError::Peer { peer: "the target", reason });
            }
            ToSource::Unknown => self.peer = None,
            _ => {}
        }
        Some(SourceEvent::Answer(self.this_move, answer))
    }

    /// The end, whichever it is: the figures are told, and the machine ends or goes on. A machine that was ended by force in
    /// doubt leaves its record, which says that nobody knows.
    fn finish(mut self, state: SourceState) {
        // The further connections end; the first is still to carry the figures.
        drop(self.sender.take().map(Sender::finish));
        self.hooks = None;
        self.log = None;
        match state {
            SourceState::InDoubt | SourceState::LostThere | SourceState::Committing => self.movement.end(|status| {
                status.phase = Phase::Failed;
                status.failure = Some(Failure::Ended);
                status.guest = format!("{state} The copy here was ended.");
            }),
            SourceState::Moved | SourceState::GivenUp => {
                self.report(state);
                if let Some(committed) = self.committed.take() {
                    committed.end(Ended::Moved(self.order.to.clone()));
                }
            }
            _ => {
                let error = match (self.error.take(), self.outlook) {
                    (Some(MoveError::Off(Off::TimedOut)), Some(outlook)) => {
                        Some(MoveError::Stalled(outlook.to_string()))
                    }
                    (error, _) => error,
                };
                let phase = match &error {
                    Some(MoveError::Off(Off::TimedOut) | MoveError::Stalled(_)) => Phase::TimedOut,
                    Some(MoveError::Off(Off::Cancelled)) => Phase::Cancelled,
                    _ => Phase::Failed,
                };
                let failure = error.as_ref().map(|error| match error.failure() {
                    Failure::Refused if !self.refused => Failure::Broken,
                    failure => failure,
                });
                let guest = match &error {
                    Some(MoveError::Off(Off::Guest(what) | Off::Ended(what))) => {
                        format!("It was moved no further: {what}.")
                    }
                    _ => state.to_string(),
                };
                self.movement.end(|status| {
                    status.phase = phase;
                    status.error = error.as_ref().map(MoveError::line);
                    status.failure = failure;
                    status.guest = guest;
                });
            }
        }
    }

    /// What the move came to, here and for those who ask there.
    fn report(&mut self, state: SourceState) {
        let total_us = self.clock.parts.total_us;
        let parts = std::mem::take(&mut self.clock.parts);
        // Not where the target's first answer was lost: when it started then, nobody can tell.
        let measured = self.started.is_some() && total_us > 0;
        self.movement.note(|status| {
            status.phase = Phase::Done;
            status.guest = state.to_string();
            if measured {
                status.downtime = Some(total_us.div_ceil(1000));
                status.downtime_parts = Some(parts);
            }
        });
        let status = self.movement.status();
        if let (Some(peer), Ok(report)) = (&self.peer, serde_json::to_vec(&status)) {
            let told = peer.send(&sterna_migration::wire::ToTarget::Report(report));
            if let Err(error) = told {
                log::debug!("the target does not take the figures: {}", error.line());
            }
        }
        self.movement.end(|_| {});
    }

    /// Where the way leads, for messages.
    fn describe(&self) -> Result<Description, MoveError> {
        describe(self.vm, self.this_move.epoch)
    }
}

/// Milliseconds of `duration`, rounded up.
fn millis_up(duration: Duration) -> u64 {
    millis(duration + Duration::from_micros(999))
}
