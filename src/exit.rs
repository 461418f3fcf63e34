//! Exit codes, part of the command line's contract.

/// Done.
pub const DONE: u8 = 0;
/// Failed; a VM that was running still runs here.
pub const FAILED: u8 = 1;
/// The command line or the configuration is wrong.
pub const USAGE: u8 = 2;
/// A check before the work refused it.
pub const REFUSED: u8 = 3;
/// Cancelled; the VM runs here.
pub const CANCELLED: u8 = 4;
/// Timed out; the VM runs here.
pub const TIMED_OUT: u8 = 5;
/// In doubt; the VM is paused here.
pub const IN_DOUBT: u8 = 6;
/// Cannot connect, or not allowed.
pub const UNREACHABLE: u8 = 7;
/// The guest is lost or stopped.
pub const GUEST_LOST: u8 = 8;
