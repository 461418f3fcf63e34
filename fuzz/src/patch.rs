//! Bytes that are right but for some: what gets past the first check, and is hostile behind it.

use arbitrary::Arbitrary;

/// Other bytes at some place.
#[derive(Arbitrary, Clone, Debug)]
pub struct Patch {
    /// Where, modulo the length.
    pub at: u16,
    /// What.
    pub bytes: [u8; 2],
    /// One byte, or a number of 64 bits that is far too large or 0.
    pub kind: Kind,
}

/// How much a patch changes.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Kind {
    /// The first of its bytes.
    Byte,
    /// Both.
    Two,
    /// Eight bytes, all of them the first.
    Eight,
}

/// Changes `bytes`.
pub fn spoil(bytes: &mut [u8], patches: &[Patch]) {
    for Patch { at, bytes: to, kind } in patches {
        let number = match kind {
            Kind::Byte => vec![to[0]],
            Kind::Two => to.to_vec(),
            Kind::Eight => vec![to[0]; 8],
        };
        let Some(at) = usize::from(*at).checked_rem(bytes.len()) else { return };
        bytes[at..].iter_mut().zip(number).for_each(|(byte, to)| *byte = to);
    }
}
