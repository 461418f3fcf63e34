//! Whether a guest's processor is one that this host can be: the guest's profile, which travels with it, against the host's.
//!
//! A guest keeps the CPUID that it booted with, for it has looked once and will not look again. A target therefore sets the
//! profile's CPUID, not its own, and must have all that is in it. Refuses to know how a profile got here, and to guess: what differs is
//! told by name, and nothing is masked behind the guest's back.

use super::CpuidError;
use super::cpuid::{supported_cpuid, vendor};
use super::features::{WORDS, Word};
use super::state::{Msr, StateError, at_most, msr};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

/// What KVM gives and takes where no feature of a process's own choice makes it more (AMX would).
const XSAVE_BYTES: u32 = 4096;
const XSAVE_LEAF: u32 = 0xD;
const ADDRESS_LEAF: u32 = 0x8000_0008;
const MAX_FEATURE_MSRS: usize = 64;
const ARCH_CAPABILITIES: u32 = 0x10a;

/// KVM's own tolerance, parts per million: within it KVM runs a guest at the host's frequency.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Bits that say how the machine is, not what the processor can do.
const MACHINE_STATE: [&str; 4] = ["osxsave", "ospke", "ht", "cmp_legacy"];

/// Components of the XSAVE area from bit 2 of XCR0 on.
const COMPONENTS: [&str; 17] = [
    "avx",
    "bndregs",
    "bndcsr",
    "avx512_opmask",
    "avx512_zmm_hi256",
    "avx512_hi16_zmm",
    "pt",
    "pkru",
    "pasid",
    "cet_user",
    "cet_kernel",
    "hdc",
    "uintr",
    "lbr",
    "hwp",
    "xtilecfg",
    "xtiledata",
];

/// Bits of IA32_ARCH_CAPABILITIES: promises, most of them, by which a guest leaves out what would protect it.
const ARCH_CAPABILITIES_BITS: &str = "rdcl_no ibrs_all rsba skip_l1dfl_vmentry ssb_no mds_no pschange_mc_no tsx_ctrl taa_no - - - -
    sbdr_ssdp_no fbsdp_no psdp_no - fb_clear fb_clear_ctrl rrsba bhi_no xapic_disable - - pbrsb_no gds_ctrl gds_no rfds_no
    rfds_clear - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - its_no";

/// One leaf of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX that it is asked with.
    pub function: u32,
    /// ECX that it is asked with.
    pub index: u32,
    /// KVM's: whether ECX counts.
    pub flags: u32,
    /// EAX, EBX, ECX, EDX that it answers.
    pub registers: [u32; 4],
}

/// A processor as a guest sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuProfile {
    /// CPUID as the first vCPU has it.
    #[serde(deserialize_with = "at_most::<KVM_MAX_CPUID_ENTRIES, _, _>")]
    pub leaves: Vec<Leaf>,
    /// MSRs by which the processor tells what it can: IA32_ARCH_CAPABILITIES, where CPUID says that it is there.
    #[serde(deserialize_with = "at_most::<MAX_FEATURE_MSRS, _, _>")]
    pub msrs: Vec<Msr>,
    /// Bytes of the XSAVE area that KVM gives and takes.
    pub xsave_bytes: u32,
    /// Frequency of the TSC, kHz; 0 if KVM does not know.
    pub tsc_khz: u32,
}

impl CpuProfile {
    /// Of the layout above.
    pub const VERSION: u16 = 1;

    /// The profile of `vcpu`, which has `cpuid`.
    ///
    /// # Errors
    /// What KVM does not tell.
    pub fn of(kvm: &Kvm, vcpu: &VcpuFd, cpuid: &CpuId) -> Result<Self, StateError> {
        let leaves = cpuid.as_slice().iter().map(|leaf| Leaf {
            function: leaf.function,
            index: leaf.index,
            flags: leaf.flags,
            registers: [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx],
        });
        let told = WORDS.iter().any(|word| word.value(cpuid.as_slice()) & word.mask(&["arch_capabilities"]) != 0);
        let capabilities = if told { msr(vcpu, ARCH_CAPABILITIES)? } else { None };
        let xsave_bytes = u32::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_BYTES);
        Ok(Self {
            leaves: leaves.collect(),
            msrs: capabilities.map(|value| Msr { index: ARCH_CAPABILITIES, value }).into_iter().collect(),
            xsave_bytes,
            tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        })
    }

    /// CPUID for the target's vCPUs, each of which has its own topology ([`super::vcpu_cpuid`]).
    ///
    /// # Errors
    /// More leaves than KVM takes.
    pub fn cpuid(&self) -> Result<CpuId, CpuidError> {
        CpuId::from_entries(&self.entries()).map_err(|_| CpuidError::TooManyLeaves)
    }

    fn entries(&self) -> Vec<kvm_cpuid_entry2> {
        let entries = self.leaves.iter().map(|leaf| {
            let ([eax, ebx, ecx, edx], Leaf { function, index, flags, .. }) = (leaf.registers, *leaf);
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
        });
        entries.collect()
    }

    /// EAX, EBX, ECX, EDX; zeros where the leaf is not there.
    fn registers(&self, function: u32, index: u32) -> [u32; 4] {
        let found = self.leaves.iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
        found.map_or([0; 4], |leaf| leaf.registers)
    }

    /// The processor's maker, as CPUID spells it.
    pub fn vendor(&self) -> String {
        let [_, ebx, ecx, edx] = self.registers(0, 0);
        String::from_utf8_lossy(&vendor(ebx, ecx, edx)).into_owned()
    }

    fn msr(&self, index: u32) -> u64 {
        self.msrs.iter().find(|msr| msr.index == index).map_or(0, |msr| msr.value)
    }
}

/// What a host can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostProfile {
    /// All that a guest here can have.
    pub cpu: CpuProfile,
    /// Whether a guest's TSC can have another frequency than the host's.
    pub scales_tsc: bool,
}

impl HostProfile {
    /// This host's, found with a vCPU that has not run yet: it has all that there is afterwards, until it is given its own CPUID.
    ///
    /// # Errors
    /// What KVM does not tell.
    pub fn of(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, StateError> {
        let cpuid = supported_cpuid(kvm).map_err(|error| match error {
            CpuidError::Supported(source) => StateError::Read { what: "the CPUID that KVM supports", source },
            other => StateError::Value(other.to_string()),
        })?;
        let refused = |source| StateError::Set { what: "the CPUID that KVM supports", source };
        vcpu.set_cpuid2(&cpuid).map_err(refused)?;
        Ok(Self { cpu: CpuProfile::of(kvm, vcpu, &cpuid)?, scales_tsc: kvm.check_extension(Cap::TscControl) })
    }
}

/// Why `guest` cannot move to `host`, a sentence each; none if it can.
pub fn incompatibilities(guest: &CpuProfile, host: &HostProfile) -> Vec<String> {
    let cpu = &host.cpu;
    let mut found = Vec::new();
    let (guest_vendor, host_vendor) = (guest.vendor(), cpu.vendor());
    if guest_vendor != host_vendor {
        found.push(format!("the guest has a processor by {guest_vendor:?}, and this host one by {host_vendor:?}"));
    }
    let (guest_leaves, host_leaves) = (guest.entries(), cpu.entries());
    let lacking = |word: &Word| {
        let compared = !(word.mask(&MACHINE_STATE) | word.repeated());
        word.value(&guest_leaves) & !word.value(&host_leaves) & compared
    };
    let features = WORDS.iter().flat_map(|word| word.describe(lacking(word)));
    found.extend(features.map(|feature| format!("the guest uses {feature}, which this host lacks")));
    let address_bits = |profile: &CpuProfile| profile.registers(ADDRESS_LEAF, 0)[0] & 0xff;
    let (guest_bits, host_bits) = (address_bits(guest), address_bits(cpu));
    if guest_bits > host_bits {
        found.push(format!("the guest's physical addresses have {guest_bits} bits, and this host's {host_bits}"));
    }
    compare_xsave(guest, cpu, &mut found);
    let promises = guest.msr(ARCH_CAPABILITIES) & !cpu.msr(ARCH_CAPABILITIES);
    found.extend((0..64).filter(|bit| promises >> bit & 1 != 0).map(|bit| {
        let name = ARCH_CAPABILITIES_BITS.split_ascii_whitespace().nth(bit).filter(|name| *name != "-");
        let name = name.map_or_else(String::new, |name| format!("{name}, "));
        format!("the guest relies on {name}bit {bit} of IA32_ARCH_CAPABILITIES (MSR 0x10a), which this host lacks")
    }));
    if !host.scales_tsc && differ(guest.tsc_khz, cpu.tsc_khz) {
        let (guest_khz, host_khz) = (guest.tsc_khz, cpu.tsc_khz);
        found.push(format!(
            "the guest's TSC runs at {guest_khz} kHz, this host's at {host_khz} kHz, and it cannot scale"
        ));
    }
    found
}

fn compare_xsave(guest: &CpuProfile, host: &CpuProfile, found: &mut Vec<String>) {
    let enabled = |profile: &CpuProfile| {
        let ([xcr0_low, _, _, xcr0_high], [_, _, xss, _]) =
            (profile.registers(XSAVE_LEAF, 0), profile.registers(XSAVE_LEAF, 1));
        u64::from(xcr0_high) << 32 | u64::from(xcr0_low | xss)
    };
    let (guest_has, host_has) = (enabled(guest), enabled(host));
    for bit in (2..63u32).filter(|bit| guest_has >> bit & 1 != 0) {
        let name = COMPONENTS.get(bit as usize - 2).copied().unwrap_or("a component");
        let ([size, offset, ..], [host_size, host_offset, ..]) =
            (guest.registers(XSAVE_LEAF, bit), host.registers(XSAVE_LEAF, bit));
        if host_has >> bit & 1 == 0 {
            found.push(format!("the guest's XSAVE area has {name} (bit {bit}), which this host's lacks"));
        } else if (size, offset) != (host_size, host_offset) {
            found.push(format!(
                "{name} (bit {bit}) of the guest's XSAVE area has {size} bytes at {offset}, and of this host's {host_size} at \
                 {host_offset}"
            ));
        }
    }
    let (guest_bytes, host_bytes) = (guest.xsave_bytes, host.xsave_bytes);
    if guest_bytes > host_bytes {
        found.push(format!("the guest's XSAVE state has {guest_bytes} bytes, and this host takes {host_bytes}"));
    }
}

fn differ(guest_khz: u32, host_khz: u32) -> bool {
    let both_known = guest_khz != 0 && host_khz != 0;
    both_known && u64::from(guest_khz.abs_diff(host_khz)) * 1_000_000 > u64::from(host_khz) * TSC_TOLERANCE_PPM
}

#[cfg(test)]
#[path = "profile_tests.rs"]
mod tests;
