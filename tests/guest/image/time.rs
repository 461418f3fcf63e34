//! Microseconds: kvmclock where the hypervisor offers it, else the TSC at the frequency that CPUID tells.

use crate::boot::{Page, wait_for_interrupt, wrmsr};
use crate::port::{out8, read, tsc, write};
use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const LAPIC: usize = 0xfee0_0000;
const TIMER_VECTOR: u8 = 0x40;

static mut PVCLOCK: Page<[u8; 4096]> = Page([0; 4096]);
static USE_PVCLOCK: AtomicBool = AtomicBool::new(false);
static TSC_KHZ: AtomicU64 = AtomicU64::new(1_000_000);

/// Chooses the clock and enables the local APIC. Returns the clock's name.
pub fn init() -> &'static str {
    // Firmware may have left the legacy interrupt controllers on, whose vectors are the exceptions'.
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    write::<u32>(LAPIC + 0x350, 0x1_0000); // LINT0 masked
    write::<u32>(LAPIC + 0xf0, 0x1ff);
    write::<u32>(LAPIC + 0x80, 0);
    write::<u32>(LAPIC + 0x3e0, 0xb); // timer: divide by 1
    write::<u32>(LAPIC + 0x320, u32::from(TIMER_VECTOR)); // one shot
    let kvm = __cpuid(0x4000_0000);
    if kvm.ebx == 0x4b4d_564b && __cpuid(0x4000_0001).eax & 8 != 0 {
        wrmsr(MSR_KVM_SYSTEM_TIME_NEW, &raw const PVCLOCK as u64 | 1);
        USE_PVCLOCK.store(true, Ordering::Relaxed);
        return "kvmclock";
    }
    let top = __cpuid(0).eax;
    let crystal = if top >= 0x15 { __cpuid(0x15) } else { __cpuid(0) };
    let khz = if top >= 0x15 && crystal.ecx != 0 && crystal.eax != 0 {
        u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax) / 1000
    } else if kvm.eax >= 0x4000_0010 && kvm.eax < 0x4000_ffff {
        u64::from(__cpuid(0x4000_0010).eax)
    } else if top >= 0x16 {
        u64::from(__cpuid(0x16).eax & 0xffff) * 1000
    } else {
        0
    };
    if khz == 0 {
        return "tsc-at-assumed-1GHz";
    }
    TSC_KHZ.store(khz, Ordering::Relaxed);
    "tsc"
}

/// Nanoseconds since some moment; goes on when the VM is moved.
pub fn now_ns() -> u64 {
    if !USE_PVCLOCK.load(Ordering::Relaxed) {
        let scaled = u128::from(tsc()) * 1_000_000 / u128::from(TSC_KHZ.load(Ordering::Relaxed));
        return scaled as u64;
    }
    // struct pvclock_vcpu_time_info: version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift
    let page = &raw const PVCLOCK as usize;
    loop {
        let version: u32 = read(page);
        fence(Ordering::Acquire);
        let delta = tsc().wrapping_sub(read::<u64>(page + 8));
        let base: u64 = read(page + 16);
        let multiplier: u32 = read(page + 24);
        let shift: i8 = read(page + 28);
        fence(Ordering::Acquire);
        if version & 1 == 0 && version == read::<u32>(page) {
            let delta = if shift < 0 { delta >> -shift } else { delta << shift };
            return base.wrapping_add((u128::from(delta) * u128::from(multiplier) >> 32) as u64);
        }
    }
}

/// Microseconds since some moment.
pub fn now_us() -> u64 {
    now_ns() / 1000
}

/// Sets the local APIC's timer to interrupt after `us` (KVM's APIC counts nanoseconds).
pub fn arm_timer(us: u64) {
    write::<u32>(LAPIC + 0x380, (us * 1000).min(u64::from(u32::MAX)) as u32);
}

/// Halts for about `us`, at most 4 s, or until another interrupt.
pub fn sleep(us: u64) {
    arm_timer(us.max(1));
    wait_for_interrupt();
    arm_timer(0);
}

/// Spins until `done` holds or `limit_us` have passed; says whether it held.
pub fn wait_until(limit_us: u64, mut done: impl FnMut() -> bool) -> bool {
    let end = now_us() + limit_us;
    loop {
        if done() {
            return true;
        }
        if now_us() > end {
            return false;
        }
        core::hint::spin_loop();
    }
}
