//! Random writes of every width to PCI configuration space and to the virtio functions' memory.
//!
//! What would hit the guest itself and not the VMM is left out: MSI-X messages keep to this processor's vectors.

use crate::line;
use crate::pci::Function;
use crate::port::{read, write};
use crate::random::Random;

/// Longest prefix of configuration space that is saved, written at random and put back.
const DWORDS: usize = 64;
const BAR_SPAN: u64 = 0x8000;

/// A function as it was found.
#[derive(Clone, Copy)]
struct Found {
    function: Function,
    config: [u32; DWORDS],
    /// First memory BAR that virtio registers are in.
    bar: usize,
    /// MSI-X table, start and end.
    table: (usize, usize),
}

/// Does `count` random writes from `seed`, puts the configuration back and says so.
pub fn run(seed: u64, count: u64) {
    let mut random = Random::new(seed);
    let mut found = [None; 32];
    for (place, function) in found.iter_mut().zip(Function::all()) {
        *place = Some(survey(function));
    }
    let functions = found.iter().flatten().count() as u64;
    for _ in 0..count {
        let target = random.below(functions.max(1)) as usize;
        let Some(target) = found[target] else { break };
        if target.bar == 0 || random.below(2) == 0 {
            write_config(target.function, &mut random);
        } else {
            write_bar(&target, &mut random);
        }
    }
    for target in found.iter().flatten() {
        (1..DWORDS).for_each(|dword| target.function.write32(dword as u8 * 4, target.config[dword]));
    }
    line!("fuzz-pci done seed={seed} count={count} functions={functions}");
}

fn survey(function: Function) -> Found {
    let mut config = [0; DWORDS];
    for (dword, value) in config.iter_mut().enumerate() {
        *value = function.read32(dword as u8 * 4);
    }
    let virtio = config[0] & 0xffff == 0x1af4;
    let place = if virtio { function.capabilities(9).next().map(|at| function.read8(at + 4)) } else { None };
    let table = if virtio { function.msix_table() } else { None };
    Found {
        function,
        config,
        bar: place.filter(|&bar| bar < 6).map_or(0, |bar| function.bar(bar)),
        table: table.map_or((0, 0), |(at, entries)| (at, at + usize::from(entries) * 16)),
    }
}

fn write_config(function: Function, random: &mut Random) {
    let (offset, value) = (random.next() as u8, random.next());
    match random.below(3) {
        0 => function.write8(offset, value as u8),
        1 => function.write16(offset, value as u16),
        _ => function.write32(offset, value as u32),
    }
    function.read32(offset);
}

fn write_bar(target: &Found, random: &mut Random) {
    // Half of the writes go to the first KiB, where the registers are dense.
    let span = if random.below(2) == 0 { 0x400 } else { BAR_SPAN };
    let address = target.bar + random.below(span) as usize;
    let value = random.next();
    if (target.table.0..target.table.1).contains(&(address & !15)) {
        let message = if address & 8 == 0 { 0xfee0_0000 } else { value as u32 & 0xff | 0x20 };
        return write(address & !3, message);
    }
    match random.below(4) {
        0 => write(address, value as u8),
        1 => write(address & !1, value as u16),
        2 => write(address & !3, value as u32),
        _ => write(address & !7, value),
    }
    read::<u32>(address & !3);
}
