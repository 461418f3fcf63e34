//! One save, one restore, one quick move.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};
use sterna_bench::{Console, Guest, Host, Qemu, WarmMemory, longest_gap_ms, ms, sign_of_life};

const PROGRAM: &str = env!("CARGO_BIN_EXE_sterna");
/// How long the guest ticks before something is done with it.
const SETTLE: Duration = Duration::from_millis(300);

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The program of this tree.
    Sterna,
    /// QEMU's smallest machine.
    Qemu,
}

/// How a save went.
#[derive(Debug)]
pub struct Saving {
    /// From the order to its end, the file on the disk.
    pub total_ms: f64,
    /// Of the guest; Sterna only.
    pub standstill_ms: f64,
}

/// What a monitor needs beside its guest's memory, and what a mapped guest touches of its own, with room to spare.
const SMALL_MIB: u64 = 256;

/// How a restore went.
#[derive(Debug)]
pub struct Restored {
    /// From exec to the guest's first byte.
    pub sign_ms: f64,
    /// What the VM's process says that it took; Sterna only.
    pub inside_ms: f64,
}

/// How a quick move went.
#[derive(Debug)]
pub struct Quick {
    pub total_ms: f64,
    pub reported_ms: f64,
    pub guest_gap_ms: f64,
}

/// Boots `guest`, saves it to `file`, and removes that.
pub fn save(kind: Kind, guest: &Guest, file: &Path) -> Saving {
    let saving = keep(kind, guest, file);
    eprintln!("{kind:?}, {} MiB, {}: {saving:?}", guest.memory_mib, guest.cmdline);
    std::fs::remove_file(file).unwrap();
    saving
}

/// Boots `guest` and saves it to `file`.
fn keep(kind: Kind, guest: &Guest, file: &Path) -> Saving {
    let dir = tempfile::TempDir::with_prefix("sterna-bench-").unwrap();
    let console = Console::follow(dir.path().join("serial"));
    let path = file.to_str().unwrap();
    match kind {
        Kind::Sterna => {
            let mut host = Host::new(PROGRAM);
            host.boot(guest, &console);
            settle(&console);
            let saved = host.save(path);
            let standstill_ms = saved.downtime_ms();
            Saving { total_ms: saved.total_ms(), standstill_ms }
        }
        Kind::Qemu => {
            let mut source = Qemu::start(guest, &console, None);
            source.prepare_move(60_000);
            settle(&console);
            let (began, _, _) = source.migrate(&format!("exec:cat > {path}"));
            std::fs::File::open(file).unwrap().sync_all().unwrap();
            Saving { total_ms: ms(began.elapsed()), standstill_ms: f64::NAN }
        }
    }
}

/// A guest saved by both.
pub struct Files {
    guest: Guest,
    sterna: PathBuf,
    qemu: Option<PathBuf>,
}

impl Files {
    /// Saves `guest` into `folder`.
    pub fn make(folder: &Path, guest: &Guest) -> Self {
        let file = |side: &str| folder.join(format!("{side}-{}", guest.memory_mib));
        let (sterna, qemu) = (file("sterna"), Qemu::is_there().then(|| file("qemu")));
        keep(Kind::Sterna, guest, &sterna);
        if let Some(file) = &qemu {
            keep(Kind::Qemu, guest, file);
        }
        Self { guest: guest.clone(), sterna, qemu }
    }

    /// Restores it twice, and tells of the second time: the first brings the program, and what is touched of the file, back into
    /// memory, from where hosts drop what lies idle for a minute. `verify` waits until the guest has verified its memory.
    pub fn restore(&self, kind: Kind, verify: bool) -> Restored {
        self.restore_once(kind, false);
        self.restore_once(kind, verify)
    }

    fn restore_once(&self, kind: Kind, verify: bool) -> Restored {
        let dir = tempfile::TempDir::with_prefix("sterna-bench-").unwrap();
        let console = Console::follow(dir.path().join("serial"));
        // The disk still has what was saved before; neither is to wait for that.
        rustix::fs::sync();
        drop(WarmMemory::touch(SMALL_MIB + if kind == Kind::Qemu { self.guest.memory_mib } else { 0 }));
        match kind {
            Kind::Sterna => self.restore_sterna(&console, verify),
            Kind::Qemu => self.restore_qemu(&console, verify),
        }
    }

    fn restore_qemu(&self, console: &Console, verify: bool) -> Restored {
        let file = self.qemu.as_ref().unwrap();
        let incoming = format!("exec:cat {}", file.display());
        let mut process = None;
        let sign = sign_of_life(&console.path, || {
            let began = Instant::now();
            process = Some(Qemu::start(&self.guest, console, Some(&incoming)));
            began
        });
        if verify {
            verified(console);
        }
        drop(process);
        Restored { sign_ms: ms(sign), inside_ms: f64::NAN }
    }

    fn restore_sterna(&self, console: &Console, verify: bool) -> Restored {
        let host = Host::new(PROGRAM);
        let map = format!("serial=file:{}", console.path.display());
        let mut command = host.command(&["restore", "--again", "--map", &map]);
        command.arg(&self.sterna).stdout(Stdio::null());
        let mut child = None;
        let sign = sign_of_life(&console.path, || {
            let began = Instant::now();
            child = Some(command.spawn().unwrap());
            began
        });
        let ended = child.unwrap().wait().unwrap();
        assert!(ended.success(), "sterna restore: {ended}");
        let inside_ms = host.status()["downtime"].as_f64().unwrap_or(f64::NAN);
        if verify {
            verified(console);
        }
        Restored { sign_ms: ms(sign), inside_ms }
    }
}

/// Moves `guest` quickly, and has it verify its memory.
pub fn quick(guest: &Guest, touched_mib: u64) -> Quick {
    let dir = tempfile::TempDir::with_prefix("sterna-bench-").unwrap();
    let console = Console::follow(dir.path().join("serial"));
    let (mut source, mut target) = (Host::new(PROGRAM), Host::new(PROGRAM));
    let address = target.receive();
    source.boot(guest, &console);
    settle(&console);
    drop(WarmMemory::touch(touched_mib + 256));
    let moved = source.migrate(&address, &["--mode", "quick"]);
    verified(&console);
    let (guest_gap_ms, _) = longest_gap_ms(&console.ticks(), moved.began, moved.ended);
    let quick = Quick { total_ms: moved.total_ms(), reported_ms: moved.downtime_ms(), guest_gap_ms };
    eprintln!("{quick:?}");
    quick
}

fn settle(console: &Console) {
    console.wait_for(&["tick "]);
    thread::sleep(SETTLE);
}

fn verified(console: &Console) {
    let word = console.wait_for(&["verified ", "MISMATCH ", "FAIL "]);
    assert!(word.text.starts_with("verified "), "the guest's memory is wrong: {}", word.text);
}
