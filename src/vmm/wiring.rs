//! Interrupts and doorbells through KVM: irqfd for every interrupt, ioeventfd for every notification.
//!
//! An MSI-X vector costs nothing until the guest unmasks it: only then does it get a route and an irqfd.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use sterna_devices::{IrqLine, LevelLine, MsiMessage, MsiVector, Wiring};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Pins of the I/O APIC; MSI-X vectors get the numbers above.
const IOAPIC_PINS: u32 = 24;
/// Most routes that KVM takes (KVM_MAX_IRQ_ROUTES).
const MAX_ROUTES: u32 = 4096;

/// The wiring of one VM.
pub struct KvmWiring {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

struct Routes {
    /// Number of the next vector.
    next_gsi: u32,
    /// Routed vectors.
    messages: BTreeMap<u32, MsiMessage>,
}

impl KvmWiring {
    /// Wiring of `vm`, with no vector yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        let routes = Routes { next_gsi: IOAPIC_PINS, messages: BTreeMap::new() };
        Self { shared: Arc::new(Shared { vm, routes: Mutex::new(routes) }) }
    }
}

impl Wiring for KvmWiring {
    fn msi_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let mut routes = self.shared.routes();
        if routes.next_gsi == MAX_ROUTES {
            return Err(io::Error::other("no interrupt route is left"));
        }
        let gsi = routes.next_gsi;
        routes.next_gsi += 1;
        let event = EventFd::new(EFD_NONBLOCK)?;
        Ok(Arc::new(Vector { shared: Arc::clone(&self.shared), gsi, event, attached: Mutex::new(false) }))
    }

    fn bind_notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.shared.vm.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(os_error)
    }

    fn unbind_notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.shared.vm.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(os_error)
    }
}

impl Shared {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands KVM the whole table: the I/O APIC's pins and every routed vector.
    fn commit(&self, routes: &Routes) -> io::Result<()> {
        let pins = (0..IOAPIC_PINS).map(|pin| {
            let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entry
        });
        let vectors = routes.messages.iter().map(|(gsi, message)| {
            let mut entry = kvm_irq_routing_entry { gsi: *gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entry
        });
        let entries: Vec<_> = pins.chain(vectors).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|error| io::Error::other(format!("{error:?}")))?;
        self.vm.set_gsi_routing(&table).map_err(os_error)
    }
}

struct Vector {
    shared: Arc<Shared>,
    gsi: u32,
    event: EventFd,
    /// Whether the irqfd is there.
    attached: Mutex<bool>,
}

impl MsiVector for Vector {
    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let mut routes = self.shared.routes();
        match message {
            Some(message) => {
                routes.messages.insert(self.gsi, message);
                self.shared.commit(&routes)?;
                if !*attached {
                    self.shared.vm.register_irqfd(&self.event, self.gsi).map_err(os_error)?;
                    *attached = true;
                }
            }
            None => {
                if *attached {
                    self.shared.vm.unregister_irqfd(&self.event, self.gsi).map_err(os_error)?;
                    *attached = false;
                }
                // The route itself does no harm without an irqfd, and leaves the table with the next change.
                routes.messages.remove(&self.gsi);
            }
        }
        Ok(())
    }

    fn signal(&self) -> io::Result<()> {
        self.event.write(1)
    }
}

/// A pin of the I/O APIC. It outlives a reboot of the guest, and is attached to each machine in turn.
pub struct Line {
    event: EventFd,
    gsi: u32,
}

impl Line {
    /// A line for `gsi`, not attached yet.
    pub fn new(gsi: u32) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { event: EventFd::new(EFD_NONBLOCK)?, gsi }))
    }

    /// Connects the line to `vm`.
    pub fn attach(&self, vm: &VmFd) -> io::Result<()> {
        vm.register_irqfd(&self.event, self.gsi).map_err(os_error)
    }
}

impl IrqLine for Line {
    fn trigger(&self) -> io::Result<()> {
        self.event.write(1)
    }
}

/// A level-triggered pin of the I/O APIC of one VM.
pub struct LevelPin {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl LevelPin {
    /// The pin of `vm` that `gsi` is, low.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi }
    }
}

impl LevelLine for LevelPin {
    fn set(&self, high: bool) -> io::Result<()> {
        self.vm.set_irq_line(self.gsi, high).map_err(os_error)
    }
}

fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
