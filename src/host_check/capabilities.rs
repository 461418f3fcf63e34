//! /dev/kvm: whether it opens, its version, and the capabilities that Sterna uses. Creates no VM.

use super::{Check, Need};
use kvm_bindings::*;
use kvm_ioctls::Kvm;
use std::io;

const GROUP: &str = "KVM";
const API_VERSION: i32 = 12;

/// A capability that must be there: name, number, what it is for.
type Required = (&'static str, u32, &'static str);

const REQUIRED: &[Required] = &[
    ("KVM_CAP_USER_MEMORY", KVM_CAP_USER_MEMORY, "guest memory"),
    ("KVM_CAP_IRQCHIP", KVM_CAP_IRQCHIP, "interrupt controllers"),
    ("KVM_CAP_SET_TSS_ADDR", KVM_CAP_SET_TSS_ADDR, "real mode"),
    ("KVM_CAP_SET_IDENTITY_MAP_ADDR", KVM_CAP_SET_IDENTITY_MAP_ADDR, "real mode"),
    ("KVM_CAP_EXT_CPUID", KVM_CAP_EXT_CPUID, "the guest's processor"),
    ("KVM_CAP_MP_STATE", KVM_CAP_MP_STATE, "more than one vCPU"),
    ("KVM_CAP_SIGNAL_MSI", KVM_CAP_SIGNAL_MSI, "MSI-X"),
    ("KVM_CAP_IOEVENTFD", KVM_CAP_IOEVENTFD, "doorbells of devices"),
    ("KVM_CAP_IMMEDIATE_EXIT", KVM_CAP_IMMEDIATE_EXIT, "pausing without a lost wake-up"),
    ("KVM_CAP_VCPU_EVENTS", KVM_CAP_VCPU_EVENTS, "saved vCPU state"),
    ("KVM_CAP_DEBUGREGS", KVM_CAP_DEBUGREGS, "saved vCPU state"),
    ("KVM_CAP_XSAVE", KVM_CAP_XSAVE, "saved vCPU state"),
    ("KVM_CAP_ADJUST_CLOCK", KVM_CAP_ADJUST_CLOCK, "the guest's clock across a move"),
];

/// One that some can do without: name, number, what it is for, what to do where it is missing.
type Optional = (&'static str, u32, &'static str, &'static str);

const NEWER: &str = "use a newer kernel";

const OPTIONAL: &[Optional] = &[
    // Not there on a host without XSAVE, which has none of these registers either.
    ("KVM_CAP_XCRS", KVM_CAP_XCRS, "saved vCPU state of a processor with XSAVE", "use a processor with XSAVE"),
    ("KVM_CAP_KVMCLOCK_CTRL", KVM_CAP_KVMCLOCK_CTRL, "a pause is no soft lock-up", NEWER),
    ("KVM_CAP_TSC_DEADLINE_TIMER", KVM_CAP_TSC_DEADLINE_TIMER, "cheaper guest timers", NEWER),
    ("KVM_CAP_GET_TSC_KHZ", KVM_CAP_GET_TSC_KHZ, "telling the guest its TSC's rate", NEWER),
    (
        "KVM_CAP_TSC_CONTROL",
        KVM_CAP_TSC_CONTROL,
        "moving to a host with another TSC rate",
        "use hosts of one TSC rate, or processors that scale it",
    ),
    ("KVM_CAP_X2APIC_API", KVM_CAP_X2APIC_API, "APIC ids above 254", NEWER),
    ("KVM_CAP_XSAVE2", KVM_CAP_XSAVE2, "processor state above 4 KiB (AMX)", "use Linux 5.17 or later"),
    (
        "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
        KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        "moving big guests smoothly",
        "use Linux 5.2 or later",
    ),
];

/// What no VM can do without and this KVM lacks; a sentence each.
pub fn missing_capabilities(kvm: &Kvm) -> Vec<String> {
    missing(|number| kvm.check_extension_raw(number.into()))
}

fn missing(answer: impl Fn(u32) -> i32) -> Vec<String> {
    let missing = REQUIRED.iter().filter(|(_, number, _)| answer(*number) <= 0);
    missing.map(|(name, _, purpose)| format!("its KVM lacks {name}: {purpose}")).collect()
}

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
    checks.extend(capabilities(|number| kvm.check_extension_raw(number.into())));
    checks.push(Check::fact(
        GROUP,
        "vCPUs a VM",
        format!("{} recommended, at most {}", kvm.get_nr_vcpus(), kvm.get_max_vcpus()),
    ));
    checks.push(Check::fact(GROUP, "memory slots", kvm.get_nr_memslots().to_string()));
    (checks, usable.then_some(kvm))
}

/// Every capability, by what KVM answers for its number.
fn capabilities(answer: impl Fn(u32) -> i32) -> Vec<Check> {
    const REMEDY: &str = "use a newer kernel, or a host with hardware virtualisation";
    let told = |name: &str, number, need, purpose: &str, remedy: &str| {
        let answer = answer(number);
        let found = if answer > 0 { Ok(format!("{answer}: {purpose}")) } else { Err(purpose.to_owned()) };
        Check::new(GROUP, name, need, found, remedy)
    };
    let required = REQUIRED.iter().map(|(name, number, purpose)| told(name, *number, Need::Required, purpose, REMEDY));
    let optional = OPTIONAL.iter();
    let optional = optional.map(|(name, number, purpose, remedy)| told(name, *number, Need::Optional, purpose, remedy));
    required.chain(optional).collect()
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
        let missing = capabilities(|_| 0);
        assert!(missing.iter().all(|check| !check.present && check.remedy.is_some()), "{missing:?}");
        assert_eq!(missing.len(), REQUIRED.len() + OPTIONAL.len());
        assert_eq!(capabilities(|_| 3)[0].detail, "3: guest memory");
    }

    #[test]
    fn what_no_vm_can_do_without_is_named_and_the_rest_is_not() {
        let has = |lacks: u32| move |number| i32::from(number != lacks);
        assert_eq!(missing(has(KVM_CAP_DEBUGREGS)), ["its KVM lacks KVM_CAP_DEBUGREGS: saved vCPU state"]);
        assert!(missing(has(KVM_CAP_XSAVE2)).is_empty());
    }

    #[test]
    fn each_way_not_to_open_has_its_own_remedy() {
        assert!(open_remedy(io::ErrorKind::NotFound).contains("modprobe"));
        assert!(open_remedy(io::ErrorKind::PermissionDenied).contains("group kvm"));
    }
}
