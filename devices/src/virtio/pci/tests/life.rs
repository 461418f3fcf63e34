//! A driver comes and goes, the machine pauses, the BAR moves, the device fails.

use super::machine::{Machine, Shared, VERSION_1, WINDOW, message};
use crate::MsiMessage;
use crate::pci::config::{COMMAND, COMMAND_MEMORY};
use crate::pci::testing::Call;
use crate::virtio::rng::Rng;
use crate::virtio::{Backend, Fault};
use std::os::fd::AsRawFd;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn probe() -> (Shared, Machine) {
    let probe = Shared::default();
    let mut machine = Machine::new(Box::new(probe.clone()));
    machine.init(VERSION_1);
    assert_eq!(probe.calls(), ["reset", "activate", "queue 0", "queue 1"]);
    (probe, machine)
}

#[test]
fn doorbells_follow_the_bar() {
    let probe = Shared::default();
    let mut machine = Machine::new(Box::new(probe.clone()));
    let at = |base: u64| [base + 0x3000, base + 0x3004];
    machine.negotiate(VERSION_1);
    machine.set_rings(1);
    machine.set_common(0x1c, 2, 1);
    assert_eq!(machine.wiring.calls(), [], "nothing is bound before DRIVER_OK");
    machine.set_status(0xf);
    assert_eq!(machine.wiring.calls(), [Call::Bind(at(WINDOW)[1])], "an unused queue has no doorbell");
    machine.init(VERSION_1);
    machine.move_bar(WINDOW + 0x1_0000);
    let [old, new] = [at(WINDOW), at(WINDOW + 0x1_0000)];
    let moved = [Call::Unbind(old[0]), Call::Bind(new[0]), Call::Unbind(old[1]), Call::Bind(new[1])];
    assert_eq!(machine.wiring.calls(), moved);
    probe.calls();
    machine.notify(1);
    machine.run();
    assert_eq!(probe.calls(), ["queue 1"]);
    machine.set_config(COMMAND as u64, &[0, 0]);
    assert_eq!(machine.wiring.calls(), new.map(Call::Unbind));
    machine.set_config(COMMAND as u64, &[COMMAND_MEMORY as u8, 0]);
    assert_eq!(machine.wiring.calls(), new.map(Call::Bind));
    machine.set_status(0);
    assert_eq!(machine.wiring.calls(), new.map(Call::Unbind));
    machine.notify(1);
    machine.run();
    assert_eq!(probe.calls(), ["quiesce", "reset"]);
}

#[test]
fn a_reset_forgets_the_driver() {
    let (probe, mut machine) = probe();
    machine.set_status(0);
    assert_eq!(probe.calls(), ["quiesce", "reset"]);
    assert_eq!((machine.status(), machine.common(0x10, 2)), (0, 0xffff));
    machine.set_common(0x16, 2, 1);
    assert_eq!((machine.common(0x1a, 2), machine.common(0x1c, 2), machine.common(0x20, 8)), (0xffff, 0, 0));
    machine.init(VERSION_1);
    assert_eq!(probe.calls(), ["reset", "activate", "queue 0", "queue 1"]);
}

#[test]
fn a_machine_that_restarts_finds_the_function_as_at_power_on() {
    let (probe, mut machine) = probe();
    machine.move_bar(WINDOW + 0x1_0000);
    machine.wiring.calls();
    machine.segment.reset();
    assert_eq!(probe.calls(), ["quiesce", "reset"]);
    assert_eq!(machine.wiring.calls(), [WINDOW + 0x1_3000, WINDOW + 0x1_3004].map(Call::Unbind));
    assert_eq!((machine.config(4) & 0xffff, machine.config(0x10)), (0, 0xc000_0000));
    machine.enumerate();
    machine.init(VERSION_1);
    assert_eq!(probe.calls(), ["reset", "activate", "queue 0", "queue 1"]);
}

#[test]
fn a_driver_that_breaks_the_rules_is_told_so_once() {
    let mut machine = Machine::new(Box::new(Rng));
    machine.init(VERSION_1);
    machine.driver.offer(0, 64);
    for _ in 0..3 {
        machine.notify(0);
        machine.run();
    }
    assert_eq!(machine.status(), 0x4f);
    assert_eq!((machine.raised(), machine.read(machine.found.isr, 1)), (vec![0], 2));
    let reason = "queue 0: descriptor chain at 64 loops, is too long, or names a descriptor that does not exist";
    assert_eq!(*machine.faults.lock().unwrap(), [("test0".to_owned(), reason.to_owned())]);
    assert_eq!(machine.lock().fault(), Some(reason));
    machine.set_status(0xf);
    assert_eq!(machine.status(), 0x4f, "only a reset helps");
    machine.init(VERSION_1);
    machine.driver.add(0, &[], &[8]);
    machine.notify(0);
    machine.run();
    assert_eq!(machine.driver.used(0).unwrap().length, 8);
}

#[test]
fn a_device_that_fails_says_why() {
    let (probe, mut machine) = probe();
    probe.0.lock().unwrap().fails = true;
    machine.notify(0);
    machine.run();
    assert_eq!(machine.lock().fault(), Some("probing: told to"));
    machine.notify(1);
    machine.run();
    assert_eq!(probe.calls(), ["queue 0"], "nothing is looked at before a reset");
    machine.set_status(0);
    assert_eq!(probe.calls(), ["quiesce", "reset"]);
    probe.0.lock().unwrap().fails = true;
    machine.set_status(3);
    assert_eq!(machine.status(), 3);
}

#[test]
fn a_pause_loses_no_notification_and_no_interrupt() {
    let mut machine = Machine::new(Box::new(Rng));
    machine.init(VERSION_1);
    machine.driver.add(0, &[], &[16]);
    machine.notify(0);
    machine.lock().pause().unwrap();
    machine.run();
    assert!(machine.driver.used(0).is_none());
    // Notified while paused; the event loop has drained the doorbell.
    machine.driver.add(0, &[], &[16]);
    machine.notify(0);
    machine.run();
    assert!(machine.driver.used(0).is_none());
    assert!(machine.raised().is_empty());
    machine.lock().resume();
    machine.run();
    assert!(machine.driver.used(0).is_some() && machine.driver.used(0).is_some());
    assert_eq!(machine.raised(), [1]);
}

#[test]
fn an_interrupt_that_was_pending_at_a_pause_still_comes() {
    let mut machine = Machine::new(Box::new(Rng));
    machine.init(VERSION_1);
    machine.set_vector_mask(1, true);
    machine.driver.add(0, &[], &[16]);
    machine.notify(0);
    machine.run();
    machine.lock().pause().unwrap();
    machine.lock().resume();
    machine.set_vector_mask(1, false);
    assert_eq!(machine.wiring.calls(), [Call::Signal(message(1))]);
}

#[test]
fn a_driver_may_come_and_go_during_a_pause() {
    let (probe, mut machine) = probe();
    machine.lock().pause().unwrap();
    machine.lock().pause().unwrap();
    assert_eq!(probe.calls(), ["quiesce"]);
    machine.init(VERSION_1);
    assert_eq!(probe.calls(), ["quiesce", "reset"], "no activation before the end of the pause");
    machine.lock().resume();
    machine.lock().resume();
    machine.run();
    assert_eq!(probe.calls(), ["activate", "queue 0", "queue 1"]);
}

#[test]
fn a_device_that_cannot_finish_is_paused_all_the_same() {
    let (probe, mut machine) = probe();
    probe.0.lock().unwrap().fails = true;
    assert!(matches!(machine.lock().pause(), Err(Fault::Backend { .. })));
    assert_eq!((machine.status(), machine.raised()), (0x4f, vec![0]));
    machine.lock().resume();
    machine.run();
    assert_eq!(probe.calls(), ["quiesce"]);
    assert_eq!(machine.lock().fault(), Some("probing: told to"));
    machine.init(VERSION_1);
    assert_eq!(probe.calls(), ["quiesce", "reset", "activate", "queue 0", "queue 1"]);
}

#[test]
fn the_event_loop_waits_for_what_a_working_device_wants() {
    let ready = EventFd::new(EFD_NONBLOCK).unwrap();
    ready.write(1).unwrap();
    let wants = |events| Some(Backend { fd: ready.as_raw_fd(), events });
    let probe = Shared::default();
    probe.0.lock().unwrap().backend = wants(EventSet::IN);
    let mut machine = Machine::new(Box::new(probe.clone()));
    machine.run();
    assert_eq!(probe.calls(), Vec::<String>::new(), "not active");
    // Readiness is level-triggered and the probe reads nothing: one round of the loop each.
    probe.0.lock().unwrap().backend = None;
    machine.init(VERSION_1);
    probe.calls();
    probe.0.lock().unwrap().backend = wants(EventSet::IN);
    machine.notify(0);
    machine.round();
    assert_eq!(probe.calls(), ["queue 0"]);
    machine.round();
    assert_eq!(probe.calls(), ["backend"]);
    machine.lock().pause().unwrap();
    machine.run();
    assert_eq!(probe.calls(), ["quiesce"], "paused");
    machine.lock().resume();
    machine.round();
    machine.round();
    assert!(probe.calls().contains(&"backend".to_owned()));
    // An eventfd that can be read is not asked for when only an error is of interest.
    probe.0.lock().unwrap().backend = wants(EventSet::ERROR);
    machine.round();
    machine.run();
    probe.0.lock().unwrap().backend = wants(EventSet::IN);
    machine.notify(0);
    machine.round();
    probe.calls();
    probe.0.lock().unwrap().fails = true;
    machine.round();
    machine.run();
    assert_eq!(probe.calls(), ["backend"], "not after a fault");
    assert!(machine.lock().fault().is_some());
    machine.set_status(0);
    machine.run();
    assert_eq!(probe.calls(), ["quiesce", "reset"]);
}

#[test]
fn a_device_that_fails_at_activation_needs_a_reset() {
    let probe = Shared::default();
    let mut machine = Machine::new(Box::new(probe.clone()));
    machine.negotiate(VERSION_1);
    machine.set_up_interrupts();
    machine.set_rings(0);
    machine.set_common(0x1c, 2, 1);
    probe.calls();
    machine.wiring.calls();
    probe.0.lock().unwrap().fails = true;
    machine.set_status(0xf);
    machine.run();
    assert_eq!((machine.status(), probe.calls(), machine.raised()), (0x4f, vec!["activate".to_owned()], vec![0]));
}

#[test]
fn messages_are_those_the_driver_wrote() {
    let (probe, mut machine) = probe();
    machine.write(machine.found.table, 8, 0xfee0_2000);
    probe.0.lock().unwrap().config_changes = true;
    machine.notify(0);
    machine.run();
    let there = MsiMessage { address: 0xfee0_2000, data: message(0).data };
    assert_eq!(machine.wiring.calls(), [Call::Signal(there)]);
}

#[test]
fn only_a_device_that_works_is_told_of_a_move() {
    let (probe, machine) = probe();
    machine.lock().moved();
    assert_eq!(probe.calls(), ["moved"]);
    machine.lock().pause().unwrap();
    machine.lock().moved();
    assert_eq!(probe.calls(), ["quiesce"]);
    machine.lock().resume();
    probe.0.lock().unwrap().fails = true;
    machine.lock().moved();
    machine.lock().moved();
    assert_eq!((probe.calls(), machine.lock().fault()), (vec!["moved".to_owned()], Some("probing: told to")));
    machine.set_status(0);
    machine.lock().moved();
    assert_eq!(probe.calls(), ["quiesce", "reset"]);
}
