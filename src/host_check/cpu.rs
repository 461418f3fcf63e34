//! What processor a guest can be given, from KVM's CPUID. Never asks the host's processor itself.

use super::Check;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

const GROUP: &str = "processor";

/// A register of a CPUID leaf, and the bits of it that a level needs.
type Bits = (u32, Register, u32);

#[derive(Clone, Copy)]
enum Register {
    Ebx,
    Ecx,
}

/// The x86-64 psABI's microarchitecture levels, each on top of the one before.
const LEVELS: [(&str, &[Bits]); 3] = [
    // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT; LAHF
    (
        "x86-64-v2",
        &[(1, Register::Ecx, 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23), (0x8000_0001, Register::Ecx, 1)],
    ),
    // FMA, MOVBE, XSAVE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT
    (
        "x86-64-v3",
        &[
            (1, Register::Ecx, 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29),
            (7, Register::Ebx, 1 << 3 | 1 << 5 | 1 << 8),
            (0x8000_0001, Register::Ecx, 1 << 5),
        ],
    ),
    // AVX512 F, DQ, CD, BW, VL
    ("x86-64-v4", &[(7, Register::Ebx, 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31)]),
];

/// Level and nested virtualisation.
pub fn check(kvm: &Kvm) -> Vec<Check> {
    match kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) {
        Ok(cpuid) => vec![
            Check::fact(GROUP, "level for guests", level(&cpuid)),
            Check::fact(GROUP, "nested virtualisation", nested(&cpuid).to_owned()),
        ],
        Err(error) => vec![Check::fact(GROUP, "CPUID", format!("KVM tells none: {error}"))],
    }
}

fn has(cpuid: &CpuId, &(function, register, bits): &Bits) -> bool {
    cpuid.as_slice().iter().filter(|leaf| leaf.function == function && leaf.index == 0).any(|leaf| {
        let value = match register {
            Register::Ebx => leaf.ebx,
            Register::Ecx => leaf.ecx,
        };
        value & bits == bits
    })
}

fn level(cpuid: &CpuId) -> String {
    let mut reached = "x86-64-v1";
    for (name, bits) in LEVELS {
        let lacking: Vec<_> =
            bits.iter().filter(|bits| !has(cpuid, bits)).map(|bits| format!("{:#x}", bits.0)).collect();
        if !lacking.is_empty() {
            return format!("{reached} ({name} lacks features of CPUID leaf {})", lacking.join(", "));
        }
        reached = name;
    }
    reached.to_owned()
}

fn nested(cpuid: &CpuId) -> &'static str {
    if has(cpuid, &(1, Register::Ecx, 1 << 5)) {
        "VMX is offered to guests"
    } else if has(cpuid, &(0x8000_0001, Register::Ecx, 1 << 2)) {
        "SVM is offered to guests"
    } else {
        "not offered to guests"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn cpuid(leaves: &[(u32, u32, u32)]) -> CpuId {
        let entries: Vec<_> = leaves
            .iter()
            .map(|&(function, ebx, ecx)| kvm_cpuid_entry2 { function, ebx, ecx, ..Default::default() })
            .collect();
        CpuId::from_entries(&entries).unwrap()
    }

    #[test]
    fn levels_build_on_each_other() {
        assert!(level(&cpuid(&[])).starts_with("x86-64-v1 (x86-64-v2 lacks features of CPUID leaf 0x1, 0x80000001"));
        let v4_without_v3 = cpuid(&[(1, 0, u32::MAX), (7, 0xd003_0000, 0), (0x8000_0001, 0, 1)]);
        assert!(level(&v4_without_v3).starts_with("x86-64-v2 (x86-64-v3 lacks"));
        assert_eq!(level(&cpuid(&[(1, 0, u32::MAX), (7, u32::MAX, 0), (0x8000_0001, 0, u32::MAX)])), "x86-64-v4");
    }

    #[test]
    fn nested_virtualisation_is_told_by_its_bits() {
        assert_eq!(nested(&cpuid(&[(1, 0, 1 << 5)])), "VMX is offered to guests");
        assert_eq!(nested(&cpuid(&[(0x8000_0001, 0, 1 << 2)])), "SVM is offered to guests");
        assert_eq!(nested(&cpuid(&[])), "not offered to guests");
    }
}
