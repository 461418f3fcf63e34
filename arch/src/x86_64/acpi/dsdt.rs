//! The DSDT: what no bus lets a guest find. PCI host bridge, legacy devices, power button and its event device, _S5.

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::x86_64::layout::*;
use acpi_tables::Aml;
use acpi_tables::aml::*;
use acpi_tables::sdt::Sdt;

/// Revision 2: integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// Bytes of a table header.
const HEADER_BYTES: u32 = 36;
/// Notification of a pressed power button (ACPI 6.5, 5.6.6).
const BUTTON_PRESSED: u8 = 0x80;

/// The whole table.
pub fn dsdt() -> Sdt {
    let mut aml = Vec::new();
    system_bus(&mut aml);
    Name::new("_S5_".into(), &Package::new(vec![&POWER_S5_TYPE, &ZERO])).to_aml_bytes(&mut aml);

    let mut sdt = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(&aml);
    sdt
}

fn system_bus(aml: &mut Vec<u8>) {
    let mut devices = Vec::new();
    pci_host_bridge(&mut devices);
    motherboard(&mut devices);
    legacy_devices(&mut devices);
    power_button(&mut devices);
    aml.extend(Scope::raw("_SB_".into(), devices));
}

/// Bus 0 with its window for memory BARs. There are no I/O BARs and, since interrupts are MSI-X only, no _PRT.
fn pci_host_bridge(aml: &mut Vec<u8>) {
    let window_end = (PCI_MMIO_START + PCI_MMIO_SIZE - 1) as u32;
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0u16),
                    &ports(PCI_CONFIG_PORT, PCI_CONFIG_SIZE),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        PCI_MMIO_START as u32,
                        window_end,
                        None,
                    ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// Reserves ECAM: without it Linux does not use the enhanced configuration space (PCI Firmware 3.3, 4.1.2), and the
/// ports of the power block.
fn motherboard(aml: &mut Vec<u8>) {
    device(
        aml,
        "MBRD",
        &EISAName::new("PNP0C02"),
        vec![&Memory32Fixed::new(true, ECAM_START as u32, ECAM_SIZE as u32), &ports(POWER_PORT, POWER_SIZE)],
    );
}

fn legacy_devices(aml: &mut Vec<u8>) {
    device(aml, "COM1", &EISAName::new("PNP0501"), vec![&edge(COM1_GSI), &ports(COM1_PORT, COM1_SIZE)]);
    device(aml, "RTC0", &EISAName::new("PNP0B00"), vec![&ports(RTC_PORT, RTC_SIZE)]);
    device(aml, "PEVT", &"QEMU0001", vec![&ports(PVPANIC_PORT, PVPANIC_SIZE)]);
}

/// The power button, and the generic event device that notifies it (ACPI 6.5, 5.6.9).
fn power_button(aml: &mut Vec<u8>) {
    Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(aml);

    let pending = Local(0);
    Device::new(
        "GED0".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&level(GED_GSI)])),
            &OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &POWER_EVENT_PORT, &ONE),
            &Field::new(
                "EVTR".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 8)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    // Reading clears, so the register is read once.
                    &Store::new(&pending, &Path::new("EVTS")),
                    &And::new(&pending, &pending, &POWER_EVENT_BUTTON),
                    &If::new(&pending, vec![&Notify::new(&Path::new("PWRB"), &BUTTON_PRESSED)]),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// A device that is always there and has fixed resources.
fn device(aml: &mut Vec<u8>, name: &str, id: &dyn Aml, resources: Vec<&dyn Aml>) {
    Device::new(
        name.into(),
        vec![
            &Name::new("_HID".into(), id),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(aml);
}

/// Consumed ports at a fixed address.
fn ports(first: u16, count: u16) -> IO {
    // The longest block of the layout has 16.
    IO::new(first, first, 1, count as u8)
}

/// An exclusive, edge-triggered, active-high interrupt: what an irqfd without a resample event is.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// An exclusive, level-triggered, active-high interrupt: pending until its reason is gone.
fn level(gsi: u32) -> Interrupt {
    Interrupt::new(true, false, false, false, gsi)
}
