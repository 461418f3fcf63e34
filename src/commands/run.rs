//! `sterna run`: from the command line to a guest that has ended.

use super::signals::StopSignals;
use super::{Output, detach};
use crate::cli::{MachineArgs, RunArgs};
use crate::config::{Draft, Problems, SerialConfig, VmConfig};
use crate::control::machine::{Ended, Machine, RunOptions};
use crate::control::server::{Server, Subject};
use crate::error::Error;
use crate::events::{Event, EventBus};
use crate::registry::{self, Claim, Registry};
use crate::vmm;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// All that a VM's process is told.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Orders {
    /// The machine.
    pub config: VmConfig,
    /// Stand still before the first instruction.
    pub paused: bool,
    /// How long after a SIGTERM it is said that the guest has not reacted.
    pub stop_timeout: Duration,
}

/// Runs a VM here, or leaves it behind.
pub fn run(registry: &Registry, args: RunArgs, verbose: u8, output: Output) -> Result<(), Error> {
    let RunArgs { machine, config, detach, paused, stop_timeout } = args;
    let mut problems = Problems::default();
    let config = describe(machine, config.as_deref(), detach, registry, &mut problems);
    // First of all: the directory that the sockets are to be in is made with it.
    let claim = registry.claim(&config.name);
    problems.append(config.validate());
    if detach && config.serial == SerialConfig::Stdio {
        problems.add("serial: stdio is not there with --detach; choose null, file=PATH or socket=PATH");
    }
    let claim = match claim {
        Err(registry::Error::BadName(_)) => None, // which `validate` has found as well
        Err(error) if !problems.list().is_empty() => {
            problems.add(error.to_string());
            None
        }
        claim => Some(claim?),
    };
    let orders = problems.none_or(Orders { config, paused, stop_timeout })?;
    match claim {
        Some(claim) if !detach => execute(claim, orders, || Ok(())),
        // The process that is to be the VM claims the name for itself.
        claim => {
            drop(claim);
            detach::start(registry, &orders, verbose, output)
        }
    }
}

/// The machine that the command line and the file describe.
fn describe(
    args: MachineArgs,
    file: Option<&Path>,
    detach: bool,
    registry: &Registry,
    problems: &mut Problems,
) -> VmConfig {
    let MachineArgs { name, kernel, initrd, cmdline, memory, cpus, disk, net, vsock, serial } = args;
    let flags = Draft { name, kernel, initrd, cmdline, memory, cpus, serial, ..Draft::default() };
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
    draft.build(default_serial, problems)
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
    let Orders { config, paused, stop_timeout } = orders;
    let name = config.name.clone();
    let events = Arc::new(EventBus::new(&name));
    let signals = StopSignals::watch(&name, stop_timeout)
        .map_err(|source| Error::Process { attempt: "watch for signals", source })?;
    let service = Service::default();
    let ready = {
        let (service, events, config) = (Arc::clone(&service), Arc::clone(&events), config.clone());
        let socket = claim.socket();
        Box::new(move |machine: Arc<dyn Machine>| {
            signals.attach(Arc::clone(&machine));
            let subject = Subject { config, machine: Arc::clone(&machine), events };
            let server = Server::start(&socket, subject)
                .map_err(|source| Error::File { attempt: "make the control socket", path: socket, source })
                .and_then(|server| on_running().map(|()| server));
            if server.is_err() {
                machine.kill();
            }
            *service.lock().unwrap_or_else(PoisonError::into_inner) = Some(server);
        })
    };
    let result = vmm::run(&config, RunOptions { paused, events: Arc::clone(&events), ready });
    // The name is free before anybody is told of the end, so that it can be used at once.
    drop(claim);
    let ended = result.map_err(|source| Error::Start { name: name.clone(), source })?;
    events.publish(Event::Ended(ended.clone()));
    events.close();
    let service = service.lock().unwrap_or_else(PoisonError::into_inner).take();
    drop(service.transpose()?);
    log::info!("{ended}");
    match ended {
        Ended::PoweredOff | Ended::Killed => Ok(()),
        Ended::GuestPanic | Ended::TripleFault | Ended::InternalError(_) => Err(Error::Ended { name, ended }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

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
