//! ACPI tables of a hardware-reduced machine (ACPI 6.5, 4.1): RSDP, XSDT, FADT, MADT, MCFG and DSDT.
//!
//! They describe what never changes on a machine; only the number of vCPUs is asked for. What is on the PCI bus is
//! not known here: the guest finds it by itself.

mod dsdt;
mod tables;

use super::layout::{ACPI_TABLES, GENERATION_ID, MAX_CPUS};
use acpi_tables::{Aml, rsdp::Rsdp};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

/// Who made the tables.
const OEM_ID: [u8; 6] = *b"STERNA";
/// Which machine they are for.
const OEM_TABLE_ID: [u8; 8] = *b"STERNAVM";
/// Revision of this description.
const OEM_REVISION: u32 = 1;

/// Why the tables could not be put into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// No vCPU, or more than the machine has.
    #[error("a machine has 1 to {MAX_CPUS} vCPUs, not {0}")]
    Cpus(u32),
    /// They do not fit below what comes next.
    #[error("the ACPI tables are larger than their place")]
    TooLarge,
    /// Guest memory does not reach there.
    #[error("cannot write the ACPI tables into guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Writes the tables for a machine of `cpus` vCPUs and returns the RSDP's address.
pub fn write_acpi_tables<M: GuestMemoryBackend>(ram: &M, cpus: u32) -> Result<GuestAddress, AcpiError> {
    if !(1..=MAX_CPUS).contains(&cpus) {
        return Err(AcpiError::Cpus(cpus));
    }
    let bytes = tables_at(ACPI_TABLES, cpus);
    if bytes.len() as u64 > GENERATION_ID - ACPI_TABLES {
        return Err(AcpiError::TooLarge);
    }
    ram.write_slice(&bytes, GuestAddress(ACPI_TABLES)).map_err(AcpiError::Write)?;
    Ok(GuestAddress(ACPI_TABLES))
}

/// All tables as they lie from `base` on, the RSDP first.
fn tables_at(base: u64, cpus: u32) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt = append(&mut bytes, base, &dsdt::dsdt());
    let described = [
        append(&mut bytes, base, &tables::fadt(dsdt)),
        append(&mut bytes, base, &tables::madt(cpus)),
        append(&mut bytes, base, &tables::mcfg()),
    ];
    let xsdt = append(&mut bytes, base, &tables::xsdt(&described));
    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    bytes.splice(..rsdp.len(), rsdp);
    bytes
}

/// Appends `table` on a 16-byte boundary and returns its address.
fn append(bytes: &mut Vec<u8>, base: u64, table: &dyn Aml) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    let address = base + bytes.len() as u64;
    table.to_aml_bytes(bytes);
    address
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86_64::fields::{bytes_at, u32_at, u64_at};
    use vm_memory::GuestMemoryMmap;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at `address`, its checksum proven.
    fn table(ram: &GuestMemoryMmap, address: u64, signature: &[u8; 4]) -> Vec<u8> {
        let mut length = [0; 4];
        ram.read_slice(&mut length, GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
        ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        assert_eq!(&bytes[..4], signature);
        assert_eq!(sum(&bytes), 0, "checksum of {}", signature.escape_ascii());
        assert_eq!(address % 16, 0);
        bytes
    }

    #[test]
    fn a_guest_finds_every_table_from_the_rsdp() {
        for cpus in [1, 2, 32] {
            let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
            let rsdp = write_acpi_tables(&ram, cpus).unwrap();
            let mut bytes = [0; 36];
            ram.read_slice(&mut bytes, rsdp).unwrap();
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes)), (0, 0));

            let xsdt = table(&ram, u64_at(&bytes, 24), b"XSDT");
            let fadt = table(&ram, u64_at(&xsdt, 36), b"FACP");
            let madt = table(&ram, u64_at(&xsdt, 44), b"APIC");
            let mcfg = table(&ram, u64_at(&xsdt, 52), b"MCFG");
            assert_eq!(xsdt.len(), 60);
            assert_eq!(u64_at(&mcfg, 44), 0xE800_0000);
            table(&ram, u64_at(&fadt, 140), b"DSDT");
            let local_apics = (0..cpus).map(|cpu| [0, 8, cpu as u8, cpu as u8, 1, 0, 0, 0]);
            assert!(madt[44..].starts_with(&local_apics.flatten().collect::<Vec<u8>>()));
        }
    }

    #[test]
    fn fadt_names_reset_and_sleep_registers() {
        let mut fadt = Vec::new();
        tables::fadt(0x1234).to_aml_bytes(&mut fadt);
        assert_eq!(fadt.len(), 276);
        let flags = u32_at(&fadt, 112);
        assert_eq!(flags >> 20 & 1, 1, "hardware reduced");
        assert_eq!(flags >> 10 & 1, 1, "reset register");
        // Port space, 8 bits, byte access.
        let register = |port: u8| Some([1, 8, 0, 1, port, 6, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes_at(&fadt, 116), register(0));
        assert_eq!(fadt[128], 1);
        assert_eq!(bytes_at(&fadt, 244), register(4));
        assert_eq!(bytes_at(&fadt, 256), register(5));
    }

    #[test]
    fn the_wrong_number_of_vcpus_is_refused() {
        let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        for cpus in [0, 33, 1000] {
            let error = write_acpi_tables(&ram, cpus).unwrap_err().to_string();
            assert_eq!(error, format!("a machine has 1 to 32 vCPUs, not {cpus}"));
        }
    }

    #[test]
    fn tables_stay_within_two_pages() {
        assert!(tables_at(ACPI_TABLES, MAX_CPUS).len() <= 8192);
    }
}
