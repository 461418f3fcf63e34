//! All that stands in the way of a machine, part by part. Asked only when there will be no guest: a start without problems
//! opens each part once, in [`Host::open`](super::Host::open).

use super::build::load_kernel;
use super::host::{Locks, open_image, open_tap};
use super::memory::Memory;
use super::{Error, chain};
use crate::config::{MAX_CPUS, Part, Problems, VmConfig};
use crate::console::Console;
use sterna_devices::virtio::vsock::Vsock;

/// Everything wrong with `config`: what shows without opening anything, and what opening the rest of it says. Of its kernel only
/// if it `boots`.
pub fn everything_wrong(config: &VmConfig, boots: bool, locks: Locks) -> Problems {
    config.validate_trying(boots, &mut |part| attempt(part, locks).err().map(|error| chain(&error)))
}

/// `first` with all else that is in the way of `config`. What it was opened with must be closed again.
pub(super) fn all(first: Error, config: &VmConfig, locks: Locks, boots: bool) -> Error {
    let mut found: Vec<Error> = config.parts(boots).filter_map(|part| attempt(part, locks).err()).collect();
    // A part's own error comes anew, unless it is over; what concerns the whole machine stands ahead.
    if found.is_empty() || !matches!(first, Error::Device { .. }) {
        found.insert(0, first);
    }
    several(found)
}

/// `error` with what is wrong with the kernel.
pub(super) fn with_kernel(error: Error, config: &VmConfig) -> Error {
    several(attempt(Part::Boot(config), Locks::Later).err().into_iter().chain([error]).collect())
}

fn several(mut errors: Vec<Error>) -> Error {
    match errors.pop() {
        Some(only) if errors.is_empty() => only,
        last => Error::Several(errors.into_iter().chain(last).collect()),
    }
}

/// Has `part` of this host and lets it go again.
fn attempt(part: Part, locks: Locks) -> Result<(), Error> {
    match part {
        Part::Boot(config) => {
            // Of vCPUs and memory that cannot be others speak: a kernel is tried with what can.
            let config = VmConfig { cpus: config.cpus.clamp(1, MAX_CPUS), ..config.clone() };
            let Ok(memory) = Memory::new(config.possible_memory_bytes()) else { return Ok(()) };
            load_kernel(&config, &memory).map(drop)
        }
        Part::Disk(disk) => open_image(disk, locks).map(drop),
        Part::Net(net) => open_tap(net).map(drop),
        Part::Vsock(vsock) => {
            Vsock::new(vsock.cid, &vsock.socket).map(drop).map_err(|error| Error::device("vsock", error))
        }
        Part::Serial(serial) => Console::try_open(serial).map_err(|error| Error::device("serial", error)),
    }
}
