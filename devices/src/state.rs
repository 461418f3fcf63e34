//! The state of a part as it is saved: a version and bytes. Refuses to know where they go.
//!
//! A part keeps a `State` struct of plain integers and vectors beside its code, apart from what it is at run time, and names
//! every field when it saves, so that a new field does not compile until someone has decided about it. The layout is
//! postcard's; a change of it is a new version, and a part reads all versions that it ever wrote. Restoring checks
//! everything first and assigns then: a state comes from a file or a peer and is hostile.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest state of one part, bytes.
pub const MAX_STATE_BYTES: usize = 16 << 20;

/// Why a part does not take a state. What it was before, it still is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Written by a newer program.
    #[error("it has version {found}, and this program reads up to {known}")]
    Version {
        /// What it has.
        found: u16,
        /// The newest that is read here.
        known: u16,
    },
    /// Not what that version consists of.
    #[error("its bytes are damaged")]
    Layout(#[source] postcard::Error),
    /// Bytes are left over.
    #[error("{0} bytes follow it")]
    Trailing(usize),
    /// A value that cannot be, or that does not fit this machine; the text names it.
    #[error("{0}")]
    Value(String),
}

/// One part's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Version of the layout, from 1.
    pub version: u16,
    /// The state, encoded.
    pub contents: Vec<u8>,
}

impl Saved {
    /// What a part without state saves: so it says that it has none.
    pub fn nothing() -> Self {
        Self { version: 1, contents: Vec::new() }
    }

    /// Encodes `state`.
    ///
    /// # Panics
    /// Never for plain structs: encoding into memory only fails for sequences of unknown length.
    #[expect(clippy::expect_used, reason = "our own structs, no sequence of unknown length among them")]
    pub fn of<T: Serialize>(version: u16, state: &T) -> Self {
        Self { version, contents: postcard::to_stdvec(state).expect("a plain struct can be encoded") }
    }

    /// Whether this is what [`Self::nothing`] saves.
    ///
    /// # Errors
    /// When it is not.
    pub fn expect_nothing(&self) -> Result<(), StateError> {
        self.expect_version(1)?;
        if self.contents.is_empty() { Ok(()) } else { Err(StateError::Trailing(self.contents.len())) }
    }

    /// That the version is one of those up to `known`.
    ///
    /// # Errors
    /// When it is newer, or 0.
    pub fn expect_version(&self, known: u16) -> Result<(), StateError> {
        if (1..=known).contains(&self.version) {
            return Ok(());
        }
        Err(StateError::Version { found: self.version, known })
    }

    /// The state, where there is only one version of its layout.
    ///
    /// # Errors
    /// Another version, or bytes that are not exactly one `T`.
    pub fn decode<T: DeserializeOwned>(&self, known: u16) -> Result<T, StateError> {
        self.expect_version(known)?;
        let (state, rest) = postcard::take_from_bytes(&self.contents).map_err(StateError::Layout)?;
        if rest.is_empty() { Ok(state) } else { Err(StateError::Trailing(rest.len())) }
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! States as text, for those that must be readable for ever.

    use super::Saved;

    /// The state that `text` spells in hexadecimal digits, in groups as one likes.
    pub fn from_hex(version: u16, text: &str) -> Saved {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        Saved { version, contents: digits.chunks(2).map(byte).collect() }
    }

    /// The other way, in lines.
    pub fn to_hex(saved: &Saved) -> String {
        let line = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        saved.contents.chunks(48).map(line).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_read_and_nothing_else() {
        let saved = Saved::of(2, &(7u32, vec![1u8, 2]));
        assert_eq!(saved.decode::<(u32, Vec<u8>)>(2).unwrap(), (7, vec![1, 2]));
        assert!(matches!(saved.decode::<(u32, Vec<u8>)>(1), Err(StateError::Version { found: 2, known: 1 })));
        let longer = Saved { contents: [saved.contents.as_slice(), &[0]].concat(), ..saved.clone() };
        assert!(matches!(longer.decode::<(u32, Vec<u8>)>(2), Err(StateError::Trailing(1))));
        let shorter = Saved { contents: saved.contents[..2].to_vec(), ..saved };
        assert!(matches!(shorter.decode::<(u32, Vec<u8>)>(2), Err(StateError::Layout(_))));
    }

    #[test]
    fn a_length_that_the_bytes_cannot_hold_allocates_nothing() {
        let huge = Saved { version: 1, contents: vec![0xff, 0xff, 0xff, 0xff, 0xff, 0x7f] };
        assert!(huge.decode::<Vec<u64>>(1).is_err());
    }

    #[test]
    fn a_part_without_state_takes_only_that() {
        let golden = Saved { version: 1, contents: vec![] };
        assert_eq!(Saved::nothing(), golden, "version 1, for ever");
        golden.expect_nothing().unwrap();
        assert!(Saved { version: 1, contents: vec![0] }.expect_nothing().is_err());
        assert!(Saved { version: 2, contents: vec![] }.expect_nothing().is_err());
    }
}
