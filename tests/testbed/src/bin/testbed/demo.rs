//! `make demo`: a stock kernel boots under Sterna, formats and verifies its disk, answers a ping, powers off. On this machine
//! where its KVM can run stock kernels, else on one of the testbed's hosts.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};
use sterna_testbed::{Error, Files, Host, HostOptions, Node, Options, Result, Running, Testbed, run_here};

/// How long the guest may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);
/// Tap device of the demo, its address, and the guest's.
const TAP: &str = "sterna-demo";
const HOST_ADDRESS: &str = "10.9.8.1/24";
const GUEST_ADDRESS: &str = "10.9.8.2";

/// Where the VM runs.
enum Place {
    Here { sterna: PathBuf, scratch: PathBuf },
    Testbed { testbed: Box<Testbed>, host: Host },
}

impl Place {
    /// This machine if it can, else a testbed's host; says why.
    fn choose(sterna: PathBuf) -> Result<Self> {
        let why_not = why_not_here(&sterna)?;
        let Some(why) = why_not else {
            println!("This machine's KVM runs stock kernels: the VM runs on it directly.");
            let scratch = env::temp_dir().join(format!("sterna-demo-{}", std::process::id()));
            fs::create_dir_all(&scratch).map_err(Error::io("make a scratch directory"))?;
            return Ok(Self::Here { sterna, scratch });
        };
        println!("This machine's KVM cannot run stock kernels ({why}).");
        println!("So the VM runs on a Sterna host of the testbed, booted under QEMU from our host image.");
        let start = Instant::now();
        let testbed = Box::new(Testbed::start(&Options::single(HostOptions::default()))?);
        println!("The host is up after {:.1} s ({}).", start.elapsed().as_secs_f32(), testbed.accel().name());
        let host = testbed.host(Node::A)?;
        Ok(Self::Testbed { testbed, host })
    }

    fn spawn(&self, command: &str) -> Result<Running> {
        match self {
            Self::Here { .. } => run_here(command),
            Self::Testbed { host, .. } => host.spawn(command),
        }
    }

    /// The command that a person would type, after the disk's image is made.
    fn command(&self) -> Result<String> {
        let (sterna, kernel, initrd, disk) = match self {
            Self::Here { sterna, scratch } => {
                let files = Files::new();
                let show = |path: PathBuf| format!("'{}'", path.display());
                (show(sterna.clone()), show(files.kernel()?), show(files.initramfs()?), show(scratch.join("disk.img")))
            }
            Self::Testbed { .. } => {
                let [kernel, initrd] = ["vmlinuz", "initramfs.cpio"].map(|name| format!("/tools/guest/{name}"));
                ("sterna".into(), kernel, initrd, "/data/demo.img".into())
            }
        };
        let run = format!(
            "{sterna} run --name demo --kernel {kernel} --initrd {initrd} --cpus 2 --memory 512M --disk path={disk} \
             --net tap={TAP},create=on --cmdline 'console=ttyS0 quiet sterna.job=demo sterna.ip={GUEST_ADDRESS}/24'"
        );
        println!("\n$ {run}\n");
        Ok(format!("truncate -s 256M {disk} && exec {run}"))
    }

    fn name(&self) -> String {
        match self {
            Self::Here { .. } => "this machine, on its KVM".into(),
            Self::Testbed { testbed, .. } => {
                let cpu = match testbed.accel() {
                    sterna_testbed::accel::Accel::Kvm => "nested KVM",
                    sterna_testbed::accel::Accel::Tcg => "QEMU's software CPU, nested SVM",
                };
                format!("host A of the testbed ({cpu}); its log: {}", testbed.dir().join("a.log").display())
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Self::Here { scratch, .. } = self {
            let _ = fs::remove_dir_all(scratch);
        }
    }
}

/// Runs the demo with the `sterna` beside this program, or the one that `STERNA` names.
pub fn demo() -> Result<ExitCode> {
    let beside = || env::current_exe().map(|path| path.with_file_name("sterna")).map_err(Error::io("find sterna"));
    let sterna = env::var_os("STERNA").map_or_else(beside, |path| Ok(PathBuf::from(path)))?;
    let place = Place::choose(sterna)?;
    let start = Instant::now();
    let mut vm = place.spawn(&place.command()?)?;
    let (mut passed, mut up) = (false, None);
    while let Some(line) = vm.line(SILENCE_LIMIT)? {
        println!("  {line}");
        if line.contains("STERNA-GUEST up") {
            up = Some(start.elapsed());
        } else if line.contains("ping waiting") {
            ping(&place)?;
        }
        passed |= line.contains("demo passed");
    }
    let end = vm.wait(SILENCE_LIMIT)?;
    print!("{}", end.stderr);
    let passed = passed && end.status == 0;
    println!("\nWhat ran   an unmodified Debian kernel, 2 vCPUs, 512 MiB, a disk and a network, under sterna run");
    println!("Where      {}", place.name());
    if let Some(up) = up {
        println!("How long   {:.1} s to user space, {:.1} s in all", up.as_secs_f32(), start.elapsed().as_secs_f32());
    }
    println!("Result     {}, sterna exited with {}", if passed { "passed" } else { "FAILED" }, end.status);
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn ping(place: &Place) -> Result<()> {
    let command = format!(
        "ip addr add {HOST_ADDRESS} dev {TAP} && ip link set {TAP} up && ping -c 3 -i 0.2 -W 10 {GUEST_ADDRESS}"
    );
    let output = place.spawn(&command)?.wait(SILENCE_LIMIT)?;
    for line in output.stdout.lines().chain(output.stderr.lines()).filter(|line| !line.is_empty()) {
        println!("  host: {line}");
    }
    Ok(())
}

/// None where stock kernels run on this machine's KVM, else the reason that `sterna host check` gives.
fn why_not_here(sterna: &PathBuf) -> Result<Option<String>> {
    let doing = || format!("run {} host check", sterna.display());
    let output = Command::new(sterna).args(["host", "check", "--json"]).output().map_err(Error::io(doing()))?;
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).map_err(|error| Error::io(doing())(error.into()))?;
    let text = |key: &str| report.get(key).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
    Ok((text("stock_kernel") != "runs").then(|| text("why")))
}
