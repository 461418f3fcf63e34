//! A vCPU's registers, saved and restored in the order that KVM needs. Refuses to know threads and whoever stops the vCPU.

use super::clock::Elapsed;
use super::msrs::{self, Msr, MsrPlan};
use super::tsc::{self, TscState};
use super::{StateError, abi, at_most, read, set, sys};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_VMXE: u64 = 1 << 13;
const EFER_LMA: u64 = 1 << 10;
const EFER_SVME: u64 = 1 << 12;
const RFLAGS_VM: u64 = 1 << 17;

/// x87 only (Intel SDM 1, 13.3).
const XCR0_RESET: u64 = 1;

/// Words of the XSAVE area. A process must ask (`arch_prctl`) for what does not fit, which is AMX; this one does not.
const XSAVE_WORDS: usize = 1024;
/// More registers than any KVM has.
const MAX_MSRS: usize = 4096;

/// All of a vCPU but its CPUID.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// `KVM_MP_STATE_*`: whether it runs, halts or waits for its start.
    pub mp_state: u32,
    /// General registers.
    #[serde(with = "abi")]
    pub regs: kvm_regs,
    /// Segments, control registers, APIC base.
    #[serde(with = "abi")]
    pub sregs: kvm_sregs,
    /// The page-directory pointers, where the guest pages with PAE in 32 bits and KVM tells them: the processor loads them when
    /// CR3 is written and does not see later changes in memory.
    pub pdptrs: Option<[u64; 4]>,
    /// The XSAVE area in standard format. A host without XSAVE has x87 and SSE in it.
    #[serde(deserialize_with = "at_most::<XSAVE_WORDS, _, _>")]
    pub xsave: Vec<u32>,
    /// Extended control registers; none on a host without XSAVE.
    #[serde(with = "abi")]
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    #[serde(with = "abi")]
    pub debug_regs: kvm_debugregs,
    /// The local APIC's page.
    #[serde(with = "abi")]
    pub lapic: kvm_lapic_state,
    /// Exceptions, interrupts and NMIs under way.
    #[serde(with = "abi")]
    pub events: kvm_vcpu_events,
    /// The time-stamp counter.
    pub tsc: TscState,
    /// All other MSRs.
    #[serde(deserialize_with = "at_most::<MAX_MSRS, _, _>")]
    pub msrs: Vec<Msr>,
}

/// Saves a vCPU that stands still: the access that it left the guest for is complete (`immediate_exit`).
///
/// # Errors
/// What KVM refuses; a guest that is a hypervisor itself.
pub fn save_vcpu(vcpu: &VcpuFd, msrs: &MsrPlan) -> Result<VcpuState, StateError> {
    // First of all: KVM now lets the vCPU accept an INIT or start-up IPI that is under way, which changes its registers.
    let mp_state = vcpu.get_mp_state().map_err(read("the vCPU's run state"))?.mp_state;
    let regs = vcpu.get_regs().map_err(read("the general registers"))?;
    let sregs = vcpu.get_sregs().map_err(read("the control registers"))?;
    // Neither is in the CPUID that guests get; whoever changes that has to save KVM_GET_NESTED_STATE here.
    if sregs.efer & EFER_SVME != 0 || sregs.cr4 & CR4_VMXE != 0 {
        return Err(StateError::Nested);
    }
    // Before Linux 5.14 KVM does not tell; it then loads them from guest RAM when control registers are set.
    let pae = sregs.cr0 & CR0_PG != 0 && sregs.cr4 & CR4_PAE != 0 && sregs.efer & EFER_LMA == 0;
    let pdptrs = pae.then(|| sys::get_sregs2(vcpu).ok().map(|sregs| sregs.pdptrs)).flatten();
    // KVM_GET_XSAVE works without XSAVE too: KVM then fills in the header, so that hosts with XSAVE take it as well
    // (fpu_copy_guest_fpstate_to_uabi in Linux). So there is no second way for the FPU.
    let xsave = vcpu.get_xsave().map_err(read("the FPU"))?.region.to_vec();
    let xcrs = vcpu.get_xcrs().map_err(read("the extended control registers"))?;
    let debug_regs = vcpu.get_debug_regs().map_err(read("the debug registers"))?;
    let (tsc, msrs) = (tsc::save(vcpu)?, msrs.read(vcpu)?);
    // KVM moves posted interrupts into the page as it reads it.
    let lapic = vcpu.get_lapic().map_err(read("the local APIC"))?;
    // Last: what came before may have made an event pending. Its flags say what is valid, and go back as they are; a start-up
    // vector is never among it, KVM has taken it with the run state.
    let events = vcpu.get_vcpu_events().map_err(read("the pending events"))?;
    Ok(VcpuState { mp_state, regs, sregs, pdptrs, xsave, xcrs, debug_regs, lapic, events, tsc, msrs })
}

/// Restores a vCPU that has never run and has the CPUID that the guest booted with: KVM checks most of what follows against that.
/// `elapsed` comes from [`super::restore_clock`]. Guest RAM is mapped: kvmclock, steal time and asynchronous page faults live
/// in it, and KVM looks for them as their MSRs are set.
///
/// # Errors
/// What KVM refuses, MSRs by name. The vCPU is of no use then.
pub fn restore_vcpu(vcpu: &VcpuFd, state: &VcpuState, elapsed: &Elapsed) -> Result<(), StateError> {
    let VcpuState { mp_state, regs, sregs, pdptrs, xsave, xcrs, debug_regs, lapic, events, tsc, msrs } = state;
    let region = <[u32; XSAVE_WORDS]>::try_from(xsave.as_slice())
        .map_err(|_| StateError::Value(format!("the FPU has {} words instead of {XSAVE_WORDS}", xsave.len())))?;
    // Control registers before most others: EFER and CR4 decide what those may be, the APIC base the format of the APIC's page.
    match pdptrs {
        Some(pdptrs) => sys::set_sregs2(vcpu, &with_pdptrs(sregs, *pdptrs)),
        None => vcpu.set_sregs(sregs),
    }
    .map_err(set("the control registers"))?;
    vcpu.set_regs(regs).map_err(set("the general registers"))?;
    // XCR0 first, as software does it; but not to what a vCPU begins with: a host without XSAVE has no XCR0, and a guest without
    // XSAVE moves there all the same.
    if xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).any(|xcr| xcr.value != XCR0_RESET) {
        vcpu.set_xcrs(xcrs).map_err(set("the extended control registers"))?;
    }
    sys::set_xsave(vcpu, &kvm_xsave { region, ..Default::default() }).map_err(set("the FPU"))?;
    vcpu.set_debug_regs(debug_regs).map_err(set("the debug registers"))?;
    // The TSC before whatever counts in it; the local APIC before the TSC deadline, which is lost unless the timer is in that mode.
    tsc::restore(vcpu, tsc, elapsed)?;
    vcpu.set_lapic(lapic).map_err(set("the local APIC"))?;
    // Enabling asynchronous page faults again makes KVM wake all tasks that waited for a page at the source.
    msrs::restore(vcpu, msrs)?;
    // Setting general or control registers drops or queues events, so the events themselves come after those.
    vcpu.set_vcpu_events(events).map_err(set("the pending events"))?;
    // Setting control registers may have made the first vCPU runnable.
    vcpu.set_mp_state(kvm_mp_state { mp_state: *mp_state }).map_err(set("the vCPU's run state"))?;
    // Tells the guest that it stood still, so that its watchdogs do not report a lock-up (KVM API, 4.65): what the source told it
    // was lost with the source's vCPU. Refused while the guest does not use kvmclock, and then there is nothing to tell.
    let _refused = vcpu.kvmclock_ctrl();
    Ok(())
}

fn with_pdptrs(sregs: &kvm_sregs, pdptrs: [u64; 4]) -> kvm_sregs2 {
    // The one field that is left out, `interrupt_bitmap`, is among the events.
    let kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = *sregs;
    let flags = KVM_SREGS2_FLAGS_PDPTRS_VALID.into();
    kvm_sregs2 { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs }
}

/// What a person wants to see of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuView {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3, the page tables.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended feature enable register.
    pub efer: u64,
    /// The mode it executes in.
    pub mode: &'static str,
    /// Whether it runs.
    pub mp_state: &'static str,
    /// The other registers by name: general ones, flags, CR2 and CR8, segments' selectors and bases.
    #[serde(serialize_with = "by_name")]
    pub registers: Vec<(&'static str, u64)>,
}

fn by_name<S: serde::Serializer>(registers: &[(&'static str, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(registers.iter().copied())
}

impl VcpuState {
    /// Of the layout above.
    pub const VERSION: u16 = 1;

    /// See [`VcpuView`].
    pub fn view(&self) -> VcpuView {
        let (regs, sregs) = (&self.regs, &self.sregs);
        VcpuView {
            rip: regs.rip,
            rsp: regs.rsp,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            mode: match (sregs.cs.l, sregs.cs.db) {
                _ if sregs.cr0 & CR0_PE == 0 => "real",
                (1, _) if sregs.efer & EFER_LMA != 0 => "64-bit",
                _ if sregs.efer & EFER_LMA != 0 => "compatibility",
                _ if regs.rflags & RFLAGS_VM != 0 => "virtual 8086",
                (_, 0) => "16-bit protected",
                _ => "32-bit protected",
            },
            mp_state: match self.mp_state {
                KVM_MP_STATE_RUNNABLE => "running",
                KVM_MP_STATE_UNINITIALIZED => "waiting for INIT",
                KVM_MP_STATE_INIT_RECEIVED => "waiting for a start-up IPI",
                KVM_MP_STATE_HALTED => "halted",
                KVM_MP_STATE_SIPI_RECEIVED => "starting",
                _ => "unknown",
            },
            registers: self.registers(),
        }
    }

    fn registers(&self) -> Vec<(&'static str, u64)> {
        let (r, s) = (&self.regs, &self.sregs);
        let general = [("rax", r.rax), ("rbx", r.rbx), ("rcx", r.rcx), ("rdx", r.rdx), ("rsi", r.rsi), ("rdi", r.rdi)];
        let more = [("rbp", r.rbp), ("r8", r.r8), ("r9", r.r9), ("r10", r.r10), ("r11", r.r11), ("r12", r.r12)];
        let rest =
            [("r13", r.r13), ("r14", r.r14), ("r15", r.r15), ("rflags", r.rflags), ("cr2", s.cr2), ("cr8", s.cr8)];
        let segments = [("cs", &s.cs), ("ss", &s.ss), ("ds", &s.ds), ("es", &s.es), ("fs", &s.fs), ("gs", &s.gs)];
        let segments = segments.map(|(name, segment)| (name, u64::from(segment.selector)));
        let bases = [("fs_base", s.fs.base), ("gs_base", s.gs.base)];
        general.into_iter().chain(more).chain(rest).chain(segments).chain(bases).collect()
    }
}
