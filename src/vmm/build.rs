//! One way to build a machine, for a boot as for whatever fills it otherwise: `build` gives one that has never run.
//!
//! [`NewMachine`] has KVM objects and devices, [`Parked`] also threads, which stand still. An error drops all of it.

use super::Error;
use super::board::Board;
use super::bus::{Bus, SharedDevice};
use super::dirty;
use super::event_loop::{EventLoop, Subscriber};
use super::gate::{Gate, Wanted};
use super::host::Host;
use super::machine::{Machine, lock};
use super::memory::Memory;
use super::parts::{PartError, Parts};
use super::vcpu::{Outcome, Shared, VcpuThread};
use super::wiring::{KvmWiring, LevelPin};
use crate::config::VmConfig;
use crate::events::{Event, EventBus};
use kvm_ioctls::VmFd;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use sterna_arch::{BootSource, CpuProfile, Entry, HostProfile, layout};
use sterna_devices::legacy::{Power, PvPanic};
use sterna_devices::pci::{BarWindow, ConfigPorts, Ecam, PciSegment};
use sterna_devices::virtio::VirtioDevice;
use sterna_devices::virtio::balloon::{Balloon, BalloonHandle};
use sterna_devices::virtio::blk::Blk;
use sterna_devices::virtio::net::{Net, NetHandle};
use sterna_devices::virtio::pci::{OnFault, VirtioPci};
use sterna_devices::virtio::rng::Rng;
use sterna_devices::virtio::vsock::Vsock;
use sterna_migration::Sections;

/// A machine that has never run.
pub struct NewMachine {
    parts: Parts,
    ports: Bus,
    mmio: Bus,
    balloon: BalloonHandle,
    nets: Vec<NetHandle>,
    /// The dirty log can be cleared chunk by chunk.
    manual_protect: bool,
}

/// Builds the machine that `config` describes on what `host` holds. A device that faults is told to `events`.
///
/// # Errors
/// What KVM refuses or a device cannot have.
pub fn build(config: &VmConfig, host: &Host, events: &Arc<EventBus>) -> Result<NewMachine, Error> {
    let (vm, manual_protect) = create_vm(host)?;
    let vcpus = (0..config.cpus)
        .map(|index| vm.create_vcpu(u64::from(index)).map_err(kvm_error("creating a vCPU")))
        .map(|vcpu| vcpu.map(|vcpu| Arc::new(Mutex::new(vcpu))))
        .collect::<Result<_, _>>()?;
    let (mut ports, mut mmio) = (Bus::default(), Bus::default());
    let wiring = Arc::new(KvmWiring::new(Arc::clone(&vm)));
    let on_fault = fault_events(events);
    let (models, balloon, nets) = models(config, host)?;
    let mut segment = PciSegment::new(layout::PCI_MMIO_START..layout::PCI_MMIO_START + layout::PCI_MMIO_SIZE);
    let mut functions = Vec::new();
    for (name, model) in models {
        let ram = Arc::clone(host.memory.ram());
        let function = VirtioPci::new(&name, model, ram, wiring.clone(), on_fault.clone())
            .map_err(|error| Error::device(&name, error))?;
        let function = Arc::new(Mutex::new(function));
        segment.add(function.clone()).map_err(|error| Error::device(&name, error))?;
        functions.push(function);
    }
    host.serial_line.attach(&vm);
    let board = Board {
        functions,
        segment: Arc::new(segment),
        serial: host.serial.clone(),
        vmgenid: host.vmgenid.clone(),
        rtc: Arc::default(),
        power: Arc::new(Mutex::new(Power::new(Arc::new(LevelPin::new(Arc::clone(&vm), layout::GED_GSI))))),
        panic: Arc::new(Mutex::new(PvPanic)),
    };
    add_devices(&mut ports, &mut mmio, &board);
    let parts = Parts { vm, vcpus, board };
    Ok(NewMachine { parts, ports, mmio, balloon, nets, manual_protect })
}

impl NewMachine {
    /// Makes ready for the state of a guest whose processors are those of `guest`: vCPUs with the CPUID that it knows.
    ///
    /// # Errors
    /// What this host's processors lack, and what KVM refuses.
    pub fn expect(&self, guest: &CpuProfile, host: &Host, config: &VmConfig) -> Result<(), Error> {
        if let Some(first) = self.parts.vcpus.first() {
            let here = HostProfile::of(&host.kvm, &lock(first)).map_err(|source| Error::VmState { source })?;
            let problems = sterna_arch::incompatibilities(guest, &here);
            if !problems.is_empty() {
                return Err(Error::Refused(problems));
            }
        }
        for (index, vcpu) in (0u32..).zip(&self.parts.vcpus) {
            let cpuid = sterna_arch::vcpu_cpuid(&host.cpuid, index, config.cpus);
            let vcpu = lock(vcpu);
            vcpu.set_cpuid2(&cpuid).map_err(kvm_error("setting the CPUID that the guest knows"))?;
            host.learn(&vcpu, Some(guest)).map_err(|source| Error::VmState { source })?;
        }
        Ok(())
    }

    /// See [`Parked::rehearse`].
    ///
    /// # Errors
    /// What a device does not take.
    pub fn rehearse(&self, sections: Sections) -> Result<(), PartError> {
        self.parts.board.rehearse(sections)
    }

    /// Gives it its threads, one of them for its devices and `console`. They stand at the gate until it has a state and is
    /// resumed: to start them takes as long as to load a kernel, and goes on meanwhile.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn park(self, console: Subscriber, outcomes: Sender<Outcome>) -> Result<Parked, Error> {
        let NewMachine { parts, ports, mmio, balloon, nets, manual_protect } = self;
        let gate = Arc::new(Gate::new(Wanted::Pause));
        let shared = Shared { ports: Arc::new(ports), mmio: Arc::new(mmio), gate: gate.clone(), outcomes };
        // From here on dropping the machine ends the threads there are.
        let machine = Machine {
            gate,
            vcpus: Mutex::default(),
            parts,
            balloon,
            nets,
            manual_protect,
            event_loop: Mutex::default(),
        };
        for (index, vcpu) in (0u32..).zip(&machine.parts.vcpus) {
            let thread = VcpuThread::spawn(index, Arc::clone(vcpu), shared.clone())
                .map_err(|source| Error::Host { what: "a vCPU's thread", source })?;
            lock(&machine.vcpus).push(thread);
        }
        let mut subscribers: Vec<Subscriber> = vec![console];
        subscribers.extend(machine.parts.board.functions.iter().map(|function| function.clone() as Subscriber));
        let event_loop =
            EventLoop::start(subscribers).map_err(|source| Error::Host { what: "the device event loop", source })?;
        *lock(&machine.event_loop) = Some(event_loop);
        Ok(Parked(machine))
    }
}

/// A machine that has never run, with threads that wait for it to have a state: its first, or one from elsewhere.
pub struct Parked(Machine);

impl Parked {
    /// Loads the kernel and sets the vCPUs' first state. The machine stands still until resumed.
    ///
    /// # Errors
    /// What is wrong with kernel, initrd or command line; what KVM refuses.
    pub fn boot(self, config: &VmConfig, host: &Host) -> Result<Machine, Error> {
        let entry = load_kernel(config, &host.memory)?;
        let generation = lock(&host.vmgenid).write(host.memory.ram());
        generation.map_err(|source| Error::Host { what: "the generation id", source: io::Error::other(source) })?;
        for (index, vcpu) in (0u32..).zip(&self.0.parts().vcpus) {
            let cpuid = sterna_arch::vcpu_cpuid(&host.cpuid, index, config.cpus);
            let vcpu = lock(vcpu);
            sterna_arch::setup_vcpu(&vcpu, &cpuid, (index == 0).then_some(&entry))
                .map_err(|source| Error::Vcpu { index, source })?;
            host.learn(&vcpu, None).map_err(|source| Error::VmState { source })?;
        }
        host.memory.prefer_huge_pages().map_err(|source| Error::Memory { bytes: config.memory_bytes, source })?;
        Ok(self.0)
    }

    /// Gives the devices a rehearsal of their state, which the final one then differs from in little.
    ///
    /// # Errors
    /// The part that does not take it.
    pub fn rehearse(&self, sections: Sections) -> Result<(), PartError> {
        self.0.parts().board.rehearse(sections)
    }

    /// Gives every part its state; its RAM has its contents. It stands still until resumed.
    ///
    /// # Errors
    /// The part that does not take it.
    pub fn restore(self, sections: Sections) -> Result<Machine, PartError> {
        self.0.parts().restore(sections)?;
        Ok(self.0)
    }
}

/// Loads kernel, initrd, command line and firmware tables into `memory`.
///
/// # Errors
/// What is wrong with the first three.
pub fn load_kernel(config: &VmConfig, memory: &Memory) -> Result<Entry, Error> {
    let ram = &**memory.ram();
    let rsdp = sterna_arch::write_acpi_tables(ram, config.cpus).map_err(|source| Error::Acpi { source })?;
    let mut kernel = open("kernel", &config.kernel)?;
    let mut initrd = config.initrd.as_deref().map(|path| open("initrd", path)).transpose()?;
    let source = BootSource { kernel: &mut kernel, initrd: initrd.as_mut(), cmdline: &config.cmdline };
    sterna_arch::load_kernel(ram, source, rsdp).map_err(|source| Error::Boot { path: config.kernel.clone(), source })
}

fn fault_events(events: &Arc<EventBus>) -> OnFault {
    let events = Arc::clone(events);
    Arc::new(move |device: &str, reason: &str| {
        events.publish(Event::DeviceFault { device: device.to_owned(), reason: reason.to_owned() });
    })
}

/// Puts every device that has registers at fixed addresses where the address map has it.
fn add_devices(ports: &mut Bus, mmio: &mut Bus, board: &Board) {
    let mut add = |port: u16, size: u16, device: SharedDevice| ports.add(port.into(), size.into(), device);
    add(layout::COM1_PORT, layout::COM1_SIZE, board.serial.clone());
    add(layout::RTC_PORT, layout::RTC_SIZE, board.rtc.clone());
    add(layout::PVPANIC_PORT, layout::PVPANIC_SIZE, board.panic.clone());
    add(layout::POWER_PORT, layout::POWER_SIZE, board.power.clone());
    add(layout::PCI_CONFIG_PORT, layout::PCI_CONFIG_SIZE, Arc::new(ConfigPorts(board.segment.clone())));
    mmio.add(layout::ECAM_START, layout::ECAM_SIZE, Arc::new(Ecam(board.segment.clone())));
    mmio.add(layout::PCI_MMIO_START, layout::PCI_MMIO_SIZE, Arc::new(BarWindow(board.segment.clone())));
}

/// The VM with its RAM and interrupt controllers. The order is KVM's: the interrupt controllers come before the vCPUs, each of
/// which gets its local APIC from them. RAM comes before both: creating the interrupt controllers starts an SRCU grace period, and
/// a memory slot set after it waits for its end (measured on Linux 6.18: 7.4 ms, against 0.17 ms before).
fn create_vm(host: &Host) -> Result<(Arc<VmFd>, bool), Error> {
    let vm = host.kvm.create_vm().map_err(kvm_error("creating a VM"))?;
    let manual_protect = dirty::prepare(&vm);
    host.memory.attach(&vm, false).map_err(|source| Error::Kvm { attempt: "registering guest memory", source })?;
    vm.set_tss_address(layout::KVM_TSS as usize).map_err(kvm_error("placing the TSS"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(kvm_error("placing the identity map"))?;
    sterna_arch::state::prepare_vm(&vm).map_err(kvm_error("asking for vCPUs that can be saved whole"))?;
    vm.create_irq_chip().map_err(kvm_error("creating the interrupt controllers"))?;
    Ok((Arc::new(vm), manual_protect))
}

/// Virtio models with their names, in slot order.
type Models = Vec<(String, Box<dyn VirtioDevice>)>;

/// Every virtio model there is to be.
fn models(config: &VmConfig, host: &Host) -> Result<(Models, BalloonHandle, Vec<NetHandle>), Error> {
    let (mut models, mut nets) = (Models::new(), Vec::new());
    for (disk, image) in config.disks.iter().zip(&host.images) {
        let model = Blk::new(image.clone(), &disk.serial).map_err(|error| Error::device(&disk.id, error))?;
        models.push((disk.id.clone(), Box::new(model)));
    }
    for (net, tap) in config.nets.iter().zip(&host.taps) {
        let tap = tap.try_clone().map_err(|error| Error::device(&net.id, error))?;
        let model = Net::new(tap, net.mac);
        nets.push(model.handle());
        models.push((net.id.clone(), Box::new(model)));
    }
    if let Some(vsock) = &config.vsock {
        let model = Vsock::new(vsock.cid, &vsock.socket).map_err(|error| Error::device("vsock", error))?;
        models.push(("vsock".into(), Box::new(model)));
    }
    models.push(("rng".into(), Box::new(Rng)));
    let memory = host.memory.clone();
    let (balloon, handle) =
        Balloon::of_ram(move || memory.give_back()).map_err(|error| Error::device("balloon", error))?;
    models.push(("balloon".into(), Box::new(balloon)));
    Ok((models, handle, nets))
}

fn open(what: &'static str, path: &Path) -> Result<File, Error> {
    File::open(path).map_err(|source| Error::OpenFile { what, path: path.to_owned(), source })
}

fn kvm_error(attempt: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |error| Error::Kvm { attempt, source: io::Error::from_raw_os_error(error.errno()) }
}
