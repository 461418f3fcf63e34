//! Threads that copy memory while its guest runs stand back behind the guest's vCPUs.
//!
//! With as many copying threads as processors a vCPU that is always busy waits for its turn far longer than the standstill.
//! Niceness and not a policy of idle time: on a host that is busy through and through a move must still get on.

use rustix::process::{getpriority_process, setpriority_process};
use std::sync::atomic::{AtomicBool, Ordering};

/// How much nicer: a third of a vCPU's share where both want the same processor. With a tenth (10) a move between hosts of one
/// busy processor each took 57 s instead of 8.
const NICER: i32 = 5;
/// As nice as it gets.
const NICEST: i32 = 19;

/// How the threads of one move stand back.
pub(super) struct Courtesy {
    /// What they have otherwise.
    usual: i32,
    /// They do: they could come forward again, and nobody has said [`Self::insist`].
    stand_back: AtomicBool,
}

impl Courtesy {
    /// Of threads that now are as nice as the calling one. None stands back before [`Self::find_out`].
    pub(super) fn new() -> Self {
        Self { usual: getpriority_process(None).unwrap_or(0), stand_back: AtomicBool::new(false) }
    }

    /// Tries it on the calling thread: anybody may stand back, and not everybody may come forward again (setpriority(2)). A
    /// thread that may not is better off with what it has, since at the end the guest waits for it.
    pub(super) fn find_out(&self) {
        let tried = self.set(self.nicer()).and_then(|()| self.set(self.usual));
        self.stand_back.store(tried.is_ok(), Ordering::Relaxed);
    }

    /// No thread stands back any more.
    pub(super) fn insist(&self) {
        self.stand_back.store(false, Ordering::Relaxed);
    }

    /// The calling thread stands back, if any does, from here to the end of what is returned.
    pub(super) fn stand_back(&self) -> Option<Back<'_>> {
        let may = self.stand_back.load(Ordering::Relaxed);
        (may && self.told(self.nicer())).then_some(Back(self))
    }

    fn told(&self, niceness: i32) -> bool {
        self.set(niceness).inspect_err(|error| log::warn!("a thread of the move keeps its priority: {error}")).is_ok()
    }

    fn nicer(&self) -> i32 {
        (self.usual + NICER).min(NICEST)
    }

    /// Linux takes "this process" for this thread.
    fn set(&self, niceness: i32) -> rustix::io::Result<()> {
        setpriority_process(None, niceness)
    }
}

/// The thread stands back.
pub(super) struct Back<'a>(&'a Courtesy);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        self.0.told(self.0.usual);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::{PageSet, Run};
    use crate::stream::rig::{connections, ram};
    use crate::stream::{Hooks, Pace, Receiver, Sender, Throttle};
    use std::io;
    use std::sync::{Arc, Mutex};

    fn niceness() -> i32 {
        getpriority_process(None).unwrap()
    }

    /// Notes how nice the threads are that send.
    #[derive(Default)]
    struct Watch(Mutex<Vec<i32>>);

    impl Hooks for Watch {
        fn before(&self, _: Run, _: &[u64]) -> io::Result<()> {
            self.0.lock().unwrap().push(niceness());
            Ok(())
        }

        fn sent(&self, _: u64, _: u64) {}

        fn cancelled(&self) -> bool {
            false
        }
    }

    #[test]
    fn who_sends_stands_back_while_the_guest_runs_and_not_at_the_end() {
        let courtesy = Courtesy::new();
        let usual = niceness();
        std::thread::scope(|scope| scope.spawn(|| courtesy.find_out()).join()).unwrap();
        let nicer = if courtesy.stand_back.load(Ordering::Relaxed) { courtesy.nicer() } else { usual };
        let ram_here = ram(6 * 1024, 2304);
        let (ours, theirs) = connections(2, false);
        let there = ram(6 * 1024, 2304);
        let target = std::thread::spawn(move || {
            let mut receiver = Receiver::new(there, theirs).unwrap();
            while receiver.next_event().is_ok() {}
        });
        let watch = Arc::new(Watch::default());
        let hooks = Arc::clone(&watch) as Arc<dyn Hooks>;
        let mut sender = Sender::new(ram_here.clone(), ours, Arc::new(Throttle::new(None)), hooks).unwrap();
        let all = Arc::new(PageSet::all(ram_here.pages()));
        for (number, (pace, expected)) in
            [(Pace::Limited, nicer), (Pace::Full, usual), (Pace::Limited, nicer), (Pace::Limited, usual)]
                .into_iter()
                .enumerate()
        {
            if number == 3 {
                sender.insist();
            }
            sender.send_pass(&all, pace).unwrap();
            let seen = std::mem::take(&mut *watch.0.lock().unwrap());
            assert!(
                !seen.is_empty() && seen.iter().all(|seen| *seen == expected),
                "{pace:?}: {seen:?}, not {expected}"
            );
            assert_eq!(niceness(), usual, "the caller's, between passes");
        }
        drop(sender);
        target.join().unwrap();
    }
}
