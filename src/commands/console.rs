//! `sterna console`: this terminal and a VM's serial port.

use crate::config::SerialConfig;
use crate::console::client::{Left, attach};
use crate::control::client::{Client, PATIENCE};
use crate::error::Error;
use crate::registry::Registry;
use std::os::unix::net::UnixStream;

/// Joins the serial port of `name` until the person leaves or the VM ends.
pub fn console(registry: &Registry, name: &str) -> Result<(), Error> {
    let name = name.to_owned();
    let path = match Client::connect(registry, &name, PATIENCE)?.show(PATIENCE)?.config.serial {
        SerialConfig::Socket(path) => path,
        serial @ (SerialConfig::Stdio | SerialConfig::Null | SerialConfig::File(_)) => {
            return Err(Error::NoConsole { name, serial });
        }
    };
    let left = UnixStream::connect(path).and_then(attach);
    match left.map_err(|source| Error::Console { name: name.clone(), source })? {
        Left::ByUser => eprintln!("\nleft the console of {name}, which runs on"),
        Left::ByMachine => eprintln!("\nthe console of {name} was closed at the other end"),
    }
    Ok(())
}
