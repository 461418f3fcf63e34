//! How QEMU runs the testbed's hosts: with this machine's KVM, or on its software CPU.

use crate::{Control, Error, Files, Result, tsc};
use std::{fs, path::Path, time::Duration};

/// What runs the hosts' instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// /dev/kvm, with nested virtualisation for the guests.
    Kvm,
    /// QEMU's software CPU, which emulates AMD SVM with nested paging.
    Tcg,
}

/// How long the probe's guest may take under KVM, where it takes a second if it works at all.
const PROBE_LIMIT: Duration = Duration::from_secs(20);

impl Accel {
    /// The one that works here. `STERNA_TESTBED_ACCEL` (`kvm`, `tcg`) decides; else flags that nested KVM cannot do without
    /// are looked at, and then a stock kernel has to prove it, once: the answer is kept in the build directory.
    pub fn choose(files: &Files) -> Result<Self> {
        if let Ok(name) = std::env::var("STERNA_TESTBED_ACCEL") {
            return Self::parse(&name).ok_or_else(|| Error::Io {
                doing: format!("use STERNA_TESTBED_ACCEL={name}"),
                source: std::io::Error::other("it is `kvm` or `tcg`"),
            });
        }
        if !nested_kvm_is_thinkable() {
            return Ok(Self::Tcg);
        }
        let cache = files.testbed().join("accel");
        if let Some(known) = fs::read_to_string(&cache).ok().and_then(|name| Self::parse(name.trim())) {
            return Ok(known);
        }
        let found = if proven(files)? { Self::Kvm } else { Self::Tcg };
        fs::create_dir_all(files.testbed()).map_err(Error::io("make the testbed's directory"))?;
        fs::write(&cache, found.name()).map_err(Error::io(format!("write {}", cache.display())))?;
        Ok(found)
    }

    /// `kvm` or `tcg`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// QEMU's arguments for it.
    pub(crate) fn args(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // QEMU 7.2 lets a nested guest's XSETBV through to the host's own state: Linux then warns and does without XSAVE.
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max,-xsave"],
        }
    }

    /// CPUs that a host gets where `wanted` were asked for. On the software CPU it is one: with more, a thread of QEMU 7.2 may translate
    /// code while another writes it, and goes on with the old instruction for good. Every VM that starts or ends has the host's
    /// kernel patch its scheduler; stock guests patch themselves. With one CPU there is one thread. Evidence: docs/testbed.md.
    pub(crate) fn cpus(self, wanted: u32) -> u32 {
        match self {
            Self::Kvm => wanted,
            Self::Tcg => 1,
        }
    }

    /// What a host's kernel is told beside what every host is told. On the software CPU it reads this machine's time stamp counter and
    /// measures its speed by emulated timers: on a busy machine it was seen to find a fifth of it, and its clocks then ran at five
    /// times their speed, those of its guests with them. Told about it, the kernel measures within 1 % of that. Nor may it end because a
    /// timer did not tick in the few milliseconds in which it looks: a busy machine had given the CPU to somebody else.
    pub(crate) fn words(self) -> String {
        match self {
            Self::Kvm => String::new(),
            Self::Tcg => format!("no_timer_check tsc_early_khz={}", tsc::khz()),
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|accel| accel.name() == name)
    }
}

fn nested_kvm_is_thinkable() -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let nested = ["kvm_amd", "kvm_intel"].iter().any(|module| {
        let value = fs::read_to_string(format!("/sys/module/{module}/parameters/nested")).unwrap_or_default();
        matches!(value.trim(), "Y" | "1")
    });
    Path::new("/dev/kvm").exists() && nested && flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx")
}

/// A stock guest comes up under KVM and has virtualisation of its own. A guest that does not is the answer "no".
fn proven(files: &Files) -> Result<bool> {
    let control = Control { accel: Some(Accel::Kvm), ..Control::default() };
    let mut guest = match control.start(files)?.ready(PROBE_LIMIT) {
        Ok(guest) => guest,
        Err(Error::Timeout { .. } | Error::Ended { .. }) => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(guest.run("grep -qwE 'svm|vmx' /proc/cpuinfo", PROBE_LIMIT)?.status == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_on_the_software_cpu_has_one_cpu() {
        assert_eq!((Accel::Tcg.cpus(4), Accel::Kvm.cpus(4)), (1, 4));
    }

    #[test]
    fn names_are_parsed_back() {
        for accel in [Accel::Kvm, Accel::Tcg] {
            assert_eq!(Accel::parse(accel.name()), Some(accel));
        }
        assert_eq!(Accel::parse("xen"), None);
    }
}
