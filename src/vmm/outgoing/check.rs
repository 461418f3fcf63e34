//! `sterna migrate --check`, at the source: asks the target to try all that a move needs, measures the way and how fast the guest
//! dirties its memory, and foretells.

use super::super::dirty::DirtyLog;
use super::super::move_error::MoveError;
use super::super::movement::millis;
use super::super::receive::TargetReport;
use super::super::vm::{Vm, random_id};
use super::peer::Peer;
use super::steps::{CONNECT_PATIENCE, FIXED_GUESS, READY_PATIENCE, machine_message};
use super::way::{probe, transfer_time};
use super::{check_caches, check_msrs, describe, unix_ns};
use crate::control::machine::MachineError;
use crate::control::movement::{CheckReport, Foretold, MigrateOrder};
use crate::records::Records;
use std::sync::Arc;
use std::time::{Duration, Instant};
use sterna_migration::handover::Move;
use sterna_migration::stream::Address;
use sterna_migration::wire::{Purpose, ToSource, ToTarget};
use sterna_migration::{PAGE_BYTES, PageSet};

/// How often it is looked whether a move wants the log.
const LOOK: Duration = Duration::from_millis(20);
/// How long it is watched what the guest dirties.
const WATCH: Duration = Duration::from_secs(1);

/// Tests all that a move as ordered could fail at.
pub fn check(vm: &Vm, order: &MigrateOrder) -> CheckReport {
    let mut report = CheckReport { target: order.to.clone(), ..CheckReport::default() };
    let mut note = |result: Result<(), MoveError>| report.problems.extend(result.err().map(|error| error.line()));
    note(check_caches(vm, order.unsafe_cache));
    note(Records::from_env().try_out(&vm.config.name).map_err(MoveError::host("write a record of the move")));
    if let Err(error) = ask(vm, order, &mut report) {
        report.failure = Some(error.failure());
        report.problems.push(error.line());
    }
    match watch(vm) {
        Ok((present, dirty_rate)) => (report.present, report.dirty_rate) = (present, dirty_rate),
        Err(error) => report.problems.push(error.line()),
    }
    if report.bandwidth > 0 {
        foretell(&mut report, order);
    }
    report
}

/// What the target finds, and what the way carries.
fn ask(vm: &Vm, order: &MigrateOrder, report: &mut CheckReport) -> Result<(), MoveError> {
    let address: Address = order.to.parse()?;
    let this_move = Move { id: random_id(), epoch: vm.identity.epoch.saturating_add(1) };
    let message = machine_message(vm, order, describe(vm, this_move.epoch)?)?;
    let peer = Peer::connect(&address, (Purpose::Check, 0), this_move, CONNECT_PATIENCE, || None)?;
    let asked = unix_ns();
    peer.send(&ToTarget::Machine(message))?;
    let ToSource::Checked(bytes) = peer.receive("what the target finds", READY_PATIENCE, || None)? else {
        return Err(MoveError::Unexpected { peer: "the target", wanted: "what it found" });
    };
    let answered = unix_ns();
    let found: TargetReport =
        serde_json::from_slice(&bytes).map_err(|source| MoveError::Description { done: "read", source })?;
    // The target looked at its clock at some moment in between: what that explains is no difference.
    let there = found.unix_ns;
    let skew_ns = i128::from(there) - i128::from(there.clamp(asked, answered.max(asked)));
    report.clock_skew = i64::try_from(skew_ns / 1_000_000).unwrap_or(i64::MAX);
    report.host = Some(super::printable(found.host.as_bytes()));
    report.program = super::printable(found.program.as_bytes());
    let clean = |texts: Vec<String>| texts.into_iter().map(|text| super::printable(text.as_bytes()));
    report.problems.extend(clean(found.problems));
    report.warnings.extend(clean(found.warnings));
    check_msrs(vm, &found.unknown_msrs)?;
    report.bandwidth = probe(&peer, || None)?;
    // What cannot be built there has been named; what can is to take the devices' state.
    if report.problems.is_empty()
        && let Some(machine) = vm.machine()
    {
        peer.rehearse(&machine.parts().board.save_functions()?, || None)?;
    }
    Ok(())
}

/// Bytes that exist, and bytes a second that are dirtied.
fn watch(vm: &Vm) -> Result<(u64, u64), MoveError> {
    let Some(machine) = vm.machine() else { return Err(MoveError::Stop(MachineError::Ended)) };
    let (vm_fd, manual_protect) = (Arc::clone(&machine.parts().vm), machine.manual_protect);
    drop(machine);
    let (log, existing) = DirtyLog::start(vm_fd, &vm.host.memory, manual_protect)
        .and_then(|(log, existing)| log.forget(&existing).map(|()| (log, existing)))
        .map_err(MoveError::host("switch the dirty log on"))?;
    let began = Instant::now();
    // A move that begins meanwhile needs the log.
    while began.elapsed() < WATCH && !vm.is_moving() {
        std::thread::sleep(LOOK);
    }
    let mut dirty = PageSet::none(existing.ram_pages());
    log.read(&mut dirty).map_err(MoveError::host("read the dirty log"))?;
    let rate = (dirty.count() * PAGE_BYTES) as f64 / began.elapsed().as_secs_f64();
    Ok((existing.count() * PAGE_BYTES, rate as u64))
}

fn foretell(report: &mut CheckReport, order: &MigrateOrder) {
    let CheckReport { present, dirty_rate, bandwidth, .. } = *report;
    let carried = FIXED_GUESS + transfer_time(present, bandwidth);
    report.quick = Some(Foretold { total: millis(carried), downtime: Some(millis(carried)) });
    // Each pass leaves what was dirtied while it went: a geometric series, which ends where the way carries more than the
    // guest dirties.
    let limited = order.limits.max_bandwidth.filter(|limit| *limit > 0).unwrap_or(bandwidth).min(bandwidth);
    let share = dirty_rate as f64 / limited.max(1) as f64;
    let budget = order.limits.max_downtime_us.map_or(FIXED_GUESS, Duration::from_micros);
    report.live = Some(if share < 1.0 {
        let total = transfer_time(present, limited).as_secs_f64() / (1.0 - share);
        let last = FIXED_GUESS + transfer_time((dirty_rate as f64 * budget.as_secs_f64()) as u64, bandwidth);
        let total = Duration::from_secs_f64(total.min(1e9));
        Foretold { total: millis(total), downtime: Some(millis(last.min(budget.max(FIXED_GUESS)))) }
    } else {
        Foretold { total: order.timeout_ms, downtime: None }
    });
}
