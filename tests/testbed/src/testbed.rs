//! The life of a testbed: start the hosts in parallel, shape their links, kill one, clean up.

use crate::{Error, Files, Host, Node, Result, accel::Accel, error::tail, keeper, qemu::Machine, run_dir::RunDir};
use std::{
    fs::File,
    io,
    net::TcpListener,
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How often a booting host is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Size of each host's own volume, sparse.
const DATA_MIB: u64 = 8192;

/// Size of one host.
#[derive(Clone, Copy, Debug)]
pub struct HostOptions {
    /// RAM, MiB.
    pub memory_mib: u32,
    /// vCPUs under KVM; on the software CPU a host has one.
    pub cpus: u32,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self { memory_mib: 2048, cpus: 2 }
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Options {
    /// Host A.
    pub a: HostOptions,
    /// Host B, if there is to be one.
    pub b: Option<HostOptions>,
    /// Size of the volume at `/shared` on all hosts, MiB, sparse; `None` leaves the NFS server out.
    pub shared_mib: Option<u64>,
    /// Size of the raw disk that hosts see as `/dev/vdb`, MiB, sparse.
    pub lun_mib: u64,
    /// How long all hosts together may take to be ready.
    pub boot_limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let host = HostOptions::default();
        Self { a: host, b: Some(host), shared_mib: Some(8192), lun_mib: 1024, boot_limit: Duration::from_secs(300) }
    }
}

impl Options {
    /// Host A alone: for what needs one host and no shared storage.
    pub fn single(a: HostOptions) -> Self {
        Self { a, b: None, shared_mib: None, ..Self::default() }
    }

    fn size(&self, node: Node) -> Option<HostOptions> {
        match node {
            Node::A => Some(self.a),
            Node::B => self.b,
            Node::N => self.shared_mib.map(|_| HostOptions { memory_mib: 768, cpus: 1 }),
        }
    }
}

/// A network link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Between hosts A and B: migration and guests.
    Hosts,
    /// Between A and the NFS server.
    StorageA,
    /// Between B and the NFS server.
    StorageB,
}

impl Link {
    /// Both ends, as the sending device of each.
    fn ends(self) -> [(Node, &'static str); 2] {
        match self {
            Self::Hosts => [(Node::A, "eth1"), (Node::B, "eth1")],
            Self::StorageA => [(Node::A, "eth2"), (Node::N, "eth1")],
            Self::StorageB => [(Node::B, "eth2"), (Node::N, "eth2")],
        }
    }
}

struct Machinery {
    node: Node,
    size: HostOptions,
    host: Host,
    port: u16,
    /// None once killed.
    process: Option<Child>,
    /// From starting QEMU to the agent's greeting.
    boot_time: Duration,
}

/// Running hosts. Dropping it ends them all and removes what they left, except their logs.
pub struct Testbed {
    files: Files,
    accel: Accel,
    dir: RunDir,
    machines: Vec<Machinery>,
    boot_limit: Duration,
}

impl Testbed {
    /// Starts what `options` name and waits until all of it is ready: agents answer, `/shared` is mounted.
    pub fn start(options: &Options) -> Result<Self> {
        let files = Files::new();
        let accel = Accel::choose(&files)?;
        let dir = RunDir::create(&files.testbed())?;
        let boot_limit = options.boot_limit;
        let mut testbed = Self { files, accel, dir, machines: Vec::new(), boot_limit };
        testbed.prepare(options)?;
        for node in [Node::N, Node::A, Node::B] {
            if let Some(size) = options.size(node) {
                let port = free_port()?;
                let host = Host::new(node.name(), port);
                let machine = Machinery { node, size, host, port, process: None, boot_time: Duration::ZERO };
                testbed.machines.push(machine);
                testbed.launch(node)?;
            }
        }
        testbed.dir.note(testbed.machines.iter().map(|machine| (machine.node, machine.port)))?;
        let deadline = Instant::now() + boot_limit;
        for node in testbed.nodes() {
            testbed.wait_ready(node, deadline)?;
        }
        Ok(testbed)
    }

    /// What runs the hosts.
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// The machines of this testbed.
    pub fn nodes(&self) -> Vec<Node> {
        self.machines.iter().map(|machine| machine.node).collect()
    }

    /// A running host.
    pub fn host(&self, node: Node) -> Result<Host> {
        let machine = self.machines.iter().find(|machine| machine.node == node && machine.process.is_some());
        machine.map(|machine| machine.host.clone()).ok_or_else(|| Error::Down(node.name().into()))
    }

    /// How long a host took from its start to the agent's greeting.
    pub fn boot_time(&self, node: Node) -> Option<Duration> {
        self.machines.iter().find(|machine| machine.node == node).map(|machine| machine.boot_time)
    }

    /// Where logs are kept: `<host>.log` is its console, `<host>.qemu.log` what QEMU said.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A host's console so far.
    pub fn log(&self, node: Node) -> String {
        self.dir.read(&format!("{}.log", node.name()))
    }

    /// Shapes both directions of a link with a root queueing discipline as `tc` takes it: `tbf rate 100mbit burst 64kb
    /// latency 50ms`, `netem delay 5ms loss 1%`. It replaces the one before.
    pub fn shape(&self, link: Link, discipline: &str) -> Result<()> {
        self.qdisc(link, "replace", discipline)
    }

    /// Takes the shaping of a link away.
    pub fn unshape(&self, link: Link) -> Result<()> {
        self.qdisc(link, "del", "")
    }

    fn qdisc(&self, link: Link, verb: &str, discipline: &str) -> Result<()> {
        for (node, device) in link.ends() {
            self.host(node)?.check(&format!("tc qdisc {verb} dev {device} root {discipline}"))?;
        }
        Ok(())
    }

    /// A machine crash: QEMU is killed; nothing in the host gets to say a word.
    pub fn kill(&mut self, node: Node) -> Result<()> {
        let mut process = self.machine(node)?.process.take().ok_or_else(|| Error::Down(node.name().into()))?;
        end(&mut process).map_err(Error::io(format!("kill host {}", node.name())))
    }

    /// Starts a host that was killed, with its disks as they are, and waits until it is ready.
    pub fn restart(&mut self, node: Node) -> Result<()> {
        if let Some(mut process) = self.machine(node)?.process.take() {
            end(&mut process).map_err(Error::io(format!("kill host {}", node.name())))?;
        }
        self.launch(node)?;
        self.wait_ready(node, Instant::now() + self.boot_limit)
    }

    fn machine(&mut self, node: Node) -> Result<&mut Machinery> {
        let found = self.machines.iter_mut().find(|machine| machine.node == node);
        found.ok_or_else(|| Error::Down(node.name().into()))
    }

    /// Makes the disks and the NFS server's initramfs.
    fn prepare(&self, options: &Options) -> Result<()> {
        self.dir.sparse("lun.img", options.lun_mib << 20)?;
        for node in [Node::A, Node::B] {
            self.volume(&format!("{}.data.img", node.name()), DATA_MIB)?;
        }
        let Some(shared_mib) = options.shared_mib else { return Ok(()) };
        self.volume("shared.img", shared_mib)?;
        let mut initramfs = self.dir.file("n.cpio")?;
        for part in [self.files.image()?, self.files.nfs()?] {
            let copied = File::open(&part).and_then(|mut part| io::copy(&mut part, &mut initramfs));
            copied.map_err(Error::io(format!("copy {}", part.display())))?;
        }
        Ok(())
    }

    /// Makes an empty ext4 volume.
    fn volume(&self, name: &str, size_mib: u64) -> Result<()> {
        let volume = self.dir.sparse(name, size_mib << 20)?;
        let mut format = keeper::command("mke2fs");
        format.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"]).arg(volume);
        format.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        let status = format.status().map_err(Error::io("run mke2fs"))?;
        let failed = || Error::io(format!("format {name}"))(io::Error::other(format!("mke2fs: {status}")));
        if status.success() { Ok(()) } else { Err(failed()) }
    }

    fn launch(&mut self, node: Node) -> Result<()> {
        let kernel = self.files.kernel()?;
        let initrd = if node == Node::N { self.dir.path().join("n.cpio") } else { self.files.image()? };
        for peer in node.peers() {
            self.dir.remove(&format!("{}-{}", node.name(), peer.name()));
        }
        // A restarted host's console starts anew, so that the old one's marker is not taken for its own.
        self.dir.rotate(&format!("{}.log", node.name()));
        let (accel, machine) = (self.accel, self.machine(node)?);
        let HostOptions { memory_mib, cpus } = machine.size;
        let machine = Machine { node, accel, memory_mib, cpus, port: machine.port, kernel: &kernel, initrd: &initrd };
        let mut command = machine.command(&self.files)?;
        let log = self.dir.file(&format!("{}.qemu.log", node.name()))?;
        let stdout = log.try_clone().map_err(Error::io("share a log"))?;
        command.current_dir(self.dir.path()).stdin(Stdio::null()).stdout(stdout).stderr(log);
        let process = keeper::spawn(command).map_err(Error::io(format!("start QEMU for host {}", node.name())))?;
        self.machine(node)?.process = Some(process);
        Ok(())
    }

    fn wait_ready(&mut self, node: Node, deadline: Instant) -> Result<()> {
        let start = Instant::now();
        let limit = self.boot_limit;
        let who = format!("host {}", node.name());
        loop {
            let log = self.log(node);
            let seen = |dir: &RunDir| tail(&format!("{log}{}", dir.read(&format!("{}.qemu.log", node.name()))));
            let what = "it to boot and its agent to answer".to_owned();
            let machine = self.machines.iter_mut().find(|machine| machine.node == node);
            let process =
                machine.and_then(|machine| machine.process.as_mut()).ok_or_else(|| Error::Down(who.clone()))?;
            if let Some(status) = process.try_wait().map_err(Error::io(format!("wait for {who}")))? {
                return Err(Error::Ended { who, how: status.to_string(), what, seen: seen(&self.dir) });
            }
            if log.contains("STERNA-HOST up") && self.host(node)?.connect().is_ok() {
                break;
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout { who, what, limit, seen: seen(&self.dir) });
            }
            thread::sleep(POLL_INTERVAL);
        }
        self.machine(node)?.boot_time = start.elapsed();
        match node.mount_shared() {
            Some(mount) if self.machines.iter().any(|machine| machine.node == Node::N) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let mount = format!("mkdir -p /shared && {{ grep -q ' /shared ' /proc/mounts || {mount}; }}");
                self.host(node)?.run_for(&mount, left).and_then(|output| match output.status {
                    0 => Ok(()),
                    status => Err(Error::Failed { who, command: mount, status, output: output.stderr }),
                })
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        for process in self.machines.iter_mut().filter_map(|machine| machine.process.as_mut()) {
            // The parent-death signal takes whatever could not be killed here.
            let _ = end(process);
        }
    }
}

fn end(process: &mut Child) -> io::Result<()> {
    process.kill()?;
    process.wait().map(drop)
}

/// A port that nobody on this machine's loopback listens on now.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    listener.map(|address| address.port()).map_err(Error::io("find a free port"))
}
