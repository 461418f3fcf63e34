//! How fast machines are saved and restored, beside plain writing of as many bytes to the same file system.
//!
//! `cargo bench -p sterna-migration --bench file -- [FOLDER]`; needs 10 GiB of memory and 6 GiB of disk. Memory is touched before
//! anything is timed, and each figure is the best of three, the two sides in turn.

#![expect(unsafe_code, reason = "guest RAM is advised as the program does it")]
#![expect(clippy::unwrap_used, reason = "a measurement that fails has no figure")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use sterna_migration::file::{Contents, Figures, Hooks, Options, Saved, SavedFile, save};
use sterna_migration::ram::GuestRam;
use sterna_migration::{Ram, Run, Section, Sections, present};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

const MIB: u64 = 1 << 20;
const THREADS: usize = 2;

fn main() {
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let folder = folder.map_or_else(std::env::temp_dir, PathBuf::from);
    let file = folder.join("sterna-bench.saved");
    against_plain(&file);
    little_in_much(&file);
    restores(&file, 256);
    restores(&file, 4096);
}

/// A RAM of `mib`, of huge pages as a machine's, whose first `touched_mib` are noise.
fn ram(mib: u64, touched_mib: u64) -> Ram {
    let low = mib.min(3072) * MIB;
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if mib * MIB > low {
        ranges.push((GuestAddress(4 << 30), (mib * MIB - low) as usize));
    }
    let ram = Ram::new(Arc::new(GuestRam::from_ranges(&ranges).unwrap()));
    for (run, address) in ram.pieces(Run { first: 0, pages: ram.pages() }) {
        // SAFETY: the range is guest RAM, whose contents stay.
        unsafe { rustix::mm::madvise(address.cast(), run.bytes() as usize, rustix::mm::Advice::LinuxHugepage) }
            .unwrap();
    }
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut page = [0; 4096];
    for number in 0..touched_mib * 256 {
        for word in page.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        ram.memory().write_slice(&page, ram.address(number).unwrap()).unwrap();
    }
    ram
}

fn contents() -> Contents {
    let text = || "bench".to_owned();
    let saved =
        Saved { program: text(), host: text(), time: text(), time_unix_ns: 0, machine: text(), uuid: Uuid::nil() };
    let mut sections = Sections::default();
    sections.push(Section { name: "vcpu0".into(), version: 1, contents: vec![1; 4096] }).unwrap();
    Contents { id: Uuid::nil(), epoch: 0, saved, description: b"{}".to_vec(), sections }
}

fn saved(file: &Path, ram: &Ram, compress: bool) -> (Duration, Figures) {
    let _ = fs::remove_file(file);
    let options = Options { compress, ..Options::default() };
    let begin = Instant::now();
    let pages = present(ram).unwrap();
    let figures = save(file, &contents(), ram, &pages, &options, Hooks::none()).unwrap();
    (begin.elapsed(), figures)
}

/// Writes `mib` of RAM as fast as the file system takes it: 4 MiB requests past the page cache, then fsync.
fn plain(file: &Path, ram: &Ram, mib: u64) -> Duration {
    let _ = fs::remove_file(file);
    let begin = Instant::now();
    let output = OpenOptions::new().write(true).create_new(true).custom_flags(libc::O_DIRECT).open(file).unwrap();
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let first = next.fetch_add(1024, Ordering::Relaxed);
                    if first >= mib * 256 {
                        break;
                    }
                    ram.write_at(&output, Run { first, pages: 1024 }, first * 4096).unwrap();
                }
            });
        }
    });
    output.sync_all().unwrap();
    begin.elapsed()
}

fn best<T>(mut measure: impl FnMut() -> (Duration, T)) -> (Duration, T) {
    (0..3).map(|_| measure()).min_by_key(|(time, _)| *time).unwrap()
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn speed(mib: u64, time: Duration) -> f64 {
    mib as f64 / time.as_secs_f64()
}

fn against_plain(file: &Path) {
    let mib = 1024;
    let ram = ram(mib, mib);
    let (mut plain_time, mut save_time) = (Duration::MAX, Duration::MAX);
    for _ in 0..3 {
        plain_time = plain_time.min(plain(file, &ram, mib));
        save_time = save_time.min(saved(file, &ram, false).0);
    }
    let part = plain_time.as_secs_f64() / save_time.as_secs_f64() * 100.0;
    println!("plain O_DIRECT writing of 1 GiB: {:.0} MiB/s", speed(mib, plain_time));
    println!("save of 1 GiB, all touched: {:.0} MiB/s, {part:.0} % of that", speed(mib, save_time));
    for page in (0..mib * 256).step_by(2) {
        ram.discard(Run { first: page, pages: 1 }).unwrap();
    }
    let (time, _) = best(|| saved(file, &ram, false));
    println!("the same with every second page gone: {:.0} MiB/s of pages", speed(mib / 2, time));
    let (time, figures) = best(|| saved(file, &ram, true));
    println!("the same compressed: {:.0} MiB/s, {} MiB", speed(mib / 2, time), figures.disk_bytes / MIB);
    fs::remove_file(file).unwrap();
}

fn little_in_much(file: &Path) {
    let (small, large) = (ram(1024, 16), ram(8192, 16));
    let (look, pages) = best(|| {
        let begin = Instant::now();
        let pages = present(&large).unwrap().count();
        (begin.elapsed(), pages)
    });
    println!("which pages of 8 GiB exist ({pages} do): {:.2} ms", ms(look));
    let (mut small_time, mut large_time) = (Duration::MAX, Duration::MAX);
    for _ in 0..5 {
        small_time = small_time.min(saved(file, &small, false).0);
        large_time = large_time.min(saved(file, &large, false).0);
    }
    let times = large_time.as_secs_f64() / small_time.as_secs_f64();
    println!(
        "save with 16 MiB touched: 1 GiB {:.1} ms, 8 GiB {:.1} ms, {times:.2} times",
        ms(small_time),
        ms(large_time)
    );
    fs::remove_file(file).unwrap();
}

fn restores(file: &Path, mib: u64) {
    let source = ram(mib, mib);
    saved(file, &source, false);
    let target = source; // warm, and emptied by each restore
    let timed = |work: &dyn Fn()| {
        let begin = Instant::now();
        work();
        (begin.elapsed(), ())
    };
    let (open, ()) = best(|| timed(&|| drop(SavedFile::open(file).unwrap())));
    let saved = SavedFile::open(file).unwrap();
    let (load, ()) = best(|| {
        drop_cache(file);
        timed(&|| saved.load(&target, Options::default().threads, Hooks::none()).unwrap())
    });
    saved.verify(THREADS, Hooks::none()).unwrap(); // into the page cache
    let (cached, ()) = best(|| timed(&|| saved.load(&target, Options::default().threads, Hooks::none()).unwrap()));
    let (verify, ()) = best(|| timed(&|| saved.verify(THREADS, Hooks::none()).unwrap()));
    let (map, ()) = best(|| timed(&|| saved.map(&target).unwrap()));
    println!("{mib} MiB touched: open {:.2} ms, map {:.3} ms", ms(open), ms(map));
    println!(
        "  load {:.0} MiB/s from the disk, {:.0} MiB/s from the page cache; verify {:.0} MiB/s",
        speed(mib, load),
        speed(mib, cached),
        speed(mib, verify)
    );
    fs::remove_file(file).unwrap();
}

fn drop_cache(file: &Path) {
    let file = File::open(file).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}
