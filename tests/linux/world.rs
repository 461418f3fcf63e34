//! One testbed for all tests of this program, and one well-equipped guest that most of them share.

use serde_json::Value;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use sterna_testbed::accel::Accel;
use sterna_testbed::{Guest, Host, HostOptions, Link, Node, Options, Running, Site, Testbed, Vm};

/// Longest wait for one thing that a guest or host does: the CPUs may be software.
pub const LIMIT: Duration = Duration::from_secs(240);

/// What a test reports.
pub type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Fails the test with a sentence.
macro_rules! ensure {
    ($condition:expr, $($text:tt)*) => {
        let holds: bool = $condition;
        if !holds {
            return Err(format!($($text)*).into());
        }
    };
}
pub(crate) use ensure;

static WORLD: Mutex<Option<World>> = Mutex::new(None);

/// The testbed and the shared guest.
pub struct World {
    testbed: Testbed,
    shared: Option<Guest>,
    travel: Option<Travel>,
}

/// Two hosts that are ready for moves, and the guest that moves between them.
pub struct Travel {
    a: Site,
    b: Site,
    pub vm: Vm,
}

impl Travel {
    /// The host where the guest is not.
    pub fn other(&self) -> &Site {
        if self.vm.site().node() == Node::A { &self.b } else { &self.a }
    }

    /// The guest died with its host: boots it again on the other, as soon as the storage no longer holds the dead host's lock.
    /// Says how often the lock refused it.
    pub fn boot_again(&mut self, node: Node) -> Result<u32> {
        let (site, deadline, mut refused) = (self.site(node).clone(), Instant::now() + LIMIT, 0);
        self.vm = loop {
            match traveller(&site) {
                Ok(vm) => break vm,
                Err(error) if error.to_string().contains("is locked by") && Instant::now() < deadline => refused += 1,
                Err(error) => return Err(error),
            }
            std::thread::sleep(Duration::from_millis(500));
        };
        Ok(refused)
    }

    /// A host.
    pub fn site(&self, node: Node) -> &Site {
        if node == Node::A { &self.a } else { &self.b }
    }
}

/// Boots the guest that moves.
fn traveller(at: &Site) -> Result<Vm> {
    let arguments = "--cpus 2 --memory 192M --disk path=/shared/web.img --net tap=web0 \
                     --disk path=/dev/vda,readonly=on,id=tools";
    let mut vm = Vm::boot(at, "web", arguments, &format!("sterna.ip={TRAVELLER}/24"))?;
    vm.check("mkdir -p /tools && mount -o ro /dev/vdb /tools")?;
    Ok(vm)
}

/// Address of the guest that moves.
pub const TRAVELLER: &str = "10.9.0.30";

/// The world, made at the first call.
pub fn world() -> Result<Held> {
    let mut held = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    if held.is_none() {
        // Memory is only what guests touch; 5 GiB of RAM must fit into A.
        let a = HostOptions { memory_mib: 7168, cpus: 2 };
        let b = HostOptions { memory_mib: 1024, cpus: 1 };
        let testbed = Testbed::start(&Options { a, b: Some(b), ..Options::default() })?;
        *held = Some(World { testbed, shared: None, travel: None });
    }
    Ok(Held(held))
}

/// What the hosts show when a test has failed on QEMU's software CPU; `None` on KVM, where a failure is a failure.
///
/// What is known of its faults is in docs/testbed.md.
pub fn software_cpu() -> Option<String> {
    let held = WORLD.lock().unwrap_or_else(PoisonError::into_inner);
    let testbed = &held.as_ref().filter(|world| world.testbed.accel() == Accel::Tcg)?.testbed;
    let state = |node: Node| {
        let log = testbed.log(node);
        let line = log.lines().find(|line| ["BUG:", "Oops", "Kernel panic"].iter().any(|sign| line.contains(sign)));
        let answer = testbed.host(node).and_then(|host| host.run_for("true", Duration::from_secs(30)));
        let state = line.map(|line| line.trim().to_owned()).or_else(|| answer.err().map(|error| error.to_string()));
        format!("host {}: {}", node.name(), state.unwrap_or_else(|| "alive".to_owned()))
    };
    let states: Vec<_> = testbed.nodes().into_iter().map(state).collect();
    Some(format!("{}; {}", states.join(", "), testbed.dir().display()))
}

/// Ends hosts and guests.
pub fn end() {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner).take();
}

/// Exclusive use of the world.
pub struct Held(MutexGuard<'static, Option<World>>);

impl Held {
    fn world(&mut self) -> Result<&mut World> {
        self.0.as_mut().ok_or_else(|| "the testbed has ended".into())
    }

    /// A host.
    pub fn host(&mut self, node: Node) -> Result<Host> {
        Ok(self.world()?.testbed.host(node)?)
    }

    /// The shared guest, started at the first call: 2 vCPUs, 256 MiB, bzImage, two disks and a read-only one, network, vsock.
    pub fn shared(&mut self) -> Result<&mut Guest> {
        let host = self.host(Node::A)?;
        let world = self.world()?;
        if world.shared.is_none() {
            host.check("truncate -s 256M /data/one.img && truncate -s 64M /data/two.img")?;
            let guest = boot(
                &host,
                "shared",
                "--cpus 2 --memory 256M --disk path=/data/one.img,serial=first \
                --disk path=/data/two.img,id=second --disk path=/dev/vda,readonly=on,id=tools \
                --net tap=shared0,create=on --vsock cid=3,socket=/run/shared.vsock",
                "sterna.ip=10.9.0.20/24",
            )?;
            host.check("ip link set shared0 master br0 up")?;
            world.shared = Some(guest);
        }
        world.shared.as_mut().ok_or_else(|| "the shared guest has ended".into())
    }

    /// What `sterna show` says of the shared guest's VM.
    pub fn show(&mut self) -> Result<Value> {
        self.shared()?;
        Ok(serde_json::from_str(&self.host(Node::A)?.check("sterna show shared --json")?)?)
    }

    /// A number of it, by its path.
    pub fn shown(&mut self, pointer: &str) -> Result<u64> {
        let shown = self.show()?;
        shown.pointer(pointer).and_then(Value::as_u64).ok_or_else(|| format!("no {pointer} in {shown}").into())
    }

    /// Waits until a number of it satisfies `wanted`.
    pub fn wait_shown(&mut self, pointer: &str, wanted: impl Fn(u64) -> bool) -> Result {
        let deadline = Instant::now() + LIMIT;
        loop {
            let value = self.shown(pointer)?;
            if wanted(value) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{pointer} stays at {value}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The guest that moves, started on A at the first call: 2 vCPUs, 192 MiB, a disk on the shared volume, the tools, network.
    pub fn travel(&mut self) -> Result<&mut Travel> {
        let world = self.world()?;
        if world.travel.is_none() {
            let [a, b] = [Node::A, Node::B].map(|node| Site::prepare(&world.testbed, node, "web0"));
            let (a, b) = (a?, b?);
            a.host().check("truncate -s 64M /shared/web.img")?;
            let vm = traveller(&a)?;
            world.travel = Some(Travel { a, b, vm });
        }
        world.travel.as_mut().ok_or_else(|| "the guest that moves has ended".into())
    }

    /// Shapes a link, or takes its shaping away.
    pub fn shape(&mut self, link: Link, discipline: Option<&str>) -> Result {
        let testbed = &self.world()?.testbed;
        Ok(discipline.map_or_else(|| testbed.unshape(link), |discipline| testbed.shape(link, discipline))?)
    }

    /// A machine crash of a host.
    pub fn kill(&mut self, node: Node) -> Result {
        Ok(self.world()?.testbed.kill(node)?)
    }

    /// Starts a crashed host again, ready for moves.
    pub fn restart(&mut self, node: Node) -> Result {
        let world = self.world()?;
        world.testbed.restart(node)?;
        let site = Site::prepare(&world.testbed, node, "web0")?;
        if let Some(travel) = &mut world.travel {
            *(if node == Node::A { &mut travel.a } else { &mut travel.b }) = site;
        }
        Ok(())
    }

    /// Ends all hosts: what comes next starts on fresh ones.
    pub fn forget(mut self) {
        self.0.take();
    }

    /// The pulse of the shared guest.
    pub fn pulse_shared(&mut self) -> Result {
        let host = self.host(Node::A)?;
        let guest = pulse(&host, "shared", self.take_shared()?)?;
        // Its tap went with its process.
        host.check("ip link set shared0 master br0 up")?;
        self.world()?.shared = Some(guest);
        Ok(())
    }

    /// The shared guest, which its test ends.
    pub fn take_shared(&mut self) -> Result<Guest> {
        self.shared()?;
        self.world()?.shared.take().ok_or_else(|| "the shared guest has ended".into())
    }
}

/// Starts `sterna run` on `host` with the stock kernel and a guest that takes commands.
pub fn boot(host: &Host, name: &str, arguments: &str, words: &str) -> Result<Guest> {
    Ok(Guest::ready(start(host, name, arguments, &format!("sterna.job=agent {words}"))?, LIMIT)?)
}

/// The same without waiting, and with any job. `--kernel` in `arguments` replaces the bzImage.
pub fn start(host: &Host, name: &str, arguments: &str, words: &str) -> Result<Running> {
    let kernel = if arguments.contains("--kernel") { "" } else { "--kernel /tools/guest/vmlinuz" };
    let command = format!(
        "sterna run --name {name} {kernel} --initrd /tools/guest/initramfs.cpio {arguments} \
         --cmdline 'console=ttyS0 quiet {words}'"
    );
    Ok(host.spawn(&command)?)
}

/// What a guest must keep over a pulse: which boot this is, and its uptime in seconds.
fn boot_and_uptime(guest: &mut Guest) -> Result<(String, f64)> {
    let seen = guest.check("cat /proc/sys/kernel/random/boot_id; cut -d' ' -f1 /proc/uptime", LIMIT)?;
    let (boot, uptime) = seen.split_once('\n').ok_or_else(|| format!("no uptime in {seen:?}"))?;
    Ok((boot.to_owned(), uptime.trim().parse()?))
}

/// The machine's pulse: it is saved, its process ends, a fresh process restores it on the same host, and the guest goes on as the
/// same boot of the same kernel, which has nothing to complain about. Returns its new console.
pub fn pulse(host: &Host, name: &str, mut guest: Guest) -> Result<Guest> {
    let (boot, before) = boot_and_uptime(&mut guest)?;
    let shown: Value = serde_json::from_str(&host.check(&format!("sterna show {name} --json"))?)?;
    let pid = shown.get("pid").and_then(Value::as_u64).ok_or_else(|| format!("no pid in {shown}"))?;
    host.check(&format!("kill -0 {pid}"))?;
    let began = Instant::now();
    host.check(&format!("sterna save {name} /data/{name}.sterna --overwrite"))?;
    let saved = began.elapsed();
    let end = guest.console().wait(LIMIT)?;
    ensure!(end.status == 0, "exit code {} after saving: {}", end.status, end.stderr);
    ensure!(host.run(&format!("kill -0 {pid}"))?.status != 0, "process {pid} is still there after it was saved");
    let listed = host.check("sterna list")?;
    ensure!(!listed.contains(name), "after saving: {listed}");
    let began = Instant::now();
    host.check(&format!("sterna restore /data/{name}.sterna"))?;
    let restored = began.elapsed();
    let mut guest = Guest::attach(host.spawn(&format!("sterna console {name}"))?, LIMIT)?;
    let (same, after) = boot_and_uptime(&mut guest)?;
    ensure!(same == boot, "another boot came back");
    ensure!(after >= before, "uptime went back from {before} to {after}");
    let complaints = guest.check("dmesg | grep -E 'BUG|WARNING|Oops|lockup|stall|I/O error' || true", LIMIT)?;
    ensure!(complaints.is_empty(), "the kernel complains after its pulse:\n{complaints}");
    println!("  pulse of {name}: saved in {} ms, restored in {} ms", saved.as_millis(), restored.as_millis());
    Ok(guest)
}

/// Powers the guest off from inside and expects that its monitor exits with 0.
pub fn power_off(mut guest: Guest) -> Result {
    guest.start("poweroff -f")?;
    let end = guest.console().wait(LIMIT)?;
    ensure!(end.status == 0, "exit code {} after power-off: {}", end.status, end.stderr);
    Ok(())
}
