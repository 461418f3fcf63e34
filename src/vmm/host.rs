//! What the VM holds of its host for as long as it lives: KVM, RAM, disks, taps, the console. Opened once, before
//! anything is built; a guest's reboot builds a new machine on the same, so no lock is let go in between.

use super::memory::Memory;
use super::parts::PartError;
use super::wiring::Line;
use super::{Error, obstacles};
use crate::config::{DiskConfig, NetConfig, VmConfig};
use crate::console::Console;
use kvm_bindings::{CpuId, KVM_API_VERSION};
use kvm_ioctls::{Kvm, VcpuFd};
use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use sterna_arch::state::{MsrPlan, StateError};
use sterna_arch::{CpuProfile, layout};
use sterna_devices::legacy::{Serial, VmGenId};
use sterna_devices::virtio::blk::Image;
use sterna_devices::virtio::net::Tap;
use vm_memory::GuestAddress;

/// See the module.
pub struct Host {
    /// The hypervisor.
    pub kvm: Kvm,
    /// What the guest's vCPUs can do.
    pub cpuid: CpuId,
    /// The processors as they are saved; known once a machine is built.
    processor: OnceLock<Processor>,
    /// Guest RAM.
    pub memory: Memory,
    /// Disk images, in the configuration's order, locked but while a machine is on its way.
    pub images: Vec<Image>,
    /// Taps, in the configuration's order.
    pub taps: Vec<Tap>,
    /// The serial port's interrupt.
    pub serial_line: Arc<Line>,
    /// The serial port: its other end stays connected across a reboot.
    pub serial: Arc<Mutex<Serial>>,
    /// Tells the guest whether it is still the only one of its kind: the same across a reboot.
    pub vmgenid: Arc<Mutex<VmGenId>>,
    /// What feeds the serial port.
    pub console: Arc<Mutex<Console>>,
}

/// What a guest's processors are here, found with the first of them.
pub struct Processor {
    /// Which MSRs a vCPU has here.
    pub msrs: MsrPlan,
    /// What they are, for another host.
    pub profile: CpuProfile,
}

/// When disks are locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locks {
    /// At once: the guest is to run.
    Now,
    /// When the machine is handed over: until then the source has them.
    Later,
}

impl Host {
    /// Opens everything that `config` names, for a guest whose processors are those of `cpu`, or all that this host has.
    ///
    /// # Errors
    /// All that a user can mend, at once: where something cannot be had, each part of the machine is tried.
    pub fn open(config: &VmConfig, cpu: Option<&CpuProfile>, locks: Locks) -> Result<Self, Error> {
        Self::open_all(config, cpu, locks).map_err(|first| obstacles::all(first, config, locks, cpu.is_none()))
    }

    /// As [`Self::open`], up to the first that cannot be had.
    fn open_all(config: &VmConfig, cpu: Option<&CpuProfile>, locks: Locks) -> Result<Self, Error> {
        let kvm = open_kvm()?;
        let cpuid = match cpu {
            Some(profile) => profile.cpuid().map_err(|source| Error::Cpuid { source })?,
            None => sterna_arch::supported_cpuid(&kvm)
                .and_then(|supported| sterna_arch::model_cpuid(&supported, config.cpu))
                .map_err(|source| Error::Cpuid { source })?,
        };
        let memory =
            Memory::new(config.memory_bytes).map_err(|source| Error::Memory { bytes: config.memory_bytes, source })?;
        let images = config.disks.iter().map(|disk| open_image(disk, locks)).collect::<Result<_, _>>()?;
        let taps = config.nets.iter().map(open_tap).collect::<Result<_, _>>()?;
        // Last: a terminal is left alone where there will be no guest.
        let (mut console, output) = Console::open(&config.serial).map_err(|error| Error::device("serial", error))?;
        let serial_line = Line::new(layout::COM1_GSI);
        let serial = Arc::new(Mutex::new(Serial::new(serial_line.clone(), output)));
        console.attach(serial.clone()).map_err(|source| Error::Host { what: "an event", source })?;
        let generation = VmGenId::random().map_err(|source| Error::Host { what: "a generation id", source })?;
        let vmgenid = Arc::new(Mutex::new(VmGenId::new(GuestAddress(layout::GENERATION_ID), generation)));
        let console = Arc::new(Mutex::new(console));
        Ok(Self { kvm, cpuid, processor: OnceLock::new(), memory, images, taps, serial_line, serial, vmgenid, console })
    }

    /// Finds out what the guest's processors are, with `vcpu`, which has its CPUID and has not run: a move asks for it later, and must
    /// not try while a guest stands still. What a guest from elsewhere (`guest`) was told at its birth it keeps; only what KVM gives
    /// and takes of its state is this host's. Reads a hundred registers.
    ///
    /// # Errors
    /// KVM's.
    pub fn learn(&self, vcpu: &VcpuFd, guest: Option<&CpuProfile>) -> Result<(), StateError> {
        if self.processor.get().is_none() {
            let here = CpuProfile::of(&self.kvm, vcpu, &self.cpuid)?;
            let profile = match guest {
                Some(guest) => CpuProfile { xsave_bytes: here.xsave_bytes, ..guest.clone() },
                None => here,
            };
            let msrs = MsrPlan::find(&self.kvm, vcpu)?;
            self.processor.get_or_init(|| Processor { msrs, profile });
        }
        Ok(())
    }

    /// The guest's processors as they are saved.
    ///
    /// # Errors
    /// No machine was built yet.
    pub fn processor(&self) -> Result<&Processor, PartError> {
        self.processor.get().ok_or_else(|| PartError::Processor {
            part: "vcpu0".into(),
            done: "asked what it is",
            source: StateError::Value("there is no machine yet".into()),
        })
    }

    /// Unlocks the disks. Whoever hears that a VM has ended may use them at once: before its process has ended.
    pub fn release_disks(&self) {
        for image in &self.images {
            if let Err(error) = image.unlock() {
                log::warn!("disk image {} stays locked: {error}", image.path().display());
            }
        }
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

/// The image of `disk`.
pub(super) fn open_image(disk: &DiskConfig, locks: Locks) -> Result<Image, Error> {
    let open = match locks {
        Locks::Now => Image::open,
        Locks::Later => Image::open_unlocked,
    };
    open(&disk.path, disk.readonly, disk.direct).map_err(|error| Error::device(&disk.id, error))
}

/// The tap of `net`.
pub(super) fn open_tap(net: &NetConfig) -> Result<Tap, Error> {
    Tap::open(&net.tap, net.create).map_err(|error| Error::device(&net.id, error))
}

fn open_kvm() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| {
        let source = io::Error::from_raw_os_error(error.errno());
        let remedy = match source.kind() {
            io::ErrorKind::NotFound => "load the module: modprobe kvm-intel or kvm-amd",
            io::ErrorKind::PermissionDenied => "run as root or join the group that owns it: usermod -aG kvm $USER",
            _ => "`sterna host check` tells what this host can do",
        };
        Error::OpenKvm { remedy, source }
    })?;
    // Not negative, and the same since 2007 (the kernel's api.rst, KVM_GET_API_VERSION).
    if u32::try_from(kvm.get_api_version()) == Ok(KVM_API_VERSION) { Ok(kvm) } else { Err(Error::NotKvm) }
}
