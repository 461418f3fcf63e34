//! A function is saved, and another goes on where it stood; what is no state of such a function is refused.

use super::super::state::State;
use super::machine::{EVENT_IDX, Machine, Shared, VERSION_1, WINDOW, message};
use crate::pci::msix::{CONTROL_ENABLE, CONTROL_MASK, ENTRY_BYTES};
use crate::pci::testing::Call;
use crate::state::testing::{from_hex, to_hex};
use crate::state::{Saved, StateError};
use crate::virtio::rng::Rng;
use crate::virtio::testing::Driver;
use proptest::prelude::*;
use std::sync::atomic::Ordering;
use vm_memory::{Bytes, GuestAddress};

/// A probe whose driver is up, with both queues.
fn running() -> (Shared, Machine) {
    let probe = Shared::default();
    let mut machine = Machine::new(Box::new(probe.clone()));
    machine.init(VERSION_1 | EVENT_IDX | 0b101);
    probe.calls();
    (probe, machine)
}

fn never_run() -> (Shared, Machine) {
    let probe = Shared::default();
    let machine = Machine::never_run(Box::new(probe.clone()), Driver::new(&[8, 16]));
    (probe, machine)
}

fn saved(machine: &Machine) -> (Saved, Saved) {
    let function = machine.lock();
    (function.save(), function.save_model())
}

fn restore(machine: &Machine, (transport, model): &(Saved, Saved)) -> Result<(), StateError> {
    machine.lock().restore(transport, model)
}

/// All that a guest can read without changing it.
fn visible(machine: &Machine) -> Vec<u64> {
    let config = (0..64).map(|word| machine.config(4 * word).into());
    let mut all: Vec<u64> = config.collect();
    let selected = machine.common(0x16, 2);
    all.extend((0..16).map(|word| machine.common(4 * word, 4)));
    for queue in 0..3 {
        machine.set_common(0x16, 2, queue);
        all.extend((0..16).map(|word| machine.common(4 * word, 4)));
    }
    machine.set_common(0x16, 2, selected);
    let table = machine.found.vectors * ENTRY_BYTES / 4;
    all.extend((0..table as u64).map(|word| machine.read(machine.found.table + 4 * word, 4)));
    all.push(machine.read(machine.found.pending, 8));
    all.extend((0..4).map(|word| machine.read(machine.found.device + 4 * word, 4)));
    all
}

/// What a guest does to a function whose driver has negotiated, each to a part of its own.
type Touch = fn(&mut Machine);
const TOUCHES: [(&str, Touch); 22] = [
    ("BAR", |machine| machine.move_bar(WINDOW + 0x2_0000)),
    ("command", |machine| machine.set_config(4, &[0x02, 0x05])),
    ("cache line", |machine| machine.set_config(0x0c, &[8])),
    ("interrupt line", |machine| machine.set_config(0x3c, &[11])),
    ("access window", |machine| machine.set_config(machine.found.access + 8, &[4, 0, 0, 0, 2, 0, 0, 0])),
    ("MSI-X enable", |machine| machine.set_config(machine.found.msix + 2, &CONTROL_ENABLE.to_le_bytes())),
    ("MSI-X mask", |machine| machine.set_config(machine.found.msix + 2, &CONTROL_MASK.to_le_bytes())),
    ("message address", |machine| machine.write(machine.found.table + 16, 8, 0x1_fee0_3000)),
    ("message data", |machine| machine.write(machine.found.table + 24, 4, 0x51)),
    ("vector mask", |machine| machine.set_vector_mask(2, false)),
    ("device feature select", |machine| machine.set_common(0x00, 4, 1)),
    ("driver feature select", |machine| machine.set_common(0x08, 4, 7)),
    ("config vector", |machine| machine.set_common(0x10, 2, 2)),
    ("status", |machine| machine.set_status(0x8b)),
    ("queue select", |machine| machine.set_common(0x16, 2, 0x1234)),
    ("queue size", |machine| machine.set_common(0x18, 2, 4)),
    ("queue vector", |machine| machine.set_common(0x1a, 2, 1)),
    ("descriptors", |machine| machine.set_common(0x20, 8, 0x1_0002_0000)),
    ("driver area", |machine| machine.set_common(0x28, 8, 0x1_0003_0000)),
    ("device area", |machine| machine.set_common(0x30, 8, 0x1_0004_0000)),
    ("queue enable", |machine| machine.set_common(0x1c, 2, 1)),
    ("device configuration", |machine| machine.write(machine.found.device + 3, 2, 0xbeef)),
];

#[test]
fn whatever_a_guest_touches_is_saved_and_comes_along() {
    for (name, touch) in TOUCHES {
        let mut machine = Machine::new(Box::new(Shared::default()));
        machine.negotiate(VERSION_1);
        let before = saved(&machine);
        touch(&mut machine);
        let seen = visible(&machine);
        let after = saved(&machine);
        assert_ne!(before, after, "{name}");
        let there = machine.moved_to(Box::new(Shared::default()));
        assert_eq!(saved(&there), after, "{name}");
        assert!(visible(&there) == seen, "{name}");
        assert_eq!(saved(&there), after, "{name}: to look is to change");
    }
    // The driver's features, before they are settled.
    let machine = Machine::new(Box::new(Shared::default()));
    let before = saved(&machine);
    machine.set_common(0x0c, 4, 0xffff_ffff);
    assert_ne!(saved(&machine), before);
    let there = machine.moved_to(Box::new(Shared::default()));
    assert_eq!(there.common(0x0c, 4), 0xffff_ffff, "what is not settled may be anything");
}

#[test]
fn a_driver_that_is_up_goes_on_without_noticing() {
    let (probe, mut machine) = running();
    probe.0.lock().unwrap().config_changes = true;
    machine.notify(0);
    machine.run();
    assert_eq!((machine.raised(), machine.common(0x15, 1)), (vec![0], 1));
    machine.notify(1); // and nobody has looked
    let seen = visible(&machine);
    let there = Shared::default();
    let mut machine = machine.moved_to(Box::new(there.clone()));
    let bound = [WINDOW + 0x3000, WINDOW + 0x3004].map(Call::Bind);
    assert_eq!(machine.wiring.calls(), bound, "doorbells are bound before the guest goes on, and nothing is raised");
    assert!(visible(&machine) == seen);
    assert_eq!(there.calls(), Vec::<String>::new());
    machine.notify(0);
    machine.run();
    assert_eq!(there.calls(), Vec::<String>::new(), "it stands still");
    machine.lock().resume();
    machine.run();
    assert_eq!(there.calls(), ["activate", "queue 0", "queue 1"]);
    assert_eq!(machine.wiring.calls(), []);
    assert_eq!(machine.read(machine.found.isr, 1), 2, "the interrupt cause is still to be read");
    machine.init(VERSION_1);
    assert_eq!(there.calls(), ["quiesce", "reset", "activate", "queue 0", "queue 1"]);
}

#[test]
fn requests_placed_before_are_served_after_and_the_rings_go_on() {
    for features in [VERSION_1, VERSION_1 | EVENT_IDX] {
        let mut machine = Machine::new(Box::new(Rng));
        machine.init(features);
        let [_, available, used] = Driver::ring(0);
        // Three are served, and the fourth is placed; the driver wants to hear of the fifth.
        let ram = machine.driver.ram.clone();
        ram.write_obj(4u16, GuestAddress(available + 4 + 2 * 64)).unwrap();
        for _ in 0..3 {
            machine.driver.add(0, &[], &[16]);
            machine.notify(0);
            machine.run();
            assert!(machine.driver.used(0).is_some());
        }
        let quiet = features & EVENT_IDX != 0;
        assert_eq!(machine.raised().len(), if quiet { 0 } else { 3 });
        let head = machine.driver.add(0, &[], &[16]);
        let mut machine = machine.moved_to(Box::new(Rng));
        machine.run();
        assert!(machine.driver.used(0).is_none());
        machine.lock().resume();
        machine.run();
        let served = machine.driver.used(0).unwrap();
        assert_eq!((served.head, served.length), (head, 16));
        assert_eq!(ram.read_obj::<u16>(GuestAddress(used + 2)).unwrap(), 4);
        assert_eq!(machine.raised(), if quiet { vec![] } else { vec![1] });
        machine.driver.add(0, &[], &[16]);
        machine.notify(0);
        machine.run();
        assert_eq!(machine.raised(), [1]);
        if quiet {
            let event: u16 = ram.read_obj(GuestAddress(used + 4 + 8 * 64)).unwrap();
            assert_eq!(event, 5, "the device asks to hear of the sixth");
        }
        assert!(machine.driver.used(0).is_some() && machine.driver.used(0).is_none());
    }
}

#[test]
fn a_pending_interrupt_stays_pending() {
    let (probe, mut machine) = running();
    machine.set_vector_mask(0, true);
    probe.0.lock().unwrap().config_changes = true;
    machine.notify(0);
    machine.run();
    let mut machine = machine.moved_to(Box::new(Shared::default()));
    machine.wiring.calls();
    machine.lock().resume();
    machine.run();
    assert_eq!((machine.read(machine.found.pending, 1), machine.wiring.calls()), (1, vec![]));
    machine.set_vector_mask(0, false);
    assert_eq!(machine.wiring.calls(), [Call::Signal(message(0))]);
}

#[test]
fn an_interrupt_that_could_not_be_raised_comes_when_the_guest_goes_on() {
    let (probe, mut machine) = running();
    machine.wiring.refuses.store(true, Ordering::Relaxed);
    probe.0.lock().unwrap().config_changes = true;
    machine.notify(0);
    machine.run();
    let machine = machine.moved_to(Box::new(Shared::default()));
    assert!(
        machine.wiring.calls().iter().all(|call| matches!(call, Call::Bind(_))),
        "not into what is overwritten yet"
    );
    machine.lock().resume();
    assert_eq!(machine.wiring.calls(), [Call::Signal(message(0))]);
}

#[test]
fn a_second_state_costs_what_is_different_in_it() {
    let (_, mut from) = running();
    let (_, to) = never_run();
    restore(&to, &saved(&from)).unwrap();
    assert_eq!(to.wiring.calls().len(), 2);
    restore(&to, &saved(&from)).unwrap();
    assert_eq!(to.wiring.calls(), [], "nothing is different");
    from.set_vector_mask(1, true);
    from.set_common(0x16, 2, 1);
    restore(&to, &saved(&from)).unwrap();
    assert_eq!(to.wiring.calls(), [], "nothing that the hypervisor knows of is different");
    from.move_bar(WINDOW + 0x1_0000);
    restore(&to, &saved(&from)).unwrap();
    let [old, new] = [WINDOW, WINDOW + 0x1_0000].map(|base| [base + 0x3000, base + 0x3004]);
    let moved = [Call::Unbind(old[0]), Call::Bind(new[0]), Call::Unbind(old[1]), Call::Bind(new[1])];
    assert_eq!(to.wiring.calls(), moved);
    from.set_status(0);
    restore(&to, &saved(&from)).unwrap();
    assert_eq!(to.wiring.calls(), new.map(Call::Unbind), "its driver has gone meanwhile");
    assert_eq!(saved(&to), saved(&from));
}

#[test]
fn a_fault_comes_along_and_a_reset_ends_it() {
    let (probe, mut machine) = running();
    probe.0.lock().unwrap().fails = true;
    machine.notify(0);
    machine.run();
    let there = Shared::default();
    let mut machine = machine.moved_to(Box::new(there.clone()));
    machine.lock().resume();
    machine.run();
    assert_eq!((machine.status(), machine.lock().fault()), (0x4f, Some("probing: told to")));
    assert_eq!(there.calls(), Vec::<String>::new());
    machine.init(VERSION_1);
    assert_eq!(there.calls(), ["reset", "activate", "queue 0", "queue 1"]);
}

#[test]
fn a_device_at_work_takes_no_state() {
    let (_, from) = running();
    let (_, to) = running();
    let error = restore(&to, &saved(&from)).unwrap_err();
    assert_eq!(error.to_string(), "the device is at work already");
}

type Damage = fn(&mut State);

/// What cannot be, and what is said of it.
const WRONG: [(&str, Damage); 23] = [
    ("its configuration space has 255 bytes, not 256", |state| state.config.truncate(255)),
    ("it is of another PCI function: 0x41 at 0x02 of configuration space, 0x6a here", |state| state.config[2] = 0x41),
    ("it is of another PCI function: 0x05 at 0x42 of configuration space, 0x02 here", |state| state.config[0x42] = 5),
    ("it has 2 interrupt vectors, and the device 3", |state| state.vectors.truncate(2)),
    ("its interrupt vector 1 is in a state that does not exist", |state| state.vectors[1].address = 0xfee0_0002),
    ("its interrupt vector 2 is in a state that does not exist", |state| {
        (state.vectors[2].pending, state.config[0x43]) = (true, 0);
    }),
    ("it has registers of 1 queues, and the device 2 queues", |state| state.registers.queues.truncate(1)),
    ("it raises interrupt vector 3, and there are 3", |state| state.registers.config_vector = 3),
    ("it raises interrupt vector 65534, and there are 3", |state| state.registers.queues[1].vector = 0xfffe),
    ("its interrupt status is 0x4", |state| state.registers.isr = 4),
    ("its device status 0x1f cannot be", |state| state.registers.status = 0x1f),
    ("its device status 0x0e cannot be", |state| state.registers.status = 0x0e),
    ("its device status 0x07 cannot be", |state| state.registers.status = 0x07),
    ("its device status 0x4b cannot be", |state| state.registers.status = 0x4b),
    ("its driver negotiated 0x100000002, and 0x130000005 is offered here", |state| {
        state.registers.driver_features = VERSION_1 | 2;
    }),
    ("its driver negotiated 0x20000000, and 0x130000005 is offered here", |state| {
        state.registers.driver_features = EVENT_IDX;
    }),
    ("its queue 0 has a size of 16, not a power of 2 up to 8", |state| state.registers.queues[0].size = 16),
    ("its queue 1 has a size of 0, not a power of 2 up to 16", |state| state.registers.queues[1].size = 0),
    ("it has 3 queues, and the device 2", |state| {
        state.rings.push(super::super::state::Ring { next_available: 0, next_used: 0 })
    }),
    ("queue 1: the rings do not lie in guest RAM", |state| state.registers.queues[1].device = 16 << 20),
    ("it waits for a reset and does not say why", |state| state.registers.status = 0x4f),
    ("it has a fault that its driver was not told of", |state| state.fault = Some("why".into())),
    ("its fault's reason is no line of up to 512 characters", |state| {
        (state.registers.status, state.fault) = (0x4f, Some("two\nlines".into()));
    }),
];

#[test]
fn what_cannot_be_is_refused_and_leaves_the_function_as_it_was() {
    let (_, from) = running();
    let (good, model) = saved(&from);
    let (probe, to) = never_run();
    restore(&to, &(good.clone(), model.clone())).unwrap();
    to.wiring.calls();
    let before = saved(&to);
    for (expected, damage) in WRONG {
        let mut state: State = good.decode(1).unwrap();
        damage(&mut state);
        let error = restore(&to, &(Saved::of(1, &state), Saved::of(1, &[9u8; 16]))).unwrap_err();
        assert_eq!((error.to_string().as_str(), saved(&to) == before), (expected, true));
    }
    let mut long: State = good.decode(1).unwrap();
    (long.registers.status, long.fault) = (0x4f, Some("x".repeat(513)));
    restore(&to, &(Saved::of(1, &long), model.clone())).unwrap_err();
    let mut odd: State = good.decode(1).unwrap();
    odd.registers.queues[0].driver += 1;
    let error = restore(&to, &(Saved::of(1, &odd), model.clone())).unwrap_err().to_string();
    assert!(error.starts_with("queue 0: "), "{error}");
    // A model that refuses leaves the transport alone, too.
    let other = Saved { version: 1, contents: vec![1, 2, 3] };
    from.set_common(0x16, 2, 1);
    restore(&to, &(from.lock().save(), other)).unwrap_err();
    let newer = Saved { version: 2, ..good.clone() };
    let error = restore(&to, &(newer, model)).unwrap_err();
    assert_eq!(error.to_string(), "it has version 2, and this program reads up to 1");
    assert_eq!((saved(&to) == before, to.wiring.calls(), probe.calls()), (true, vec![], vec![]));
    assert_eq!(
        error_of_another_device(&good),
        "it is of another PCI function: 0x6a at 0x02 of configuration space, 0x44 here"
    );
}

fn error_of_another_device(transport: &Saved) -> String {
    let rng = Machine::never_run(Box::new(Rng), Driver::new(&[64]));
    restore(&rng, &(transport.clone(), Saved::nothing())).unwrap_err().to_string()
}

#[test]
fn every_part_of_a_state_is_no_state() {
    let (_, from) = running();
    let (good, model) = saved(&from);
    let (_, to) = never_run();
    for length in 0..good.contents.len() {
        let part = Saved { version: 1, contents: good.contents[..length].to_vec() };
        restore(&to, &(part, model.clone())).unwrap_err();
    }
}

proptest! {
    #[test]
    fn damaged_states_are_refused_or_make_a_function_that_works(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        tail in prop::collection::vec(any::<u8>(), 0..4),
    ) {
        let mut from = Machine::new(Box::new(Rng));
        from.init(VERSION_1 | EVENT_IDX);
        let mut transport = from.lock().save();
        for (at, byte) in edits {
            let at = at.index(transport.contents.len());
            transport.contents[at] = byte;
        }
        transport.contents.extend(tail);
        let mut to = Machine::never_run(Box::new(Rng), from.driver);
        let before = saved(&to);
        if restore(&to, &(transport, Saved::nothing())).is_err() {
            prop_assert!(saved(&to) == before);
        }
        to.lock().resume();
        to.run();
        to.segment.reset();
        to.enumerate();
        to.init(VERSION_1);
        to.driver.add(0, &[], &[16]);
        to.notify(0);
        to.run();
        prop_assert!(to.driver.used(0).is_some());
    }

    #[test]
    fn random_bytes_are_no_state(contents in prop::collection::vec(any::<u8>(), 0..600)) {
        let (_, to) = never_run();
        restore(&to, &(Saved { version: 1, contents }, Saved::nothing())).unwrap_err();
    }
}

/// Version 1, which must be read for ever.
const GOLDEN: &str = "
8002f41a6a1006001000010000ff00000000000001c0000000000000000000000000000000000000000000000000f41a
6a1000000000400000000000000000000000114c02800040000000500000095c10010000000000000000400000000970
140200000000003000000800000004000000098010030000000000100000010000000990100400000000002000000010
000009001405000000000000000000000000000000000000000000000000000000000000000000000000000000000000
000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000
00000000000000000000000000000000000003808080f70f300101808080f70f310000808080f70f3200000001858080
8012000f0102010208010180800480800680800710020180800880800a80800b020000000000";

#[test]
fn a_state_of_version_1_is_read() {
    let (probe, mut from) = running();
    from.set_vector_mask(0, true);
    probe.0.lock().unwrap().config_changes = true;
    from.notify(0);
    from.run();
    from.move_bar(WINDOW + 0x1_0000);
    assert_eq!(to_hex(&from.lock().save()), to_hex(&from_hex(1, GOLDEN)));
    let (_, to) = never_run();
    restore(&to, &(from_hex(1, GOLDEN), from.lock().save_model())).unwrap();
    assert_eq!(saved(&to), saved(&from));
}
