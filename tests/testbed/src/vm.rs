//! A Linux VM that moves between hosts A and B, driven as their operator would: by `sterna` on either.

use crate::{Error, Guest, Host, Node, Output, Result, Running, Testbed};
use serde::Deserialize;
use std::time::{Duration, Instant};

/// Port of each host's receiver.
const RECEIVE_PORT: u16 = 7300;
/// Port on which each host tells the time.
const CLOCK_PORT: u16 = 9200;
/// Longest wait for one thing: the CPUs may be software.
const LIMIT: Duration = Duration::from_secs(240);

/// A host that VMs move to and from.
#[derive(Clone, Debug)]
pub struct Site {
    node: Node,
    host: Host,
    address: &'static str,
}

impl Site {
    /// Makes host `node` ready: a tap of that name in its bridge, records of moves on its own volume so that they outlive a crash, a
    /// receiver, and a clock that can be asked.
    pub fn prepare(testbed: &Testbed, node: Node, tap: &str) -> Result<Self> {
        let (host, address) = (testbed.host(node)?, node.address().ok_or_else(|| Error::Down(node.name().into()))?);
        // The tools' disk is mounted on the host too: without its name it would be taken for the host's own.
        let storage = "--storage /shared --storage /tools --storage /dev/vda";
        let receive = format!("sterna receive --listen tcp:{address}:{RECEIVE_PORT} {storage}");
        host.check(&format!(
            "mkdir -p /data/records /var/lib/sterna && sync && mount -o bind /data/records /var/lib/sterna && \
             ip tuntap add {tap} mode tap && ip link set {tap} master br0 up && ({receive} >/run/receive.log 2>&1 &) && \
             (guest-tool clock-serve {CLOCK_PORT} >/run/clock.log 2>&1 &) && for i in $(seq 300); do \
             grep -q listening /run/receive.log && grep -q listening /run/clock.log && exit; sleep 0.1; done; exit 1"
        ))?;
        Ok(Self { node, host, address })
    }

    /// Which it is.
    pub fn node(&self) -> Node {
        self.node
    }

    /// Where commands run.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Address of its receiver.
    pub fn receiver(&self) -> String {
        format!("tcp:{}:{RECEIVE_PORT}", self.address)
    }

    /// Sets its clock by that of another.
    pub fn set_clock_by(&self, other: &Self) -> Result<Clocks> {
        let text = self.host.check(&format!("guest-tool clock-compare {} {CLOCK_PORT} --set", other.address))?;
        Clocks::parse(&text, "clock-compare")
    }

    /// Starts pinging an address; ends when the input is closed.
    pub fn ping(&self, address: &str, interval_ms: u32) -> Result<Running> {
        let mut ping = self.host.spawn(&format!("guest-tool ping {address} {interval_ms}"))?;
        ping.wait_for("answered", LIMIT)?;
        Ok(ping)
    }
}

/// A guest's clocks less the wall clock of the host that it is on.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// Wall clock, microseconds.
    pub realtime_us: i64,
    /// Monotonic clock, microseconds: only its change says something.
    pub monotonic_us: i64,
    /// Round trip of the exchange by which this is known: twice the greatest error.
    pub rtt_us: i64,
}

impl Clocks {
    fn parse(text: &str, command: &str) -> Result<Self> {
        let word = |name: &str| {
            let found = text.split_whitespace().find_map(|word| word.strip_prefix(name));
            found.and_then(|number| number.parse().ok())
        };
        let parsed = (word("realtime_us="), word("monotonic_us="), word("rtt_us="));
        let (Some(realtime_us), Some(monotonic_us), Some(rtt_us)) = parsed else {
            return Err(said(command, text));
        };
        Ok(Self { realtime_us, monotonic_us, rtt_us })
    }
}

fn said(command: &str, text: &str) -> Error {
    let command = command.to_owned();
    Error::Failed { who: "guest".into(), command, status: 0, output: text.to_owned() }
}

/// Figures of a move, as `sterna migrate` reports them.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Moved {
    /// Milliseconds in all.
    pub total_time: u64,
    /// Milliseconds for which the guest stood still.
    pub downtime: u64,
    /// Memory.
    pub ram: MovedRam,
}

/// Of it, memory.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MovedRam {
    /// Bytes sent.
    pub transferred: u64,
    /// Passes.
    pub dirty_sync_count: u32,
}

/// The VM, wherever it is.
pub struct Vm {
    name: String,
    site: Site,
    guest: Guest,
}

impl Vm {
    /// Boots the stock kernel with a guest that takes commands, detached, and joins its console.
    pub fn boot(site: &Site, name: &str, arguments: &str, words: &str) -> Result<Self> {
        site.host.check(&format!(
            "sterna run --name {name} --kernel /tools/guest/vmlinuz --initrd /tools/guest/initramfs.cpio {arguments} \
             --cmdline 'console=ttyS0 quiet sterna.job=agent {words}' --detach"
        ))?;
        let guest = Guest::ready(site.host.spawn(&format!("sterna console {name}"))?, LIMIT)?;
        Ok(Self { name: name.to_owned(), site: site.clone(), guest })
    }

    /// Joins the console of a VM that runs on a host and takes commands.
    pub fn join(site: &Site, name: &str) -> Result<Self> {
        let guest = Guest::attach(site.host.spawn(&format!("sterna console {name}"))?, LIMIT)?;
        Ok(Self { name: name.to_owned(), site: site.clone(), guest })
    }

    /// Where it is.
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// Its console.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// Runs a line of shell in it that must succeed.
    pub fn check(&mut self, line: &str) -> Result<String> {
        self.guest.check(line, LIMIT)
    }

    /// Starts a move to another host, to be waited for.
    pub fn start_migrate(&self, to: &Site, arguments: &str) -> Result<Running> {
        self.site.host.spawn(&format!("sterna --json migrate {} {} {arguments}", self.name, to.receiver()))
    }

    /// Moves it to another host, where the console is joined again.
    pub fn migrate(&mut self, to: &Site, arguments: &str) -> Result<Moved> {
        let command = format!("sterna --json migrate {} {} {arguments}", self.name, to.receiver());
        let Output { status, stdout, stderr } = self.site.host.run(&command)?;
        let last = stdout.lines().last().unwrap_or_default();
        if status != 0 {
            let log = self.site.host.run(&format!("tail -n 5 /run/sterna/{}.log", self.name))?.stdout;
            let there = to.host.run(&format!("tail -n 5 /run/receive.log /run/sterna/{}.log", self.name))?.stdout;
            let output = format!("{stderr}\n{last}\n{log}\n{there}");
            return Err(Error::Failed { who: self.site.node.name().into(), command, status, output });
        }
        let moved = serde_json::from_str(last).map_err(|_| said(&command, last))?;
        self.arrived(to)?;
        Ok(moved)
    }

    /// It is on another host now: joins its console there.
    pub fn arrived(&mut self, at: &Site) -> Result<()> {
        *self = Self::join(at, &self.name)?;
        Ok(())
    }

    /// The guest's clocks against those of its host.
    pub fn clocks(&mut self) -> Result<Clocks> {
        let line = format!("guest-tool clock-compare {} {CLOCK_PORT}", self.site.address);
        let text = self.check(&line)?;
        Clocks::parse(&text, &line)
    }

    /// The machine's generation id, as the guest finds it in its memory. Debian's kernel has no driver that reads it.
    pub fn generation(&mut self) -> Result<String> {
        self.check("dd if=/dev/mem bs=16 skip=$((0xF0000 / 16)) count=1 2>/dev/null | hexdump -C | head -n 1")
    }

    /// What `sterna migration status` says, from when it satisfies `wanted`.
    pub fn wait_status(&self, wanted: impl Fn(&serde_json::Value) -> bool) -> Result<serde_json::Value> {
        let command = format!("sterna --json migration status {}", self.name);
        let deadline = Instant::now() + LIMIT;
        loop {
            let text = self.site.host.run(&command)?.stdout;
            if let Some(status) = serde_json::from_str(&text).ok().filter(&wanted) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                let what = "another state of its move".into();
                return Err(Error::Timeout { who: command, what, limit: LIMIT, seen: text });
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}
