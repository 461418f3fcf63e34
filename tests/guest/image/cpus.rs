//! The other vCPUs: INIT and start-up interrupts to all of them, and what they do then.

use crate::boot::{CPU_COUNT, MAX_CPUS, TRAMPOLINE, halt, install_trampoline};
use crate::memory;
use crate::port::write;
use crate::time::{now_us, wait_until};
use crate::{fail, line};
use core::sync::atomic::{AtomicBool, Ordering};

const ICR: usize = 0xfee0_0300;
const ALL_BUT_SELF: u32 = 3 << 18;

/// Set when the other vCPUs may begin to work on memory.
pub static WORK: AtomicBool = AtomicBool::new(false);

/// Starts the other vCPUs until `wanted` run.
pub fn start(wanted: u32) {
    if wanted as usize > MAX_CPUS {
        fail!("cpus={wanted}: at most {MAX_CPUS}");
    }
    let began = now_us();
    install_trampoline();
    write::<u32>(ICR, ALL_BUT_SELF | 0x4500); // INIT, assert
    wait_until(200, || false);
    write::<u32>(ICR, ALL_BUT_SELF | 0x4600 | (TRAMPOLINE >> 12) as u32);
    if !wait_until(5_000_000, || CPU_COUNT.load(Ordering::Acquire) >= wanted) {
        fail!("cpus={wanted}: only {} started", CPU_COUNT.load(Ordering::Acquire));
    }
    line!("cpus running={} us={}", CPU_COUNT.load(Ordering::Acquire), now_us() - began);
}

/// What every other vCPU does: dirty its stripe, verify it when asked.
pub fn run(cpu: u32) -> ! {
    while !WORK.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    let Some(mut worker) = memory::Worker::new(cpu) else { halt() };
    loop {
        worker.step();
    }
}
