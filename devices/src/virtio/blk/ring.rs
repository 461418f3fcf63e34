//! An io_uring that owns the operations it has handed to the kernel.
#![expect(unsafe_code, reason = "the kernel is given pointers that must outlive the call")]

use super::event::Event;
use super::op::{Done, Op};
use io_uring::{IoUring, squeue};
use std::io;

/// Submission entries: every operation that may be in flight fits.
const ENTRIES: u16 = super::SLOTS;

/// See the module.
pub struct Ring {
    uring: IoUring,
    /// Operations the kernel works on, by token.
    ops: Vec<Option<Op>>,
    in_flight: usize,
}

impl Ring {
    /// A ring that signals `completed`. Nothing is registered with it but that event: a registered file would be let
    /// go only some time after the process has ended, and its lock with it.
    ///
    /// # Errors
    /// ENOSYS or EPERM where the host does not permit io_uring.
    pub fn new(completed: &Event) -> io::Result<Self> {
        let uring = IoUring::builder().dontfork().setup_cqsize(u32::from(ENTRIES)).build(u32::from(ENTRIES))?;
        uring.submitter().register_eventfd(completed.fd())?;
        Ok(Self { uring, ops: (0..ENTRIES).map(|_| None).collect(), in_flight: 0 })
    }

    /// Queues `op`, whose `entry` this is, for the next [`Self::submit`]. A taken token or a full ring gives it back.
    pub fn push(&mut self, token: u16, op: Op, entry: squeue::Entry) -> Result<(), Op> {
        let Some(slot) = self.ops.get_mut(usize::from(token)).filter(|slot| slot.is_none()) else { return Err(op) };
        let op = slot.insert(op);
        debug_assert!(matches!(op, Op::Read { .. } | Op::Write { .. } | Op::Flush | Op::Allocate { .. }));
        // SAFETY: the entry points to the vectors of `op` and these to memory, all owned by `op` on the heap, so its
        // move into the slot left them in place. The slot keeps `op` until its completion arrives (`pop` is the only
        // one to take it out), and `drop` leaks it rather than free what the kernel may still use.
        let pushed = unsafe { self.uring.submission().push(&entry.user_data(u64::from(token))) };
        match pushed {
            Ok(()) => {
                self.in_flight += 1;
                Ok(())
            }
            Err(_full) => slot.take().map_or(Ok(()), Err),
        }
    }

    /// Hands what was pushed to the kernel.
    ///
    /// # Errors
    /// The kernel is out of resources: what was not taken stays queued for the next call.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            match self.uring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) => return Err(io::ErrorKind::WouldBlock.into()),
                outcome => drop(outcome?),
            }
        }
        Ok(())
    }

    /// The next operation that has ended.
    pub fn pop(&mut self) -> Option<Done> {
        loop {
            let entry = self.uring.completion().next()?;
            let token = u16::try_from(entry.user_data()).unwrap_or(u16::MAX);
            // A completion of nothing we know is not ours to act on.
            let Some(op) = self.ops.get_mut(usize::from(token)).and_then(Option::take) else { continue };
            self.in_flight -= 1;
            let result = u32::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            return Some(Done { token, op, result });
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The engine waits for everything before it drops the ring. Should that ever fail, memory that the kernel may
        // still write is lost, not reused.
        if self.in_flight != 0 {
            std::mem::forget(std::mem::take(&mut self.ops));
        }
    }
}
