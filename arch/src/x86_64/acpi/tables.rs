//! The tables with fixed fields: FADT, MADT, MCFG and XSDT. What is written in AML is in `dsdt`.

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::x86_64::layout::*;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::xsdt::XSDT;

/// There is no VGA, no 8042 and no ASPM to configure, but the devices on the legacy bus that the DSDT lists
/// (ACPI 6.5, 5.2.9.3).
const BOOT_ARCHITECTURE: u16 = 1 << 0 | 1 << 2 | 1 << 4;

/// Fixed ACPI description: hardware-reduced, with reset and sleep registers.
pub fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Both say: no fixed button; the power button is a device of the DSDT, and there is no sleep button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = byte_port(POWER_RESET_PORT);
    fadt.reset_value = POWER_RESET_VALUE;
    fadt.sleep_control_reg = byte_port(POWER_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(POWER_SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// Local APICs with the vCPU's index as id, and the I/O APIC from GSI 0 on. The flags say that there is no 8259.
pub fn madt(cpus: u32) -> MADT {
    let lapic = LocalInterruptController::Address(LAPIC_START as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    // At most MAX_CPUS, which the caller has checked.
    for cpu in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_START as u32, 0));
    madt
}

/// Enhanced configuration space of bus 0.
pub fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0);
    mcfg
}

/// The list of `tables` by address.
pub fn xsdt(tables: &[u64]) -> XSDT {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    tables.iter().for_each(|table| xsdt.add_entry(*table));
    xsdt
}
