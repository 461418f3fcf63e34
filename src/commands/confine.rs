//! What a VM that was configured here needs of its host, as a plan for its sandbox.
//!
//! It opens nothing.

use crate::cli::ReceivedArgs;
use crate::config::{SerialConfig, VmConfig};
use crate::error::Error;
use crate::records::Records;
use crate::registry::Registry;
use crate::sandbox::{self, Mode, Plan, Storage};
use std::path::{Path, PathBuf};

/// Puts the process, which has no other threads yet and has opened all that `config` names, into the sandbox. `dir` has its
/// control socket.
pub fn enter(config: &VmConfig, dir: &Path) -> Result<(), Error> {
    let records = prepare_records()?;
    enter_as(&plan(config, [dir.to_owned(), records], Mode::from_env()?))
}

/// Puts the process of a machine to come, which has read nothing of it yet, into the sandbox.
pub fn receiver(registry: &Registry, args: &ReceivedArgs) -> Result<(), Error> {
    let records = prepare_records()?;
    enter_as(&Plan {
        mode: Mode::from_env()?,
        writable_dirs: vec![registry.dir().to_owned(), records],
        // When the guest reboots.
        readable: vec![PathBuf::from("/boot")],
        storage: if args.storage.is_empty() { Storage::FilesAndDevices } else { Storage::At(args.storage.clone()) },
    })
}

fn enter_as(plan: &Plan) -> Result<(), Error> {
    let report = sandbox::enter(plan)?;
    for gap in report.gaps {
        log::info!("sandbox: {gap}");
    }
    Ok(())
}

/// Makes the directory of the records of moves, which cannot be made from inside.
fn prepare_records() -> Result<PathBuf, Error> {
    let records = Records::from_env();
    let path = records.dir().to_owned();
    records.prepare().map_err(|source| Error::File { attempt: "make the directory", path: path.clone(), source })?;
    Ok(path)
}

/// Disks, taps and the console's file are open by then; what is made or opened later is sockets, the file that the machine is
/// saved to and, when the guest reboots, its kernel.
fn plan(config: &VmConfig, dirs: [PathBuf; 2], mode: Mode) -> Plan {
    let console = match &config.serial {
        SerialConfig::Socket(path) => Some(path),
        SerialConfig::Stdio | SerialConfig::Null | SerialConfig::File(_) => None,
    };
    let sockets = [console, config.vsock.as_ref().map(|vsock| &vsock.socket)];
    let kernels = [Some(&config.kernel), config.initrd.as_ref()];
    Plan {
        mode,
        writable_dirs: sockets.into_iter().flatten().map(|path| parent(path)).chain(dirs).collect(),
        readable: kernels.into_iter().flatten().map(|path| around(path)).collect(),
        storage: Storage::Files,
    }
}

/// The directory that `path` is in.
fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The directory that the file at `path` is really in: when the guest reboots, another file may be in its place. Not the
/// root, which is everything.
fn around(path: &Path) -> PathBuf {
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    match real.parent() {
        Some(dir) if dir.parent().is_some() => dir.to_owned(),
        _ => real,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Draft, Problems, VsockConfig};

    #[test]
    fn a_guest_that_runs_reaches_its_sockets_and_its_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let boot = dir.path().canonicalize().unwrap();
        std::fs::write(boot.join("vmlinuz-1"), "").unwrap();
        std::os::unix::fs::symlink("vmlinuz-1", boot.join("vmlinuz")).unwrap();
        let mut config = Draft::default().build(SerialConfig::Socket("/srv/serial".into()), &mut Problems::default());
        config.kernel = boot.join("vmlinuz");
        config.initrd = Some("/initrd.img".into());
        config.vsock = Some(VsockConfig { cid: 3, socket: "web.vsock".into() });
        let known = plan(&config, ["/run/sterna", "/var/lib/sterna"].map(PathBuf::from), Mode::On);
        assert_eq!(known.writable_dirs, ["/srv", ".", "/run/sterna", "/var/lib/sterna"].map(PathBuf::from));
        assert_eq!(known.readable, [boot, "/initrd.img".into()]);
        assert_eq!(known.storage, Storage::Files);
    }
}
