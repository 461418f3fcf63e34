//! The first guest: one `sterna run` boots a stock kernel, and one watches its console. It formats its disk, writes, reads back and
//! compares, answers pings and powers off.

use super::{word, wrong};
use std::path::Path;
use std::time::{Duration, Instant};
use sterna_testbed::{Files, Host, Output, Result, Running, run_here};

/// How long the guest may say nothing: the CPUs may be software.
const LIMIT: Duration = Duration::from_secs(120);
const TAP: &str = "first0";
const HOST: &str = "10.9.9.1";
const GUEST: &str = "10.9.9.20";
/// What the guest's init says once its network is up; what its disk held, before and after; that it has answered.
const UP: &str = "STERNA-GUEST up ";
const SUM: &str = "STERNA-GUEST first read ";
const RIGHT: &str = "STERNA-GUEST first right";

/// Where the guest runs: on this machine, or on a host of the testbed.
pub struct Ground {
    host: Option<Host>,
    /// Which, and why.
    pub place: String,
    sterna: String,
    tool: String,
    kernel: String,
    initrd: String,
    disk: String,
}

/// What was seen.
pub struct Seen {
    /// From the command to the guest's first program, and to its end.
    pub boot: Duration,
    pub all: Duration,
    /// Checksum of what came back from its disk.
    pub sum: String,
    /// How many pings it answered, of how many.
    pub answered: String,
}

impl Ground {
    /// This machine if its KVM runs stock kernels, which `sterna host check` finds by trying, with the disk in `dir`; else `host`.
    pub fn choose(dir: &Path, host: Option<Host>) -> Result<Self> {
        let programs = std::env::current_exe().map(|path| path.with_file_name("")).unwrap_or_default();
        let program = |name: &str| programs.join(name).display().to_string();
        let checked = run_here(&format!("{} host check --json", program("sterna")))?.wait(LIMIT)?;
        let found: serde_json::Value = serde_json::from_str(&checked.stdout).unwrap_or_default();
        if found["stock_kernel"] == "runs" {
            let files = Files::new();
            return Ok(Self {
                host: None,
                place: "on this machine's KVM, which runs stock kernels".to_owned(),
                sterna: program("sterna"),
                tool: program("guest-tool"),
                kernel: files.kernel()?.display().to_string(),
                initrd: files.initramfs()?.display().to_string(),
                disk: dir.join("first.img").display().to_string(),
            });
        }
        let Some(host) = host else {
            let why = found["why"].as_str().unwrap_or(checked.stderr.trim());
            return Err(wrong(format!("this machine's KVM cannot run stock kernels ({why})")));
        };
        Ok(Self {
            place: format!(
                "on host {}: this machine's KVM cannot run stock kernels, and `sterna host check` says why",
                host.name().to_uppercase()
            ),
            host: Some(host),
            sterna: "sterna".to_owned(),
            tool: "guest-tool".to_owned(),
            kernel: "/tools/guest/vmlinuz".to_owned(),
            initrd: "/tools/guest/initramfs.cpio".to_owned(),
            disk: "/data/first.img".to_owned(),
        })
    }

    /// Boots the guest and shows its console to the end, at which all that it did was right.
    pub fn boot(&self) -> Result<Seen> {
        let Self { sterna, kernel, initrd, disk, .. } = self;
        let words = format!("console=ttyS0 loglevel=6 sterna.job=first sterna.ip={GUEST}/24");
        let run = format!(
            "{sterna} run --name first --cpus 2 --memory 512M --kernel {kernel} --initrd {initrd} --disk path={disk} \
             --net tap={TAP},create=on --cmdline '{words}'"
        );
        println!("   $ truncate -s 256M {disk}");
        println!("   $ {run}");
        let start = Instant::now();
        // On this machine in a network namespace of its own, which ends with it.
        let apart = if self.host.is_some() { "" } else { "unshare --net " };
        let script = format!("truncate -s 256M {disk} && exec {apart}sh -c 'echo $$; exec \"$@\"' sh {run}");
        let mut guest = self.spawn(&script)?;
        let pid = guest.line(LIMIT)?.unwrap_or_default();
        let (mut boot, mut sum, mut right, mut ping) = (Duration::ZERO, String::new(), false, None);
        while let Some(line) = guest.line(LIMIT)? {
            println!("   | {line}");
            if line.starts_with(UP) {
                boot = start.elapsed();
                ping = Some(self.ping(&pid)?);
            }
            if let Some(read) = line.strip_prefix(SUM) {
                sum = read.to_owned();
            }
            right |= line.starts_with(RIGHT);
        }
        let Output { status, stderr, .. } = guest.wait(LIMIT)?;
        let (true, 0, Some(mut ping)) = (right, status, ping) else {
            return Err(wrong(format!("the first guest: exit code {status}: {stderr}")));
        };
        ping.close_stdin()?;
        let pinged = ping.wait(LIMIT)?.stdout;
        let (sent, lost) = (word(&pinged, "sent="), word(&pinged, "lost="));
        let count = |text: &str| text.parse::<u32>().unwrap_or_default();
        let answered = format!("{} of {sent}", count(&sent).saturating_sub(count(&lost)));
        self.spawn(&format!("rm {disk}"))?.wait(LIMIT)?;
        Ok(Seen { boot, all: start.elapsed(), sum, answered })
    }

    /// What was seen, in two lines.
    pub fn sum_up(&self, seen: &Seen) -> String {
        let place = self.place.split([':', ',']).next().unwrap_or_default();
        let Seen { boot, all, sum, answered } = seen;
        let (boot, all) = (boot.as_secs_f32(), all.as_secs_f32());
        format!(
            "   first    2 vCPUs and 512 MiB {place}: its first program after {boot:.1} s, its end after {all:.1} s\n            \
             its disk gave back what was written (sha256 {sum}), and it answered {answered} pings"
        )
    }

    fn spawn(&self, command: &str) -> Result<Running> {
        self.host.as_ref().map_or_else(|| run_here(command), |host| host.spawn(command))
    }

    /// Pings the guest of process `pid` from its host's side of the tap, until the input is closed.
    fn ping(&self, pid: &str) -> Result<Running> {
        let inside = if self.host.is_some() { String::new() } else { format!("nsenter -t {pid} -n ") };
        let ping =
            format!("ip addr add {HOST}/24 dev {TAP} && ip link set {TAP} up && exec {} ping {GUEST} 200", self.tool);
        println!("   $ ping {GUEST}");
        let mut ping = self.spawn(&format!("exec {inside}sh -c '{ping}'"))?;
        ping.wait_for("answered", LIMIT)?;
        Ok(ping)
    }
}
