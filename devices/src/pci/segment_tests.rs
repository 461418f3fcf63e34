//! The bus as a guest sees it, with functions that only remember.

use super::super::Identity;
use super::super::config::{BAR0, COMMAND, COMMAND_MEMORY};
use super::*;
use crate::state::testing::{from_hex, to_hex};

const GOLDEN: &str = "
84908080088002361b080006010000000000060000000000000000000000000000000000000000000000000000000000
000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000
000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000
000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000
000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000
0000000000000000000000000000000000000000000000";

const WINDOW: Range<u64> = 0xc000_0000..0xc010_0000;

struct Plain {
    config: crate::pci::ConfigSpace,
    seen: Vec<(u64, Vec<u8>)>,
}

impl PciFunction for Plain {
    fn config(&self) -> &crate::pci::ConfigSpace {
        &self.config
    }
    fn config_mut(&mut self) -> &mut crate::pci::ConfigSpace {
        &mut self.config
    }
    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        self.seen.push((offset, data.to_vec()));
    }
    fn reset(&mut self) {
        self.config.reset();
    }
}

fn plain(bar: u32) -> Arc<Mutex<Plain>> {
    let identity =
        Identity { vendor: 0x1af4, device: 0x1044, class: 0, revision: 1, subsystem_vendor: 0, subsystem: 0 };
    Arc::new(Mutex::new(Plain { config: crate::pci::ConfigSpace::new(&identity).with_bar(bar), seen: Vec::new() }))
}

fn u32_at(device: &impl SharedBusDevice, offset: u64) -> u32 {
    let mut data = [0; 4];
    device.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn place(ecam: &Ecam, slot: u64, base: u32) {
    ecam.write(slot << 15 | BAR0 as u64, &base.to_le_bytes());
    ecam.write(slot << 15 | COMMAND as u64, &COMMAND_MEMORY.to_le_bytes());
}

#[test]
fn bars_are_placed_in_the_window_by_their_size() {
    let mut segment = PciSegment::new(WINDOW);
    for (size, slot) in [(0x1000, 1), (0x8000, 2), (0x1000, 3), (0x8_0000, 4)] {
        assert_eq!(segment.add(plain(size)), Ok(slot));
    }
    assert_eq!(segment.add(plain(0x1000)), Err(PciError::WindowFull { size: 0x1000 }));
    let ecam = Ecam(Arc::new(segment));
    let bases: Vec<_> = (0..5).map(|slot| u32_at(&ecam, slot << 15 | BAR0 as u64)).collect();
    assert_eq!(bases, [0, 0xc000_0000, 0xc000_8000, 0xc001_0000, 0xc008_0000]);
}

#[test]
fn the_bus_has_32_slots() {
    let mut segment = PciSegment::new(WINDOW);
    let added: Vec<_> = (0..32).map(|_| segment.add(plain(0x1000))).collect();
    assert_eq!(added[30], Ok(31));
    assert_eq!(added[31], Err(PciError::NoSlot));
}

#[test]
fn both_ways_into_configuration_space_show_the_same() {
    let mut segment = PciSegment::new(WINDOW);
    segment.add(plain(0x1000)).unwrap();
    let segment = Arc::new(segment);
    let (ecam, ports) = (Ecam(segment.clone()), ConfigPorts(segment));
    assert_eq!(u32_at(&ports, 4), u32::MAX, "no address yet");
    for (slot, id) in [(0_u32, 0x0008_1b36), (1, 0x1044_1af4), (2, u32::MAX)] {
        ports.write(0, &(0x8000_0000 | slot << 11).to_le_bytes());
        assert_eq!(u32_at(&ports, 0), 0x8000_0000 | slot << 11);
        assert_eq!((u32_at(&ports, 4), u32_at(&ecam, u64::from(slot) << 15)), (id, id));
    }
    ports.write(0, &0x8000_0808_u32.to_le_bytes());
    let mut class = [0; 2];
    ports.read(4, &mut class);
    assert_eq!(class, [1, 0]);
    // Other functions and other buses are empty; so is what straddles two functions.
    for address in [0x8000_0900_u32, 0x8001_0800, 0x0000_0800] {
        ports.write(0, &address.to_le_bytes());
        assert_eq!(u32_at(&ports, 4), u32::MAX, "{address:#x}");
    }
    assert_eq!(u32_at(&ecam, 1 << 15 | 1 << 12), u32::MAX);
    assert_eq!(u32_at(&ecam, (1 << 15) - 2), u32::MAX);
    // A byte to 0xCFB, which Linux writes to tell the mechanisms apart, is no address.
    ports.write(3, &[1]);
    assert_eq!(u32_at(&ports, 0), 0x0000_0800);
}

#[test]
fn a_bar_answers_where_the_guest_put_it() {
    let mut segment = PciSegment::new(WINDOW);
    let function = plain(0x1000);
    segment.add(function.clone()).unwrap();
    let segment = Arc::new(segment);
    let (ecam, window) = (Ecam(segment.clone()), BarWindow(segment.clone()));
    assert_eq!(u32_at(&window, 8), u32::MAX, "decoding is off");
    place(&ecam, 1, 0xc000_0000);
    assert_eq!(u32_at(&window, 8), 0x0808_0808);
    place(&ecam, 1, 0xc005_0000);
    assert_eq!(u32_at(&window, 8), u32::MAX);
    assert_eq!(u32_at(&window, 0x5_0010), 0x1010_1010);
    assert_eq!(u32_at(&window, 0x5_0ffe), u32::MAX, "an access that leaves the BAR");
    assert_eq!(u32_at(&window, u64::MAX - 1), u32::MAX);
    window.write(0x5_0020, &[1, 2]);
    assert_eq!(function.lock().unwrap().seen, [(0x20, vec![1, 2])]);
    place(&ecam, 1, 0xfee0_0000);
    assert_eq!(u32_at(&window, 0x5_0010), u32::MAX, "a BAR out of the window answers nowhere");
    segment.reset();
    assert_eq!((u32_at(&ecam, 1 << 15 | 0x10), u32_at(&ecam, 1 << 15 | 4)), (0xc000_0000, 0));
    assert_eq!(u32_at(&window, 0x5_0010), u32::MAX);
}

#[test]
fn the_bus_itself_moves() {
    let there = Arc::new(PciSegment::new(WINDOW));
    let (ecam, ports) = (Ecam(there.clone()), ConfigPorts(there.clone()));
    let segment = Arc::new(PciSegment::new(WINDOW));
    let fresh = segment.save();
    ConfigPorts(segment.clone()).write(0, &0x8000_0804_u32.to_le_bytes());
    let latched = segment.save();
    Ecam(segment.clone()).write(4, &[0x07, 0x01]);
    let saved = segment.save();
    assert!(fresh != latched && latched != saved);
    assert_eq!(to_hex(&saved), to_hex(&from_hex(1, GOLDEN)), "version 1, which must be read for ever");
    there.restore(&from_hex(1, GOLDEN)).unwrap();
    assert_eq!((u32_at(&ports, 0), u32_at(&ecam, 4) & 0xffff), (0x8000_0804, 0x0106));
    assert_eq!(there.save(), saved);
    let bridge = || HostBridge::new().config().save();
    let mut other = bridge();
    other[1] = 0;
    for (state, expected) in [
        ((0x0100_0000u32, bridge()), "its address register holds 0x01000000"),
        ((0, bridge()[1..].to_vec()), "its configuration space has 255 bytes, not 256"),
        ((0, other), "it is of another PCI function: 0x00 at 0x01 of configuration space, 0x1b here"),
    ] {
        assert_eq!(there.restore(&Saved::of(1, &state)).unwrap_err().to_string(), expected);
        assert_eq!(there.save(), saved);
    }
    for length in 0..saved.contents.len() {
        let part = Saved { version: 1, contents: saved.contents[..length].to_vec() };
        there.restore(&part).unwrap_err();
    }
    there.restore(&fresh).unwrap();
    assert_eq!(there.save(), fresh);
}

#[test]
fn a_restored_bar_answers_at_once() {
    let (from, to) = (plain(0x1000), plain(0x1000));
    let segments = [&from, &to].map(|function| {
        let mut segment = PciSegment::new(WINDOW);
        segment.add(function.clone()).unwrap();
        Arc::new(segment)
    });
    place(&Ecam(segments[0].clone()), 1, 0xc005_0000);
    let saved = from.lock().unwrap().config.save();
    to.lock().unwrap().config.check(&saved).unwrap();
    to.lock().unwrap().config.restore(&saved);
    assert_eq!(u32_at(&BarWindow(segments[1].clone()), 0x5_0010), 0x1010_1010);
}

#[test]
fn of_overlapping_bars_the_lowest_slot_answers() {
    let mut segment = PciSegment::new(WINDOW);
    let functions = [plain(0x1000), plain(0x8000)];
    for function in &functions {
        segment.add(function.clone()).unwrap();
    }
    let segment = Arc::new(segment);
    let (ecam, window) = (Ecam(segment.clone()), BarWindow(segment));
    place(&ecam, 2, 0xc001_0000);
    place(&ecam, 1, 0xc001_1000);
    window.write(0x1_0000, &[1]);
    window.write(0x1_1000, &[2]);
    window.write(0x1_2000, &[3]);
    place(&ecam, 1, 0xc000_0000);
    window.write(0x1_1000, &[4]);
    assert_eq!(functions[0].lock().unwrap().seen, [(0, vec![2])]);
    assert_eq!(functions[1].lock().unwrap().seen, [(0, vec![1]), (0x2000, vec![3]), (0x1000, vec![4])]);
}

#[test]
fn one_function_does_not_wait_for_another() {
    let mut segment = PciSegment::new(WINDOW);
    let functions = [plain(0x1000), plain(0x1000)];
    for function in &functions {
        segment.add(function.clone()).unwrap();
    }
    let segment = Arc::new(segment);
    place(&Ecam(segment.clone()), 1, 0xc000_0000);
    place(&Ecam(segment.clone()), 2, 0xc000_1000);
    let busy = functions[0].lock().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let id = u32_at(&Ecam(segment.clone()), 2 << 15);
        sender.send((id, u32_at(&BarWindow(segment), 0x1004))).unwrap();
    });
    let answer = receiver.recv_timeout(std::time::Duration::from_secs(10)).expect("slot 2 waits for slot 1");
    assert_eq!(answer, (0x1044_1af4, 0x0404_0404));
    drop(busy);
}
