//! `sterna restore`: a VM goes on from a file, in a process of its own.

use super::run::{Orders, Source};
use super::{Output, detach, migrate};
use crate::cli::RestoreArgs;
use crate::error::Error;
use crate::registry::Registry;
use crate::vmm::{self, RestoreOrder};

/// Restores a VM and returns when its guest runs.
pub fn restore(registry: &Registry, args: RestoreArgs, verbose: u8, output: Output) -> Result<(), Error> {
    let RestoreArgs { file, name, map, paused, again, load, stop_timeout } = args;
    let file = std::path::absolute(&file).map_err(|source| Error::File { attempt: "find", path: file, source })?;
    let wanted = name.clone().unwrap_or_else(|| file.display().to_string());
    let failed = |source| Error::Start { name: wanted.clone(), source };
    let (saved, mut description) = vmm::open_saved(&file, name.as_deref(), &migrate::join(map)).map_err(failed)?;
    description.settle(|name| registry.console(name));
    // The directory that its sockets are to be in is made with it.
    let claim = registry.claim(&description.config.name)?;
    if !description.config.validate_arrival().list().is_empty() {
        return Err(vmm::everything_wrong(&description.config, false, vmm::Locks::Now).into());
    }
    let order = RestoreOrder { path: file, saved, description, again, load };
    let orders = Orders { source: Source::Restore(Box::new(order)), paused, stop_timeout };
    detach::start(registry, claim, orders, verbose, output)
}
