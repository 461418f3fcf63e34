//! The first 48 bytes of every connection and file: plain, so that any version can say what it has met.
//!
//! | bytes | field |
//! | --- | --- |
//! | 8 | magic |
//! | 2 | format version |
//! | 2 | architecture, as an ELF machine number |
//! | 1 | [`Purpose`] |
//! | 1 | 0 |
//! | 2 | number of the connection within its move |
//! | 16 | id of the move or save |
//! | 8 | epoch that the move gives the machine |
//! | 8 | XXH3 of the 40 bytes before |
//!
//! All numbers are little-endian. The id and the purpose are here and not in a frame so that whoever accepts a connection
//! can tell where it belongs without decoding anything.

use super::{WireError, checksum};
use uuid::Uuid;

/// Bytes of a preamble.
pub const BYTES: usize = 48;
/// No text and no other format begins so: a byte that is not ASCII, the name, and a newline that text modes would change.
const MAGIC: [u8; 8] = *b"\x8fSTERN\r\n";
/// Format version that is written.
pub const VERSION: u16 = 1;
/// Oldest format version that is read.
pub const OLDEST_VERSION: u16 = 1;
/// ELF machine number of x86-64.
pub const X86_64: u16 = 62;

/// What a connection or file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A saved machine.
    File,
    /// The first connection of a move.
    Move,
    /// A further connection of a move.
    Join,
    /// A source in doubt asks what became of its move.
    Ask,
    /// A trial: everything that can be tested is, and nothing is moved.
    Check,
}

const PURPOSES: [(u8, Purpose); 5] =
    [(1, Purpose::File), (2, Purpose::Move), (3, Purpose::Join), (4, Purpose::Ask), (5, Purpose::Check)];

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Format version.
    pub version: u16,
    /// ELF machine number.
    pub architecture: u16,
    /// What follows.
    pub purpose: Purpose,
    /// Number of the connection within its move; 0 is the first.
    pub connection: u16,
    /// Id of the move or save.
    pub id: Uuid,
    /// Epoch that the move gives the machine.
    pub epoch: u64,
}

impl Preamble {
    /// One of this program's version and architecture.
    pub fn new(purpose: Purpose, connection: u16, id: Uuid, epoch: u64) -> Self {
        Self { version: VERSION, architecture: X86_64, purpose, connection, id, epoch }
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; BYTES] {
        let purpose = PURPOSES.iter().find(|(_, purpose)| *purpose == self.purpose).map_or(0, |(number, _)| *number);
        let mut bytes = [0; BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &self.version.to_le_bytes());
        put(10, &self.architecture.to_le_bytes());
        put(12, &[purpose]);
        put(14, &self.connection.to_le_bytes());
        put(16, self.id.as_bytes());
        put(32, &self.epoch.to_le_bytes());
        let sum = checksum(&bytes[..40]);
        bytes[40..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads one. Versions and architectures other than ours are told before anything else is looked at.
    ///
    /// # Errors
    /// What it is instead.
    pub fn decode(bytes: &[u8; BYTES]) -> Result<Self, WireError> {
        if bytes[..8] != MAGIC {
            return Err(WireError::Magic);
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u64_at = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        };
        let version = u16_at(8);
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(WireError::Version { found: version, oldest: OLDEST_VERSION, newest: VERSION });
        }
        if u64_at(40) != checksum(&bytes[..40]) {
            return Err(WireError::Preamble);
        }
        let architecture = u16_at(10);
        if architecture != X86_64 {
            return Err(WireError::Architecture { found: architecture, here: X86_64 });
        }
        if bytes[13] != 0 {
            return Err(WireError::Unexpected { what: "reserved byte of a preamble", found: bytes[13].into() });
        }
        let known = PURPOSES.iter().find(|(number, _)| *number == bytes[12]).map(|(_, purpose)| *purpose);
        let purpose = known.ok_or(WireError::Unexpected { what: "purpose", found: bytes[12].into() })?;
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[16..32]);
        let (connection, id, epoch) = (u16_at(14), Uuid::from_bytes(id), u64_at(32));
        Ok(Self { version, architecture, purpose, connection, id, epoch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Preamble {
        Preamble::new(Purpose::Join, 3, Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff), 7)
    }

    #[test]
    fn every_flipped_bit_is_told() {
        for bit in 0..BYTES * 8 {
            let mut bytes = sample().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Preamble::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_reserved_byte_that_is_not_zero_is_refused() {
        let mut bytes = sample().encode();
        bytes[13] = 0xff;
        let sum = checksum(&bytes[..40]);
        bytes[40..].copy_from_slice(&sum.to_le_bytes());
        let text = Preamble::decode(&bytes).unwrap_err().to_string();
        assert_eq!(text, "unexpected reserved byte of a preamble 255");
    }

    #[test]
    fn another_version_and_architecture_are_told_by_number() {
        let newer = Preamble { version: 9, ..sample() }.encode();
        let text = Preamble::decode(&newer).unwrap_err().to_string();
        assert_eq!(text, "it has format version 9; this program reads 1 to 1");
        let other = Preamble { architecture: 183, ..sample() }.encode();
        assert!(matches!(Preamble::decode(&other), Err(WireError::Architecture { found: 183, here: 62 })));
    }
}
