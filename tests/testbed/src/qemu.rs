//! QEMU's command line for one of the testbed's hosts: the only place that knows it.
//!
//! ```text
//!   A eth1 ---- a-b ---- eth1 B      10.9.0.1, .2: bridge br0 on each, guests join it
//!   A eth2 ---- a-n ---- eth1 N      10.9.1.1, .3  storage
//!   B eth2 ---- b-n ---- eth2 N      10.9.2.2, .3  storage
//!   eth0 of each: QEMU's user network, closed but for the agent's port on this machine's loopback
//! ```
//! The links are Unix datagram sockets: nothing is lost on overrun, and a host that is started again is just there again.

use crate::{Files, Result, accel::Accel, keeper};
use std::{path::Path, process::Command};

/// Port of the agent inside each host.
pub(crate) const AGENT_PORT: u16 = 7;

/// One of the testbed's machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// First host.
    A,
    /// Second host.
    B,
    /// NFS server.
    N,
}

impl Node {
    /// `a`, `b` or `n`: host name, and stem of its files.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::N => "n",
        }
    }

    /// Address on the network of hosts and guests; none where it has none.
    pub fn address(self) -> Option<&'static str> {
        match self {
            Self::A => Some("10.9.0.1"),
            Self::B => Some("10.9.0.2"),
            Self::N => None,
        }
    }

    /// The one of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::A, Self::B, Self::N].into_iter().find(|node| node.name().eq_ignore_ascii_case(name))
    }

    /// Peers in the order of network devices, from eth1 on.
    pub(crate) fn peers(self) -> [Self; 2] {
        match self {
            Self::A => [Self::B, Self::N],
            Self::B => [Self::A, Self::N],
            Self::N => [Self::A, Self::B],
        }
    }

    /// Kernel command line words for its network and disks.
    fn words(self) -> &'static str {
        match self {
            Self::A => {
                "sterna.bridge=br0:eth1 sterna.ip=br0:10.9.0.1/24 sterna.ip=eth2:10.9.1.1/24 \
                 sterna.mount=ext4|/dev/vda|/tools|ro sterna.mount=ext4|/dev/vdc|/data"
            }
            Self::B => {
                "sterna.bridge=br0:eth1 sterna.ip=br0:10.9.0.2/24 sterna.ip=eth2:10.9.2.2/24 \
                 sterna.mount=ext4|/dev/vda|/tools|ro sterna.mount=ext4|/dev/vdc|/data"
            }
            Self::N => "sterna.ip=eth1:10.9.1.3/24 sterna.ip=eth2:10.9.2.3/24",
        }
    }

    /// Command that mounts the shared volume on it; none where the volume is.
    pub(crate) fn mount_shared(self) -> Option<&'static str> {
        match self {
            Self::A => Some("mount -i -t nfs4 -o vers=4.2,addr=10.9.1.3,clientaddr=10.9.1.1 10.9.1.3:/ /shared"),
            Self::B => Some("mount -i -t nfs4 -o vers=4.2,addr=10.9.2.3,clientaddr=10.9.2.2 10.9.2.3:/ /shared"),
            Self::N => None,
        }
    }
}

/// What QEMU is told about a host.
pub(crate) struct Machine<'a> {
    pub node: Node,
    pub accel: Accel,
    pub memory_mib: u32,
    pub cpus: u32,
    /// Port on this machine's loopback that leads to the agent.
    pub port: u16,
    pub kernel: &'a Path,
    pub initrd: &'a Path,
}

impl Machine<'_> {
    /// The command, to be started in the run's directory, where sockets and logs get short names.
    pub fn command(&self, files: &Files) -> Result<Command> {
        let name = self.node.name();
        let mut command = keeper::command("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"]);
        command.args(self.accel.args());
        command.args([
            "-name",
            name,
            "-smp",
            &self.accel.cpus(self.cpus).to_string(),
            "-m",
            &self.memory_mib.to_string(),
        ]);
        command.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initrd);
        command.args([
            "-append",
            &format!(
                "console=ttyS0 tsc=reliable quiet panic=-1 sterna.hostname={name} sterna.agent={AGENT_PORT} \
                 sterna.ip=eth0:10.0.2.15/24 {} {}",
                self.node.words(),
                self.accel.words()
            ),
        ]);
        command.args(["-chardev", &format!("socket,id=con,path={name}.sock,server=on,wait=off,logfile={name}.log")]);
        command.args(["-serial", "chardev:con"]);
        // A host that ends by a triple fault says nothing itself; this keeps its last registers.
        command.args(["-d", "cpu_reset", "-D", &format!("{name}.cpu.log")]);
        let forward = format!("hostfwd=tcp:127.0.0.1:{}-:{AGENT_PORT}", self.port);
        command.args(["-netdev", &format!("user,id=n0,restrict=on,{forward}")]);
        for (index, peer) in self.node.peers().iter().enumerate() {
            let (index, peer) = (index + 1, peer.name());
            command.args([
                "-netdev",
                &format!(
                    "dgram,id=n{index},local.type=unix,local.path={name}-{peer},\
                     remote.type=unix,remote.path={peer}-{name}"
                ),
            ]);
        }
        for index in 0..=2 {
            let mac = format!("52:54:00:09:{:02x}:0{index}", self.node as u8);
            // Jumbo frames between hosts: a software CPU's time goes by the frame.
            let mtu = if index == 0 { 1500 } else { 9000 };
            command.args(["-device", &format!("virtio-net-pci,netdev=n{index},mac={mac},host_mtu={mtu},romfile=")]);
        }
        self.disks(&mut command, files)?;
        Ok(command)
    }

    fn disks(&self, command: &mut Command, files: &Files) -> Result<()> {
        let mut disk = |options: String, device: &str| {
            command.args(["-drive", &format!("if=none,format=raw,{options}")]);
            command.args(["-device", &format!("virtio-blk-pci,{device}")]);
        };
        if self.node == Node::N {
            disk("id=shared,file=shared.img,cache=writeback".into(), "drive=shared,serial=shared");
        } else {
            let tools = files.tools()?;
            let shared = "file.locking=off";
            disk(
                format!("id=tools,file={},readonly=on,{shared}", tools.display().to_string().replace(',', ",,")),
                "drive=tools,serial=tools",
            );
            disk(format!("id=lun,file=lun.img,cache=none,{shared}"), "drive=lun,serial=lun,share-rw=on");
            let data = format!("{}.data.img", self.node.name());
            disk(format!("id=data,file={data},cache=writeback"), "drive=data,serial=data");
        }
        command.args(["-device", "virtio-rng-pci"]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_link_has_two_ends() {
        for node in [Node::A, Node::B, Node::N] {
            for peer in node.peers() {
                assert!(peer.peers().contains(&node), "{peer:?} does not know {node:?}");
            }
            assert_eq!(Node::from_name(node.name()), Some(node));
        }
    }
}
