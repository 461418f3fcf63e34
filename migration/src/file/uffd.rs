//! userfaultfd: the calls that a load in the background needs. It knows addresses, not pages of RAM.
#![expect(unsafe_code, reason = "the userfaultfd crate needs libclang to build, for five ioctls")]

use super::Error;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// <linux/userfaultfd.h>: `_IO(0xaa, 0)` on /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFDIO_UNREGISTER: libc::Ioctl = 0x8010_aa01_u32 as libc::Ioctl;
const UFFDIO_WAKE: libc::Ioctl = 0x8010_aa02_u32 as libc::Ioctl;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04_u32 as libc::Ioctl;
const REGISTER_MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;
const ADDRESS_AT: usize = 16;

/// See the module. When it goes away, whoever waits for a page goes on, and finds zeros.
#[derive(Debug)]
pub(super) struct Faults(File);

impl Faults {
    /// One that KVM's own faults come to as well.
    pub fn new() -> Result<Self, Error> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call makes a descriptor and touches no memory.
        let called = checked(|| unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as libc::c_int);
        let opened = called.or_else(|error| match File::open("/dev/userfaultfd") {
            // SAFETY: the call takes flags by value and makes a descriptor.
            Ok(device) => checked(|| unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) }),
            Err(_) => Err(error),
        });
        let fd = opened.map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => Error::FaultsNotAllowed(error),
            _ => Error::io("opening userfaultfd")(error),
        })?;
        // SAFETY: the descriptor is new, and nobody else has it.
        let faults = Self(File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
        faults.call(UFFDIO_API, &mut [UFFD_API, 0, 0]).map_err(Error::io("opening userfaultfd"))?;
        Ok(faults)
    }

    /// Calls with a structure that consists of 64-bit numbers.
    fn call<const N: usize>(&self, request: libc::Ioctl, argument: &mut [u64; N]) -> io::Result<()> {
        // SAFETY: the callers below pass the structures of their requests, which outlive the call. What they do to memory they do
        // to guest RAM only, which may change at any moment.
        checked(|| unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) }).map(drop)
    }

    /// From now on, whoever touches a missing page of guest RAM in `[address, address + bytes)` waits for it.
    pub fn register(&self, address: u64, bytes: u64) -> io::Result<()> {
        self.call(UFFDIO_REGISTER, &mut [address, bytes, REGISTER_MODE_MISSING, 0])
    }

    /// Whoever touches a missing page there finds zeros again.
    ///
    /// The kernel wakes who waits before it lets the range go, and since faults need no more than their area's lock (Linux 6.8),
    /// somebody may begin to wait in between: they are woken here.
    pub fn unregister(&self, address: u64, bytes: u64) -> io::Result<()> {
        self.call(UFFDIO_UNREGISTER, &mut [address, bytes])?;
        self.call(UFFDIO_WAKE, &mut [address, bytes])
    }

    /// Makes `pages` the missing guest pages at `address`, and wakes who waits for them.
    pub fn copy(&self, address: u64, pages: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < pages.len() {
            let rest = &pages[done..];
            let mut argument = [address + done as u64, rest.as_ptr() as u64, rest.len() as u64, 0, 0];
            match self.call(UFFDIO_COPY, &mut argument) {
                Ok(()) => return Ok(()),
                // The address space changed meanwhile: so many bytes were copied, or the negative of an error number.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    done += usize::try_from(argument[4].cast_signed()).unwrap_or(0);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes the missing guest page at `address` zeros, and wakes who waits for it.
    pub fn zero(&self, address: u64, bytes: u64) -> io::Result<()> {
        loop {
            match self.call(UFFDIO_ZEROPAGE, &mut [address, bytes, 0, 0]) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                // Another thread was there first.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => return Ok(()),
                result => return result,
            }
        }
    }

    /// The address of a page that somebody waits for, if somebody does.
    pub fn next(&self) -> Option<u64> {
        let mut message = [0; MESSAGE_BYTES];
        loop {
            match (&self.0).read(&mut message) {
                Ok(MESSAGE_BYTES) if message[0] == EVENT_PAGEFAULT => {
                    let address = message.get(ADDRESS_AT..)?.first_chunk()?;
                    return Some(u64::from_ne_bytes(*address));
                }
                Ok(MESSAGE_BYTES) => {}
                _ => return None,
            }
        }
    }
}

/// The result of a call that says -1 where it failed.
fn checked(call: impl FnOnce() -> libc::c_int) -> io::Result<libc::c_int> {
    match call() {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
