//! What the processor says about itself: all that KVM supports on this host, with the machine's topology.
//!
//! One package, one thread a core; vCPU `i` is core `i` with (x2)APIC id `i`. KVM's own leaves (0x40000000 on) stay
//! as KVM offers them.

use super::layout::MAX_CPUS;
use super::model::{CpuModel, hide_immovable};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const AMD_LEAF1_ECX_CMP_LEGACY: u32 = 1 << 1;

/// Extended topology leaves: the second exists on some Intel processors only.
const TOPOLOGY_LEAF: u32 = 0xB;
const TOPOLOGY_V2_LEAF: u32 = 0x1F;
/// Domain types of the topology leaves (Intel SDM 2A, CPUID).
const DOMAIN_THREAD: u32 = 1;
const DOMAIN_CORE: u32 = 2;

/// Why the host's CPUID could not be had.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// `KVM_GET_SUPPORTED_CPUID` failed.
    #[error("cannot ask KVM which CPUID it supports")]
    Supported(#[source] kvm_ioctls::Error),
    /// More leaves than KVM takes.
    #[error("this host has more CPUID leaves than KVM takes")]
    TooManyLeaves,
    /// A CPU model needs more than the host has.
    #[error("this host cannot be {model}: it lacks {missing}")]
    Level {
        /// The model.
        model: CpuModel,
        /// The features, by name and place.
        missing: String,
    },
}

/// What KVM supports on this host and can move to another, with the leaves in place that [`vcpu_cpuid`] fills in.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, CpuidError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Supported)?;
    // KVM_GET_SUPPORTED_CPUID does not tell; a capability does (KVM api.rst, 4.46).
    machine_cpuid(supported.as_slice(), kvm.check_extension(Cap::TscDeadlineTimer))
}

fn machine_cpuid(supported: &[kvm_cpuid_entry2], tsc_deadline: bool) -> Result<CpuId, CpuidError> {
    let topology_leaf = |function| matches!(function, TOPOLOGY_LEAF | TOPOLOGY_V2_LEAF);
    let mut entries: Vec<_> = supported.iter().copied().filter(|entry| !topology_leaf(entry.function)).collect();
    hide_immovable(&mut entries);
    let mut max_leaf = TOPOLOGY_LEAF;
    for entry in &mut entries {
        match entry.function {
            0 => {
                entry.eax = entry.eax.max(TOPOLOGY_LEAF);
                max_leaf = entry.eax;
            }
            1 => {
                // The in-kernel local APIC has x2APIC on every host.
                entry.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC;
                set(&mut entry.ecx, LEAF1_ECX_TSC_DEADLINE, tsc_deadline);
            }
            _ => {}
        }
    }
    for function in [TOPOLOGY_LEAF, TOPOLOGY_V2_LEAF].into_iter().filter(|leaf| *leaf <= max_leaf) {
        // Threads, cores, and the level that ends the list.
        entries.extend((0..3).map(|index| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..Default::default()
        }));
    }
    CpuId::from_entries(&entries).map_err(|_| CpuidError::TooManyLeaves)
}

/// `machine`, as [`supported_cpuid`] returned it, for vCPU `index` of `cpus` (1 to [`MAX_CPUS`]).
pub fn vcpu_cpuid(machine: &CpuId, index: u32, cpus: u32) -> CpuId {
    let mut cpuid = machine.clone();
    let cpus = cpus.clamp(1, MAX_CPUS);
    let amd = cpuid.as_slice().iter().any(|entry| entry.function == 0 && is_amd(entry));
    for entry in cpuid.as_mut_slice() {
        if entry.function < 0x8000_0000 {
            set_basic_leaf(entry, index, cpus);
        } else if amd {
            set_amd_leaf(entry, index, cpus);
        }
    }
    cpuid
}

fn is_amd(leaf0: &kvm_cpuid_entry2) -> bool {
    matches!(&vendor(leaf0.ebx, leaf0.ecx, leaf0.edx), b"AuthenticAMD" | b"HygonGenuine")
}

/// The maker's name, as leaf 0 spells it.
pub(super) fn vendor(ebx: u32, ecx: u32, edx: u32) -> [u8; 12] {
    let mut vendor = [0; 12];
    for (chunk, register) in vendor.chunks_exact_mut(4).zip([ebx, edx, ecx]) {
        chunk.copy_from_slice(&register.to_le_bytes());
    }
    vendor
}

/// Bits of an APIC id that number the cores.
fn core_id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// Intel SDM 2A, CPUID.
fn set_basic_leaf(entry: &mut kvm_cpuid_entry2, index: u32, cpus: u32) {
    let id_space = cpus.next_power_of_two();
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | cpus << 16 | index << 24;
            set(&mut entry.edx, LEAF1_EDX_HTT, cpus > 1);
        }
        (4, _) if entry.eax & 0x1f != 0 => {
            let sharing = sharers(entry.eax >> 5 & 7, id_space);
            entry.eax = (entry.eax & 0x3fff) | (sharing - 1) << 14 | (id_space - 1) << 26;
        }
        (TOPOLOGY_LEAF | TOPOLOGY_V2_LEAF, level) => {
            entry.eax = if level == 1 { core_id_bits(cpus) } else { 0 };
            entry.ebx = [1, cpus].get(level as usize).copied().unwrap_or(0);
            entry.ecx = level | [DOMAIN_THREAD, DOMAIN_CORE].get(level as usize).copied().unwrap_or(0) << 8;
            entry.edx = index;
        }
        _ => {}
    }
}

/// AMD APM volume 3, appendix E.
fn set_amd_leaf(entry: &mut kvm_cpuid_entry2, index: u32, cpus: u32) {
    match entry.function {
        0x8000_0001 => set(&mut entry.ecx, AMD_LEAF1_ECX_CMP_LEGACY, cpus > 1),
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (cpus - 1) | core_id_bits(cpus) << 12,
        0x8000_001D if entry.eax & 0x1f != 0 => {
            entry.eax = (entry.eax & !(0xfff << 14)) | (sharers(entry.eax >> 5 & 7, cpus) - 1) << 14;
        }
        0x8000_001E => {
            entry.eax = index;
            entry.ebx = index & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// How many of `all` share a cache of `level`: each core has its own but for the last level.
fn sharers(level: u32, all: u32) -> u32 {
    if level >= 3 { all } else { 1 }
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
