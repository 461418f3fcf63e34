//! One run of one monitor with the test guest, watched from outside.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use sterna_bench::WarmMemory;

/// What is measured.
#[derive(Clone, Copy)]
pub enum Kind {
    /// The program of this tree.
    Sterna,
    /// QEMU's smallest machine.
    Qemu,
}

/// What one run showed.
pub struct Sample {
    /// From just before the exec to the guest's first byte.
    pub first_instruction_ms: f64,
    /// Resident memory of the process less what is resident of guest RAM.
    pub overhead_mib: f64,
    /// CPU time of the process while the guest halts.
    pub idle_cpu_ms_per_s: f64,
}

/// How long the halted guest is left alone first: what a monitor does once its guest runs is over by then.
const SETTLE: Duration = Duration::from_millis(100);

/// How long the halted guest is watched.
const WATCH: Duration = Duration::from_millis(500);

/// Puts the program of this tree into `directory` as `make install` and a package do, by writing it: what a linker leaves through a
/// mapping lies in smaller pieces in the page cache, each of which costs a fault.
pub fn install(directory: &Path) {
    fs::copy(env!("CARGO_BIN_EXE_sterna"), installed(directory)).unwrap();
}

fn installed(directory: &Path) -> PathBuf {
    directory.join("sterna-installed")
}

/// Starts the monitor, waits for the guest's first byte, looks at the process, and ends it.
/// `directory` is the host's directory of VMs, the same in each run as it is on a host.
///
/// The monitor is started twice in a row and the second start counts: hosts drop from memory what lies idle for a minute.
pub fn measure(kind: Kind, memory_mib: u64, directory: &Path) -> Sample {
    drop(start(kind, memory_mib, directory));
    drop(WarmMemory::touch(memory_mib));
    let (first_instruction_ms, child, mut output) = start(kind, memory_mib, directory);
    // The rest of its start-up, until it halts.
    let (mut greeting, mut byte) = (Vec::new(), [0]);
    while !greeting.ends_with(b"halted") {
        output.read_exact(&mut byte).unwrap();
        greeting.push(byte[0]);
    }
    thread::sleep(SETTLE);
    let before = cpu_ms(child.0.id());
    thread::sleep(WATCH);
    let idle_cpu_ms_per_s = (cpu_ms(child.0.id()) - before) / WATCH.as_secs_f64();
    Sample { first_instruction_ms, overhead_mib: overhead_mib(child.0.id(), memory_mib), idle_cpu_ms_per_s }
}

/// Starts it and waits for the guest's first byte: how many milliseconds that takes, its process and what it prints next.
fn start(kind: Kind, memory_mib: u64, directory: &Path) -> (f64, Running, ChildStdout) {
    let mut command = command(kind, memory_mib, directory);
    command.env("STERNA_DIR", directory).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = Running(command.spawn().unwrap());
    let mut output = child.0.stdout.take().unwrap();
    let mut byte = [0];
    output.read_exact(&mut byte).unwrap();
    let first_instruction_ms = start.elapsed().as_secs_f64() * 1e3;
    assert_eq!(byte, *b"S", "the guest's first byte");
    (first_instruction_ms, child, output)
}

/// One line that says what was measured.
pub fn version(kind: Kind, directory: &Path) -> String {
    let program = command(kind, 256, directory).get_program().to_owned();
    let output = Command::new(program).arg("--version").output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("unknown").to_owned()
}

fn command(kind: Kind, memory_mib: u64, directory: &Path) -> Command {
    let (guest, memory) = (sterna_guest::GUEST_ELF, format!("{memory_mib}M"));
    let (program, arguments) = match kind {
        Kind::Sterna => (
            installed(directory),
            vec!["run", "--name", "bench", "--kernel", guest, "--cmdline", "halt", "--memory", &memory, "--cpus", "1"],
        ),
        Kind::Qemu => {
            let machine = "microvm,accel=kvm,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off";
            let fixed = [
                "-M",
                machine,
                "-cpu",
                // Set by `-cpu host` and refused by some hosts' KVM.
                "host,arch-capabilities=off",
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
                "-serial",
                "stdio",
                "-smp",
                "1",
            ];
            let mut arguments = fixed.to_vec();
            arguments.extend(["-kernel", guest, "-append", "halt", "-m", &memory]);
            (PathBuf::from("qemu-system-x86_64"), arguments)
        }
    };
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Ours, and a benchmark has nothing to save.
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// CPU time of all threads so far, with the kernel's nanosecond accounting.
fn cpu_ms(pid: u32) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let nanoseconds = tasks.filter_map(|task| {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e6
}

/// Resident memory outside the mapping of guest RAM, which is the only one as large as the guest's memory.
fn overhead_mib(pid: u32, memory_mib: u64) -> f64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut overhead_kib, mut in_ram) = (0.0, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, end)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            let address = |text| u64::from_str_radix(text, 16).unwrap();
            in_ram = address(end) - address(start) >= memory_mib << 20;
        } else if first == "Rss:" && !in_ram {
            overhead_kib += words.next().unwrap().parse::<f64>().unwrap();
        }
    }
    overhead_kib / 1024.0
}
