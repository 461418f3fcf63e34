//! How KVM's structures and lists are decoded: exactly, and bounded. Refuses to know what is in them.
//!
//! KVM's structures are its stable ABI, so their bytes are a format. kvm-bindings reads them leniently, padding what is too
//! short and cutting what is too long; here a structure has exactly its bytes.

use serde::de::value::BytesDeserializer;
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::{Serialize, Serializer};
use std::fmt;
use std::marker::PhantomData;

/// For `#[serde(with)]`.
pub(super) fn serialize<S: Serializer, T: Serialize>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    value.serialize(serializer)
}

/// For `#[serde(with)]`.
pub(super) fn deserialize<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Exactly<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Exactly<T> {
        type Value = T;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "{} bytes", size_of::<T>())
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<T, E> {
            if bytes.len() != size_of::<T>() {
                return Err(E::invalid_length(bytes.len(), &self));
            }
            T::deserialize(BytesDeserializer::new(bytes))
        }
    }

    deserializer.deserialize_bytes(Exactly(PhantomData))
}

/// Decodes a list of at most `MAX` elements; it allocates for those that are there, never for those that are announced.
pub(crate) fn at_most<'de, const MAX: usize, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct AtMost<const MAX: usize, T>(PhantomData<T>);

    impl<'de, const MAX: usize, T: Deserialize<'de>> Visitor<'de> for AtMost<MAX, T> {
        type Value = Vec<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(formatter, "at most {MAX} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(element) = sequence.next_element()? {
                if list.len() == MAX {
                    return Err(A::Error::invalid_length(MAX + 1, &self));
                }
                list.push(element);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(AtMost::<MAX, T>(PhantomData))
}
