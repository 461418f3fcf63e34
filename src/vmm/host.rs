//! What the VM holds of its host for as long as it lives: KVM, RAM, disks, taps, the console. Opened once, before
//! anything is built; a guest's reboot builds a new machine on the same, so no lock is let go in between.

use super::Error;
use super::build::load_kernel;
use super::memory::Memory;
use super::wiring::Line;
use crate::config::{SerialConfig, VmConfig};
use crate::console::Console;
use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use std::io;
use std::sync::{Arc, Mutex};
use sterna_arch::layout;
use sterna_devices::legacy::Serial;
use sterna_devices::virtio::blk::Image;
use sterna_devices::virtio::net::Tap;

/// See the module.
pub struct Host {
    /// The hypervisor.
    pub kvm: Kvm,
    /// What its vCPUs can be.
    pub cpuid: CpuId,
    /// Guest RAM.
    pub memory: Memory,
    /// Disk images, in the configuration's order, locked.
    pub images: Vec<Image>,
    /// Taps, in the configuration's order.
    pub taps: Vec<Tap>,
    /// The serial port's interrupt.
    pub serial_line: Arc<Line>,
    /// The serial port: its other end stays connected across a reboot.
    pub serial: Arc<Mutex<Serial>>,
    /// What feeds it.
    pub console: Arc<Mutex<Console>>,
}

impl Host {
    /// Opens everything that `config` names.
    ///
    /// # Errors
    /// All that a user can mend, at once: what of disks, taps and console cannot be had, and then also what is wrong with
    /// the kernel. Otherwise the first that fails.
    pub fn open(config: &VmConfig) -> Result<Self, Error> {
        let kvm = open_kvm()?;
        let cpuid = sterna_arch::supported_cpuid(&kvm).map_err(|source| Error::Cpuid { source })?;
        let memory =
            Memory::new(config.memory_bytes).map_err(|source| Error::Memory { bytes: config.memory_bytes, source })?;
        let mut refused = Vec::new();
        let images = config
            .disks
            .iter()
            .filter_map(|disk| had(&disk.id, Image::open(&disk.path, disk.readonly, disk.direct), &mut refused));
        let images = images.collect();
        let taps = config.nets.iter().filter_map(|net| had(&net.id, Tap::open(&net.tap, net.create), &mut refused));
        let taps = taps.collect();
        // The terminal is left alone where there will be no guest.
        let wanted = refused.is_empty() || config.serial != SerialConfig::Stdio;
        let console = wanted.then(|| had("serial", Console::open(&config.serial), &mut refused)).flatten();
        let Some((mut console, output)) = console.filter(|_| refused.is_empty()) else {
            return Err(everything(refused, config, &memory));
        };
        let serial_line = Line::new(layout::COM1_GSI).map_err(|source| Error::Host { what: "an event", source })?;
        let serial = Arc::new(Mutex::new(Serial::new(serial_line.clone(), output)));
        console.attach(serial.clone()).map_err(|source| Error::Host { what: "an event", source })?;
        Ok(Self { kvm, cpuid, memory, images, taps, serial_line, serial, console: Arc::new(Mutex::new(console)) })
    }

    /// Makes ready for another machine after one has ended.
    ///
    /// # Errors
    /// When RAM cannot be cleared.
    pub fn recycle(&self) -> Result<(), Error> {
        super::machine::lock(&self.serial).reset();
        self.memory.clear().map_err(|source| Error::Host { what: "clean guest memory", source })
    }
}

/// What was opened; an error goes to `refused`, under the device's name.
fn had<T, E>(device: &str, opened: Result<T, E>, refused: &mut Vec<Error>) -> Option<T>
where
    E: std::error::Error + Send + Sync + 'static,
{
    opened.map_err(|error| refused.push(Error::device(device, error))).ok()
}

/// What was `refused`, and what would have been next.
fn everything(mut refused: Vec<Error>, config: &VmConfig, memory: &Memory) -> Error {
    refused.extend(load_kernel(config, memory).err());
    match refused.pop() {
        Some(only) if refused.is_empty() => only,
        last => Error::Several(refused.into_iter().chain(last).collect()),
    }
}

fn open_kvm() -> Result<Kvm, Error> {
    Kvm::new().map_err(|error| {
        let source = io::Error::from_raw_os_error(error.errno());
        let remedy = match source.kind() {
            io::ErrorKind::NotFound => "load the module: modprobe kvm-intel or kvm-amd",
            io::ErrorKind::PermissionDenied => "run as root or join the group that owns it: usermod -aG kvm $USER",
            _ => "`sterna host check` tells what this host can do",
        };
        Error::OpenKvm { remedy, source }
    })
}
