//! The address map: where RAM, boot structures, windows and ports lie. Constants only, in bytes and guest physical
//! addresses; it refuses to know what is put there.

use vm_memory::GuestAddress;

/// Size of a small page.
pub const PAGE_SIZE: u64 = 4096;

/// Most vCPUs a machine has; vCPU `i` has APIC id `i`.
pub const MAX_CPUS: u32 = 32;

/// Global descriptor table at boot.
pub const BOOT_GDT: u64 = 0x500;
/// PVH start info, its module list and its memory map: one page.
pub const PVH_START_INFO: u64 = 0x6000;
/// Module list of the PVH start info.
pub const PVH_MODULES: u64 = PVH_START_INFO + 0x80;
/// Memory map of the PVH start info.
pub const PVH_MEMORY_MAP: u64 = PVH_START_INFO + 0x100;
/// Zero page (`struct boot_params`) of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack the kernel is entered with; it grows towards the zero page.
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
/// PML4, PDPT, then one page directory for each GiB of low RAM.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line, with its NUL.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, with its NUL.
pub const CMDLINE_SIZE: usize = 4096;
/// First address that is not usable RAM below 1 MiB.
pub const LOW_RAM_END: u64 = 0xA_0000;
/// ACPI tables, RSDP first: inside the BIOS area, where a kernel that is not told looks for it (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: u64 = 0xE_0000;
/// Generation id of the machine: 16 bytes in a page of their own, reserved like the tables.
pub const GENERATION_ID: u64 = 0xF_0000;
/// FFFF:0000, where real-mode code restarts a PC.
pub const BIOS_ENTRY: u64 = 0xF_FFF0;
/// Where kernels are loaded, and usable RAM goes on.
pub const KERNEL_START: u64 = 0x10_0000;

/// RAM below 4 GiB ends here at the latest.
pub const MMIO_GAP_START: u64 = 0xC000_0000;
/// RAM above the hole starts here.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// 32-bit window for PCI memory BARs.
pub const PCI_MMIO_START: u64 = MMIO_GAP_START;
/// Size of the window for PCI memory BARs.
pub const PCI_MMIO_SIZE: u64 = 0x2800_0000;
/// PCI Express enhanced configuration space of bus 0 (PCI Firmware 3.3, 4.1.2).
pub const ECAM_START: u64 = 0xE800_0000;
/// One bus.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// I/O APIC registers.
pub const IOAPIC_START: u64 = 0xFEC0_0000;
/// Size of the I/O APIC's window.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Interrupt inputs of the I/O APIC: GSI 0 up to this, exclusive. Route them to the I/O APIC only: there is no 8259.
pub const IOAPIC_PINS: u32 = 24;
/// Local APIC registers.
pub const LAPIC_START: u64 = 0xFEE0_0000;
/// Page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// First serial port (16550).
pub const COM1_PORT: u16 = 0x3F8;
/// Ports of a 16550.
pub const COM1_SIZE: u16 = 8;
/// Interrupt of the first serial port.
pub const COM1_GSI: u32 = 4;
/// Index and data port of the CMOS clock.
pub const RTC_PORT: u16 = 0x70;
/// Ports of the CMOS clock.
pub const RTC_SIZE: u16 = 2;
/// pvpanic's event port.
pub const PVPANIC_PORT: u16 = 0x505;
/// One byte.
pub const PVPANIC_SIZE: u16 = 1;
/// PCI configuration address and data ports (PCI 3.0, 3.2.2.3.2).
pub const PCI_CONFIG_PORT: u16 = 0xCF8;
/// Address and data, four ports each.
pub const PCI_CONFIG_SIZE: u16 = 8;

/// Power block: reset, sleep and event registers.
pub const POWER_PORT: u16 = 0x600;
/// Ports of the power block.
pub const POWER_SIZE: u16 = 16;
/// Reset register, a byte (ACPI 6.5, 4.8.3.6).
pub const POWER_RESET_PORT: u16 = POWER_PORT;
/// Writing this to the reset register restarts the machine.
pub const POWER_RESET_VALUE: u8 = 1;
/// Sleep control register, a byte (ACPI 6.5, 4.8.3.7).
pub const POWER_SLEEP_CONTROL_PORT: u16 = POWER_PORT + 4;
/// Sleep status register, a byte (ACPI 6.5, 4.8.3.7).
pub const POWER_SLEEP_STATUS_PORT: u16 = POWER_PORT + 5;
/// SLP_TYP of soft-off.
pub const POWER_S5_TYPE: u8 = 5;
/// Event register of the generic event device, a byte; reading clears it.
pub const POWER_EVENT_PORT: u16 = POWER_PORT + 8;
/// Event bit: the power button was pressed.
pub const POWER_EVENT_BUTTON: u8 = 1;
/// Event bit: the generation id has changed.
pub const POWER_EVENT_GENERATION: u8 = 2;
/// Interrupt of the generic event device.
pub const GED_GSI: u32 = 9;

/// Page tables of the boot identity map at most: PML4, PDPT and a directory for each GiB below the hole.
const BOOT_PAGE_TABLES_END: u64 = BOOT_PAGE_TABLES + (2 + MMIO_GAP_START / (1 << 30)) * PAGE_SIZE;

const _: () = {
    assert!(BOOT_GDT + PAGE_SIZE / 4 <= PVH_START_INFO && PVH_START_INFO + PAGE_SIZE <= ZERO_PAGE);
    assert!(ZERO_PAGE + PAGE_SIZE <= BOOT_STACK_TOP && BOOT_STACK_TOP < BOOT_PAGE_TABLES);
    assert!(BOOT_PAGE_TABLES_END <= CMDLINE && CMDLINE + CMDLINE_SIZE as u64 <= LOW_RAM_END);
    assert!(LOW_RAM_END <= ACPI_TABLES && ACPI_TABLES < BIOS_ENTRY && ACPI_TABLES.is_multiple_of(16));
    assert!(ACPI_TABLES < GENERATION_ID && GENERATION_ID.is_multiple_of(PAGE_SIZE));
    assert!(GENERATION_ID + PAGE_SIZE <= BIOS_ENTRY && BIOS_ENTRY + 16 == KERNEL_START);
    assert!(KERNEL_START < MMIO_GAP_START && MMIO_GAP_START.is_multiple_of(1 << 30));
    assert!(PCI_MMIO_START + PCI_MMIO_SIZE <= ECAM_START && ECAM_START + ECAM_SIZE <= IOAPIC_START);
    assert!(IOAPIC_START + IOAPIC_SIZE <= LAPIC_START && LAPIC_START + PAGE_SIZE <= KVM_IDENTITY_MAP);
    assert!(KVM_IDENTITY_MAP + PAGE_SIZE <= KVM_TSS && KVM_TSS + 3 * PAGE_SIZE <= HIGH_RAM_START);
    assert!(POWER_EVENT_PORT < POWER_PORT + POWER_SIZE && GED_GSI < IOAPIC_PINS);
};

/// Where `bytes` of RAM lie: up to 3 GiB from 0, the rest from 4 GiB. Empty for no RAM; sizes in bytes.
pub fn ram_ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = bytes.min(MMIO_GAP_START);
    let high = bytes - low;
    // usize is 64 bits wide on this architecture.
    [(GuestAddress(0), low as usize), (GuestAddress(HIGH_RAM_START), high as usize)]
        .into_iter()
        .filter(|&(_, size)| size > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn ram_below_3_gib_is_one_range() {
        assert_eq!(ram_ranges(256 * MIB), [(GuestAddress(0), 256 << 20)]);
        assert_eq!(ram_ranges(3 * GIB), [(GuestAddress(0), 3 << 30)]);
    }

    #[test]
    fn ram_over_3_gib_goes_on_at_4_gib() {
        let low = (GuestAddress(0), 3 << 30);
        assert_eq!(ram_ranges(3 * GIB + PAGE_SIZE), [low, (GuestAddress(4 * GIB), 4096)]);
        assert_eq!(ram_ranges(5 * GIB), [low, (GuestAddress(4 * GIB), 2 << 30)]);
    }

    #[test]
    fn no_ram_is_no_range() {
        assert!(ram_ranges(0).is_empty());
    }

    proptest! {
        #[test]
        fn ranges_keep_every_byte_and_leave_the_hole(bytes in 0u64..1 << 46) {
            let ranges = ram_ranges(bytes);
            prop_assert_eq!(ranges.iter().map(|range| range.1 as u64).sum::<u64>(), bytes);
            for (start, size) in ranges {
                let end = start.0 + size as u64;
                prop_assert!(end <= MMIO_GAP_START || start.0 >= HIGH_RAM_START);
            }
        }
    }
}
