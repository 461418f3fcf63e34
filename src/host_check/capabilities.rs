//! /dev/kvm: whether it opens, its version, and the capabilities that Sterna uses. Creates no VM.

use super::{Check, Need};
use kvm_bindings::*;
use kvm_ioctls::Kvm;
use std::io;

const GROUP: &str = "KVM";
const API_VERSION: i32 = 12;

/// A capability: name, number, need, what it is for, what to do where it is missing.
type Row = (&'static str, u32, Need, &'static str, &'static str);

const NEWER_OR_HARDWARE: &str = "use a newer kernel, or a host with hardware virtualisation";
const NEWER: &str = "use a newer kernel";

const ROWS: &[Row] = &[
    ("KVM_CAP_USER_MEMORY", KVM_CAP_USER_MEMORY, Need::Required, "guest memory", NEWER_OR_HARDWARE),
    ("KVM_CAP_IRQCHIP", KVM_CAP_IRQCHIP, Need::Required, "interrupt controllers", NEWER_OR_HARDWARE),
    ("KVM_CAP_SET_TSS_ADDR", KVM_CAP_SET_TSS_ADDR, Need::Required, "real mode", NEWER_OR_HARDWARE),
    ("KVM_CAP_SET_IDENTITY_MAP_ADDR", KVM_CAP_SET_IDENTITY_MAP_ADDR, Need::Required, "real mode", NEWER_OR_HARDWARE),
    ("KVM_CAP_EXT_CPUID", KVM_CAP_EXT_CPUID, Need::Required, "the guest's processor", NEWER_OR_HARDWARE),
    ("KVM_CAP_MP_STATE", KVM_CAP_MP_STATE, Need::Required, "more than one vCPU", NEWER_OR_HARDWARE),
    ("KVM_CAP_SIGNAL_MSI", KVM_CAP_SIGNAL_MSI, Need::Required, "MSI-X", NEWER_OR_HARDWARE),
    ("KVM_CAP_IOEVENTFD", KVM_CAP_IOEVENTFD, Need::Required, "doorbells of devices", NEWER_OR_HARDWARE),
    (
        "KVM_CAP_IMMEDIATE_EXIT",
        KVM_CAP_IMMEDIATE_EXIT,
        Need::Required,
        "pausing without a lost wake-up",
        NEWER_OR_HARDWARE,
    ),
    ("KVM_CAP_VCPU_EVENTS", KVM_CAP_VCPU_EVENTS, Need::Required, "saved vCPU state", NEWER_OR_HARDWARE),
    ("KVM_CAP_DEBUGREGS", KVM_CAP_DEBUGREGS, Need::Required, "saved vCPU state", NEWER_OR_HARDWARE),
    ("KVM_CAP_XSAVE", KVM_CAP_XSAVE, Need::Required, "saved vCPU state", NEWER_OR_HARDWARE),
    // Not there on a host without XSAVE, which has none of these registers either.
    (
        "KVM_CAP_XCRS",
        KVM_CAP_XCRS,
        Need::Optional,
        "saved vCPU state of a processor with XSAVE",
        "use a processor with XSAVE",
    ),
    (
        "KVM_CAP_ADJUST_CLOCK",
        KVM_CAP_ADJUST_CLOCK,
        Need::Required,
        "the guest's clock across a move",
        NEWER_OR_HARDWARE,
    ),
    ("KVM_CAP_KVMCLOCK_CTRL", KVM_CAP_KVMCLOCK_CTRL, Need::Optional, "a pause is no soft lock-up", NEWER),
    ("KVM_CAP_TSC_DEADLINE_TIMER", KVM_CAP_TSC_DEADLINE_TIMER, Need::Optional, "cheaper guest timers", NEWER),
    ("KVM_CAP_GET_TSC_KHZ", KVM_CAP_GET_TSC_KHZ, Need::Optional, "telling the guest its TSC's rate", NEWER),
    (
        "KVM_CAP_TSC_CONTROL",
        KVM_CAP_TSC_CONTROL,
        Need::Optional,
        "moving to a host with another TSC rate",
        "use hosts of one TSC rate, or processors that scale it",
    ),
    ("KVM_CAP_X2APIC_API", KVM_CAP_X2APIC_API, Need::Optional, "APIC ids above 254", NEWER),
    ("KVM_CAP_XSAVE2", KVM_CAP_XSAVE2, Need::Optional, "processor state above 4 KiB (AMX)", "use Linux 5.17 or later"),
    (
        "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        Need::Optional,
        "moving big guests smoothly",
        "use Linux 5.2 or later",
    ),
    (
        "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
        KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        Need::Optional,
        "dirty ring",
        "use Linux 6.1 or later",
    ),
    (
        "KVM_CAP_NESTED_STATE",
        KVM_CAP_NESTED_STATE,
        Need::Optional,
        "moving guests that run guests",
        "use Linux 4.20 or later, with nested=1 for kvm_intel or kvm_amd",
    ),
    (
        "KVM_CAP_PRE_FAULT_MEMORY",
        KVM_CAP_PRE_FAULT_MEMORY,
        Need::Optional,
        "warm memory after a move",
        "use Linux 6.11 or later",
    ),
];

/// Checks, and the device if it can be used.
pub fn check() -> (Vec<Check>, Option<Kvm>) {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let error = io::Error::from_raw_os_error(error.errno());
            let remedy = open_remedy(error.kind());
            return (vec![Check::new(GROUP, "/dev/kvm", Need::Required, Err(error.to_string()), remedy)], None);
        }
    };
    let version = kvm.get_api_version();
    let right =
        if version == API_VERSION { Ok(format!("opens, API {version}")) } else { Err(format!("API {version}")) };
    let usable = right.is_ok();
    let mut checks = vec![Check::new(GROUP, "/dev/kvm", Need::Required, right, "use a kernel with KVM API 12")];
    checks.extend(ROWS.iter().map(|row| capability(row, kvm.check_extension_raw(row.1.into()))));
    checks.push(Check::fact(
        GROUP,
        "vCPUs a VM",
        format!("{} recommended, at most {}", kvm.get_nr_vcpus(), kvm.get_max_vcpus()),
    ));
    checks.push(Check::fact(GROUP, "memory slots", kvm.get_nr_memslots().to_string()));
    (checks, usable.then_some(kvm))
}

fn capability(&(name, _, need, purpose, remedy): &Row, answer: i32) -> Check {
    let found = if answer > 0 { Ok(format!("{answer}: {purpose}")) } else { Err(purpose.to_owned()) };
    Check::new(GROUP, name, need, found, remedy)
}

fn open_remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::NotFound => {
            "modprobe kvm_intel or kvm_amd; if that fails, enable virtualisation in the firmware (or nested virtualisation)"
        }
        io::ErrorKind::PermissionDenied => "run as root, or join the group kvm",
        _ => "see dmesg",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_capability_is_told_with_a_remedy() {
        for row in ROWS {
            let missing = capability(row, 0);
            assert!(!missing.present && missing.remedy.is_some(), "{missing:?}");
        }
        assert_eq!(capability(&ROWS[0], 3).detail, "3: guest memory");
    }

    #[test]
    fn each_way_not_to_open_has_its_own_remedy() {
        assert!(open_remedy(io::ErrorKind::NotFound).contains("modprobe"));
        assert!(open_remedy(io::ErrorKind::PermissionDenied).contains("group kvm"));
    }
}
