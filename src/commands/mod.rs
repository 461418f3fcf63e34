//! What each subcommand does: one function each, one file for a noun.

mod balloon;
mod check;
mod confine;
mod console;
mod detach;
mod events;
mod fork;
mod host;
mod inspect;
mod list;
mod migrate;
mod power;
mod progress;
mod receive;
mod restore;
mod run;
mod signals;

use crate::cli::{Cli, Command, HostCommand};
use crate::error::Error;
use crate::registry::Registry;
use serde::Serialize;
use std::io::{Write, stdout};

/// Carries out `cli`'s command.
///
/// # Errors
/// With all that a person is told about it.
pub fn run(cli: Cli) -> Result<(), Error> {
    let registry = Registry::from_env()?;
    let output = Output { json: cli.json };
    match cli.command {
        Command::Run(args) => run::run(&registry, *args, cli.verbose, output),
        Command::Save(args) => migrate::save(&registry, args, output),
        Command::Restore(args) => restore::restore(&registry, args, cli.verbose, output),
        Command::Inspect(args) => inspect::inspect(&args, output),
        Command::Receive(args) => receive::receive(&registry, &args, cli.verbose, output),
        Command::Received(args) => receive::serve(&registry, &args),
        Command::Migrate(args) => migrate::migrate(&registry, *args, output),
        Command::Migration(command) => migrate::migration(&registry, command, output),
        Command::List => list::list(&registry, output),
        Command::Show(vm) => list::show(&registry, &vm.name, output),
        Command::Pause(vm) => power::pause(&registry, &vm.name, output),
        Command::Resume(vm) => power::resume(&registry, &vm.name, output),
        Command::Stop(args) => power::stop(&registry, &args, output),
        Command::Console(vm) => console::console(&registry, &vm.name),
        Command::Events(args) => events::events(&registry, args.name.as_deref()),
        Command::Host(HostCommand::Check) => host::check(output),
        Command::Balloon(args) => balloon::balloon(&registry, &args, output),
    }
}

/// Where results go: standard output, for people or for programs.
#[derive(Clone, Copy, Debug)]
struct Output {
    json: bool,
}

impl Output {
    /// Prints `value` as JSON, or what `text` says of it.
    fn result<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<(), Error> {
        if self.json {
            let mut line = serde_json::to_string_pretty(value).map_err(|error| Error::Output(error.into()))?;
            line.push('\n');
            print(&line)
        } else {
            print(&text(value))
        }
    }
}

impl Output {
    /// Prints `value` as one line of JSON, or what `text` says of it.
    fn line<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<(), Error> {
        if self.json {
            let line = serde_json::to_string(value).map_err(|error| Error::Output(error.into()))?;
            print(&(line + "\n"))
        } else {
            print(&text(value))
        }
    }
}

/// Writes all of `text` to standard output at once.
fn print(text: &str) -> Result<(), Error> {
    let mut stdout = stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Error::Output)
}

/// What a command did to a VM, for programs.
#[derive(Serialize)]
struct Outcome<'a> {
    /// The VM.
    name: &'a str,
    /// What came of it, in one word.
    result: &'a str,
}
