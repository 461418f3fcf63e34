//! The PCI bus with a function of every kind: accesses of any width by all three ways in, drivers that start devices
//! on hostile rings, pauses, resets, and a hypervisor that refuses.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna_fuzz::bus::{Bus, Step, guest};

fuzz_target!(|steps: Vec<Step>| {
    sterna_fuzz::format_logs();
    let mut bus = Bus::new(guest());
    steps.into_iter().take(64).for_each(|step| bus.step(step));
    bus.recovers();
});
