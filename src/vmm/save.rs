//! A machine goes to a file: a move whose destination is a later day.
//!
//! The guest stands still from before its state is saved until the file is whole; whatever fails before that lets it go on, and
//! leaves no file. A whole file is the commit point: the guest does not go on here after it.

use super::description::RunSection;
use super::move_error::MoveError;
use super::movement::{Movement, Off, micros, millis};
use super::outgoing::{check_caches, describe, flush_disks};
use super::vm::{Vm, random_id};
use crate::clock::rfc3339;
use crate::control::machine::Ended;
use crate::control::movement::{Downtime, Kind, Limits, MoveStatus, Phase, SaveOrder};
use std::sync::Arc;
use std::time::{Instant, SystemTime};
use sterna_migration::PAGE_BYTES;
use sterna_migration::file::{self, Contents, Hooks, Options, Saved};

/// Threads that write.
const WRITERS: usize = 4;

const HERE: &str = "The guest runs here.";
const STANDS: &str = "The guest stands still here.";

/// The first status of a save.
pub fn begin(vm: &Vm, order: &SaveOrder) -> Arc<Movement> {
    let (id, epoch) = (random_id(), vm.identity.epoch.saturating_add(1));
    let peer = order.file.display().to_string();
    let begun = MoveStatus::begin(id, epoch, Kind::Save, peer, vm.config.memory_bytes);
    let status = MoveStatus { guest: HERE.to_owned(), ..begun };
    Movement::begin(status, Limits::default(), Arc::clone(&vm.events))
}

/// Saves the machine and ends it, or lets it go on.
pub fn run(vm: &Arc<Vm>, movement: &Arc<Movement>, order: &SaveOrder) {
    match save(vm, movement, order) {
        Ok(()) => {
            movement.end(|status| {
                status.phase = Phase::Done;
                status.guest = format!("The guest lies in {}.", order.file.display());
            });
            vm.end(Ended::Saved(order.file.display().to_string()));
        }
        Err(error) => {
            log::warn!("{}", error.line());
            let phase = match &error {
                MoveError::Off(Off::Cancelled) => Phase::Cancelled,
                _ => Phase::Failed,
            };
            movement.end(|status| {
                status.phase = phase;
                status.error = Some(error.line());
                status.failure = Some(error.failure());
                status.guest = match &error {
                    MoveError::Off(Off::Guest(what) | Off::Ended(what)) => format!("It was not saved: {what}."),
                    _ => HERE.to_owned(),
                };
            });
        }
    }
}

fn save(vm: &Arc<Vm>, movement: &Arc<Movement>, order: &SaveOrder) -> Result<(), MoveError> {
    check_caches(vm, order.unsafe_cache)?;
    let status = movement.status();
    let description = describe(vm, status.epoch)?;
    let description = description.encode().map_err(|source| MoveError::Description { done: "written", source })?;
    let msrs = &vm.host.processor()?.msrs;
    let began = Instant::now();
    let stopped = vm.stop_for_move().map_err(MoveError::Stop)?;
    movement.update(|status| {
        status.phase = Phase::Saving;
        status.guest = STANDS.to_owned();
    });
    flush_disks(vm)?;
    let stop_us = micros(began.elapsed());
    let mut sections = stopped.machine().parts().save(msrs)?;
    RunSection::of(vm, stopped.was_paused()).push(&mut sections)?;
    let existing = vm.host.memory.existing().map_err(MoveError::host("ask which memory exists"))?;
    let saved = Saved {
        program: env!("CARGO_PKG_VERSION").to_owned(),
        host: super::description::host_name(),
        time: rfc3339(SystemTime::now()),
        time_unix_ns: super::description::unix_ns(),
        machine: vm.config.name.clone(),
        uuid: vm.identity.uuid,
    };
    let contents = Contents { id: status.id, epoch: status.epoch, saved, description, sections };
    let state_us = micros(began.elapsed()) - stop_us;
    movement.begin_pass(existing.count() * PAGE_BYTES);
    movement.update(|status| {
        status.phase = Phase::Transferring;
        status.ram.present = existing.count() * PAGE_BYTES;
    });
    let progress = |done: u64, all: u64| movement.sent_in_all(done, all);
    let hooks = Hooks { progress: &progress, cancel: movement.is_off() };
    let options =
        Options { threads: WRITERS, compress: order.compress, overwrite: order.overwrite, ..Options::default() };
    let written = file::save(&order.file, &contents, &vm.host.memory.pages(), &existing, &options, hooks);
    let figures = match written {
        // From here on the machine is in the file, and must not be here.
        Ok(figures) => {
            if let Err(off) = movement.commit() {
                std::fs::remove_file(&order.file).map_err(MoveError::host("remove the file again"))?;
                return Err(MoveError::Off(off));
            }
            let _committed = stopped.commit();
            figures
        }
        Err(error) => return Err(movement.off().map_or(MoveError::File(error), MoveError::Off)),
    };
    movement.note(|status| {
        status.ram.duplicate = figures.zero_pages;
        status.downtime = Some(millis(began.elapsed()));
        let pages_us = micros(began.elapsed()).saturating_sub(stop_us + state_us);
        let total_us = micros(began.elapsed());
        status.downtime_parts = Some(Downtime { stop_us, state_us, pages_us, total_us, ..Downtime::default() });
    });
    Ok(())
}
