//! QEMU as a control: the same guest kernel and initramfs under another monitor.

use crate::{Files, Guest, Result, Running, accel::Accel, keeper, local};
use std::{path::PathBuf, time::Duration};

/// A guest of QEMU's on this machine: q35, virtio over PCI, serial console on its standard input and output.
#[derive(Clone, Debug)]
pub struct Control {
    /// KVM or the software CPU; `None` asks [`Accel::choose`].
    pub accel: Option<Accel>,
    /// Boot the ELF kernel by PVH instead of the bzImage.
    pub elf: bool,
    /// RAM, MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub cpus: u32,
    /// Raw disks, in PCI order.
    pub disks: Vec<PathBuf>,
    /// Words added to the kernel command line.
    pub cmdline: String,
}

impl Default for Control {
    fn default() -> Self {
        let cmdline = "sterna.job=agent".into();
        Self { accel: None, elf: false, memory_mib: 512, cpus: 2, disks: Vec::new(), cmdline }
    }
}

/// A control that was started and may still be booting.
pub struct ControlRunning(Running);

impl Control {
    /// Starts it.
    pub fn start(&self, files: &Files) -> Result<ControlRunning> {
        let accel = self.accel.map_or_else(|| Accel::choose(files), Ok)?;
        let kernel = if self.elf { files.kernel_elf()? } else { files.kernel()? };
        let mut command = keeper::command("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]);
        command.args(accel.args());
        command.args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string(), "-serial", "stdio"]);
        command.args(["-device", "virtio-rng-pci"]);
        command.arg("-kernel").arg(kernel).arg("-initrd").arg(files.initramfs()?);
        command.args(["-append", &format!("console=ttyS0 tsc=reliable quiet panic=-1 {}", self.cmdline)]);
        for disk in &self.disks {
            command.arg("-drive").arg(format!("if=virtio,format=raw,cache=none,file={}", disk.display()));
        }
        local::run("QEMU", command).map(ControlRunning)
    }
}

impl ControlRunning {
    /// Waits until the guest takes commands.
    pub fn ready(self, limit: Duration) -> Result<Guest> {
        Guest::ready(self.0, limit)
    }

    /// Its console.
    pub fn console(self) -> Running {
        self.0
    }
}
