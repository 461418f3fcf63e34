//! What happens to a machine, told to whoever listens.
//!
//! Publishing never waits: a listener that does not keep up loses events and is told how many. This file refuses to
//! know sockets.

use crate::clock;
use crate::control::machine::Ended;
use crate::control::movement::MoveStatus;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

/// Events that one listener may be behind.
pub const BACKLOG: usize = 256;

/// Something that happened to a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The vCPUs run for the first time.
    Started,
    /// vCPUs and devices stand still.
    Paused,
    /// vCPUs and devices go on.
    Resumed,
    /// The power button was pressed.
    PowerButton,
    /// The guest asked for a reset and starts again from its kernel.
    Rebooted,
    /// A device found the guest's driver breaking the rules and waits for a reset.
    DeviceFault {
        /// Id of the device.
        device: String,
        /// What the driver did.
        reason: String,
    },
    /// A move has come further, or has ended.
    Migration(Box<MoveStatus>),
    /// The guest's kernel reported a panic.
    GuestPanic,
    /// The guest is gone; the last event.
    Ended(Ended),
    /// This listener was too slow and has not been told of so many events.
    Lost {
        /// How many.
        count: u64,
    },
}

/// An event with what is needed to place it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Counts the machine's events from 1; on `Lost` the number of the last event lost.
    pub seq: u64,
    /// When, in UTC (RFC 3339).
    pub time: String,
    /// Name of the machine.
    pub vm: String,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// Passes one machine's events to any number of listeners.
pub struct EventBus {
    /// Name of the machine, part of each record.
    vm: String,
    state: Mutex<BusState>,
}

#[derive(Default)]
struct BusState {
    /// Number of the latest event.
    seq: u64,
    /// No event will follow.
    closed: bool,
    /// Listeners; one that was dropped goes at the next event.
    listeners: Vec<Weak<Queue>>,
}

#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    /// Oldest first, at most [`BACKLOG`].
    records: VecDeque<Record>,
    /// Told in the place where events are missing.
    lost: Option<(u64, Record)>,
    /// No event will follow those in `records`.
    closed: bool,
}

impl EventBus {
    /// A bus for the machine called `vm`.
    pub fn new(vm: &str) -> Self {
        EventBus { vm: vm.to_owned(), state: Mutex::default() }
    }

    /// Tells every listener. Never waits for one.
    pub fn publish(&self, event: Event) {
        let mut state = lock(&self.state);
        state.seq += 1;
        let record = Record { seq: state.seq, time: clock::rfc3339(SystemTime::now()), vm: self.vm.clone(), event };
        log::debug!("event {}: {:?}", record.seq, record.event);
        state.listeners.retain(|listener| match listener.upgrade() {
            Some(queue) => {
                queue.push(record.clone());
                true
            }
            None => false,
        });
    }

    /// Listens from now on.
    pub fn subscribe(&self) -> Subscription {
        let queue = Arc::new(Queue::default());
        let mut state = lock(&self.state);
        lock(&queue.state).closed = state.closed;
        state.listeners.retain(|listener| listener.strong_count() > 0);
        state.listeners.push(Arc::downgrade(&queue));
        Subscription { queue }
    }

    /// Says that no event will follow; listeners end once they have read what there is.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        for queue in state.listeners.drain(..).filter_map(|listener| listener.upgrade()) {
            lock(&queue.state).closed = true;
            queue.changed.notify_all();
        }
    }
}

impl Queue {
    fn push(&self, record: Record) {
        let mut state = lock(&self.state);
        if state.records.len() < BACKLOG && state.lost.is_none() {
            state.records.push_back(record);
        } else {
            let count = state.lost.as_ref().map_or(0, |(count, _)| *count) + 1;
            state.lost = Some((count, record));
        }
        self.changed.notify_all();
    }
}

/// One listener's place on an [`EventBus`].
pub struct Subscription {
    queue: Arc<Queue>,
}

/// What waiting for an event came to.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// An event.
    Event(Record),
    /// Nothing happened within the time given.
    Nothing,
    /// No event will follow.
    Closed,
}

impl Subscription {
    /// Waits for the next event, at most `timeout`.
    pub fn next(&self, timeout: Duration) -> Next {
        let deadline = Instant::now() + timeout;
        let mut state = lock(&self.queue.state);
        loop {
            if let Some(record) = state.records.pop_front() {
                return Next::Event(record);
            }
            if let Some((count, last)) = state.lost.take() {
                return Next::Event(Record { event: Event::Lost { count }, ..last });
            }
            if state.closed {
                return Next::Closed;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Next::Nothing;
            }
            state = self.queue.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Takes a lock whose holder cannot leave the data half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(10);

    fn event_of(next: Next) -> Event {
        match next {
            Next::Event(record) => record.event,
            other => panic!("expected an event, got {other:?}"),
        }
    }

    #[test]
    fn each_listener_gets_each_event_in_order() {
        let bus = EventBus::new("web");
        let (a, b) = (bus.subscribe(), bus.subscribe());
        bus.publish(Event::Started);
        bus.publish(Event::Paused);
        for listener in [a, b] {
            assert_eq!(event_of(listener.next(SOON)), Event::Started);
            assert_eq!(event_of(listener.next(SOON)), Event::Paused);
            assert_eq!(listener.next(SOON), Next::Nothing);
        }
    }

    #[test]
    fn a_slow_listener_is_told_how_much_it_missed() {
        let bus = EventBus::new("web");
        let listener = bus.subscribe();
        for _ in 0..BACKLOG + 3 {
            bus.publish(Event::Rebooted);
        }
        for _ in 0..BACKLOG {
            assert_eq!(event_of(listener.next(SOON)), Event::Rebooted);
        }
        assert_eq!(event_of(listener.next(SOON)), Event::Lost { count: 3 });
        bus.publish(Event::Paused);
        assert_eq!(event_of(listener.next(SOON)), Event::Paused);
    }

    #[test]
    fn a_closed_bus_delivers_what_it_has_and_ends() {
        let bus = EventBus::new("web");
        let listener = bus.subscribe();
        bus.publish(Event::Ended(Ended::Killed));
        bus.close();
        assert_eq!(event_of(listener.next(SOON)), Event::Ended(Ended::Killed));
        assert_eq!(listener.next(SOON), Next::Closed);
        assert_eq!(bus.subscribe().next(SOON), Next::Closed);
    }

    #[test]
    fn a_waiting_listener_is_woken() {
        let bus = Arc::new(EventBus::new("web"));
        let listener = bus.subscribe();
        let publisher = std::thread::spawn({
            let bus = Arc::clone(&bus);
            move || bus.publish(Event::Started)
        });
        assert_eq!(event_of(listener.next(Duration::from_secs(10))), Event::Started);
        publisher.join().unwrap();
    }

    #[test]
    fn records_are_flat_json() {
        let record = |event| Record { seq: 3, time: "t".into(), vm: "web".into(), event };
        for (event, json) in [
            (Event::PowerButton, r#"{"seq":3,"time":"t","vm":"web","event":"power-button"}"#),
            (
                Event::DeviceFault { device: "disk0".into(), reason: "loop".into() },
                r#"{"seq":3,"time":"t","vm":"web","event":"device-fault","device":"disk0","reason":"loop"}"#,
            ),
            (Event::Ended(Ended::Killed), r#"{"seq":3,"time":"t","vm":"web","event":"ended","reason":"killed"}"#),
            (
                Event::Ended(Ended::InternalError("x".into())),
                r#"{"seq":3,"time":"t","vm":"web","event":"ended","reason":"internal-error","detail":"x"}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&record(event.clone())).unwrap(), json);
            assert_eq!(serde_json::from_str::<Record>(json).unwrap(), record(event));
        }
    }
}
