//! The PVH test guest as an ELF image. See `README.md` for its command line and what it prints.

/// Path of the image on the machine that built this.
pub const GUEST_ELF: &str = concat!(env!("OUT_DIR"), "/guest.elf");

/// The image itself.
pub fn elf() -> &'static [u8] {
    include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(at: usize, bytes: usize) -> usize {
        elf()[at..at + bytes].iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte))
    }

    /// Program headers as (type, file offset, address, bytes in the file).
    fn segments() -> Vec<(usize, usize, usize, usize)> {
        let (table, count) = (number(32, 8), number(56, 2));
        let header = |index| table + index * 56;
        (0..count)
            .map(header)
            .map(|at| (number(at, 4), number(at + 8, 8), number(at + 24, 8), number(at + 32, 8)))
            .collect()
    }

    #[test]
    fn first_instruction_marks_the_debug_port() {
        let note = segments().into_iter().find(|segment| segment.0 == 4).unwrap();
        assert_eq!(number(note.1 + 8, 4), 18, "not a PHYS32_ENTRY note");
        let entry = number(note.1 + 16, 8);
        let image = segments().into_iter().find(|segment| segment.0 == 1).unwrap();
        let at = image.1 + entry - image.2;
        assert_eq!(elf()[at..at + 4], [0xb0, 0x5a, 0xe6, 0x80], "entry is not: mov al, 0x5a; out 0x80, al");
    }

    #[test]
    fn image_is_small_and_loads_at_one_mebibyte() {
        let loads: Vec<_> = segments().into_iter().filter(|segment| segment.0 == 1).collect();
        assert_eq!(loads.len(), 1);
        assert_eq!(loads[0].2, 1 << 20);
        assert!(loads[0].3 < 256 << 10, "{} bytes", loads[0].3);
    }

    #[test]
    fn path_names_the_same_bytes() {
        assert_eq!(std::fs::read(GUEST_ELF).unwrap(), elf());
    }
}
