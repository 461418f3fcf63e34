//! `sterna run`: from the command line to a guest that has ended.

use super::signals::Caught;
use super::{Output, confine, detach};
use crate::cli::{MachineArgs, RunArgs};
use crate::config::{Draft, Problems, SerialConfig, VmConfig};
use crate::control::machine::{Ended, Machine, RunOptions};
use crate::control::server::{Server, Subject};
use crate::error::Error;
use crate::events::{Event, EventBus};
use crate::records::Records;
use crate::registry::{self, Claim, Registry};
use crate::vmm::{self, RestoreOrder, Start};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, absolute};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use sterna_migration::handover::Phase;

/// All that a VM's process is told.
pub struct Orders {
    /// Where it comes from.
    pub source: Source,
    /// Stand still before the first instruction.
    pub paused: bool,
    /// How long after a SIGTERM it is said that the guest has not reacted.
    pub stop_timeout: Duration,
}

/// Where a VM comes from.
pub enum Source {
    /// It boots.
    Boot(Box<VmConfig>),
    /// It goes on from a file.
    Restore(Box<RestoreOrder>),
}

impl Orders {
    /// The machine.
    pub fn config(&self) -> &VmConfig {
        self.source.config()
    }
}

impl Source {
    fn config(&self) -> &VmConfig {
        match self {
            Source::Boot(config) => config,
            Source::Restore(order) => &order.description.config,
        }
    }
}

/// Runs a VM here, or leaves it behind.
pub fn run(registry: &Registry, args: RunArgs, verbose: u8, output: Output) -> Result<(), Error> {
    let RunArgs { machine, config, detach, paused, stop_timeout } = args;
    let mut problems = Problems::default();
    let config = describe(machine, config.as_deref(), detach, registry, &mut problems);
    // First of all: the directory that the sockets are to be in is made with it.
    let claim = registry.claim(&config.name);
    let mut wrong = config.validate();
    // A start that comes to nothing anyway tries what it would have opened, unless a VM of that name has just that.
    let is_refused = !problems.list().is_empty() || !wrong.list().is_empty();
    if is_refused && !matches!(claim, Err(registry::Error::InUse { .. })) {
        wrong = vmm::everything_wrong(&config, true, vmm::Locks::Now);
    }
    problems.append(wrong);
    match &claim {
        Err(registry::Error::BadName(_)) => {} // which `validate` has found as well
        Err(error) if !problems.list().is_empty() => problems.add(error.to_string()),
        _ => {}
    }
    problems.none_or(())?;
    let claim = claim?;
    let orders = Orders { source: Source::Boot(Box::new(config)), paused, stop_timeout };
    if detach { detach::start(registry, claim, orders, verbose, output) } else { execute(claim, orders, || Ok(())) }
}

/// The machine that the command line and the file describe.
fn describe(
    args: MachineArgs,
    file: Option<&Path>,
    detach: bool,
    registry: &Registry,
    problems: &mut Problems,
) -> VmConfig {
    let MachineArgs { name, kernel, initrd, cmdline, memory, cpus, cpu, disk, net, vsock, serial } = args;
    let flags = Draft { name, kernel, initrd, cmdline, memory, cpus, cpu, serial, ..Draft::default() };
    let mut draft = flags.with_devices(&disk, &net, vsock.as_deref(), problems);
    if let Some(path) = file {
        match std::fs::read_to_string(path) {
            Ok(text) => draft = draft.or(Draft::from_toml(&path.display().to_string(), &text, problems)),
            Err(error) => problems.add(format!("config {}: {error}", path.display())),
        }
    }
    let default_serial = match &draft.name {
        Some(name) if detach => SerialConfig::Socket(registry.console(name)),
        None if detach => SerialConfig::Null,
        _ => SerialConfig::Stdio,
    };
    let config = draft.build(default_serial, problems);
    if detach && config.serial == SerialConfig::Stdio {
        problems.add("serial: stdio is not there with --detach; choose null, file=PATH or socket=PATH");
    }
    config
}

/// What `ready` leaves for the thread that runs the machine: the server, or why there is none.
type Service = Arc<Mutex<Option<Result<Server, Error>>>>;

/// Runs the VM until its guest has ended. `on_running` is called when the vCPUs run and the VM can be controlled; its
/// failure ends the VM.
pub fn execute(
    claim: Claim,
    orders: Orders,
    on_running: impl FnOnce() -> Result<(), Error> + Send + 'static,
) -> Result<(), Error> {
    let name = orders.config().name.clone();
    let Orders { source, paused, stop_timeout } = orders;
    let signals = catch()?;
    check_record(&Records::from_env(), source.config())?;
    let start = match source {
        Source::Boot(config) => Start::boot(*config),
        Source::Restore(order) => Start::restore(*order),
    };
    let start = start.map_err(|source| Error::Start { name, source })?;
    // After the owner's disks and taps are open, so that it can be told who is in their way; before threads, which would stay
    // outside.
    confine::enter(start.config(), claim.dir())?;
    carry_out(claim, start, signals, paused, stop_timeout, on_running)
}

/// Refuses to start a machine that may run elsewhere where no lock would keep the two apart: one whose process ended while it
/// was on its way, and one that has moved away and has a disk that carries no locks. A record that cannot be read may be of either.
fn check_record(records: &Records, config: &VmConfig) -> Result<(), Error> {
    let name = &config.name;
    let unreadable = |source| Error::UnreadableRecord { name: name.clone(), path: records.path(name), source };
    let Some(record) = records.read(name).map_err(unreadable)? else { return Ok(()) };
    let written = config.disks.iter().filter(|disk| !disk.readonly).map(|disk| disk.path.as_path());
    let mut shared = written.filter(|path| record.disks.iter().any(|recorded| same_disk(path, Path::new(recorded))));
    let unlocked = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    let stands_against = match record.phase {
        // Without disks of its own nothing tells it from another machine of that name.
        Phase::OnItsWay => record.disks.is_empty() || shared.next().is_some(),
        Phase::Moved => shared.any(unlocked),
        Phase::Arrived => false,
    };
    if stands_against {
        return Err(Error::Recorded { name: name.clone(), found: Box::new(record.without_process()) });
    }
    Ok(())
}

/// Whether two paths lead to one disk, by whatever links; a block device is the same under every one of its nodes.
fn same_disk(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        let device = found.file_type().is_block_device();
        Some(if device { (true, found.rdev(), 0) } else { (false, found.dev(), found.ino()) })
    };
    match (identity(one), identity(other)) {
        (Some(one), Some(other)) => one == other,
        // Not there, or not to be looked at: only the names are left.
        _ => absolute(one).ok() == absolute(other).ok(),
    }
}

/// From here on signals are waiting for whom they concern.
pub fn catch() -> Result<Caught, Error> {
    Caught::catch().map_err(|source| Error::Process { attempt: "watch for signals", source })
}

/// As [`execute`], for a machine whose needs are opened.
pub fn carry_out(
    claim: Claim,
    start: Start,
    signals: Caught,
    paused: bool,
    stop_timeout: Duration,
    on_running: impl FnOnce() -> Result<(), Error> + Send + 'static,
) -> Result<(), Error> {
    let config = start.config().clone();
    let name = config.name.clone();
    let unwatched = |source| Error::Process { attempt: "watch for signals", source };
    let unstarted = |source| Error::Start { name: name.clone(), source };
    let events = Arc::new(EventBus::new(&name));
    let service = Service::default();
    let ready = {
        let (service, events, name) = (Arc::clone(&service), Arc::clone(&events), name.clone());
        let socket = claim.socket();
        Box::new(move |machine: Arc<dyn Machine>| {
            let subject = Subject { config, machine: Arc::clone(&machine), events };
            let server = Server::start(&socket, subject)
                .map_err(|source| Error::File { attempt: "make the control socket", path: socket, source })
                .and_then(|server| signals.watch(&machine, &name, stop_timeout).map_err(unwatched).map(|()| server))
                .and_then(|server| on_running().map(|()| server));
            if server.is_err() {
                machine.kill();
            }
            *service.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        })
    };
    let result = vmm::run(start, RunOptions { paused, events: Arc::clone(&events), ready });
    // The name is free before anybody is told of the end, so that it can be used at once.
    drop(claim);
    let ended = result.map_err(unstarted)?;
    events.publish(Event::Ended(ended.clone()));
    events.close();
    let service = service.lock().unwrap_or_else(PoisonError::into_inner).take();
    drop(service.transpose()?);
    match ended {
        // Whoever watches this process end wants to know where its guest is.
        Ended::Moved(_) | Ended::Saved(_) => eprintln!("{name}: {ended}"),
        _ => log::info!("{ended}"),
    }
    match ended {
        Ended::PoweredOff | Ended::Killed | Ended::Moved(_) | Ended::Saved(_) => Ok(()),
        Ended::NotArrived(_) => Err(Error::Ended { name, ended }),
        Ended::GuestPanic | Ended::TripleFault | Ended::InternalError(_) => Err(Error::Ended { name, ended }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use sterna_migration::handover::Move;

    fn run_line(line: &str) -> Result<(), Error> {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().join("not/there/yet"));
        let words = ["sterna", "run"].into_iter().chain(line.split_whitespace());
        let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else { panic!("not run") };
        run(&registry, *args, 0, Output { json: false })
    }

    fn problems(line: &str) -> Vec<String> {
        match run_line(line).unwrap_err() {
            Error::Config(problems) => problems.list().to_vec(),
            other => panic!("expected problems, got {other}"),
        }
    }

    #[test]
    fn everything_wrong_with_a_command_line_is_told_at_once() {
        let list =
            problems("--name a/b --memory 1X --cpus 0 --disk path=/nowhere,foo=1 --detach --serial stdio").join("\n");
        for part in [
            "memory: '1X' is not a size",
            "disk 0: unknown key `foo`",
            "name 'a/b' must not contain a slash",
            "no kernel is given",
            "cpus is 0",
            "disk0: /nowhere: No such file",
            "stdio is not there with --detach",
        ] {
            assert!(list.contains(part), "{part} is missing in:\n{list}");
        }
    }

    fn recorded(records: &Records, disk: &Path, phase: Phase) {
        let this_move = Move { id: uuid::Uuid::from_u128(1), epoch: 2 };
        records.write(&crate::records::record(this_move, &machine(disk), "tcp:b:7300", phase)).unwrap();
    }

    fn machine(disk: &Path) -> VmConfig {
        machine_with(&[format!("path={}", disk.display())])
    }

    fn machine_with(disks: &[String]) -> VmConfig {
        let draft = Draft { name: Some("web".into()), ..Draft::default() };
        let mut problems = Problems::default();
        draft.with_devices(disks, &[], None, &mut problems).build(SerialConfig::Null, &mut problems)
    }

    #[test]
    fn a_record_stands_against_the_same_disk_under_another_path() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path().join("records"));
        let [disk, link, other] = ["disk", "link", "other"].map(|name| dir.path().join(name));
        std::fs::write(&disk, "x").unwrap();
        std::fs::write(&other, "x").unwrap();
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        recorded(&records, &disk, Phase::OnItsWay);
        assert!(matches!(check_record(&records, &machine(&link)), Err(Error::Recorded { .. })));
        assert!(check_record(&records, &machine(&other)).is_ok());
        // A file carries locks, which say more than the record does.
        recorded(&records, &disk, Phase::Moved);
        assert!(check_record(&records, &machine(&disk)).is_ok());
    }

    #[test]
    fn a_record_of_a_machine_without_disks_stands_against_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (records, without) = (Records::at(dir.path().to_owned()), machine_with(&["path=/rom,readonly=on".into()]));
        let recorded = |phase| {
            let this_move = Move { id: uuid::Uuid::from_u128(1), epoch: 2 };
            records.write(&crate::records::record(this_move, &without, "tcp:b:7300", phase)).unwrap();
            check_record(&records, &without)
        };
        assert!(matches!(recorded(Phase::OnItsWay), Err(Error::Recorded { .. })));
        assert!(recorded(Phase::Moved).is_ok());
    }

    #[test]
    fn a_record_that_cannot_be_read_stands_against_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path().to_owned());
        std::fs::write(records.path("web"), "{").unwrap();
        let error = check_record(&records, &machine(Path::new("/nowhere"))).unwrap_err();
        let report = error.report();
        assert!(report.contains("web.move") && report.contains("resolve web --here"), "{report}");
        assert_eq!(error.exit_code(), crate::exit::REFUSED);
    }

    #[test]
    fn a_missing_name_and_a_missing_file_are_problems() {
        let list = problems("--kernel /proc/version --config /nowhere.toml").join("\n");
        assert!(list.contains("no name is given; add --name NAME"), "{list}");
        assert!(list.contains("config /nowhere.toml: No such file"), "{list}");
    }

    #[test]
    fn a_name_in_use_is_refused_with_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().to_owned());
        let _claim = registry.claim("web").unwrap();
        let words = ["sterna", "run", "--name", "web", "--kernel", "/proc/version"];
        let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else { panic!("not run") };
        let report = run(&registry, *args, 0, Output { json: false }).unwrap_err().report();
        assert!(report.contains(&format!("'web' is in use by process {}", std::process::id())), "{report}");
    }
}
