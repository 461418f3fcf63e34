//! System calls that are refused, and how.

use super::sys::call;
use super::{Place, refused};
use rustix::net::{AddressFamily, SocketType, socket, socketpair};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;
use sterna::sandbox::{Mode, Plan, enter};

const NOTHING: [u64; 6] = [0; 6];

pub fn what_takes_over_a_host_is_refused(place: &Place) {
    place.enter();
    for number in [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_mount,
        libc::SYS_fsopen,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_kexec_load,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_keyctl,
        libc::SYS_open_by_handle_at,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_iopl,
        libc::SYS_ioperm,
        libc::SYS_personality,
        libc::SYS_setuid,
        libc::SYS_setresgid,
        libc::SYS_capset,
        libc::SYS_chroot,
        libc::SYS_pivot_root,
        libc::SYS_pidfd_open,
        libc::SYS_mknodat,
    ] {
        refused(call(number, NOTHING), libc::EPERM, number);
    }
    // As a kernel without it would answer, so that glibc falls back to clone, whose flags can be seen.
    refused(call(libc::SYS_clone3, NOTHING), libc::ENOSYS, "clone3");
    let thread = libc::CLONE_VM | libc::CLONE_THREAD;
    for flags in [0, libc::CLONE_VM | libc::CLONE_VFORK, thread | libc::CLONE_NEWNET, thread | libc::CLONE_NEWUSER] {
        refused(call(libc::SYS_clone, [flags as u64, 0, 0, 0, 0, 0]), libc::EPERM, flags);
    }
}

pub fn no_program_is_started(place: &Place) {
    place.enter();
    refused(Err::<(), io::Error>(Command::new("/bin/true").exec()), libc::EPERM, "exec");
    refused(Command::new("/bin/true").spawn(), libc::EPERM, "spawn");
}

pub fn sockets_are_local_or_ip(place: &Place) {
    place.enter();
    let raw = |number| SocketType::from_raw(number);
    for (family, kind) in [
        (AddressFamily::NETLINK, SocketType::RAW),
        (AddressFamily::PACKET, SocketType::RAW),
        (AddressFamily::VSOCK, SocketType::STREAM),
        (AddressFamily::INET, SocketType::RAW),
        (AddressFamily::INET6, raw(10)),
    ] {
        refused(socket(family, kind, None).map_err(io::Error::from), libc::EPERM, (family, kind));
    }
    for family in [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6] {
        socket(family, SocketType::STREAM, None).unwrap();
        socket(family, SocketType::DGRAM, None).unwrap();
    }
    socketpair(AddressFamily::UNIX, SocketType::STREAM, rustix::net::SocketFlags::CLOEXEC, None).unwrap();
}

pub fn a_terminal_is_not_typed_into(place: &Place) {
    place.enter();
    refused(call(libc::SYS_ioctl, [0, libc::TIOCSTI, 0, 0, 0, 0]), libc::EPERM, "TIOCSTI");
    // /dev/null is no terminal, which the kernel says itself.
    assert!(!rustix::termios::isatty(io::stdin()));
    refused(rustix::termios::tcgetattr(io::stdin()).map_err(io::Error::from), libc::ENOTTY, "TCGETS");
}

pub fn no_memory_is_made_executable(place: &Place) {
    place.enter();
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    refused(call(libc::SYS_mmap, [0, 4096, executable, anonymous, u64::MAX, 0]), libc::EPERM, "mmap");
    let page = call(libc::SYS_mmap, [0, 4096, libc::PROT_READ as u64, anonymous, u64::MAX, 0]).unwrap();
    refused(call(libc::SYS_mprotect, [page, 4096, executable, 0, 0, 0]), libc::EPERM, "mprotect");
}

pub fn signals_go_to_this_process_only(place: &Place) {
    let parent = u64::from(std::os::unix::process::parent_id());
    place.enter();
    // Signal 0 only asks whether it could be sent.
    refused(call(libc::SYS_tgkill, [parent, parent, 0, 0, 0, 0]), libc::EPERM, "tgkill");
    refused(call(libc::SYS_kill, [parent, 0, 0, 0, 0, 0]), libc::EPERM, "kill");
    let own = u64::from(std::process::id());
    call(libc::SYS_tgkill, [own, own, 0, 0, 0, 0]).unwrap();
}

pub fn threads_that_were_there_are_restricted_too(place: &Place) {
    let (go, wait) = channel();
    let early = thread::spawn(move || {
        wait.recv().unwrap();
        call(libc::SYS_unshare, NOTHING)
    });
    let report = place.enter();
    go.send(()).unwrap();
    refused(early.join().unwrap(), libc::EPERM, "unshare");
    let told = report.gaps.iter().any(|gap| gap == "1 threads were there before and reach every file");
    // Since its eighth version landlock takes them in as well.
    assert_eq!(told, report.landlock_abi.is_some_and(|abi| abi < 8), "{report:?}");
}

pub fn a_log_refuses_nothing(place: &Place) {
    let report = enter(&Plan { mode: Mode::Log, ..place.plan() }).unwrap();
    assert_eq!(report.mode, Mode::Log);
    call(libc::SYS_unshare, NOTHING).unwrap();
    // Of the calls, that is: files are fenced off.
    super::fenced(&report, std::fs::read("/etc/hostname"), std::path::Path::new("/etc/hostname"));
}
