//! The DSDT: what no bus lets a guest find. PCI host bridge, legacy devices, power button, generation id and the event
//! device of both, _S5.

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
/// Notification of a new generation id.
const GENERATION_CHANGED: u8 = 0x80;

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
    generation_id(&mut devices);
    power_button(&mut devices);
    event_device(&mut devices);
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

/// Where the generation id lies (Microsoft's Virtual Machine Generation ID; the _CID is the one that drivers look for).
fn generation_id(aml: &mut Vec<u8>) {
    let name = "VM_Gen_Counter";
    let address = [GENERATION_ID as u32, (GENERATION_ID >> 32) as u32];
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"STRN0001"),
            &Name::new("_CID".into(), &name),
            &Name::new("_DDN".into(), &name),
            &Name::new("ADDR".into(), &Package::new(vec![&address[0], &address[1]])),
        ],
    )
    .to_aml_bytes(aml);
}

fn power_button(aml: &mut Vec<u8>) {
    Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(aml);
}

/// The generic event device, which notifies the two above (ACPI 6.5, 5.6.9).
fn event_device(aml: &mut Vec<u8>) {
    let pending = Local(0);
    let (button, generation) = (Path::new("PWRB"), Path::new("VGEN"));
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
                    &If::new(
                        &And::new(&ZERO, &pending, &POWER_EVENT_BUTTON),
                        vec![&Notify::new(&button, &BUTTON_PRESSED)],
                    ),
                    &If::new(
                        &And::new(&ZERO, &pending, &POWER_EVENT_GENERATION),
                        vec![&Notify::new(&generation, &GENERATION_CHANGED)],
                    ),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes from the first `start` on.
    fn from(start: &[u8]) -> Vec<u8> {
        let mut table = Vec::new();
        dsdt().to_aml_bytes(&mut table);
        let at = table.windows(start.len()).position(|window| window == start);
        table.split_off(at.unwrap_or_else(|| panic!("no {} in the table", start.escape_ascii())))
    }

    #[test]
    fn the_generation_id_is_found_by_its_compatible_id() {
        let device = from(b"VGEN");
        let end = device.windows(4).position(|window| window == b"PWRB").unwrap();
        let holds = |bytes: &[u8]| device[..end].windows(bytes.len()).any(|window| window == bytes);
        // Names (08) of strings (0d), and of a package (12) of two: a double word (0c), and nothing above 4 GiB (00).
        assert!(holds(b"\x08_HID\x0dSTRN0001\0"));
        assert!(holds(b"\x08_CID\x0dVM_Gen_Counter\0"));
        assert!(holds(b"\x08_DDN\x0dVM_Gen_Counter\0"));
        assert!(holds(b"\x08ADDR\x12\x08\x02\x0c\x00\x00\x0f\x00\x00"));
    }

    #[test]
    fn the_event_device_reads_once_and_notifies_for_each_bit() {
        let method = from(b"_EVT");
        // One argument, serialized; Local0 (60) = EVTS; if (a0) Local0 & bit: notify (86).
        let body = b"_EVT\x09\x70EVTS\x60\
            \xa0\x0c\x7b\x60\x01\x00\x86PWRB\x0a\x80\
            \xa0\x0d\x7b\x60\x0a\x02\x00\x86VGEN\x0a\x80";
        assert_eq!(method[..body.len()].escape_ascii().to_string(), body.escape_ascii().to_string());
    }
}
