//! Guests of all kinds meet hosts of other kinds.

use super::super::cpuid::vcpu_cpuid;
use super::*;
use proptest::prelude::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> Leaf {
    Leaf { function, index, flags: 0, registers }
}

fn host() -> HostProfile {
    let leaves = vec![
        leaf(0, 0, [0xD, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x606a6, 0, 0x0020_2000, 0x0783_fbff]),
        leaf(7, 0, [1, 0x0000_0020, 0, 1 << 29]),
        leaf(0xD, 0, [7, 832, 832, 0]),
        leaf(0xD, 2, [256, 576, 0, 0]),
        leaf(0x4000_0001, 0, [0x0100_000b, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 1, 0x2010_0800]),
        leaf(0x8000_0008, 0, [0x3030, 0, 0, 0]),
    ];
    let cpu =
        CpuProfile { leaves, msrs: vec![Msr { index: 0x10a, value: 0b1001 }], xsave_bytes: 4096, tsc_khz: 2_000_000 };
    HostProfile { cpu, scales_tsc: false }
}

/// What is found when `change` is made to a guest of [`host`]'s own kind.
fn found(change: impl FnOnce(&mut CpuProfile)) -> Vec<String> {
    let host = host();
    let mut guest = host.cpu.clone();
    change(&mut guest);
    incompatibilities(&guest, &host)
}

fn register(profile: &mut CpuProfile, function: u32, index: u32) -> &mut [u32; 4] {
    let found = profile.leaves.iter_mut().find(|leaf| (leaf.function, leaf.index) == (function, index));
    &mut found.unwrap().registers
}

#[test]
fn a_guest_moves_to_a_host_of_its_kind_or_better() {
    assert_eq!(found(|_| {}), Vec::<String>::new());
    assert_eq!(
        found(|guest| {
            register(guest, 7, 0)[1] = 0;
            register(guest, 0x8000_0008, 0)[0] = 0x302e;
            guest.leaves.retain(|leaf| leaf.function != 0xD);
            guest.msrs.clear();
        }),
        Vec::<String>::new()
    );
}

#[test]
fn features_that_the_host_lacks_are_named() {
    let sentences = found(|guest| {
        register(guest, 7, 0)[1] |= 1 << 16 | 1 << 22;
        register(guest, 0x8000_0001, 0)[2] |= 1 << 5;
        register(guest, 0x4000_0001, 0)[0] |= 1 << 5;
        // How the machine is, not what the processor can do.
        register(guest, 1, 0)[2] |= 1 << 27;
        register(guest, 1, 0)[3] |= 1 << 28;
        register(guest, 0x8000_0001, 0)[3] |= 1 << 4;
    });
    assert_eq!(
        sentences,
        [
            "the guest uses avx512f (CPUID 7.0 EBX bit 16), which this host lacks",
            "the guest uses CPUID 7.0 EBX bit 22, which this host lacks",
            "the guest uses kvm_steal_time (CPUID 0x40000001 EAX bit 5), which this host lacks",
            "the guest uses abm (CPUID 0x80000001 ECX bit 5), which this host lacks",
        ]
    );
}

#[test]
fn the_maker_the_addresses_and_the_msrs_count() {
    let sentences = found(|guest| {
        *register(guest, 0, 0) = [0xD, 0x6874_7541, 0x444d_4163, 0x6974_6e65];
        register(guest, 0x8000_0008, 0)[0] = 0x3034;
        guest.msrs[0].value |= 1 << 5 | 1 << 9 | 1 << 62;
    });
    let relies =
        |bit| format!("the guest relies on {bit} of IA32_ARCH_CAPABILITIES (MSR 0x10a), which this host lacks");
    assert_eq!(
        sentences,
        [
            "the guest has a processor by \"AuthenticAMD\", and this host one by \"GenuineIntel\"".to_owned(),
            "the guest's physical addresses have 52 bits, and this host's 48".to_owned(),
            relies("mds_no, bit 5"),
            relies("bit 9"),
            relies("its_no, bit 62"),
        ]
    );
}

#[test]
fn the_xsave_area_must_fit() {
    let sentences = found(|guest| {
        register(guest, 0xD, 0)[0] |= 1 << 9;
        register(guest, 0xD, 2)[1] = 1024;
        guest.xsave_bytes = 11008;
    });
    assert_eq!(
        sentences,
        [
            "avx (bit 2) of the guest's XSAVE area has 256 bytes at 1024, and of this host's 256 at 576",
            "the guest's XSAVE area has pkru (bit 9), which this host's lacks",
            "the guest's XSAVE state has 11008 bytes, and this host takes 4096",
        ]
    );
}

#[test]
fn the_tsc_may_differ_by_what_kvm_tolerates_or_scales() {
    let sentences = |khz| found(|guest| guest.tsc_khz = khz);
    for same in [0, 2_000_000, 2_000_500, 1_999_500] {
        assert_eq!(sentences(same), Vec::<String>::new());
    }
    let refused = "the guest's TSC runs at 2000501 kHz, this host's at 2000000 kHz, and it cannot scale";
    assert_eq!(sentences(2_000_501), [refused]);
    let scaling = HostProfile { scales_tsc: true, ..host() };
    let faster = CpuProfile { tsc_khz: 3_000_000, ..scaling.cpu.clone() };
    assert_eq!(incompatibilities(&faster, &scaling), Vec::<String>::new());
}

#[test]
#[cfg_attr(not(kvm_opens), ignore = "/dev/kvm does not open")]
fn a_guest_of_this_host_can_stay_here_with_its_own_cpuid() {
    let kvm = Kvm::new().expect("this test needs /dev/kvm");
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let host = HostProfile::of(&kvm, &vcpu).unwrap();
    let cpuid = vcpu_cpuid(&supported_cpuid(&kvm).unwrap(), 0, 4);
    vcpu.set_cpuid2(&cpuid).unwrap();
    let guest = CpuProfile::of(&kvm, &vcpu, &cpuid).unwrap();
    assert_eq!(incompatibilities(&guest, &host), Vec::<String>::new());
    assert_eq!(guest.cpuid().unwrap().as_slice(), cpuid.as_slice());
    let bytes = postcard::to_stdvec(&guest).unwrap();
    assert_eq!(postcard::from_bytes::<CpuProfile>(&bytes).unwrap(), guest);
    println!("{} leaves, {} bytes, TSC {} kHz", guest.leaves.len(), bytes.len(), guest.tsc_khz);
}

#[test]
fn version_1_of_a_profile_is_read_for_ever() {
    assert_eq!(CpuProfile::VERSION, 1);
    let profile = CpuProfile {
        leaves: vec![Leaf { function: 0x8000_0001, index: 2, flags: 1, registers: [1, 200, 3, u32::MAX] }],
        msrs: vec![Msr { index: 0x10a, value: 1 << 62 }],
        xsave_bytes: 4096,
        tsc_khz: 2_596_142,
    };
    let golden = [
        0x01, 0x81, 0x80, 0x80, 0x80, 0x08, 0x02, 0x01, 0x01, 0xc8, 0x01, 0x03, 0xff, 0xff, 0xff, 0xff, 0x0f, 0x01,
        0x8a, 0x02, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40, 0x80, 0x20, 0xae, 0xba, 0x9e, 0x01,
    ];
    assert_eq!(postcard::to_stdvec(&profile).unwrap(), golden);
    assert_eq!(postcard::from_bytes::<CpuProfile>(&golden).unwrap(), profile);
}

#[test]
fn a_profile_of_too_many_leaves_is_refused() {
    let profile = CpuProfile { leaves: vec![leaf(0, 0, [0; 4]); 257], ..host().cpu };
    assert!(postcard::from_bytes::<CpuProfile>(&postcard::to_stdvec(&profile).unwrap()).is_err());
}

proptest! {
    #[test]
    fn random_profiles_are_compared_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        if let Ok(guest) = postcard::from_bytes::<CpuProfile>(&bytes) {
            prop_assert!(guest.leaves.len() <= 256 && guest.msrs.len() <= 64);
            let _sentences = incompatibilities(&guest, &host());
            guest.cpuid().unwrap();
        }
    }
}
