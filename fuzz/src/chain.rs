//! Descriptor chains as fuzz input: mostly of the right shape, so that devices get past the framing.

use arbitrary::{Arbitrary, Unstructured};

/// One descriptor.
#[derive(Arbitrary, Clone, Debug)]
pub enum Part {
    /// Bytes for the device to read, in a buffer of their own.
    Readable(Vec<u8>),
    /// So many bytes for the device to write, in a buffer of their own.
    Writable(u16),
    /// Anywhere in or a little past RAM.
    Near {
        /// Guest physical address.
        at: u32,
        /// Bytes.
        length: u32,
        /// Descriptor flags beside NEXT.
        flags: u16,
    },
    /// Anywhere at all.
    Far {
        /// Guest physical address.
        at: u64,
        /// Bytes.
        length: u32,
        /// Descriptor flags beside NEXT.
        flags: u16,
    },
}

/// How the descriptors are linked.
#[derive(Clone, Copy, Debug)]
pub enum Framing {
    /// One after the other.
    Direct,
    /// In an indirect table.
    Indirect,
    /// One after the other, but for one of them.
    Spoiled {
        /// Which, modulo their number.
        which: u8,
        /// Its flags.
        flags: u16,
        /// Its successor.
        next: u16,
    },
    /// In an indirect table of another length than it has entries.
    Cut {
        /// Bytes.
        table_bytes: u32,
    },
}

/// Mostly by the rules: a device stops at the first chain that is not, so few of them do more than many.
impl<'a> Arbitrary<'a> for Framing {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u8::arbitrary(u)? {
            0..=119 => Framing::Direct,
            120..=239 => Framing::Indirect,
            240..=249 => Framing::Spoiled { which: u.arbitrary()?, flags: u.arbitrary()?, next: u.arbitrary()? },
            250.. => Framing::Cut { table_bytes: u.arbitrary()? },
        })
    }
}

/// A chain to offer.
#[derive(Arbitrary, Clone, Debug)]
pub struct Chain {
    /// Its descriptors, of which a bounded number is used.
    pub parts: Vec<Part>,
    /// Their links.
    pub framing: Framing,
}

impl Chain {
    /// A request with `bytes`, cut in two after `split` (modulo the length), then `writable` buffers.
    pub fn request(bytes: Vec<u8>, split: u16, writable: impl IntoIterator<Item = u16>, framing: Framing) -> Self {
        let (first, second) = bytes.split_at(usize::from(split) % (bytes.len() + 1));
        let readable = [first, second].into_iter().filter(|part| !part.is_empty());
        let parts = readable.map(|part| Part::Readable(part.to_vec())).chain(writable.into_iter().map(Part::Writable));
        Self { parts: parts.collect(), framing }
    }
}
