//! A machine that is on its way to here: what it needs of this host is looked at, opened and built, then it is taken in.

use super::build::{self, NewMachine};
use super::description::{Description, DiskMark, available_bytes, host_name, missing_for_reboot, unix_ns};
use super::error::Error;
use super::host::{Host, Locks};
use super::incoming::{Arrival, Taker};
use super::keeper_link::KeeperLink;
use super::move_error::MoveError;
use super::movement::Movement;
use super::obstacles::everything_wrong;
use super::outgoing;
use super::vcpu::Outcome;
use super::vm::Vm;
use super::{chain, console};
use crate::control::machine::{Ended, Machine, RunOptions};
use crate::control::movement::{Kind, Limits, MoveStatus, RamStatus};
use crate::events::EventBus;
use crate::host_check::missing_capabilities;
use crate::records::Records;
use crate::registry::{Registry, name_problem};
use crate::units::format_size;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;
use sterna_devices::virtio::blk::Image;
use sterna_migration::handover::{Move, TargetState};
use sterna_migration::wire::message::Ready;

/// Clocks of two hosts may differ by so much without a word.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(500);

/// Takes the machine of `arrival` in. The VM can be controlled from when it is built; its guest runs when this returns.
///
/// # Errors
/// The outer: the machine could not be built here. The inner: it was built and has not arrived. The source is told both.
pub fn run(
    arrival: Arrival,
    keeper: KeeperLink,
    options: RunOptions,
    sender: &Sender<Outcome>,
) -> Result<Result<Arc<Vm>, Ended>, Error> {
    match prepare(&arrival, options, sender) {
        Ok(Prepared { vm, parked, movement, ready }) => {
            let taker = Taker::new(&vm, &movement, keeper, arrival, parked, ready);
            Ok(match taker.run() {
                Ok(()) => Ok(vm),
                Err(error) => {
                    vm.remove(&Outcome::Ended(Ended::NotArrived(error.line())));
                    Err(Ended::NotArrived(error.line()))
                }
            })
        }
        Err(error) => {
            arrival.refuse(&chain(&error));
            Err(error)
        }
    }
}

struct Prepared {
    vm: Arc<Vm>,
    parked: build::Parked,
    movement: Arc<Movement>,
    ready: Ready,
}

fn prepare(arrival: &Arrival, options: RunOptions, sender: &Sender<Outcome>) -> Result<Prepared, Error> {
    let RunOptions { events, ready, .. } = options;
    let description = &arrival.description;
    let host = Host::open(&description.config, Some(&description.cpu), Locks::Later)?;
    let problems = misfits(arrival, &host);
    if !problems.is_empty() {
        return Err(Error::Refused(problems));
    }
    let warnings = warnings(description, arrival.heard_unix_ns);
    let vm =
        Vm::new(description.config.clone(), Arc::new(host), description.identity, Arc::clone(&events), sender.clone());
    let new = build::build(&vm.config, &vm.host, &events)?;
    new.expect(&description.cpu, &vm.host, &vm.config)?;
    let unknown_msrs = unknown_msrs(description, &vm.host);
    let memory = &vm.host.memory;
    memory.prefer_huge_pages().map_err(|source| Error::Memory { bytes: vm.config.memory_bytes, source })?;
    let parked = new.park(console(&vm), sender.clone())?;
    let this_move = arrival.this_move();
    let kind = if arrival.is_quick() { Kind::Quick } else { Kind::Live };
    let Move { id, epoch } = this_move;
    let begun =
        MoveStatus::begin(id, epoch, kind, outgoing::printable(description.host.as_bytes()), vm.config.memory_bytes);
    let guest = TargetState::Ready.to_string();
    let status = MoveStatus { incoming: true, warnings: warnings.clone(), guest, ..begun };
    let status = MoveStatus { ram: RamStatus { present: description.present_bytes, ..status.ram }, ..status };
    let movement = Movement::begin(status, Limits::default(), events);
    vm.expect(Arc::clone(&movement));
    ready(Arc::clone(&vm) as Arc<dyn Machine>);
    let ready = Ready { build_ns: arrival.age_ns(), warnings, unknown_msrs };
    Ok(Prepared { vm, parked, movement, ready })
}

/// Why the machine does not fit what this host has for it.
fn misfits(arrival: &Arrival, host: &Host) -> Vec<String> {
    let description = &arrival.description;
    let mut problems = missing_capabilities(&host.kvm);
    if host.memory.pages().layout() != arrival.message.layout {
        problems.push("its RAM lies at other addresses than this program would put it".to_owned());
    }
    if let Some(free) = available_bytes().filter(|free| *free < description.present_bytes) {
        let (needed, free) = (format_size(description.present_bytes), format_size(free));
        problems.push(format!("it has {needed} of memory in use, and this host has {free} free"));
    }
    if let Err(error) = Records::from_env().try_out(&description.config.name) {
        problems.push(format!("no record of the move can be written: {error}"));
    }
    for ((disk, mark), image) in description.config.disks.iter().zip(&description.disks).zip(&host.images) {
        problems.extend(different_disk(&disk.id, mark, image, true));
    }
    problems
}

/// MSRs of the machine's state that are not here, once a machine was built on `host`.
fn unknown_msrs(description: &Description, host: &Host) -> Vec<u32> {
    host.processor().map(|here| here.msrs.lacks(&description.state_msrs)).unwrap_or_default()
}

/// Builds the machine: what KVM or a device refuses shows.
fn try_to_build(description: &Description, host: &Host) -> Result<NewMachine, Error> {
    let events = Arc::new(EventBus::new(&description.config.name));
    let new = build::build(&description.config, host, &events)?;
    new.expect(&description.cpu, host, &description.config)?;
    Ok(new)
}

/// What a target finds when it tries all that a move needs.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetReport {
    /// Its name.
    pub host: String,
    /// Version of its program.
    pub program: String,
    /// Its clock, nanoseconds since 1970.
    pub unix_ns: u64,
    /// What it would refuse the machine for.
    pub problems: Vec<String>,
    /// What a person should know.
    pub warnings: Vec<String>,
    /// MSRs of the machine's state that it does not have.
    #[serde(default)]
    pub unknown_msrs: Vec<u32>,
}

/// Tries all that the machine of `arrival` needs here and tells the source; then tries its devices' state, and helps to measure the way.
///
/// # Errors
/// The connection's.
pub fn answer_check(arrival: &Arrival, registry: &Registry) -> Result<(), MoveError> {
    let description = &arrival.description;
    let config = &description.config;
    let mut problems = config.validate_arrival().list().to_vec();
    let (mut built, mut unknown) = (None, Vec::new());
    let is_sound = problems.is_empty();
    if !is_sound {
        // What is missing hides nothing else that is.
        problems = everything_wrong(config, false, Locks::Later).list().to_vec();
    }
    if name_problem(&config.name).is_none() {
        problems.extend(registry.claim(&config.name).err().map(|error| chain(&error)));
    }
    if is_sound {
        match Host::open(config, Some(&description.cpu), Locks::Later) {
            Ok(host) => {
                problems.extend(misfits(arrival, &host));
                match try_to_build(description, &host) {
                    Ok(new) => built = Some(new),
                    Err(error) => problems.push(chain(&error)),
                }
                unknown = unknown_msrs(description, &host);
            }
            Err(error) => problems.push(chain(&error)),
        }
    }
    let report = TargetReport {
        host: host_name(),
        program: env!("CARGO_PKG_VERSION").to_owned(),
        unix_ns: unix_ns(),
        problems,
        warnings: warnings(description, arrival.heard_unix_ns),
        unknown_msrs: unknown,
    };
    arrival.answer_check(&report, built.as_ref())
}

/// Why `image` is not the disk that `mark` was made of, or `None`. A file that the source has locked (`held`) shows so by its
/// lock; what carries no lock between hosts, by its contents.
pub fn different_disk(id: &str, mark: &DiskMark, image: &Image, held: bool) -> Option<String> {
    let path = image.path().display();
    if image.size_bytes() != mark.size_bytes {
        let (here, there) = (format_size(image.size_bytes()), format_size(mark.size_bytes));
        return Some(format!("{id}: {path} is not the same disk: it has {here} here and {there} at the source"));
    }
    if !mark.readonly && !mark.block_device && held {
        return match image.is_locked_elsewhere() {
            Ok(true) => None,
            Ok(false) => Some(format!(
                "{id}: {path} is not the same disk, or lies on a filesystem whose locks do not hold between hosts: the \
                 source holds its lock, and here it is free; share it over NFSv4 or a cluster filesystem, or name the \
                 right path with --map {id}=PATH"
            )),
            Err(error) => Some(format!("{id}: the lock of {path} cannot be looked at: {error}")),
        };
    }
    let same = |sample: &[u64]| {
        let equal = sample.iter().zip(&mark.sample).filter(|(here, there)| here == there).count();
        // The guest may be writing to a block device meanwhile, to a few places of all.
        let enough = if held && !mark.readonly { sample.len() / 2 + 1 } else { sample.len() };
        sample.len() == mark.sample.len() && equal >= enough
    };
    match image.sample() {
        Ok(sample) if same(&sample) => None,
        Ok(_) => Some(format!(
            "{id}: {path} has other contents here than at the source; name the right path with --map {id}=PATH"
        )),
        Err(error) => Some(format!("{id}: {path} cannot be read: {error}")),
    }
}

/// What a person should know and nothing is refused for.
fn warnings(description: &Description, heard_unix_ns: u64) -> Vec<String> {
    let mut warnings = missing_for_reboot(&description.config);
    for (disk, mark) in description.config.disks.iter().zip(&description.disks) {
        if mark.block_device && !mark.readonly {
            let id = &disk.id;
            warnings.push(format!(
                "{id} is a block device, which carries no lock between hosts: only the record of the move says who may write it"
            ));
        }
    }
    let skew = Duration::from_nanos(heard_unix_ns.abs_diff(description.written_unix_ns));
    if skew > CLOCK_TOLERANCE {
        warnings.push(format!(
            "the clocks of {} and this host differ by {:.1} s: the guest's wall clock will jump by as much",
            description.host,
            skew.as_secs_f64()
        ));
    }
    warnings
}
