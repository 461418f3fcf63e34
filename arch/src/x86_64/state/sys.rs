//! The KVM calls for which kvm-ioctls has no safe function. Refuses to know what they are for.
#![expect(unsafe_code, reason = "ioctls that kvm-ioctls does not have, or not safely")]

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_irqchip, kvm_sregs2, kvm_xsave,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Bytes of [`kvm_irqchip`]'s union.
pub(super) const CHIP_BYTES: usize = 512;

fn check(returned: i32) -> Result<(), Error> {
    if returned == 0 { Ok(()) } else { Err(Error::last()) }
}

/// `KVM_GET_SREGS2`.
pub(super) fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: KVM writes one `kvm_sregs2`, which the reference is to.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// `KVM_SET_SREGS2`.
pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Error> {
    // SAFETY: KVM reads one `kvm_sregs2`, which the reference is to.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

/// `KVM_SET_XSAVE` with the 4096 bytes that are all there is unless a process asks for AMX by `arch_prctl`.
pub(super) fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), Error> {
    // KVM refuses this call where the vCPU's area is larger than that (KVM API, 4.42).
    vcpu.get_xsave()?;
    // SAFETY: KVM reads as many bytes as the vCPU's area has, and the call above has shown that a `kvm_xsave` has as many.
    unsafe { vcpu.set_xsave(xsave) }
}

/// `KVM_VCPU_TSC_OFFSET`, in cycles of the guest's TSC; `None` where this KVM has none (before Linux 5.16).
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset as u64);
    // SAFETY: KVM reads `attribute` and writes the u64 at its `addr`, which is the live, writable local above.
    check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) }).ok()?;
    Some(offset)
}

/// Sets `KVM_VCPU_TSC_OFFSET`.
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_attribute(&raw const offset as u64);
    // SAFETY: KVM reads `attribute` and the u64 at its `addr`, which is this function's live argument.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}

fn tsc_offset_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr, flags: 0 }
}

/// `KVM_GET_IRQCHIP` of chip `id`, as bytes.
pub(super) fn irqchip(vm: &VmFd, id: u32) -> Result<[u8; CHIP_BYTES], Error> {
    let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
    vm.get_irqchip(&mut chip)?;
    // SAFETY: all members of the union are plain integers, and `dummy` is all of it, which KVM or `default` has written.
    Ok(unsafe { chip.chip.dummy }.map(i8::cast_unsigned))
}

/// `KVM_SET_IRQCHIP` of chip `id`.
pub(super) fn set_irqchip(vm: &VmFd, id: u32, bytes: &[u8; CHIP_BYTES]) -> Result<(), Error> {
    let mut chip = kvm_irqchip { chip_id: id, ..Default::default() };
    chip.chip.dummy = bytes.map(u8::cast_signed);
    vm.set_irqchip(&chip)
}
