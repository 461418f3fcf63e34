//! The one piece of firmware: real-mode code where a BIOS is entered.
//!
//! On a hardware-reduced machine Linux takes EFI for granted and does not use the FADT's reset register to restart
//! (arch/x86/kernel/reboot.c, `reboot_init`). Finding no EFI it goes to real mode and jumps to FFFF:0000. What it finds
//! there writes the reset register for it.

use super::BootError;
use super::layout::{BIOS_ENTRY, POWER_RESET_PORT, POWER_RESET_VALUE};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Writes the code into the reserved area below 1 MiB.
pub fn write<M: GuestMemoryBackend>(ram: &M) -> Result<(), BootError> {
    let [port_low, port_high] = POWER_RESET_PORT.to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xba, port_low, port_high, // mov dx, POWER_RESET_PORT
        0xb0, POWER_RESET_VALUE,   // mov al, POWER_RESET_VALUE
        0xee,                      // out dx, al
        0xf4,                      // hlt
        0xeb, 0xfd,                // jmp to the hlt
    ];
    ram.write_slice(&code, GuestAddress(BIOS_ENTRY)).map_err(BootError::WriteTables)
}
