//! Topology as guests work it out, on what an Intel and an AMD host report.

use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// The host's own topology is all over it: it must not shine through.
fn intel_host() -> Vec<kvm_cpuid_entry2> {
    vec![
        leaf(0, 0, [0x1F, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x606a6, 0x1740_0800, 1 << 13, 0x0f8b_fbff]),
        leaf(4, 0, [0xfc00_4121, 0x02c0_003f, 0x3f, 0]),
        leaf(4, 3, [0xfc1f_c163, 0x02c0_003f, 0xffff, 0]),
        leaf(4, 4, [0, 0, 0, 0]),
        leaf(0xB, 0, [1, 2, 0x100, 0x17]),
        leaf(0xB, 1, [6, 64, 0x201, 0x17]),
        leaf(0x1F, 0, [1, 2, 0x100, 0x17]),
        leaf(0x4000_0000, 0, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0008, 0, [0x392e, 0, 0, 0]),
    ]
}

fn amd_host() -> Vec<kvm_cpuid_entry2> {
    vec![
        leaf(0, 0, [0xD, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        leaf(1, 0, [0x00a2_0f10, 0x0720_0800, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 1 << 22, 0]),
        leaf(0x8000_0008, 0, [0x3030, 0x1234, 0x501f, 0]),
        leaf(0x8000_001D, 0, [0x0000_4121, 0x01c0_003f, 0x3f, 0]),
        leaf(0x8000_001D, 3, [0x0003_c163, 0x03c0_003f, 0x7fff, 1]),
        leaf(0x8000_001D, 4, [0, 0, 0, 0]),
        leaf(0x8000_001E, 0, [7, 0x0103, 0x0301, 0]),
    ]
}

fn registers(cpuid: &CpuId, function: u32, index: u32) -> [u32; 4] {
    let mut found = cpuid.as_slice().iter().filter(|entry| (entry.function, entry.index) == (function, index));
    let entry = found.next().unwrap();
    assert!(found.next().is_none(), "leaf {function:#x}.{index} is there twice");
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

fn machine(host: Vec<kvm_cpuid_entry2>) -> CpuId {
    machine_cpuid(&host, true).unwrap()
}

const SIZES: [(u32, u32); 5] = [(1, 0), (2, 1), (4, 2), (6, 3), (32, 5)];

#[test]
fn every_apic_id_field_is_the_vcpus_index() {
    for (host, topology_leaves) in [(intel_host(), &[0xB, 0x1F][..]), (amd_host(), &[0xB])] {
        let machine = machine(host);
        for (cpus, _) in SIZES {
            for index in 0..cpus {
                let cpuid = vcpu_cpuid(&machine, index, cpus);
                assert_eq!(registers(&cpuid, 1, 0)[1], 0x0800 | cpus << 16 | index << 24);
                for leaf in topology_leaves {
                    assert!((0..3).all(|level| registers(&cpuid, *leaf, level)[3] == index));
                }
            }
        }
    }
}

#[test]
fn topology_leaves_count_single_threaded_cores() {
    let machine = machine(intel_host());
    for (cpus, bits) in SIZES {
        let cpuid = vcpu_cpuid(&machine, 0, cpus);
        for function in [0xB, 0x1F] {
            assert_eq!(registers(&cpuid, function, 0), [0, 1, 0x100, 0]);
            assert_eq!(registers(&cpuid, function, 1), [bits, cpus, 0x201, 0]);
            assert_eq!(registers(&cpuid, function, 2), [0, 0, 2, 0]);
        }
        assert_eq!(registers(&cpuid, 1, 0)[3] & LEAF1_EDX_HTT != 0, cpus > 1);
    }
}

#[test]
fn intel_caches_are_private_but_for_the_last_level() {
    let machine = machine(intel_host());
    for (cpus, bits) in SIZES {
        let cpuid = vcpu_cpuid(&machine, 0, cpus);
        let cores = (1 << bits) - 1;
        assert_eq!(registers(&cpuid, 4, 0)[0], 0x121 | cores << 26);
        assert_eq!(registers(&cpuid, 4, 3)[0], 0x163 | cores << 14 | cores << 26);
        assert_eq!(registers(&cpuid, 4, 4)[0], 0, "the end of the list");
    }
}

#[test]
fn amd_leaves_count_cores_in_one_node() {
    let machine = machine(amd_host());
    for (cpus, bits) in SIZES {
        for index in 0..cpus {
            let cpuid = vcpu_cpuid(&machine, index, cpus);
            assert_eq!(registers(&cpuid, 0x8000_0008, 0), [0x3030, 0x1234, (cpus - 1) | bits << 12, 0]);
            assert_eq!(registers(&cpuid, 0x8000_001E, 0), [index, index, 0, 0]);
            assert_eq!(registers(&cpuid, 0x8000_001D, 0)[0], 0x121);
            assert_eq!(registers(&cpuid, 0x8000_001D, 3)[0], 0x163 | (cpus - 1) << 14);
            assert_eq!(registers(&cpuid, 0x8000_001D, 4)[0], 0, "the end of the list");
            assert_eq!(registers(&cpuid, 0x8000_0001, 0)[2], 1 << 22 | u32::from(cpus > 1) << 1);
        }
    }
}

#[test]
fn intel_guests_see_no_amd_topology() {
    let cpuid = vcpu_cpuid(&machine(intel_host()), 0, 4);
    assert_eq!(registers(&cpuid, 0x8000_0008, 0), [0x392e, 0, 0, 0]);
}

#[test]
fn hypervisor_and_timer_bits_follow_the_machine() {
    for tsc_deadline in [false, true] {
        let cpuid = machine_cpuid(&intel_host(), tsc_deadline).unwrap();
        let ecx = registers(&cpuid, 1, 0)[2];
        assert_eq!(ecx & (LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC), LEAF1_ECX_HYPERVISOR | LEAF1_ECX_X2APIC);
        assert_eq!(ecx & LEAF1_ECX_TSC_DEADLINE != 0, tsc_deadline);
        assert_eq!(ecx & 1 << 13, 1 << 13, "the host's bits stay");
    }
}

#[test]
fn kvm_leaves_stay_as_kvm_offers_them() {
    let cpuid = vcpu_cpuid(&machine(intel_host()), 3, 4);
    assert_eq!(registers(&cpuid, 0x4000_0000, 0), [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
    assert_eq!(registers(&cpuid, 0x4000_0001, 0), [0x0100_7efb, 0, 0, 0]);
}

#[test]
fn a_host_without_the_topology_leaf_gets_one() {
    let old = machine(vec![leaf(0, 0, [4, 0x756e_6547, 0x6c65_746e, 0x4965_6e69])]);
    assert_eq!(registers(&old, 0, 0)[0], 0xB);
    assert_eq!(registers(&vcpu_cpuid(&old, 1, 2), 0xB, 1), [1, 2, 0x201, 1]);
    assert!(old.as_slice().iter().all(|entry| entry.function != 0x1F));
}

#[test]
fn more_leaves_than_kvm_takes_are_refused() {
    let many: Vec<_> = (0..KVM_MAX_CPUID_ENTRIES as u32).map(|function| leaf(function + 0x100, 0, [0; 4])).collect();
    let error = machine_cpuid(&many, true).unwrap_err().to_string();
    assert_eq!(error, "this host has more CPUID leaves than KVM takes");
}
