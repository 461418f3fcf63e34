//! What the registers answer: identity, negotiation, queue set-up, interrupts, the window in configuration space.

use super::machine::{EVENT_IDX, Machine, Shared, VERSION_1, message};
use crate::pci::testing::Call;
use crate::virtio::rng::Rng;

#[test]
fn a_driver_finds_the_structures() {
    let machine = Machine::new(Box::new(Rng));
    assert_eq!(machine.config(0), 0x1044_1af4);
    assert_eq!(machine.config(8) & 0xff, 1, "not a transitional device");
    assert_eq!(machine.config(0x3c) >> 8 & 0xff, 0, "no interrupt pin");
    let found = machine.found;
    assert_eq!((found.vectors, found.multiplier), (2, 4));
    assert_eq!(machine.common(0x12, 2), 1);
    assert_eq!((machine.common(0x18, 2), machine.common(0x1a, 2)), (64, 0xffff));
    assert_eq!(machine.wiring.calls(), [], "finding a device costs nothing");
}

#[test]
fn random_bytes_come_with_an_interrupt() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut machine = Machine::new(Box::new(Rng));
        machine.init(features);
        machine.driver.add(0, &[], &[16]);
        machine.notify(0);
        machine.run();
        assert_eq!(machine.driver.used(0).unwrap().length, 16);
        assert_eq!(machine.raised(), [1]);
        assert_eq!((machine.read(machine.found.isr, 1), machine.read(machine.found.isr, 1)), (1, 0));
    }
}

#[test]
fn notifications_work_without_a_binding() {
    let mut machine = Machine::new(Box::new(Rng));
    machine.wiring.refuses.store(true, std::sync::atomic::Ordering::Relaxed);
    machine.init(VERSION_1);
    machine.wiring.refuses.store(false, std::sync::atomic::Ordering::Relaxed);
    machine.driver.add(0, &[], &[16]);
    machine.notify(0);
    machine.run();
    assert_eq!(machine.driver.used(0).unwrap().length, 16);
    assert_eq!(machine.raised(), [1]);
}

#[test]
fn features_are_offered_and_negotiated() {
    let machine = Machine::new(Box::new(Shared::default()));
    let offered = |half| {
        machine.set_common(0, 4, half);
        machine.common(4, 4)
    };
    assert_eq!([offered(0), offered(1), offered(2)], [1 << 28 | 1 << 29 | 0b101, 1, 0]);
    for (features, status, why) in [
        (VERSION_1 | 0b101, 0xb, "a part of what is offered"),
        (0b101, 0x3, "without VERSION_1"),
        (VERSION_1 | 0b10, 0x3, "a feature that is not offered"),
        (VERSION_1 | 1 << 63, 0x3, "a feature that no one has"),
    ] {
        machine.negotiate(features);
        assert_eq!(machine.status(), status, "{why}");
    }
    machine.negotiate(VERSION_1);
    machine.set_common(0x08, 4, 0);
    machine.set_common(0x0c, 4, 1);
    assert_eq!(machine.common(0x0c, 4), 0, "features stand once they are agreed on");
    machine.set_common(0, 4, 0);
    machine.set_status(0);
    machine.set_status(8);
    assert_eq!(machine.status(), 0, "FEATURES_OK without a driver");
    machine.set_status(4);
    assert_eq!(machine.status(), 0, "DRIVER_OK without features");
}

#[test]
fn queue_registers_keep_what_is_valid() {
    let machine = Machine::new(Box::new(Shared::default()));
    machine.set_common(0x16, 2, 1);
    for (written, read) in [(16, 16), (8, 8), (1, 1), (0, 1), (3, 1), (32, 1), (0xffff, 1), (4, 4)] {
        machine.set_common(0x18, 2, written);
        assert_eq!(machine.common(0x18, 2), read, "queue size {written}");
    }
    for (written, read) in [(2, 2), (3, 0xffff), (0, 0), (0xffff, 0xffff)] {
        machine.set_common(0x1a, 2, written);
        assert_eq!(machine.common(0x1a, 2), read, "queue vector {written}");
        machine.set_common(0x10, 2, written);
        assert_eq!(machine.common(0x10, 2), read, "configuration vector {written}");
    }
    machine.set_common(0x20, 8, 0x1234_5678_9abc_def0);
    assert_eq!((machine.common(0x20, 4), machine.common(0x24, 4)), (0x9abc_def0, 0x1234_5678));
    assert_eq!(machine.common(0x1e, 2), 1, "notification offset");
    machine.set_common(0x1c, 2, 1);
    machine.set_common(0x18, 2, 8);
    machine.set_common(0x28, 8, 7);
    assert_eq!((machine.common(0x18, 2), machine.common(0x28, 8)), (4, 0), "an enabled queue stands");
    machine.set_common(0x16, 2, 2);
    assert_eq!((machine.common(0x18, 2), machine.common(0x1c, 2)), (0, 0), "no such queue");
    machine.set_common(0x1c, 2, 1);
    assert_eq!(machine.common(0x1c, 2), 0);
}

#[test]
fn queues_that_cannot_be_used_are_found_at_driver_ok() {
    for (register, address, why) in [
        (0x20, 0x1_0008, "the ring is unusable: "),
        (0x28, 0x1_0001, "the ring is unusable: "),
        (0x30, 0x1_0002, "the ring is unusable: "),
        (0x20, 0xff_ffc0, "the rings do not lie in guest RAM"),
        (0x28, u64::MAX - 1, "the rings do not lie in guest RAM"),
        (0x30, 1 << 40, "the rings do not lie in guest RAM"),
    ] {
        let probe = Shared::default();
        let mut machine = Machine::new(Box::new(probe.clone()));
        machine.negotiate(VERSION_1);
        machine.set_up_interrupts();
        machine.set_rings(1);
        machine.set_common(register, 8, address);
        machine.set_common(0x1c, 2, 1);
        machine.wiring.calls();
        probe.calls();
        machine.set_status(0xf);
        machine.run();
        assert_eq!((machine.status(), probe.calls()), (0x4f, vec![]), "{register:#x} = {address:#x}");
        let fault = machine.lock().fault().map(str::to_owned).unwrap();
        assert!(fault.starts_with("queue 1: ") && fault.contains(why), "{fault}");
        assert_eq!(machine.raised(), [0]);
        machine.init(VERSION_1);
        assert_eq!(machine.lock().fault(), None);
        assert_eq!(probe.calls(), ["reset", "activate", "queue 0", "queue 1"]);
    }
}

#[test]
fn device_configuration_is_read_written_and_counted() {
    let probe = Shared::default();
    let mut machine = Machine::new(Box::new(probe.clone()));
    machine.init(VERSION_1);
    machine.write(machine.found.device + 4, 4, 0x0403_0201);
    assert_eq!(machine.read(machine.found.device + 5, 2), 0x0302);
    assert_eq!(machine.read(machine.found.device + 0xff8, 8), 0);
    let generation = machine.common(0x15, 1);
    probe.0.lock().unwrap().config_changes = true;
    machine.notify(1);
    machine.run();
    assert_eq!(machine.common(0x15, 1), generation + 1);
    assert_eq!((machine.raised(), machine.read(machine.found.isr, 1)), (vec![0], 2));
}

#[test]
fn a_masked_queue_vector_is_delivered_when_unmasked() {
    let mut machine = Machine::new(Box::new(Rng));
    machine.init(VERSION_1);
    machine.set_vector_mask(1, true);
    machine.driver.add(0, &[], &[16]);
    machine.notify(0);
    machine.run();
    assert_eq!((machine.raised(), machine.read(machine.found.pending, 8)), (vec![], 2));
    machine.set_vector_mask(1, false);
    assert_eq!(machine.wiring.calls(), [Call::Signal(message(1))]);
    assert_eq!(machine.read(machine.found.pending, 8), 0);
    machine.set_common(0x16, 2, 0);
    machine.set_common(0x1a, 2, 0xffff);
    machine.driver.add(0, &[], &[16]);
    machine.notify(0);
    machine.run();
    assert_eq!((machine.raised(), machine.read(machine.found.isr, 1)), (vec![], 1), "a queue without a vector");
}

#[test]
fn the_bar_is_reached_through_configuration_space() {
    let machine = Machine::new(Box::new(Rng));
    let access = |offset: u64, length: u32| {
        machine.set_config(machine.found.access + 8, &(offset as u32).to_le_bytes());
        machine.set_config(machine.found.access + 12, &length.to_le_bytes());
    };
    access(machine.found.common + 0x18, 2);
    assert_eq!(machine.config(machine.found.access + 16), 64);
    machine.set_config(machine.found.access + 16, &16_u32.to_le_bytes());
    assert_eq!(machine.common(0x18, 2), 16);
    for (offset, length) in [(machine.found.common + 0x18, 3), (1, 2), (0x8000, 4), (u64::MAX, 1)] {
        access(offset, length);
        machine.set_config(machine.found.access + 16, &8_u32.to_le_bytes());
        assert_eq!(machine.common(0x18, 2), 16, "{offset:#x}, {length} bytes");
    }
    access(machine.found.common + 0x18, 2);
    machine.set_config(machine.found.access + 4, &[1]);
    machine.set_config(machine.found.access + 16, &8_u32.to_le_bytes());
    assert_eq!(machine.common(0x18, 2), 16, "there is no BAR 1");
}
