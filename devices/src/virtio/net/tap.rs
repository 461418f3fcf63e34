//! Tap interfaces: finding, attaching and creating them, and what they are told about offloads.
//!
//! Refuses to know virtqueues, bridges, addresses and routes. An interface that exists is used as it is; only one that
//! this file created is brought up, and it goes away with the last descriptor on it.
#![expect(unsafe_code, reason = "tun and interface ioctls have no safe wrapper")]

use super::HEADER_BYTES;
use super::holders::holders;
use super::port::{Offload, Port};
use rustix::fs::{Mode, OFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

/// Longest interface name, in bytes: IFNAMSIZ without its NUL.
const NAME_BYTES: usize = 15;

/// Why a tap interface cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TapError {
    /// Not a name an interface can have.
    #[error("\"{name}\" cannot be an interface name: 1 to 15 bytes, no spaces, no '/', ':' or '%'")]
    Name {
        /// As given.
        name: String,
    },
    /// No such interface.
    #[error(
        "tap interface {name} does not exist; to make it: \
         ip tuntap add dev {name} mode tap && ip link set dev {name} up"
    )]
    Missing {
        /// Interface.
        name: String,
    },
    /// Another descriptor is attached to it.
    #[error("tap interface {name} is busy: held by {holder}")]
    Busy {
        /// Interface.
        name: String,
        /// Process ids and commands, or that none could be seen.
        holder: String,
    },
    /// The interface is no tap, or a tap with several queues.
    #[error(
        "interface {name} exists but is not a single-queue tap interface; `ip -d link show dev {name}` tells what it is"
    )]
    NotTap {
        /// Interface.
        name: String,
    },
    /// The caller may not attach to or create it.
    #[error(
        "not allowed to use tap interface {name}: run as root, or have root make it for you: \
         ip tuntap add dev {name} mode tap user $USER && ip link set dev {name} up"
    )]
    Denied {
        /// Interface.
        name: String,
        /// What was refused.
        #[source]
        source: io::Error,
    },
    /// The host offers no tun/tap at all.
    #[error("cannot open /dev/net/tun; is the tun module loaded? (modprobe tun)")]
    Unavailable(#[source] io::Error),
    /// A step that should not fail.
    #[error("cannot {attempt} tap interface {name}")]
    Setup {
        /// What was attempted.
        attempt: &'static str,
        /// Interface.
        name: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// One attached tap interface: every read and write is one frame behind a 12-byte virtio-net header.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    mtu: u16,
}

/// `struct ifreq`: a name and a union, of which only the leading integer is used here.
#[repr(C, align(8))]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    fn new(name: &str, value: u16) -> Self {
        let mut request = Self { name: [0; 16], value: [0; 24] };
        // Names are at most 15 bytes here, so the sixteenth stays NUL.
        request.name.iter_mut().zip(name.bytes().take(NAME_BYTES)).for_each(|(to, from)| *to = from);
        request.value[..2].copy_from_slice(&value.to_ne_bytes());
        request
    }

    /// The union as `short`, which is also the low half of the `int` of an MTU.
    fn value(&self) -> u16 {
        u16::from_ne_bytes([self.value[0], self.value[1]])
    }
}

impl Tap {
    /// Attaches to the tap interface `name`, without blocking, and without offloads until the driver asks for them.
    /// With `create`, one that does not exist is made, brought up, and vanishes with the last descriptor on it.
    ///
    /// # Errors
    /// [`TapError`]; each names the interface and what to do.
    pub fn open(name: &str, create: bool) -> Result<Self, TapError> {
        if !valid_name(name) {
            return Err(TapError::Name { name: name.into() });
        }
        let setup = |attempt| move |source| TapError::Setup { attempt, name: name.into(), source };
        let control = control_socket().map_err(setup("look for"))?;
        // Attaching would create what does not exist, so it is asked for before.
        let exists = netdevice::name_to_index(&control, name).is_ok();
        if !exists && !create {
            return Err(TapError::Missing { name: name.into() });
        }
        let file = open_tun().map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => TapError::Denied { name: name.into(), source },
            _ => TapError::Unavailable(source),
        })?;
        attach(&file, name).map_err(|source| refused(name, source))?;
        set_header_bytes(&file).map_err(setup("set the header length of"))?;
        if !exists {
            bring_up(&control, name).map_err(setup("bring up"))?;
        }
        let mtu = mtu(&control, name).map_err(setup("read the MTU of"))?;
        let tap = Self { file, name: name.into(), mtu };
        tap.set_offload(Offload::default()).map_err(setup("switch off the offloads of"))?;
        Ok(tap)
    }

    /// Another handle on the same interface, to build the device anew while this one still holds it.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, name: self.name.clone(), mtu: self.mtu })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Port for Tap {
    fn name(&self) -> &str {
        &self.name
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn set_offload(&self, offload: Offload) -> io::Result<()> {
        let mut bits = 0;
        for (wanted, bit) in [
            (offload.checksum, libc::TUN_F_CSUM),
            (offload.tso4, libc::TUN_F_TSO4),
            (offload.tso6, libc::TUN_F_TSO6),
            (offload.ecn, libc::TUN_F_TSO_ECN),
        ] {
            bits |= if wanted { bit } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of ours.
        done(unsafe { ioctl_with_val(&self.file, libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
    }
}

/// What the kernel takes as a name; '%' would make it choose a number.
fn valid_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    (1..=NAME_BYTES).contains(&name.len()) && name.bytes().all(plain) && name != "." && name != ".."
}

fn open_tun() -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open("/dev/net/tun", flags, Mode::empty())?))
}

fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn attach(tun: &File, name: &str) -> io::Result<()> {
    // The three flags fit a u16: 0x5002.
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    let mut request = InterfaceRequest::new(name, flags);
    // SAFETY: the request has the size and layout of struct ifreq, which is what TUNSETIFF reads and writes.
    done(unsafe { ioctl_with_mut_ref(tun, libc::TUNSETIFF, &mut request) })
}

fn refused(name: &str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy { holder: holders(&name), name },
        Some(libc::EINVAL) => TapError::NotTap { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Denied { name, source },
        _ => TapError::Setup { attempt: "attach to", name, source },
    }
}

fn set_header_bytes(tun: &File) -> io::Result<()> {
    let bytes = HEADER_BYTES as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    done(unsafe { ioctl_with_ref(tun, libc::TUNSETVNETHDRSZ, &bytes) })
}

fn bring_up(control: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = InterfaceRequest::new(name, 0);
    // SAFETY: the request has the size and layout of struct ifreq, which is what SIOCGIFFLAGS reads and writes.
    done(unsafe { ioctl_with_mut_ref(control, libc::SIOCGIFFLAGS, &mut request) })?;
    let request = InterfaceRequest::new(name, request.value() | libc::IFF_UP as u16);
    // SAFETY: as above; SIOCSIFFLAGS only reads it.
    done(unsafe { ioctl_with_ref(control, libc::SIOCSIFFLAGS, &request) })
}

fn mtu(control: &OwnedFd, name: &str) -> io::Result<u16> {
    let mut request = InterfaceRequest::new(name, 0);
    // SAFETY: the request has the size and layout of struct ifreq, which is what SIOCGIFMTU reads and writes.
    done(unsafe { ioctl_with_mut_ref(control, libc::SIOCGIFMTU, &mut request) })?;
    // A tap's MTU is at most 65521, so the low half of the int is all of it on a little-endian host.
    Ok(request.value())
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
