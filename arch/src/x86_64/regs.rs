//! Registers a kernel is entered with, by protocol (Linux boot.rst, "64-bit boot protocol"; Xen pvh.rst, "x86/HVM
//! direct boot ABI").

use super::VcpuSetupError;
use super::boot_tables::{GDT_LIMIT, code_segment, data_segment, task_segment};
use super::kernel::{Entry, Protocol};
use super::layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_STACK_TOP, PVH_START_INFO, ZERO_PAGE};
use kvm_bindings::{kvm_dtable, kvm_fpu, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// Puts `vcpu` at the kernel's entry.
pub fn set_entry(vcpu: &VcpuFd, entry: &Entry) -> Result<(), VcpuSetupError> {
    let reset = vcpu.get_sregs().map_err(VcpuSetupError::Registers)?;
    vcpu.set_sregs(&entry_sregs(reset, entry.protocol)).map_err(VcpuSetupError::Registers)?;
    vcpu.set_regs(&entry_regs(entry)).map_err(VcpuSetupError::Registers)
}

/// The FPU as FNINIT leaves it, all SSE exceptions masked.
pub fn set_fpu(vcpu: &VcpuFd) -> Result<(), VcpuSetupError> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(VcpuSetupError::Fpu)
}

fn entry_regs(entry: &Entry) -> kvm_regs {
    let common = kvm_regs { rflags: RFLAGS, rip: entry.rip, rsp: BOOT_STACK_TOP, ..Default::default() };
    match entry.protocol {
        Protocol::Linux64 => kvm_regs { rsi: ZERO_PAGE, ..common },
        Protocol::Pvh => kvm_regs { rbx: PVH_START_INFO, ..common },
    }
}

/// `reset` keeps what is not the protocol's business, the APIC base above all.
fn entry_sregs(reset: kvm_sregs, protocol: Protocol) -> kvm_sregs {
    let data = data_segment();
    let flat = kvm_sregs {
        cs: code_segment(protocol),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task_segment(),
        gdt: kvm_dtable { base: BOOT_GDT, limit: GDT_LIMIT, ..Default::default() },
        idt: kvm_dtable::default(),
        cr0: CR0_PE | CR0_ET,
        ..reset
    };
    match protocol {
        Protocol::Pvh => flat,
        Protocol::Linux64 => {
            kvm_sregs { cr0: flat.cr0 | CR0_PG, cr3: BOOT_PAGE_TABLES, cr4: CR4_PAE, efer: EFER_LME | EFER_LMA, ..flat }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linux_is_entered_in_long_mode_with_the_zero_page() {
        let sregs = entry_sregs(kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() }, Protocol::Linux64);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x8000_0011, 0x9000, 0x20, 0x500));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.ss.selector), (0x10, 1, 0, 0x18));
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        let regs = entry_regs(&Entry { protocol: Protocol::Linux64, rip: 0x10_0200 });
        assert_eq!((regs.rip, regs.rsi, regs.rbx, regs.rflags), (0x10_0200, 0x7000, 0, 2));
    }

    #[test]
    fn pvh_is_entered_in_protected_mode_with_the_start_info() {
        let sregs = entry_sregs(kvm_sregs::default(), Protocol::Pvh);
        assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.tr.limit), (0, 1, 0x67));
        let regs = entry_regs(&Entry { protocol: Protocol::Pvh, rip: 0x10_0000 });
        assert_eq!((regs.rbx, regs.rsi), (0x6000, 0));
    }
}
