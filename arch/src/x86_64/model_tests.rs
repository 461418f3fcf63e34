//! What each model shows of a host that has everything.

use super::super::cpuid::vcpu_cpuid;
use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// Every feature bit there is, and every leaf that a model treats specially.
fn rich_host() -> CpuId {
    let all = u32::MAX;
    let mut leaves = vec![
        leaf(0, 0, [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x606a6, 0x1740_0800, all, all]),
        leaf(6, 0, [4, 0, 0, 0]),
        leaf(7, 0, [2, all, all, all]),
        leaf(7, 1, [all, 0, 0, all]),
        leaf(7, 2, [0, 0, 0, all]),
        leaf(0xD, 0, [0x602e7, 0x2b00, 0x2b00, 0]),
        leaf(0xD, 1, [0x1f, 0x2440, 0x1800, 0]),
        leaf(0xD, 2, [256, 576, 0, 0]),
        leaf(0xD, 5, [64, 1088, 0, 0]),
        leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, all, all]),
        leaf(0x8000_0007, 0, [0, 0, 0, 0x100]),
        leaf(0x8000_0008, 0, [0x3030, all, 0x7001, 0]),
        leaf(0x8000_0021, 0, [all, 0, 6, 0]),
    ];
    leaves.extend(
        [0xA, 0x12, 0x14, 0x19, 0x1D, 0x24, 0x8000_000A, 0x8000_0022].map(|function| leaf(function, 0, [1; 4])),
    );
    CpuId::from_entries(&leaves).unwrap()
}

fn names(cpuid: &CpuId) -> Vec<String> {
    let described = WORDS.iter().flat_map(|word| word.describe(word.value(cpuid.as_slice()) & !word.repeated()));
    described.filter_map(|feature| feature.split_once(" (").map(|(name, _)| name.to_owned())).collect()
}

fn assert_has(cpuid: &CpuId, has: &str, has_not: &str) {
    let names = names(cpuid);
    let lacking: Vec<_> = has.split_whitespace().filter(|name| !names.iter().any(|known| known == name)).collect();
    let extra: Vec<_> = has_not.split_whitespace().filter(|name| names.iter().any(|known| known == name)).collect();
    assert!(lacking.is_empty() && extra.is_empty(), "lacks {lacking:?}, has {extra:?}");
}

fn registers(cpuid: &CpuId, function: u32, index: u32) -> Option<[u32; 4]> {
    let found = cpuid.as_slice().iter().find(|leaf| (leaf.function, leaf.index) == (function, index));
    found.map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
}

#[test]
fn names_go_to_and_fro() {
    for (model, name) in MODELS {
        assert_eq!((model.to_string().as_str(), name.parse()), (name, Ok(model)));
    }
    assert_eq!(format!("{:<10}|", CpuModel::Host), "host      |");
    let message = "x86-64-v4".parse::<CpuModel>().unwrap_err().to_string();
    assert_eq!(message, "no CPU model is called \"x86-64-v4\": there are host, x86-64-v2 and x86-64-v3");
}

#[test]
fn every_name_of_a_list_is_a_feature() {
    for name in [V1, V2, V3, MACHINE, CRYPTOGRAPHY, SAFETY, IMMOVABLE].iter().flat_map(|list| list.split_whitespace()) {
        assert!(WORDS.iter().any(|word| word.mask(&[name]) != 0), "{name} is no feature");
    }
}

#[test]
fn the_host_model_hides_only_what_does_not_move() {
    let mut leaves = rich_host().as_slice().to_vec();
    hide_immovable(&mut leaves);
    let cpuid = CpuId::from_entries(&leaves).unwrap();
    assert_has(&cpuid, "avx512f avx2 xsaves pku rdpid amd_ibpb", IMMOVABLE);
    for function in [0xA, 0x12, 0x14, 0x1D, 0x8000_000A, 0x8000_0022] {
        assert_eq!(registers(&cpuid, function, 0), None, "leaf {function:#x}");
    }
    assert_eq!(registers(&cpuid, 0x24, 0), Some([1; 4]));
    assert_eq!(model_cpuid(&cpuid, CpuModel::Host).unwrap().as_slice(), cpuid.as_slice());
}

#[test]
fn v2_has_no_xsave_and_nothing_that_needs_it() {
    let cpuid = model_cpuid(&rich_host(), CpuModel::V2).unwrap();
    assert_has(&cpuid, &[V1, V2, MACHINE, CRYPTOGRAPHY, SAFETY].join(" "), &[V3, IMMOVABLE].join(" "));
    assert_has(&cpuid, "", "osxsave xsaveopt avx512f pku fsgsbase avx_vnni la57");
    assert!(cpuid.as_slice().iter().all(|leaf| leaf.function != 0xD));
    for function in [0x19, 0x24, 0xA, 0x8000_000A] {
        assert_eq!(registers(&cpuid, function, 0), None, "leaf {function:#x}");
    }
}

#[test]
fn v3_has_xsave_with_avx_in_standard_format() {
    let cpuid = model_cpuid(&rich_host(), CpuModel::V3).unwrap();
    assert_has(&cpuid, &[V1, V2, V3, MACHINE, CRYPTOGRAPHY, SAFETY].join(" "), IMMOVABLE);
    assert_has(&cpuid, "", "xsaveopt xsavec xsaves avx512f pku fma4 xop");
    assert_eq!(registers(&cpuid, 0xD, 0), Some([7, 832, 832, 0]));
    assert_eq!(registers(&cpuid, 0xD, 1), Some([0; 4]));
    assert_eq!(registers(&cpuid, 0xD, 2), Some([256, 576, 0, 0]));
    assert_eq!(registers(&cpuid, 0xD, 5), None);
}

#[test]
fn levels_keep_what_is_kvms_and_the_machines() {
    for model in [CpuModel::V2, CpuModel::V3] {
        let cpuid = model_cpuid(&rich_host(), model).unwrap();
        assert_eq!(registers(&cpuid, 0x4000_0001, 0), Some([0x0100_7efb, 0, 0, 0]));
        assert_eq!(registers(&cpuid, 0x8000_0007, 0), Some([0, 0, 0, 0x100]));
        assert_eq!(registers(&cpuid, 0x8000_0001, 0).unwrap()[3] & 0x0183_f3ff, 0x0183_f3ff, "AMD's repeated bits");
        // A second reduction, and that of each vCPU's topology, find nothing to change.
        assert_eq!(model_cpuid(&cpuid, model).unwrap().as_slice(), cpuid.as_slice());
        let once = vcpu_cpuid(&cpuid, 0, 4);
        assert_eq!(vcpu_cpuid(&once, 0, 4).as_slice(), once.as_slice());
    }
}

#[test]
fn a_host_below_the_level_is_refused_by_name() {
    let mut leaves = rich_host().as_slice().to_vec();
    for leaf in &mut leaves {
        match (leaf.function, leaf.index) {
            (7, 0) => leaf.ebx &= !(1 << 5),
            (1, 0) => leaf.ecx &= !(1 << 12),
            _ => {}
        }
    }
    let host = CpuId::from_entries(&leaves).unwrap();
    model_cpuid(&host, CpuModel::V2).unwrap();
    let message = model_cpuid(&host, CpuModel::V3).unwrap_err().to_string();
    let lacking = "fma (CPUID 1 ECX bit 12), avx2 (CPUID 7.0 EBX bit 5)";
    assert_eq!(message, format!("this host cannot be x86-64-v3: it lacks {lacking}"));
}
