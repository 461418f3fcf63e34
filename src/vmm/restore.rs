//! A machine comes back from a file.

use super::build;
use super::console;
use super::description::{Description, RunSection};
use super::error::Error;
use super::host::{Host, Locks};
use super::movement::{Movement, millis};
use super::receive::different_disk;
use super::vcpu::Outcome;
use super::vm::Vm;
use crate::clock::rfc3339;
use crate::config::VmConfig;
use crate::control::machine::{Machine, RunOptions};
use crate::control::movement::{Kind, Limits, Map, MoveStatus, Phase};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Instant, SystemTime};
use sterna_devices::legacy::VmGenId;
use sterna_migration::PAGE_BYTES;
use sterna_migration::file::{self, Claim, Form, Hooks, SavedFile};

/// Threads that read.
const READERS: usize = 4;

/// How RAM comes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Load {
    /// The file is mapped: the guest runs at once, and its pages come when they are touched. The file must stay as it is.
    #[default]
    Map,
    /// All of it is read first, and compared with its checksums.
    Whole,
    /// The guest runs at once while its pages are read in the background; the file is free when that is done.
    Background,
}

/// An order to restore.
pub struct RestoreOrder {
    /// Where the file is.
    pub path: PathBuf,
    /// The file.
    pub saved: SavedFile,
    /// What is in it, with names and paths as they are to be here.
    pub description: Description,
    /// Also where it was restored before: as a second copy, with a generation id of its own.
    pub again: bool,
    /// How its RAM comes back.
    pub load: Load,
}

/// Reads what is in `file`, with another name and other paths where they are given.
///
/// # Errors
/// What is no saved machine, or a map that does not fit it.
pub fn open(file: &Path, name: Option<&str>, map: &Map) -> Result<(SavedFile, Description), Error> {
    let opened = SavedFile::open(file).map_err(|source| Error::saved(file, source))?;
    let decoded = Description::decode(&opened.contents().description);
    let mut description = decoded.map_err(|source| Error::Description { path: file.to_owned(), source })?;
    if let Some(problem) = description.inconsistency() {
        return Err(Error::Refused(vec![problem]));
    }
    let problems = description.rehome(name, map);
    problems.none_or((opened, description)).map_err(|problems| Error::Refused(problems.list().to_vec()))
}

/// A file and what its machine needs of this host, opened.
pub struct Restoring {
    order: RestoreOrder,
    claim: Claim,
    host: Host,
}

impl Restoring {
    /// Takes the right to restore, and opens all that the machine needs.
    ///
    /// # Errors
    /// A file that was restored before, and what this host cannot give it.
    pub fn open(mut order: RestoreOrder) -> Result<Self, Error> {
        let claim = order.saved.claim().map_err(|source| Error::saved(&order.path, source))?;
        if let (Some(before), false) = (&claim.restored_before, order.again) {
            return Err(Error::RestoredBefore { path: order.path.clone(), before: before.clone() });
        }
        let Description { config, cpu, disks, .. } = &order.description;
        let host = Host::open(config, Some(cpu), Locks::Now)?;
        if !order.again {
            let marks = config.disks.iter().zip(disks).zip(&host.images);
            let problems: Vec<_> =
                marks.filter_map(|((disk, mark), image)| different_disk(&disk.id, mark, image, false)).collect();
            if !problems.is_empty() {
                return Err(Error::Refused(problems));
            }
        }
        Ok(Self { order, claim, host })
    }

    /// The machine as it will be here.
    pub fn config(&self) -> &VmConfig {
        &self.order.description.config
    }
}

/// Restores the machine; its guest runs when this returns, or stands still where it is to.
pub fn run(restoring: Restoring, options: RunOptions, sender: &Sender<Outcome>) -> Result<Arc<Vm>, Error> {
    let began = Instant::now();
    let RunOptions { paused, events, ready } = options;
    let Restoring { order, claim, host } = restoring;
    let Description { config, identity, .. } = order.description.clone();
    let vm = Vm::new(config, Arc::new(host), identity, Arc::clone(&events), sender.clone());
    let movement = Movement::begin(status(&order), Limits::default(), events);
    vm.expect(Arc::clone(&movement));
    if maps(&order) {
        map_ram(&order, &vm)?;
    }
    let new = build::build(&vm.config, &vm.host, &vm.events)?;
    new.expect(&order.description.cpu, &vm.host, &vm.config)?;
    if !maps(&order) {
        load_ram(&order, &vm)?;
    }
    // The mark takes a disk as long as the rest takes here, and is there before the guest runs. Not before its memory is: to read that
    // may take long, and whoever is killed meanwhile has run nothing.
    let (filled, marked) = beside(|| mark(&claim), || fill(&order, new, &vm, sender))?;
    let (machine, run) = filled.inspect_err(|_| {
        if marked.is_ok()
            && let Err(error) = claim.unmark()
        {
            log::error!("{} stays marked as restored, and its machine has not run: {error}", order.path.display());
        }
    })?;
    let machine = vm.fill(machine);
    let marked = marked.and_then(|()| claim.share());
    if claim.restored_before.is_some() || marked.is_err() {
        // A copy that is not known to be the only one.
        let generation = VmGenId::random().map_err(|source| Error::Host { what: "a generation id", source })?;
        let ram = vm.host.memory.ram();
        let changed = super::machine::lock(&vm.host.vmgenid).set_generation(ram, generation);
        changed.map_err(|source| Error::Host { what: "the generation id", source: std::io::Error::other(source) })?;
        machine.notify_generation();
    }
    let paused = paused || run.paused;
    vm.arrive(paused, run.uptime());
    movement.end(|status| {
        status.phase = Phase::Done;
        status.percent = 100;
        status.downtime = Some(millis(began.elapsed()));
        status.guest = "The guest has started here.".to_owned();
    });
    ready(Arc::clone(&vm) as Arc<dyn Machine>);
    Ok(vm)
}

/// What `work` gives, and what `aside` gives in a thread of its own.
fn beside<A: Send, W>(aside: impl FnOnce() -> A + Send, work: impl FnOnce() -> W) -> Result<(W, A), Error> {
    std::thread::scope(|scope| {
        let aside = std::thread::Builder::new().spawn_scoped(scope, aside);
        let aside = aside.map_err(|source| Error::Host { what: "a thread", source })?;
        let worked = work();
        Ok((worked, aside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
    })
}

/// Notes when and where the machine goes on.
fn mark(claim: &Claim) -> Result<(), file::Error> {
    claim.mark(&format!("on {} at {}", super::description::host_name(), rfc3339(SystemTime::now())))
}

/// Gives the machine its state.
fn fill(
    order: &RestoreOrder,
    new: build::NewMachine,
    vm: &Arc<Vm>,
    sender: &Sender<Outcome>,
) -> Result<(super::machine::Machine, RunSection), Error> {
    let mut sections = order.saved.sections().clone();
    let restored = |source| Error::State { path: order.path.clone(), source };
    let run = RunSection::take(&mut sections).map_err(restored)?;
    let machine = new.park(console(vm), sender.clone())?.restore(sections).map_err(restored)?;
    Ok((machine, run))
}

/// Whether RAM comes from the file as it lies there; what is compressed cannot.
fn maps(order: &RestoreOrder) -> bool {
    order.load == Load::Map && order.saved.form() == Form::InPlace
}

/// Maps the file, before KVM has RAM: it would be told that another mapping takes the place of the first, and some KVMs then
/// look through all pages.
fn map_ram(order: &RestoreOrder, vm: &Vm) -> Result<(), Error> {
    let (file, memory) = (&order.saved, &vm.host.memory);
    file.map(&memory.pages()).map_err(|source| Error::saved(&order.path, source))?;
    memory.note_mapped(file.pages());
    Ok(())
}

fn load_ram(order: &RestoreOrder, vm: &Vm) -> Result<(), Error> {
    let (file, memory) = (&order.saved, &vm.host.memory);
    let saved = |source: file::Error| Error::saved(&order.path, source);
    let failed = |source| Error::Memory { bytes: vm.config.memory_bytes, source };
    match order.load {
        Load::Map | Load::Whole => {
            memory.prefer_huge_pages().map_err(failed)?;
            file.load(&memory.pages(), READERS, Hooks::none()).map_err(saved)
        }
        Load::Background => {
            memory.prefer_huge_pages().map_err(failed)?;
            let failed = |error: &file::Error| log::error!("the guest waits for memory that cannot be read: {error}");
            memory.keep(file.load_lazily(&memory.pages(), READERS, failed).map_err(saved)?);
            memory.note_mapped(file.pages());
            Ok(())
        }
    }
}

fn status(order: &RestoreOrder) -> MoveStatus {
    let (file, config) = (&order.saved, &order.description.config);
    let contents = file.contents();
    let peer = order.path.display().to_string();
    let mut status = MoveStatus::begin(contents.id, contents.epoch, Kind::Restore, peer, config.memory_bytes);
    status.incoming = true;
    status.phase = Phase::Restoring;
    status.ram.present = file.statistics().map_or(0, |statistics| statistics.pages * PAGE_BYTES);
    status.warnings = super::description::missing_for_reboot(config);
    status.guest = "The guest is being restored here.".to_owned();
    status
}
