//! Interrupts and doorbells through KVM: an ioctl for every interrupt, an ioeventfd for every notification.
//!
//! Not irqfd, which is for those who cannot call KVM (vhost, another process). Its eventfd write delivers a message only
//! where KVM's fast path takes it; a broadcast, an irregular logical destination and every pin of the I/O APIC go through a
//! workqueue, and only KVM_IRQFD_DEASSIGN waits for that, so that a machine's state could be saved without an interrupt
//! that was raised before. It also wants a route for each message, and each change of the table a grace period.
//! KVM_SIGNAL_MSI and KVM_IRQ_LINE need neither and cost less (measured on Linux 6.18: 0.46 us against 0.53, and for an edge
//! of a pin 0.74 against 0.91 without the workqueue's share).

use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use sterna_devices::{IrqLine, LevelLine, MsiMessage, Wiring};
use vmm_sys_util::eventfd::EventFd;

/// The wiring of one VM.
pub struct KvmWiring {
    vm: Arc<VmFd>,
}

impl KvmWiring {
    /// Wiring of `vm`.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl Wiring for KvmWiring {
    fn signal(&self, message: MsiMessage) -> io::Result<()> {
        let message = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        // 0 says that nobody was there to take it or that it was pending already: both are no failure of ours.
        self.vm.signal_msi(message).map(drop).map_err(os_error)
    }

    fn bind_notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.vm.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(os_error)
    }

    fn unbind_notify(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.vm.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch).map_err(os_error)
    }
}

/// An edge-triggered pin of the I/O APIC. It outlives a reboot of the guest, and is attached to each machine in turn; a
/// machine that has ended takes no more edges.
pub struct Line {
    /// Does not keep the VM alive: its memory is cleared for the next one.
    vm: Mutex<Weak<VmFd>>,
    gsi: u32,
}

impl Line {
    /// A line for `gsi`, not attached yet.
    pub fn new(gsi: u32) -> Arc<Self> {
        Arc::new(Self { vm: Mutex::default(), gsi })
    }

    /// Connects the line to `vm`.
    pub fn attach(&self, vm: &Arc<VmFd>) {
        *self.vm.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(vm);
    }
}

impl IrqLine for Line {
    fn trigger(&self) -> io::Result<()> {
        let Some(vm) = self.vm.lock().unwrap_or_else(PoisonError::into_inner).upgrade() else { return Ok(()) };
        vm.set_irq_line(self.gsi, true).and_then(|()| vm.set_irq_line(self.gsi, false)).map_err(os_error)
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
