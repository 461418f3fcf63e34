//! Sections: the state of a machine, part by part, in the order in which it is saved.
//!
//! One section on the wire, all numbers little-endian:
//!
//! | bytes | field |
//! | --- | --- |
//! | 1 | length of the name, 1 to 64 |
//! | n | name: letters, digits, `-`, `_`, `.` |
//! | 2 | version of the contents, from 1 |
//! | 4 | length of the contents, at most 16 MiB |
//! | m | contents |
//!
//! A list is a count of 2 bytes, at most 1024, and so many sections. Names are unique. Taking the list apart is strict: a
//! missing, unknown or duplicate section is an error, never a default.

/// Longest name, bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// Longest contents of one section, bytes.
pub const MAX_CONTENTS_BYTES: usize = 16 << 20;
/// Most sections in a list.
pub const MAX_SECTIONS: usize = 1024;

/// Why a list of sections is not what it should be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SectionError {
    /// The bytes end before the list does.
    #[error("the list of sections ends {missing_bytes} bytes too early")]
    Truncated {
        /// How many more there should be, at least.
        missing_bytes: usize,
    },
    /// Bytes follow the list.
    #[error("{extra_bytes} bytes follow the list of sections")]
    Trailing {
        /// How many.
        extra_bytes: usize,
    },
    /// A length, count or version is outside its limits.
    #[error("{field} is {value}, outside 1..={limit}")]
    Limit {
        /// Which field.
        field: &'static str,
        /// What it says.
        value: usize,
        /// Its upper limit.
        limit: usize,
    },
    /// A name has other characters than it may.
    #[error("a section's name is not made of letters, digits, '-', '_' and '.'")]
    Name,
    /// Two sections have one name.
    #[error("section {0} is there twice")]
    Duplicate(String),
    /// A part of the machine has no section.
    #[error("section {0} is missing")]
    Missing(String),
    /// Sections that no part of the machine took.
    #[error("no part of this machine takes {}", .0.join(", "))]
    Unknown(Vec<String>),
}

/// One part's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Stable name of the part: `vcpu0`, `disk0`.
    pub name: String,
    /// Version of the contents' layout, from 1.
    pub version: u16,
    /// The state, encoded by the part's owner.
    pub contents: Vec<u8>,
}

/// Sections in the order in which they were saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sections(Vec<Section>);

impl Sections {
    /// Appends `section`.
    ///
    /// # Errors
    /// What the format cannot hold, or a name that is there already.
    pub fn push(&mut self, section: Section) -> Result<(), SectionError> {
        check_name(section.name.as_bytes())?;
        limit("a section's version", section.version.into(), u16::MAX.into())?;
        if section.contents.len() > MAX_CONTENTS_BYTES {
            return limit("a section's length", section.contents.len(), MAX_CONTENTS_BYTES);
        }
        limit("the number of sections", self.0.len() + 1, MAX_SECTIONS)?;
        if self.0.iter().any(|known| known.name == section.name) {
            return Err(SectionError::Duplicate(section.name));
        }
        self.0.push(section);
        Ok(())
    }

    /// Each section, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Section> {
        self.0.iter()
    }

    /// Takes the section called `name` out.
    ///
    /// # Errors
    /// When there is none.
    pub fn take(&mut self, name: &str) -> Result<Section, SectionError> {
        let at = self.0.iter().position(|section| section.name == name);
        at.map(|at| self.0.remove(at)).ok_or_else(|| SectionError::Missing(name.to_owned()))
    }

    /// Ends the taking apart.
    ///
    /// # Errors
    /// When a section is left that nobody took.
    pub fn finish(self) -> Result<(), SectionError> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(SectionError::Unknown(self.0.into_iter().map(|section| section.name).collect()))
    }

    /// The list as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // `push` has checked every length against its field.
        bytes.extend((self.0.len() as u16).to_le_bytes());
        for section in &self.0 {
            bytes.push(section.name.len() as u8);
            bytes.extend(section.name.as_bytes());
            bytes.extend(section.version.to_le_bytes());
            bytes.extend((section.contents.len() as u32).to_le_bytes());
            bytes.extend(&section.contents);
        }
        bytes
    }

    /// The list that `bytes` hold, all of them.
    ///
    /// # Errors
    /// Whatever is not exactly a list of sections.
    pub fn decode(bytes: &[u8]) -> Result<Self, SectionError> {
        let mut input = Input(bytes);
        let count = usize::from(u16::from_le_bytes(input.array()?));
        if count > MAX_SECTIONS {
            limit("the number of sections", count, MAX_SECTIONS)?;
        }
        let mut sections = Self::default();
        for _ in 0..count {
            let [name_bytes] = input.array()?;
            let name = input.take(name_bytes.into())?;
            check_name(name)?;
            let name = String::from_utf8(name.to_vec()).map_err(|_| SectionError::Name)?;
            let version = u16::from_le_bytes(input.array()?);
            let length = u32::from_le_bytes(input.array()?) as usize;
            if length > MAX_CONTENTS_BYTES {
                limit("a section's length", length, MAX_CONTENTS_BYTES)?;
            }
            sections.push(Section { name, version, contents: input.take(length)?.to_vec() })?;
        }
        match input.0.len() {
            0 => Ok(sections),
            extra_bytes => Err(SectionError::Trailing { extra_bytes }),
        }
    }
}

fn limit(field: &'static str, value: usize, limit: usize) -> Result<(), SectionError> {
    if (1..=limit).contains(&value) { Ok(()) } else { Err(SectionError::Limit { field, value, limit }) }
}

fn check_name(name: &[u8]) -> Result<(), SectionError> {
    limit("the length of a section's name", name.len(), MAX_NAME_BYTES)?;
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    if name.iter().all(allowed) { Ok(()) } else { Err(SectionError::Name) }
}

/// Bytes still to be decoded.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], SectionError> {
        let missing_bytes = length.saturating_sub(self.0.len());
        let (taken, rest) = self.0.split_at_checked(length).ok_or(SectionError::Truncated { missing_bytes })?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], SectionError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn section(name: &str, contents: &[u8]) -> Section {
        Section { name: name.into(), version: 3, contents: contents.to_vec() }
    }

    fn sample() -> Sections {
        let mut sections = Sections::default();
        sections.push(section("vcpu0", &[1, 2, 3])).unwrap();
        sections.push(section("disk0", &[])).unwrap();
        sections
    }

    /// The first version of the format, byte for byte: it must be readable for ever.
    #[test]
    fn the_golden_bytes_are_read_and_written() {
        let golden = b"\x02\x00\x05vcpu0\x03\x00\x03\x00\x00\x00\x01\x02\x03\x05disk0\x03\x00\x00\x00\x00\x00";
        assert_eq!(sample().encode(), golden);
        assert_eq!(Sections::decode(golden).unwrap(), sample());
    }

    #[test]
    fn every_truncation_is_told() {
        let bytes = sample().encode();
        for length in 0..bytes.len() {
            let result = Sections::decode(&bytes[..length]);
            assert!(matches!(result, Err(SectionError::Truncated { missing_bytes: 1.. })), "{length}: {result:?}");
        }
    }

    #[test]
    fn what_follows_the_list_is_told() {
        let mut bytes = sample().encode();
        bytes.push(0);
        assert_eq!(Sections::decode(&bytes), Err(SectionError::Trailing { extra_bytes: 1 }));
    }

    #[test]
    fn a_huge_length_is_refused_before_anything_is_allocated() {
        let bytes = b"\x01\x00\x01a\x01\x00\xff\xff\xff\xff";
        let limit = MAX_CONTENTS_BYTES;
        let expected = SectionError::Limit { field: "a section's length", value: u32::MAX as usize, limit };
        assert_eq!(Sections::decode(bytes), Err(expected));
    }

    #[test]
    fn missing_unknown_and_duplicate_sections_are_errors() {
        let mut sections = sample();
        assert_eq!(sections.push(section("disk0", &[])), Err(SectionError::Duplicate("disk0".into())));
        assert_eq!(sections.take("net0"), Err(SectionError::Missing("net0".into())));
        assert_eq!(sections.take("vcpu0").unwrap().contents, [1, 2, 3]);
        assert_eq!(sections.clone().finish(), Err(SectionError::Unknown(vec!["disk0".into()])));
        sections.take("disk0").unwrap();
        assert_eq!(sections.finish(), Ok(()));
    }

    #[test]
    fn names_and_versions_have_limits() {
        let long = "a".repeat(MAX_NAME_BYTES + 1);
        for name in ["", "a b", "a/b", "naïve", &long] {
            assert!(Sections::default().push(section(name, &[])).is_err(), "{name}");
        }
        let zero = Section { version: 0, ..section("a", &[]) };
        assert!(matches!(Sections::default().push(zero), Err(SectionError::Limit { value: 0, .. })));
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(parts in prop::collection::btree_map("[a-z0-9.-]{1,64}", (1u16.., prop::collection::vec(any::<u8>(), 0..64)), 0..20)) {
            let mut sections = Sections::default();
            for (name, (version, contents)) in parts {
                sections.push(Section { name, version, contents }).unwrap();
            }
            prop_assert_eq!(Sections::decode(&sections.encode()).unwrap(), sections);
        }

        #[test]
        fn garbage_never_panics_and_what_is_accepted_is_canonical(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            if let Ok(sections) = Sections::decode(&bytes) {
                prop_assert_eq!(sections.encode(), bytes);
            }
        }
    }
}
