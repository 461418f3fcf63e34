//! From exec to /init of a stock kernel on a testbed host, Sterna and QEMU's microvm with the same kernel and initramfs.
//!
//! Both print to a pipe that the testbed's agent reads, so what that costs counts for both.

use serde_json::{Value, json};
use std::time::{Duration, Instant};
use sterna_bench::Summary;
use sterna_testbed::{Host, HostOptions, Node, Options, Testbed};

const LIMIT: Duration = Duration::from_secs(300);
const WORDS: &str = "console=ttyS0 quiet reboot=t sterna.job=idle";

/// Runs `blocks` blocks, prints a line, and returns it for the result file.
pub fn run(blocks: usize) -> sterna_testbed::Result<Value> {
    let testbed = Testbed::start(&Options::single(HostOptions::default()))?;
    let host = testbed.host(Node::A)?;
    let (kernel, initrd) = ("/tools/guest/vmlinuz", "/tools/guest/initramfs.cpio");
    let sterna = format!(
        "sterna run --name bench --kernel {kernel} --initrd {initrd} --memory 256M --cpus 1 --cmdline '{WORDS}'"
    );
    let qemu = format!(
        "/tools/bin/qemu-system-x86_64 -L /tools/share -M microvm,accel=kvm,pit=off,pic=off,rtc=off -cpu host -nodefaults \
         -no-user-config -display none -no-reboot -serial stdio -m 256M -smp 1 -kernel {kernel} -initrd {initrd} \
         -append '{WORDS}'"
    );
    let commands = [sterna, qemu];
    // Neither pays for reading the kernel and the programs from the disk first.
    for command in &commands {
        seconds_to_init(&host, command)?;
    }
    let mut seconds: [Vec<f64>; 2] = Default::default();
    for block in 0..blocks {
        for turn in 0..2 {
            let which = (block + turn) % 2;
            seconds[which].push(seconds_to_init(&host, &commands[which])?);
        }
    }
    let ratio = Summary::of(seconds[0].iter().zip(&seconds[1]).map(|(ours, theirs)| ours / theirs));
    let [sterna, qemu] = seconds.map(|seconds| Summary::of(seconds.into_iter()));
    let name = format!("exec to /init, stock kernel ({})", testbed.accel().name());
    println!("{name:38} {:>8} {sterna:>22} {qemu:>22}   {ratio}", "s");
    Ok(json!({ "figure": name, "unit": "s", "sterna": sterna.json(), "qemu": qemu.json(), "ratio": ratio.json() }))
}

fn seconds_to_init(host: &Host, command: &str) -> sterna_testbed::Result<f64> {
    let start = Instant::now();
    let mut vm = host.spawn(&format!("exec {command}"))?;
    vm.wait_for("STERNA-GUEST init", LIMIT)?;
    let seconds = start.elapsed().as_secs_f64();
    vm.kill();
    // The next run must not share the processors with the end of this one.
    host.check("while pgrep -f '[s]terna run|[q]emu-system'; do sleep 0.1; done >/dev/null")?;
    Ok(seconds)
}
