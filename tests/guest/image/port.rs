//! Access to ports, to registers and memory by address, and to the time stamp counter.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;

pub fn out8(port: u16, value: u8) {
    // SAFETY: a port write has no effect on this program's memory except through devices it has set up.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) }
}
pub fn out16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack)) }
}
pub fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) }
}
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack)) }
    value
}
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack)) }
    value
}

/// Reads `T` at `address`: a register, or memory that others write.
pub fn read<T: Copy>(address: usize) -> T {
    // SAFETY: callers pass mapped addresses: the whole of guest memory is this program's own.
    unsafe { (address as *const T).read_volatile() }
}
/// Writes `T` at `address`.
pub fn write<T: Copy>(address: usize, value: T) {
    // SAFETY: as for `read`.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every 64-bit processor has it, and ring 3 may read it (CR4.TSD is clear).
    unsafe { _rdtsc() }
}
