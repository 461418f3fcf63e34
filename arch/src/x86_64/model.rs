//! The processor that a guest gets: the host's, or one of the x86-64 psABI's microarchitecture levels. Refuses to know vCPUs.
//!
//! A guest keeps the CPUID that it booted with wherever it moves, so a model must be one that every host of a cluster has: a level
//! hides what goes beyond it. Of that it keeps what a guest would miss for its safety, its cryptography or its clock, where
//! the host has it; a target that lacks one of those says so by name ([`super::profile`]).
//!
//! No model has what would not move: nested virtualisation, the PMU and what belongs to it, SGX, encrypted memory, AMX (a process must
//! ask Linux for it), and CET (its shadow stack pointer is not among KVM's MSRs).

use super::CpuidError;
use super::features::{WORDS, Word};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What a guest's processor is like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuModel {
    /// All that the host has and that can move.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// SSE4.2 and CMPXCHG16B: processors from 2009 on. No XSAVE, so x87 and SSE are all of its FPU.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2, BMI and FMA: processors from 2013 (Intel) or 2017 (AMD) on.
    #[serde(rename = "x86-64-v3")]
    V3,
}

/// All models, by name.
const MODELS: [(CpuModel, &str); 3] =
    [(CpuModel::Host, "host"), (CpuModel::V2, "x86-64-v2"), (CpuModel::V3, "x86-64-v3")];

impl fmt::Display for CpuModel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = MODELS.iter().find(|(model, _)| model == self).map_or("", |(_, name)| name);
        formatter.pad(name)
    }
}

/// No model has this name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no CPU model is called {0:?}: there are host, x86-64-v2 and x86-64-v3")]
pub struct UnknownCpuModel(String);

impl FromStr for CpuModel {
    type Err = UnknownCpuModel;

    fn from_str(name: &str) -> Result<Self, UnknownCpuModel> {
        let found = MODELS.iter().find(|(_, known)| *known == name);
        found.map(|(model, _)| *model).ok_or_else(|| UnknownCpuModel(name.to_owned()))
    }
}

/// What the levels require, each on top of the one before (System V ABI, AMD64 supplement, 3.1.1).
const V1: &str = "cmov cx8 fpu fxsr mmx syscall sse sse2 lm";
const V2: &str = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";
const V3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";

/// What a level keeps where the host has it: the rest of the base architecture and of the machine,
const MACHINE: &str = "vme de pse tsc msr pae mce apic sep mtrr pge mca pat pse36 clflush ht nx rdtscp arat x2apic
    tsc_deadline_timer hypervisor nonstop_tsc cmp_legacy cr8_legacy topoext";
/// cryptography, entropy, and what makes page-table isolation cheap,
const CRYPTOGRAPHY: &str = "aes pclmulqdq rdrand rdseed pcid invpcid";
/// and all by which a kernel protects itself or knows that it need not.
const SAFETY: &str = "smep smap umip spec_ctrl intel_stibp spec_ctrl_ssbd flush_l1d arch_capabilities md_clear srbds_ctrl
    rtm_always_abort tsx_force_abort intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no amd_ibpb amd_ibrs amd_stibp
    amd_stibp_always_on amd_ssbd virt_ssbd amd_ssb_no amd_psfd btc_no amd_ibpb_ret lfence_rdtsc verw_clear
    null_sel_clr_base autoibrs sbpb ibpb_brtype srso_no srso_user_kernel_no tsa_sq_no tsa_l1_no";

/// What no guest has, and the leaves that belong to it.
const IMMOVABLE: &str =
    "vmx svm skinit pdcm dtes64 ds_cpl dts intel_pt arch_lbr arch_perfmon_ext ibs perfctr_core perfctr_nb
    perfctr_llc brs sgx sgx_lc amx_bf16 amx_tile amx_int8 amx_fp16 amx_complex shstk ibt";
const IMMOVABLE_LEAVES: [u32; 11] =
    [0xA, 0x12, 0x14, 0x1C, 0x1D, 0x1E, 0x23, 0x8000_000A, 0x8000_001B, 0x8000_001F, 0x8000_0022];

/// Leaves that a level has: identity, caches, topology, features, frequencies.
const LEVEL_LEAVES: [u32; 10] = [0, 1, 2, 4, 6, 7, 0xB, 0x15, 0x16, 0x1F];
const LEVEL_EXTENDED_LEAVES: [u32; 3] = [0x8000_001D, 0x8000_001E, 0x8000_0021];
const XSAVE_LEAF: u32 = 0xD;
const KVM_LEAVES: std::ops::Range<u32> = 0x4000_0000..0x4001_0000;

/// Bytes of an XSAVE area with x87, SSE and AVX in standard format: legacy area, header, and AVX at 576.
const V3_XSAVE_BYTES: u32 = 576 + 256;
const V3_XCR0: u32 = 0b111;

/// Takes out what would not move.
pub(super) fn hide_immovable(leaves: &mut Vec<kvm_cpuid_entry2>) {
    leaves.retain(|leaf| !IMMOVABLE_LEAVES.contains(&leaf.function));
    let immovable = names(&[IMMOVABLE]);
    for_each_word(leaves, |word, register| *register &= !word.mask(&immovable));
}

/// The names in `lists`.
fn names(lists: &[&'static str]) -> Vec<&'static str> {
    lists.iter().flat_map(|list| list.split_ascii_whitespace()).collect()
}

/// `host`, as [`super::supported_cpuid`] returned it, reduced to `model`.
///
/// # Errors
/// The features of the level that the host lacks, by name.
pub fn model_cpuid(host: &CpuId, model: CpuModel) -> Result<CpuId, CpuidError> {
    let required = match model {
        CpuModel::Host => return Ok(host.clone()),
        CpuModel::V2 => names(&[V1, V2]),
        CpuModel::V3 => names(&[V1, V2, V3]),
    };
    let mut leaves = host.as_slice().to_vec();
    let lacking = |word: &Word| word.mask(&required) & !word.value(&leaves);
    let missing: Vec<_> = WORDS.iter().flat_map(|word| word.describe(lacking(word))).collect();
    if !missing.is_empty() {
        return Err(CpuidError::Level { model, missing: missing.join(", ") });
    }
    leaves.retain(|leaf| match leaf.function {
        XSAVE_LEAF => model == CpuModel::V3 && leaf.index <= 2,
        function if KVM_LEAVES.contains(&function) => true,
        function if function < 0x8000_0000 => LEVEL_LEAVES.contains(&function),
        function => function <= 0x8000_0008 || LEVEL_EXTENDED_LEAVES.contains(&function),
    });
    let allowed = [required, names(&[MACHINE, CRYPTOGRAPHY, SAFETY])].concat();
    for_each_word(&mut leaves, |word, register| {
        if !KVM_LEAVES.contains(&word.function) {
            *register &= word.mask(&allowed) | word.repeated();
        }
    });
    leaves.iter_mut().filter(|leaf| leaf.function == XSAVE_LEAF).for_each(set_v3_xsave);
    CpuId::from_entries(&leaves).map_err(|_| CpuidError::TooManyLeaves)
}

fn set_v3_xsave(leaf: &mut kvm_cpuid_entry2) {
    match leaf.index {
        0 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (V3_XCR0, V3_XSAVE_BYTES, V3_XSAVE_BYTES, 0),
        // Only the standard format: neither XSAVEC nor XSAVES, and with it no supervisor state.
        1 => (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

fn for_each_word(leaves: &mut [kvm_cpuid_entry2], mut apply: impl FnMut(&Word, &mut u32)) {
    for leaf in leaves {
        let place = (leaf.function, leaf.index);
        for word in WORDS.iter().filter(|word| (word.function, word.index) == place) {
            apply(word, word.register.of(leaf));
        }
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
