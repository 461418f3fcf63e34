//! The virtio transport over PCI (virtio 1.2, 4.1): registers, queues, interrupts and the life of a driver.
//!
//! A [`VirtioPci`] lives under one lock. vCPUs come in through its registers, the event loop through doorbells and the
//! device's own descriptor; what a vCPU sets in motion in a ring, the event loop carries out. The transport refuses to
//! know what a device does.
//!
//! A device works while its driver has set DRIVER_OK, it is not paused, and it has no fault.

mod events;
mod layout;
mod registers;
mod state;
#[cfg(test)]
mod tests;

use super::{Backend, Fault, GuestRam, Interrupts, Io, VirtioDevice};
use crate::Wiring;
use crate::pci::msix::Msix;
use crate::pci::{ConfigSpace, PciFunction};
use layout::{Capabilities, MAX_QUEUES, NOTIFY_STRIDE, Region};
use registers::{Registers, status};
use std::error::Error;
use std::io;
use std::sync::Arc;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What is told of a fault: the device's name and the reason. Called under the device's lock: it must not call back.
pub type OnFault = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Faults of one device that are logged; a hostile driver can fault and reset without end.
const LOGGED_FAULTS: u32 = 16;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    name: String,
    device: Box<dyn VirtioDevice>,
    ram: Arc<GuestRam>,
    wiring: Arc<dyn Wiring>,
    on_fault: OnFault,
    config: ConfigSpace,
    capabilities: Capabilities,
    registers: Registers,
    msix: Msix,
    queues: Vec<Queue>,
    /// Notification events, by queue.
    doorbells: Vec<EventFd>,
    /// Guest physical address that signals the doorbell without an exit, by queue.
    bound: Vec<Option<u64>>,
    /// Makes the event loop look at what this device waits for.
    wake: EventFd,
    /// What the event loop waits for on this device's behalf.
    watched: Option<Backend>,
    /// The device was activated since its last reset.
    active: bool,
    paused: bool,
    fault: Option<String>,
    /// Faults so far.
    faults: u32,
}

/// The function's interrupts while a device has the loan.
struct Raise<'a> {
    registers: &'a mut Registers,
    msix: &'a mut Msix,
}

impl Interrupts for Raise<'_> {
    fn queue(&mut self, queue: usize) {
        if let Some(queue) = self.registers.queues.get(queue) {
            self.registers.isr |= registers::ISR_QUEUE;
            self.msix.trigger(queue.vector);
        }
    }

    fn config(&mut self) {
        self.registers.isr |= registers::ISR_CONFIG;
        self.registers.config_generation = self.registers.config_generation.wrapping_add(1);
        self.msix.trigger(self.registers.config_vector);
    }
}

impl VirtioPci {
    /// Puts `device` on the bus. `name` is its id in messages and events.
    ///
    /// # Errors
    /// Queues the transport cannot serve, or no descriptors left for the doorbells.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        wiring: Arc<dyn Wiring>,
        on_fault: OnFault,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes().to_vec();
        if sizes.len() > MAX_QUEUES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("more than {MAX_QUEUES} queues")));
        }
        let invalid = |source| io::Error::new(io::ErrorKind::InvalidInput, source);
        let queues = sizes.iter().map(|size| Queue::new(*size).map_err(invalid)).collect::<io::Result<Vec<_>>>()?;
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let doorbells = sizes.iter().map(|_| event()).collect::<io::Result<Vec<_>>>()?;
        let vectors = sizes.len() as u16 + 1;
        let (config, capabilities) =
            layout::config_space(device.device_type(), device.pci_class(), sizes.len(), vectors);
        Ok(Self {
            name: name.to_owned(),
            device,
            ram,
            on_fault,
            config,
            capabilities,
            registers: Registers::new(&sizes, vectors),
            msix: Msix::new(name, vectors, wiring.clone()),
            wiring,
            queues,
            doorbells,
            bound: vec![None; sizes.len()],
            wake: event()?,
            watched: None,
            active: false,
            paused: false,
            fault: None,
            faults: 0,
        })
    }

    /// The device's id.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Why the device waits for a reset, if it does.
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Finishes what is in flight and stands still: until [`Self::resume`] nothing touches guest RAM. Notifications
    /// that come meanwhile are not lost. Stop the vCPUs first.
    ///
    /// # Errors
    /// The device could not finish; it is paused all the same and waits for a reset.
    pub fn pause(&mut self) -> Result<(), Fault> {
        if self.paused {
            return Ok(());
        }
        self.paused = true;
        self.wake();
        // A device with a fault may have work in flight too, but it cannot fault twice.
        let quiesced = if self.active { self.lend(|device, io| device.quiesce(io)) } else { Ok(()) };
        match quiesced {
            Err(fault) if self.fault.is_none() => {
                self.fail(&fault);
                Err(fault)
            }
            _ => Ok(()),
        }
    }

    /// Goes on, and looks at every queue for what came meanwhile.
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.paused) {
            self.start();
            self.msix.deliver_all();
            self.look_again();
        }
    }

    /// Tells the device that the machine has just started on a new host, or goes on after a failed move. Comes after
    /// [`Self::resume`], and before the vCPUs run.
    pub fn moved(&mut self) {
        self.react(|device, io| device.moved(io));
    }

    /// Features offered to the driver.
    fn offered(&self) -> u64 {
        let transport = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC];
        transport.iter().fold(self.device.features(), |features, bit| features | 1 << bit)
    }

    fn working(&self) -> bool {
        self.active && !self.paused && self.fault.is_none()
    }

    /// Lends the device its queues for one reaction.
    fn lend<R>(&mut self, reaction: impl FnOnce(&mut dyn VirtioDevice, &mut Io) -> R) -> R {
        let mut raise = Raise { registers: &mut self.registers, msix: &mut self.msix };
        let features = raise.registers.driver_features;
        let mut io = Io::new(&self.ram, &mut self.queues, &self.doorbells, features, &mut raise);
        reaction(&mut *self.device, &mut io)
    }

    /// Lets a device that works react, and ends its work at a fault.
    fn react(&mut self, reaction: impl FnOnce(&mut dyn VirtioDevice, &mut Io) -> Result<(), Fault>) {
        if self.working()
            && let Err(fault) = self.lend(reaction)
        {
            self.fail(&fault);
        }
    }

    /// Stops the device until its driver resets it, and says why.
    fn fail(&mut self, fault: &Fault) {
        let reason = with_causes(fault);
        self.faults = self.faults.saturating_add(1);
        if self.faults <= LOGGED_FAULTS {
            let last = if self.faults == LOGGED_FAULTS { "; its further faults are not logged" } else { "" };
            log::error!("{}: {reason}; the device waits for a reset by its driver{last}", self.name);
        }
        self.registers.status |= status::NEEDS_RESET;
        self.lend(|_, io| io.config_changed());
        (self.on_fault)(&self.name, &reason);
        self.fault = Some(reason);
        self.wake();
    }

    /// Carries out a write to the status register (virtio 1.2, 3.1.1). Bits are only ever added; 0 is a reset.
    fn write_status(&mut self, written: u8) {
        if written == 0 {
            self.reset_device();
            return;
        }
        let driver_bits = status::ACKNOWLEDGE | status::DRIVER | status::FAILED;
        let added = written & !self.registers.status;
        self.registers.status |= written & driver_bits;
        if added & status::FEATURES_OK != 0 && self.features_acceptable() {
            self.registers.status |= status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && self.registers.has(status::FEATURES_OK) {
            self.registers.status |= status::DRIVER_OK;
            self.start();
        }
    }

    fn features_acceptable(&self) -> bool {
        self.registers.has(status::ACKNOWLEDGE | status::DRIVER)
            && registers::acceptable(self.registers.driver_features, self.offered())
    }

    /// Activates the device if its driver is ready and that has not been done: at DRIVER_OK, or at the end of a pause
    /// in which DRIVER_OK or a state with it came.
    fn start(&mut self) {
        if self.active || self.paused || self.fault.is_some() || !self.registers.has(status::DRIVER_OK) {
            return;
        }
        // Those of a restored device stand where they stood.
        let fresh = self.queues.iter().all(|queue| !queue.ready());
        if fresh && let Err(fault) = set_up_queues(&mut self.queues, &self.registers, &self.ram) {
            self.queues.iter_mut().for_each(Queue::reset);
            self.fail(&fault);
            return;
        }
        self.active = true;
        self.react(|device, io| device.activate(io));
        self.bind_doorbells();
        self.look_again();
    }

    /// Makes the event loop look at each queue, and at what the device waits for.
    fn look_again(&self) {
        for doorbell in &self.doorbells {
            // The counter can only refuse near 2^64, when the event is pending anyway.
            let _pending = doorbell.write(1);
        }
        self.wake();
    }

    fn wake(&self) {
        let _pending = self.wake.write(1);
    }

    /// Forgets the driver.
    fn reset_device(&mut self) {
        if self.active
            && let Err(fault) = self.lend(|device, io| device.quiesce(io))
        {
            log::debug!("{}: in-flight work ended by a reset: {fault}", self.name);
        }
        self.device.reset();
        self.active = false;
        self.fault = None;
        self.registers.reset();
        self.queues.iter_mut().for_each(Queue::reset);
        self.bind_doorbells();
        self.wake();
    }

    /// Binds the doorbell of each queue that is in use to its notification address, and undoes bindings that no longer
    /// hold. Where a binding fails, notifications arrive as register writes.
    fn bind_doorbells(&mut self) {
        let base = self.config.bar().map(|bar| bar.start + u64::from(Region::Notify.offset()));
        for (index, (bound, doorbell)) in self.bound.iter_mut().zip(&self.doorbells).enumerate() {
            let enabled = self.queues.get(index).is_some_and(Queue::ready);
            let wanted = base.filter(|_| enabled).map(|base| base + index as u64 * u64::from(NOTIFY_STRIDE));
            if *bound == wanted {
                continue;
            }
            if let Some(address) = bound.take()
                && let Err(error) = self.wiring.unbind_notify(address, doorbell)
            {
                log::debug!("{}: the doorbell of queue {index} at {address:#x} stays bound: {error}", self.name);
            }
            if let Some(address) = wanted {
                match self.wiring.bind_notify(address, doorbell) {
                    Ok(()) => *bound = wanted,
                    Err(error) => log::debug!("{}: no fast doorbell for queue {index}: {error}", self.name),
                }
            }
        }
    }

    /// What an access to configuration space asks of the BAR, if it touches the data of the PCI configuration access
    /// capability and what that describes is good: offset and bytes.
    fn access_to_bar(&self, offset: usize, length: usize) -> Option<(u64, usize)> {
        let at = self.capabilities.access;
        let data = at + Capabilities::ACCESS_DATA;
        let touched = offset < data + 4 && data < offset.saturating_add(length);
        let bar = self.config.u16(at + Capabilities::ACCESS_BAR) & 0xff;
        let target = self.config.u32(at + Capabilities::ACCESS_OFFSET);
        let bytes = self.config.u32(at + Capabilities::ACCESS_LENGTH);
        let good = bar == 0 && matches!(bytes, 1 | 2 | 4) && target.is_multiple_of(bytes) && target < layout::BAR_BYTES;
        (touched && good).then_some((u64::from(target), bytes as usize))
    }
}

/// Makes `queues` what the driver set up in `registers`, with empty rings.
fn set_up_queues(queues: &mut [Queue], registers: &Registers, ram: &GuestRam) -> Result<(), Fault> {
    let event_idx = registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
    for (index, (queue, registers)) in queues.iter_mut().zip(&registers.queues).enumerate() {
        queue.reset();
        if registers.enabled {
            registers.configure(index, queue, event_idx)?;
            if !queue.is_valid(ram) {
                return Err(Fault::Malformed { queue: index, what: "the rings do not lie in guest RAM" });
            }
        }
    }
    Ok(())
}

fn with_causes(fault: &Fault) -> String {
    let causes = std::iter::successors(fault.source(), |cause: &&(dyn Error + 'static)| (*cause).source());
    causes.fold(fault.to_string(), |reason, cause| format!("{reason}: {cause}"))
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if let Some((at, length)) = self.access_to_bar(offset, data.len()) {
            let mut window = [0; 4];
            self.read_bar(at, &mut window[..length]);
            self.config.set(self.capabilities.access + Capabilities::ACCESS_DATA, &window);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        self.msix.set_control(self.config.u16(self.capabilities.msix_control));
        self.bind_doorbells();
        if let Some((at, length)) = self.access_to_bar(offset, data.len()) {
            let window = self.config.u32(self.capabilities.access + Capabilities::ACCESS_DATA).to_le_bytes();
            self.write_bar(at, &window[..length]);
        }
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((region, at)) = Region::at(offset) else { return };
        match region {
            Region::Common => self.registers.read(at, data, self.offered()),
            Region::Isr => {
                if let (0, Some(isr)) = (at, data.first_mut()) {
                    *isr = std::mem::take(&mut self.registers.isr);
                }
            }
            Region::Device => self.device.read_config(at as u64, data),
            Region::Notify => {}
            Region::MsixTable => self.msix.read_table(at, data),
            Region::MsixPending => self.msix.read_pending(at, data),
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let Some((region, at)) = Region::at(offset) else { return };
        match region {
            Region::Common => {
                let offered = self.offered();
                if let Some(written) = self.registers.write(at, data, offered) {
                    self.write_status(written);
                }
            }
            Region::Device => self.device.write_config(at as u64, data),
            // The address names the queue; what is written there says no more.
            Region::Notify => {
                if let Some(doorbell) = self.doorbells.get(at / NOTIFY_STRIDE as usize) {
                    let _pending = doorbell.write(1);
                }
            }
            Region::MsixTable => self.msix.write_table(at, data),
            Region::Isr | Region::MsixPending => {}
        }
    }

    fn reset(&mut self) {
        self.config.reset();
        self.reset_device();
        self.msix.reset();
    }
}
