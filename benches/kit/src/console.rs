//! A guest's serial output in a file, as it comes: what it says, and when, by the host's clock and by its own.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::setpriority_process;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often it is looked: a resolution, and few enough looks to leave the processors to what is measured.
const LOOK: Duration = Duration::from_micros(500);
/// Ahead of what is measured, so that a look comes in time.
const NICE: i32 = -19;

/// A line and when its end came.
#[derive(Clone)]
pub struct Line {
    /// By the host's clock.
    pub at: Instant,
    /// Without its end.
    pub text: String,
}

/// `tick N Tus`, or `tick N Tus W`.
#[derive(Clone, Copy)]
pub struct Tick {
    /// When it came, by the host's clock.
    pub at: Instant,
    /// When it was, by the guest's.
    pub guest_us: u64,
    /// Pages written by then, if the guest says so.
    pub writes: u64,
}

/// Follows the file until it is dropped.
pub struct Console {
    /// Of the file.
    pub path: PathBuf,
    lines: Arc<Mutex<Vec<Line>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Console {
    /// Follows `path`, which is made anew.
    pub fn follow(path: PathBuf) -> Self {
        let mut file = File::create_new(&path).and_then(|_| File::open(&path)).unwrap();
        let (lines, over) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (into, end) = (Arc::clone(&lines), Arc::clone(&over));
        let look = move || {
            let _only_root = setpriority_process(Some(rustix::thread::gettid()), NICE);
            let mut begun = Vec::new();
            while !end.load(Ordering::Relaxed) {
                thread::sleep(LOOK);
                let had = begun.len();
                if file.read_to_end(&mut begun).unwrap() == 0 {
                    continue;
                }
                let at = Instant::now();
                let Some(end) = begun[had..].iter().rposition(|byte| *byte == b'\n') else { continue };
                let rest = begun.split_off(had + end + 1);
                let text = String::from_utf8_lossy(&begun).into_owned();
                into.lock().unwrap().extend(text.lines().map(|text| Line { at, text: text.trim().to_owned() }));
                begun = rest;
            }
        };
        Self { path, lines, over, thread: Some(thread::spawn(look)) }
    }

    /// The first line that begins with one of `starts`.
    pub fn wait_for(&self, starts: &[&str]) -> Line {
        let deadline = Instant::now() + super::LIMIT;
        loop {
            let wanted = |line: &&Line| starts.iter().any(|start| line.text.starts_with(start));
            let found = self.lines.lock().unwrap().iter().find(wanted).cloned();
            if let Some(line) = found {
                return line;
            }
            assert!(Instant::now() < deadline, "the guest has not said any of {starts:?} in {:?}", super::LIMIT);
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Every tick so far.
    pub fn ticks(&self) -> Vec<Tick> {
        self.lines.lock().unwrap().iter().filter_map(tick).collect()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

fn tick(line: &Line) -> Option<Tick> {
    let mut words = line.text.split(' ');
    let ("tick", Some(_), Some(time)) = (words.next()?, words.next(), words.next()) else { return None };
    let guest_us = time.strip_suffix("us")?.parse().ok()?;
    let writes = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
    Some(Tick { at: line.at, guest_us, writes })
}

/// The longest time between two ticks over the usual one, by the guest's clock and by the host's, milliseconds, of the ticks
/// that came from `from` to `to`, with one before and one after.
pub fn longest_gap_ms(ticks: &[Tick], from: Instant, to: Instant) -> (f64, f64) {
    let first = ticks.iter().rposition(|tick| tick.at < from).unwrap_or(0);
    let last = ticks.iter().position(|tick| tick.at > to).map_or(ticks.len(), |at| at + 1);
    let window = &ticks[first..last.max(first)];
    let pairs = || window.iter().zip(window.iter().skip(1));
    let over = |gaps: Vec<f64>| {
        let mut sorted = gaps;
        sorted.sort_by(f64::total_cmp);
        let usual = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        sorted.last().map_or(f64::NAN, |longest| longest - usual)
    };
    let guest = over(pairs().map(|(a, b)| b.guest_us.saturating_sub(a.guest_us) as f64 / 1e3).collect());
    let outside = over(pairs().map(|(a, b)| super::ms(b.at - a.at)).collect());
    (guest, outside)
}

/// Does `start`, and says how long from then until something is written to the file at `path`, which is there.
pub fn sign_of_life(path: &Path, start: impl FnOnce() -> Instant) -> Duration {
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, path, inotify::WatchFlags::MODIFY).unwrap();
    let began = start();
    let patience = Timespec { tv_sec: super::LIMIT.as_secs() as i64, tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&patience)).unwrap();
    assert!(ready > 0, "the guest shows no sign of life within {:?}", super::LIMIT);
    began.elapsed()
}
