//! The PVH test guest as an ELF image. See `README.md` for its command line and what it prints.

/// Path of the image on the machine that built this.
pub const GUEST_ELF: &str = concat!(env!("OUT_DIR"), "/guest.elf");

/// The image itself.
pub fn elf() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"))
}
