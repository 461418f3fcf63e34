//! `sterna migrate`, `save` and `migration`: a VM leaves this host.

use super::{Outcome, Output, progress};
use crate::cli::{MigrateArgs, MigrationCommand, Mode, ResolveArgs, SaveArgs, SetArgs};
use crate::control::client::{Client, Error as ClientError, PATIENCE};
use crate::control::movement::{Limits, Map, MigrateOrder, Resolution, SaveOrder};
use crate::control::protocol::Request;
use crate::error::Error;
use crate::records::Records;
use crate::registry::Registry;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;
use sterna_migration::stream::Address;

/// Moves a VM to another host.
pub fn migrate(registry: &Registry, args: MigrateArgs, output: Output) -> Result<(), Error> {
    let MigrateArgs { name, target, mode, max_downtime, max_bandwidth, connections, timeout, .. } = args;
    let order = MigrateOrder {
        to: resolve_host(target)?.to_string(),
        quick: mode == Mode::Quick,
        limits: Limits { max_downtime_us: Some(micros(max_downtime)), max_bandwidth },
        connections,
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
        on_timeout: args.on_timeout,
        map: join(args.map),
        name: args.rename,
        verify: args.verify,
        unsafe_cache: args.unsafe_cache,
    };
    if args.check {
        return super::check::check(registry, &name, order, output);
    }
    let request = Request::Migrate(Box::new(order));
    if args.detach {
        Client::connect(registry, &name, PATIENCE)?.change(request)?;
        let next = format!("{name} is moving; sterna migration watch {name}\n");
        return output.result(&Outcome { name: &name, result: "moving" }, |_| next);
    }
    progress::follow(registry, &name, request, output)
}

/// `target` with an address instead of a host's name: the VM's process is confined and looks up none.
fn resolve_host(target: Address) -> Result<Address, Error> {
    let Address::Tcp { host, port } = &target else { return Ok(target) };
    // `localhost` and many a host has addresses of both kinds, and a receiver that listens on one listens on IPv4.
    let found = (host.as_str(), *port).to_socket_addrs();
    match found.map(|addresses| addresses.min_by_key(SocketAddr::is_ipv6)) {
        Ok(Some(address)) => Ok(Address::Tcp { host: address.ip().to_string(), port: address.port() }),
        Ok(None) => Err(Error::UnknownHost { host: host.clone(), source: std::io::ErrorKind::NotFound.into() }),
        Err(source) => Err(Error::UnknownHost { host: host.clone(), source }),
    }
}

/// Saves a VM to a file.
pub fn save(registry: &Registry, args: SaveArgs, output: Output) -> Result<(), Error> {
    let SaveArgs { name, file, overwrite, compress, unsafe_cache } = args;
    // The VM's process has another current directory.
    let file = std::path::absolute(&file).map_err(|source| Error::File { attempt: "find", path: file, source })?;
    let request = Request::Save(SaveOrder { file, overwrite, compress, unsafe_cache });
    progress::follow(registry, &name, request, output)
}

/// Looks at, changes or ends a move.
pub fn migration(registry: &Registry, command: MigrationCommand, output: Output) -> Result<(), Error> {
    match command {
        MigrationCommand::Status(vm) => status(registry, &vm.name, output),
        MigrationCommand::Watch(vm) => progress::attach(registry, &vm.name, output),
        MigrationCommand::Cancel(vm) => {
            let status = progress::end(registry, &vm.name, Request::MigrationCancel)?;
            let name = vm.name.as_str();
            if status.leaves() {
                return Err(Error::MovedBefore { name: vm.name, status: Box::new(status) });
            }
            output.result(&Outcome { name, result: "cancelled" }, |_| {
                format!("the move of {name} is called off\n{}\n", status.guest)
            })
        }
        MigrationCommand::Set(args) => set(registry, &args, output),
        MigrationCommand::Resolve(args) => resolve(registry, &args, output),
    }
}

fn status(registry: &Registry, name: &str, output: Output) -> Result<(), Error> {
    match progress::status(registry, name) {
        Ok(Some(status)) => output.result(&status, |status| {
            if status.phase == crate::control::movement::Phase::Done {
                return progress::summary(name, status);
            }
            let mut text =
                format!("{} to {}: {}\n{}\n", status.kind, status.peer, progress::line(status), status.guest);
            if let Some(error) = &status.error {
                text += &format!("{error}\n");
            }
            text
        }),
        Ok(None) => Err(Error::NotMoving { name: name.to_owned() }),
        Err(error) => recorded(name, error, output),
    }
}

/// What the record on disk says of a VM that has no process here.
fn recorded(name: &str, error: Error, output: Output) -> Result<(), Error> {
    let gone = matches!(error, Error::Client(ClientError::NoSuchVm { .. } | ClientError::Gone { .. }));
    let record = if gone { Records::from_env().read(name).ok().flatten() } else { None };
    let Some(record) = record else { return Err(error) };
    let found = record.without_process();
    output.result(&found, |found| format!("{}\n{}\n", found.truth, found.next))
}

fn set(registry: &Registry, args: &SetArgs, output: Output) -> Result<(), Error> {
    let limits = Limits { max_downtime_us: args.max_downtime.map(micros), max_bandwidth: args.max_bandwidth };
    Client::connect(registry, &args.name, PATIENCE)?.change(Request::MigrationSet(limits))?;
    let name = args.name.as_str();
    output.result(&Outcome { name, result: "set" }, |_| format!("the limits of the move of {name} are changed\n"))
}

fn resolve(registry: &Registry, args: &ResolveArgs, output: Output) -> Result<(), Error> {
    let name = args.name.as_str();
    let resolution = if args.here { Resolution::Here } else { Resolution::There };
    let words = match progress::end(registry, name, Request::MigrationResolve(resolution)) {
        Ok(status) => status.guest,
        // Without a process there is only the record to be settled.
        Err(Error::Client(error @ (ClientError::NoSuchVm { .. } | ClientError::Gone { .. }))) => {
            settle_record(&Records::from_env(), name, resolution)?.ok_or(error)?
        }
        Err(error) => return Err(error),
    };
    output.result(&Outcome { name, result: "resolved" }, |_| format!("{words}\n"))
}

/// Settles the record of a machine that has no process here, on a person's word; what was done, or nothing where there is none.
fn settle_record(records: &Records, name: &str, resolution: Resolution) -> Result<Option<String>, Error> {
    let path = || records.path(name);
    match (records.read(name), resolution) {
        (Ok(None), _) => Ok(None),
        (Ok(Some(found)), Resolution::There) => {
            let words = format!("The record says now that {name} moved to {}.", found.peer);
            let written = records.settle_there(found);
            written.map_err(|source| Error::File { attempt: "write the record", path: path(), source })?;
            Ok(Some(words))
        }
        (Err(source), Resolution::There) => {
            Err(Error::UnreadableRecord { name: name.to_owned(), path: path(), source })
        }
        // One that cannot be read, too: a person knows better.
        (Ok(Some(_)) | Err(_), Resolution::Here) => {
            let removed = records.remove(name);
            removed.map_err(|source| Error::File { attempt: "remove the record", path: path(), source })?;
            Ok(Some(format!("The record of its move is removed: {name} may be started here.")))
        }
    }
}

/// All of several `--map`.
pub fn join(maps: Vec<Map>) -> Map {
    maps.into_iter().flatten().collect()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sterna_migration::handover::{Phase, Record};

    #[test]
    fn a_record_is_kept_as_moved_for_there_and_removed_for_here() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::at(dir.path().to_owned());
        let settle = |resolution| settle_record(&records, "web", resolution).unwrap();
        assert_eq!(settle(Resolution::There), None);
        let record = Record {
            move_id: uuid::Uuid::from_u128(1),
            epoch: 2,
            vm: "web".into(),
            peer: "tcp:b:7300".into(),
            phase: Phase::OnItsWay,
            time: "t".into(),
            disks: vec![],
        };
        records.write(&record).unwrap();
        assert!(settle(Resolution::There).unwrap().ends_with("moved to tcp:b:7300."));
        assert_eq!(records.read("web").unwrap().unwrap().phase, Phase::Moved);
        assert!(settle(Resolution::Here).is_some());
        assert_eq!(records.read("web").unwrap(), None);
        std::fs::write(records.path("web"), "{").unwrap();
        assert!(matches!(settle_record(&records, "web", Resolution::There), Err(Error::UnreadableRecord { .. })));
        assert!(settle(Resolution::Here).is_some());
    }

    #[test]
    fn a_name_with_both_kinds_of_address_is_reached_by_ipv4() {
        let found = resolve_host("tcp:localhost:7300".parse().unwrap()).unwrap();
        assert_eq!(found.to_string(), "tcp:127.0.0.1:7300");
    }
}
