//! Port or MMIO space: ranges and the devices in them. Refuses to know what the devices do.
//!
//! A bus is built once and never changes while vCPUs run, so a look-up takes no lock; what an access needs, the
//! device locks itself.

use std::sync::Arc;
use sterna_devices::{Effect, SharedBusDevice};

/// A device as vCPU threads share it.
pub type SharedDevice = Arc<dyn SharedBusDevice>;

/// One address space. See the module.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, without overlap.
    ranges: Vec<Range>,
}

struct Range {
    base: u64,
    length: u64,
    device: SharedDevice,
}

impl Bus {
    /// Puts `device` at `length` bytes from `base`.
    ///
    /// # Panics
    /// When the range overlaps another: the address map is ours, so that is our own bug.
    pub fn add(&mut self, base: u64, length: u64, device: SharedDevice) {
        let at = self.ranges.partition_point(|range| range.base < base);
        let free_before = at == 0 || self.ranges[at - 1].base + self.ranges[at - 1].length <= base;
        let free_after = self.ranges.get(at).is_none_or(|next| base + length <= next.base);
        assert!(free_before && free_after, "address range {base:#x}+{length:#x} is taken");
        self.ranges.insert(at, Range { base, length, device });
    }

    /// Reads; where there is nothing, a read gives all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((range, offset)) => range.device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes; where there is nothing, a write is lost.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address, data.len()) {
            Some((range, offset)) => range.device.write(offset, data),
            None => Effect::None,
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(&Range, u64)> {
        let index = self.ranges.partition_point(|range| range.base <= address).checked_sub(1)?;
        let range = self.ranges.get(index)?;
        let offset = address - range.base;
        let end = offset.checked_add(length as u64)?;
        (end <= range.length).then_some((range, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use sterna_devices::BusDevice;

    struct Probe(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
            self.0.push((offset, data.to_vec()));
            Effect::Reset
        }
    }

    fn bus() -> (Bus, Arc<Mutex<Probe>>) {
        let probe = Arc::new(Mutex::new(Probe(Vec::new())));
        let mut bus = Bus::default();
        bus.add(0x100, 8, probe.clone());
        bus.add(0x80, 1, probe.clone());
        (bus, probe)
    }

    #[test]
    fn accesses_reach_the_device_with_their_offset() {
        let (bus, probe) = bus();
        let mut data = [0; 2];
        bus.read(0x106, &mut data);
        assert_eq!(data, [6, 6]);
        assert_eq!(bus.write(0x80, &[9]), Effect::Reset);
        assert_eq!(probe.lock().unwrap().0, [(0, vec![9])]);
    }

    #[test]
    fn accesses_beside_or_across_an_end_reach_nothing() {
        let (bus, probe) = bus();
        for (address, length) in [(0x107, 2), (0x108, 1), (0xff, 2), (0, 1), (u64::MAX, 1), (u64::MAX, 8)] {
            let mut data = vec![0; length];
            bus.read(address, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff), "{address:#x}");
            assert_eq!(bus.write(address, &data), Effect::None);
        }
        assert!(probe.lock().unwrap().0.is_empty());
    }

    #[test]
    #[should_panic(expected = "is taken")]
    fn overlapping_ranges_are_our_own_bug() {
        let (mut bus, probe) = bus();
        bus.add(0x104, 8, probe);
    }
}
