//! The entropy device: any chains.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna_devices::virtio::rng::Rng;
use sterna_fuzz::chain::Chain;
use sterna_fuzz::drive::{Oracle, Step, drive};

fuzz_target!(|steps: Vec<Step<Chain, ()>>| drive(&mut Rng, Oracle::Whole, steps, |_, ()| {}));
