//! The names of CPUID's feature bits, as Linux has them in /proc/cpuinfo. Refuses to know which are good to have.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(super) fn of(self, leaf: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut leaf.eax,
            Self::Ebx => &mut leaf.ebx,
            Self::Ecx => &mut leaf.ecx,
            Self::Edx => &mut leaf.edx,
        }
    }
}

/// A register whose bits are features.
pub(super) struct Word {
    pub function: u32,
    pub index: u32,
    pub register: Register,
    /// From bit 0 on; `-` is a bit without a name, `.` one that says what another register says already.
    names: &'static str,
}

impl Word {
    const fn new(function: u32, index: u32, register: Register, names: &'static str) -> Self {
        Self { function, index, register, names }
    }

    fn names(&self) -> impl Iterator<Item = (u32, &'static str)> {
        (0..32).zip(self.names.split_ascii_whitespace())
    }

    /// The bits that `names` has, whatever else is in it.
    pub(super) fn mask(&self, names: &[&str]) -> u32 {
        self.names().filter(|(_, name)| names.contains(name)).fold(0, |mask, (bit, _)| mask | 1 << bit)
    }

    /// The bits that repeat another register.
    pub(super) fn repeated(&self) -> u32 {
        self.mask(&["."])
    }

    /// The register among `leaves`; 0 if the leaf is not there.
    pub(super) fn value(&self, leaves: &[kvm_cpuid_entry2]) -> u32 {
        let mut found =
            leaves.iter().copied().filter(|leaf| (leaf.function, leaf.index) == (self.function, self.index));
        found.next().map_or(0, |mut leaf| *self.register.of(&mut leaf))
    }

    /// Each bit of `bits` as a person knows it: `avx2 (CPUID 7.0 EBX bit 5)`.
    pub(super) fn describe(&self, bits: u32) -> impl Iterator<Item = String> {
        (0..32).filter(move |bit| bits & 1 << bit != 0).map(|bit| {
            let name = self.names().find(|(at, name)| *at == bit && *name != "-").map(|(_, name)| name);
            let place = format!("CPUID {} bit {bit}", self.place());
            name.map_or_else(|| place.clone(), |name| format!("{name} ({place})"))
        })
    }

    fn place(&self) -> String {
        let register = format!("{:?}", self.register).to_uppercase();
        match self.function {
            7 | 0xd => format!("{:x}.{} {register}", self.function, self.index),
            function if function < 0x10 => format!("{function:x} {register}"),
            function => format!("{function:#x} {register}"),
        }
    }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// Every register of features that KVM tells guests.
pub(super) const WORDS: [Word; 17] = [
    Word::new(
        1,
        0,
        Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse
        sse2 ss ht tm ia64 pbe",
    ),
    Word::new(
        1,
        0,
        Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1
        sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    Word::new(6, 0, Eax, "- - arat"),
    Word::new(
        7,
        0,
        Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a
        avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni
        avx512bw avx512vl",
    ),
    Word::new(
        7,
        0,
        Ecx,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni
        avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd
        sgx_lc pks",
    ),
    Word::new(
        7,
        0,
        Edx,
        "- - avx512_4vnniw avx512_4fmaps fsrm - - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort -
        tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8
        spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    Word::new(
        7,
        1,
        Eax,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs
        wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs",
    ),
    Word::new(
        7,
        1,
        Edx,
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - - avx10",
    ),
    Word::new(7, 2, Edx, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    Word::new(0xd, 1, Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    Word::new(0x4000_0001, 0, Eax, KVM_NAMES),
    Word::new(
        0x8000_0001,
        0,
        Edx,
        ". . . . . . . . . . - syscall . . . . . . - mp nx - mmxext . . fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    Word::new(
        0x8000_0001,
        0,
        Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp
        fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    Word::new(0x8000_0007, 0, Edx, "- - - - - - - - nonstop_tsc"),
    Word::new(
        0x8000_0008,
        0,
        Ebx,
        "clzero irperf xsaveerptr - rdpru - - - mcommit wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp -
        amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no amd_ibpb_ret brs",
    ),
    Word::new(
        0x8000_0021,
        0,
        Eax,
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc - - verw_clear null_sel_clr_base - autoibrs - - - - - - - - -
        - - prefetchi - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no",
    ),
    Word::new(0x8000_0021, 0, Ecx, "- tsa_sq_no tsa_l1_no"),
];

/// KVM's own (Linux, cpuid.rst of KVM), without their `KVM_FEATURE_`.
const KVM_NAMES: &str =
    "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi
    kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield
    kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable";

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_no_more_than_bits() {
        let mut seen = BTreeSet::new();
        for word in &WORDS {
            assert!(word.names.split_ascii_whitespace().count() <= 32, "too many names in {}", word.place());
            for (_, name) in word.names().filter(|(_, name)| !["-", "."].contains(name)) {
                assert!(seen.insert(name), "{name} is there twice");
            }
        }
    }

    #[test]
    fn names_stand_at_their_bits() {
        let known = [
            (1, Edx, 26, "sse2"),
            (1, Ecx, 13, "cx16"),
            (1, Ecx, 31, "hypervisor"),
            (7, Ebx, 5, "avx2"),
            (7, Ebx, 31, "avx512vl"),
            (7, Ecx, 16, "la57"),
            (7, Ecx, 22, "rdpid"),
            (7, Ecx, 31, "pks"),
            (7, Edx, 10, "md_clear"),
            (7, Edx, 20, "ibt"),
            (7, Edx, 31, "spec_ctrl_ssbd"),
            (0x8000_0001, Edx, 29, "lm"),
            (0x8000_0001, Ecx, 5, "abm"),
            (0x8000_0001, Ecx, 29, "mwaitx"),
            (0x8000_0008, Ebx, 12, "amd_ibpb"),
            (0x8000_0008, Ebx, 31, "brs"),
            (0x8000_0021, Eax, 30, "srso_user_kernel_no"),
            (0x4000_0001, Eax, 24, "kvm_clocksource_stable"),
        ];
        for (function, register, bit, name) in known {
            let word = WORDS.iter().find(|w| (w.function, w.index, w.register) == (function, 0, register)).unwrap();
            assert_eq!(word.mask(&[name]), 1 << bit, "{name}");
        }
    }

    #[test]
    fn a_bit_is_described_by_name_and_place() {
        let describe = |at: usize, bits| WORDS[at].describe(bits).collect::<Vec<_>>().join(", ");
        assert_eq!(describe(3, 1 << 5 | 1 << 22), "avx2 (CPUID 7.0 EBX bit 5), CPUID 7.0 EBX bit 22");
        assert_eq!(describe(1, 1), "pni (CPUID 1 ECX bit 0)");
        assert_eq!(describe(12, 1), "lahf_lm (CPUID 0x80000001 ECX bit 0)");
    }
}
