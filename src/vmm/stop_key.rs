//! The console's key that stops the machine: the console only notes the wish, this does what a SIGTERM does.

use super::machine::lock;
use crate::console::Console;
use event_manager::{EventOps, Events, MutEventSubscriber};
use signal_hook::consts::SIGTERM;
use std::sync::{Arc, Mutex};

/// The console as the event loop sees it.
pub struct StopKey(pub Arc<Mutex<Console>>);

impl MutEventSubscriber for StopKey {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let wants_stop = {
            let mut console = lock(&self.0);
            console.process(events, ops);
            console.take_stop_request()
        };
        // One way to ask, with one answer for a guest that is paused or deaf: the first presses the button, the second ends it.
        if wants_stop && let Err(error) = signal_hook::low_level::raise(SIGTERM) {
            log::warn!("the key that stops the machine: {error}");
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        lock(&self.0).init(ops);
    }
}
