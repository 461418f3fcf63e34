//! The one thread on which devices react: notifications, host descriptors, console input.

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Something that reacts to descriptors, as the loop shares it with vCPU threads.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The running loop; dropping it ends the thread.
pub struct EventLoop {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts a loop over `subscribers`.
    ///
    /// # Errors
    /// When the thread or its descriptors cannot be made.
    pub fn start(subscribers: Vec<Subscriber>) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopping = Arc::new(Mutex::new(Stopping { event: stop.try_clone()?, seen: false }));
        let mut manager = EventManager::<Subscriber>::new().map_err(io::Error::other)?;
        let run = move || {
            for subscriber in subscribers {
                manager.add_subscriber(subscriber);
            }
            manager.add_subscriber(stopping.clone());
            while !is_over(&stopping) {
                if let Err(error) = manager.run() {
                    log::error!("device event loop: {error}");
                }
            }
        };
        let thread = Builder::new().name("devices".into()).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        // The counter can only refuse near 2^64, when the event is pending anyway.
        let _pending = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic in it has already ended the process.
            let _ended = thread.join();
        }
    }
}

struct Stopping {
    event: EventFd,
    seen: bool,
}

fn is_over(stopping: &Mutex<Stopping>) -> bool {
    stopping.lock().map_or(true, |stopping| stopping.seen)
}

impl MutEventSubscriber for Stopping {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        self.seen = true;
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.event, EventSet::IN)) {
            log::error!("device event loop cannot be told to stop: {error}");
        }
    }
}
