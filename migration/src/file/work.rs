//! Work that several threads share, piece by piece, with progress and a way to stop.

use super::Error;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Most threads that work at once.
const MAX_THREADS: usize = 64;

/// How the caller follows what goes on, and stops it.
#[derive(Clone, Copy)]
pub struct Hooks<'a> {
    /// Told the pages that are done, and how many there are; from any thread, never backwards.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
    /// Once this is true, what goes on ends with [`Error::Cancelled`].
    pub cancel: &'a AtomicBool,
}

impl Hooks<'static> {
    /// Nobody follows.
    pub fn none() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Self { progress: &|_, _| {}, cancel: &NEVER }
    }
}

/// Does `work` on each of `items`, on `threads` threads, this one among them. `pages` is how much of the whole an item is.
///
/// # Errors
/// The first one; what had not begun by then is left.
pub(super) fn each<T: Sync, R: Send>(
    threads: usize,
    items: &[T],
    pages: impl Fn(&T) -> u64 + Sync,
    hooks: Hooks<'_>,
    work: impl Fn(&T) -> Result<R, Error> + Sync,
) -> Result<Vec<R>, Error> {
    let total = items.iter().map(&pages).sum();
    let next = AtomicUsize::new(0);
    let done = Mutex::new((0, Ok(Vec::with_capacity(items.len()))));
    let run = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            let result = if hooks.cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { work(item) };
            let (done_pages, results) = &mut *done.lock().unwrap_or_else(PoisonError::into_inner);
            match (results, result) {
                (Ok(results), Ok(result)) => {
                    results.push(result);
                    *done_pages += pages(item);
                    (hooks.progress)(*done_pages, total);
                }
                (results @ Ok(_), Err(error)) => {
                    *results = Err(error);
                    next.store(items.len(), Ordering::Relaxed);
                }
                (Err(_), _) => {}
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.clamp(1, MAX_THREADS).min(items.len().max(1)) {
            // Where no thread can be had, there is one less.
            let _ = thread::Builder::new().name("file".into()).spawn_scoped(scope, run);
        }
        run();
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner).1
}
