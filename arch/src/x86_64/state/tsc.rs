//! A vCPU's time-stamp counter: saved with the wall clock of that moment, restored advanced by the time that has passed.
//!
//! A guest may read the time from its TSC alone, so the TSC goes on exactly as kvmclock does, and TSCs that agreed with each
//! other still agree to the cycle: the first vCPU's new offset says by how much all of them move. Refuses to know other registers.

use super::clock::{Elapsed, TscMove, realtime_ns, together};
use super::msrs::{self, IA32_TSC, Msr};
use super::{StateError, set, sys};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// A TSC at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscState {
    /// What the guest would have read, cycles.
    pub value: u64,
    /// The host's wall clock at that moment, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Its frequency, kHz; 0 if KVM does not know.
    pub khz: u32,
    /// Guest's minus host's (scaled) TSC, cycles, modulo 2^64; not there before Linux 5.16.
    pub offset: Option<u64>,
}

/// Reads the TSC with the wall clock of that moment.
pub(super) fn save(vcpu: &VcpuFd) -> Result<TscState, StateError> {
    let (realtime_ns, value) = together(realtime_ns, || read(vcpu))?;
    Ok(TscState { value, realtime_ns, khz: vcpu.get_tsc_khz().unwrap_or(0), offset: sys::tsc_offset(vcpu) })
}

/// Sets the TSC to what it would be had it gone on.
pub(super) fn restore(vcpu: &VcpuFd, tsc: &TscState, elapsed: &Elapsed) -> Result<(), StateError> {
    // The frequency first: offset and value are in its cycles. KVM takes what is within 250 ppm of the host's as it is, and
    // anything else only where the processor scales.
    if tsc.khz != 0 && vcpu.get_tsc_khz().ok() != Some(tsc.khz) {
        vcpu.set_tsc_khz(tsc.khz).map_err(set("the frequency of the TSC, which this host cannot scale"))?;
    }
    let (Some(saved_offset), Some(offset)) = (tsc.offset, sys::tsc_offset(vcpu)) else {
        // Values written within a second of each other make KVM give all vCPUs the first one's offset.
        let wanted = tsc.value.wrapping_add(cycles(elapsed.since(tsc.realtime_ns), tsc.khz));
        msrs::restore(vcpu, &[Msr { index: IA32_TSC, value: wanted }])?;
        return elapsed.tsc_move(|| Ok(TscMove { shift: 0, behind_cycles: behind(vcpu, wanted)? })).map(drop);
    };
    let set_offset = |offset| sys::set_tsc_offset(vcpu, offset).map_err(set("the offset of the TSC"));
    let moved = elapsed.tsc_move(|| {
        // Never by the host's TSC, which a scaling KVM multiplies by what it does not tell: by what the guest would read.
        let (slept_ns, now) = together(|| elapsed.since(tsc.realtime_ns), || read(vcpu))?;
        let wanted = tsc.value.wrapping_add(cycles(slept_ns, tsc.khz));
        let new_offset = offset.wrapping_add(wanted).wrapping_sub(now);
        set_offset(new_offset)?;
        Ok(TscMove { shift: new_offset.wrapping_sub(saved_offset), behind_cycles: behind(vcpu, wanted)? })
    })?;
    set_offset(saved_offset.wrapping_add(moved.shift))
}

fn read(vcpu: &VcpuFd) -> Result<u64, StateError> {
    Ok(msrs::get(vcpu, IA32_TSC)?.unwrap_or(0))
}

/// How far the TSC is behind `wanted`, which it should be past by now.
fn behind(vcpu: &VcpuFd, wanted: u64) -> Result<u64, StateError> {
    Ok(wanted.wrapping_sub(read(vcpu)?).cast_signed().max(0).cast_unsigned())
}

/// Cycles of a TSC of `khz` in `ns`.
fn cycles(ns: u64, khz: u32) -> u64 {
    // At most 2^64 * 2^32 / 10^6; the counter itself wraps at 2^64.
    (u128::from(ns) * u128::from(khz) / 1_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_is_as_many_cycles_as_it_has() {
        assert_eq!(cycles(86_400_000_000_000, 2_596_142), 224_306_668_800_000);
        assert_eq!(cycles(1, 2_596_142), 2);
        assert_eq!(cycles(u64::MAX, 0), 0);
    }
}
