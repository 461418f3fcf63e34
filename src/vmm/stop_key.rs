//! The console's key that stops the machine: the console only notes the wish, this presses the power button.

use super::machine::lock;
use super::vm::Vm;
use crate::console::Console;
use crate::control::machine::Machine;
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::sync::{Arc, Mutex, Weak};

/// The console as the event loop sees it.
pub struct StopKey {
    console: Arc<Mutex<Console>>,
    /// Weak, since the VM holds the event loop.
    vm: Weak<Vm>,
}

impl StopKey {
    /// Presses the power button of `vm` when `console` is told to.
    pub fn new(console: Arc<Mutex<Console>>, vm: &Arc<Vm>) -> Self {
        Self { console, vm: Arc::downgrade(vm) }
    }
}

impl MutEventSubscriber for StopKey {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let wants_stop = {
            let mut console = lock(&self.console);
            console.process(events, ops);
            console.take_stop_request()
        };
        if let Some(vm) = self.vm.upgrade().filter(|_| wants_stop)
            && let Err(error) = vm.press_power_button()
        {
            log::warn!("the power button: {error}");
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        lock(&self.console).init(ops);
    }
}
