//! The table and the end record: which pages a file has, their checksums, and that it is whole.
//!
//! An entry of the table, for 4 MiB of RAM with at least one page in the file, in the order of RAM:
//!
//! | bytes | field |
//! | --- | --- |
//! | 4 | number of the chunk: its first page / 1024 |
//! | 4 | compressed: bytes of its zstd frame; else 0 |
//! | 8 | compressed: offset of its zstd frame; else 0 |
//! | 8 | XXH3 of its pages that are in the file, in order |
//! | 128 | which those are: a bit for each of its 1024 pages |
//!
//! The end record, the last 64 bytes of the file:
//!
//! | bytes | field |
//! | --- | --- |
//! | 8 | magic |
//! | 8 | offset of the table |
//! | 8 | entries of the table |
//! | 8 | pages in the file |
//! | 8 | pages that existed, but were all zeros |
//! | 8 | XXH3 of the head, the claim block left out |
//! | 8 | XXH3 of the table |
//! | 8 | XXH3 of the 56 bytes before |

use super::Error;
use super::head::{Form, Head, Summed};
use crate::pages::{PAGE_BYTES, PageSet, Run};
use crate::wire::checksum;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

/// Pages of a chunk: 4 MiB.
pub(super) const CHUNK_PAGES: u64 = 1024;
/// Bytes of a chunk.
pub(super) const CHUNK_BYTES: usize = (CHUNK_PAGES * PAGE_BYTES) as usize;
/// Bytes of an entry.
pub(super) const ENTRY_BYTES: usize = 152;
/// Bytes of the end record.
pub(super) const END_BYTES: usize = 64;

const WORDS: usize = CHUNK_PAGES as usize / 64;
const MAGIC: [u8; 8] = *b"\x8fSTERend";
/// Most bytes of a zstd frame of a chunk; what zstd makes of 4 MiB of noise is 16 KiB longer.
const MAX_STORED: u32 = CHUNK_BYTES as u32 + (64 << 10);

/// An entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub number: u32,
    /// Bytes of its zstd frame.
    pub stored: u32,
    /// Where its zstd frame is.
    pub at: u64,
    pub sum: u64,
    /// A bit for each page in the file.
    pub bits: [u64; WORDS],
}

impl Chunk {
    /// All pages of the chunk, whether they are in the file or not.
    pub fn span(&self) -> Run {
        Run { first: u64::from(self.number) * CHUNK_PAGES, pages: CHUNK_PAGES }
    }

    /// Pages in the file.
    pub fn pages(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether `page`, one of the span, is in the file.
    pub fn contains(&self, page: u64) -> bool {
        let bit = page % CHUNK_PAGES;
        self.bits.get((bit / 64) as usize).is_some_and(|word| word >> (bit % 64) & 1 != 0)
    }

    /// The pages in the file.
    pub fn runs(&self) -> Vec<Run> {
        let mut set = PageSet::none(CHUNK_PAGES);
        set.insert_bitmap(0, &self.bits);
        let first = self.span().first;
        set.runs().map(|run| Run { first: first + run.first, pages: run.pages }).collect()
    }

    /// That its pages are not those that were saved.
    pub fn damaged(&self) -> Error {
        let span = self.span();
        Error::Pages { first: span.first, last: span.end() - 1 }
    }

    /// Appends its bytes.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.stored.to_le_bytes());
        bytes.extend(self.at.to_le_bytes());
        bytes.extend(self.sum.to_le_bytes());
        bytes.extend(self.bits.iter().flat_map(|word| word.to_le_bytes()));
    }

    fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |index: usize| words.get(index).map_or(0, |word| u64::from_le_bytes(*word));
        let bits = std::array::from_fn(|index| word(3 + index));
        Self { number: word(0) as u32, stored: (word(0) >> 32) as u32, at: word(1), sum: word(2), bits }
    }

    /// Whether it lies in a RAM of `pages` and its frame between `from` and `to`.
    fn is_sound(&self, pages: u64, form: Form, from: u64, to: u64) -> bool {
        let last = self.bits.iter().rposition(|word| *word != 0);
        let end = last.map(|index| {
            let top = self.bits.get(index).map_or(0, |word| word.leading_zeros());
            self.span().first + (index as u64 + 1) * 64 - u64::from(top)
        });
        let stored = match form {
            Form::InPlace => self.stored == 0 && self.at == 0,
            Form::Zstd => {
                let end = self.at.checked_add(self.stored.into());
                (1..=MAX_STORED).contains(&self.stored) && self.at >= from && end.is_some_and(|end| end <= to)
            }
        };
        stored && end.is_some_and(|end| end <= pages)
    }
}

/// The end record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct End {
    pub table_at: u64,
    pub entries: u64,
    pub pages: u64,
    pub zero_pages: u64,
    pub head_sum: u64,
    pub table_sum: u64,
}

impl End {
    /// As bytes.
    pub fn encode(&self) -> [u8; END_BYTES] {
        let fields = [self.table_at, self.entries, self.pages, self.zero_pages, self.head_sum, self.table_sum];
        let mut bytes = [0; END_BYTES];
        let (words, _) = bytes.as_chunks_mut::<8>();
        let fields = std::iter::once(MAGIC).chain(fields.map(u64::to_le_bytes));
        words.iter_mut().zip(fields).for_each(|(word, field)| *word = field);
        let sum = checksum(&bytes[..END_BYTES - 8]);
        bytes[END_BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads one.
    ///
    /// # Errors
    /// When it is not one: the file is not whole.
    pub fn decode(bytes: &[u8; END_BYTES]) -> Result<Self, Error> {
        let (words, _) = bytes.as_chunks::<8>();
        let [magic, fields @ .., sum] = words else { return Err(Error::NotWhole) };
        if *magic != MAGIC || *sum != checksum(&bytes[..END_BYTES - 8]).to_le_bytes() {
            return Err(Error::NotWhole);
        }
        let field = |index: usize| fields.get(index).map_or(0, |field| u64::from_le_bytes(*field));
        let [table_at, entries, pages, zero_pages, head_sum, table_sum] = std::array::from_fn(field);
        Ok(Self { table_at, entries, pages, zero_pages, head_sum, table_sum })
    }
}

/// Reads the end record and the table of `file`, whose head is `head`.
///
/// # Errors
/// A file that is not whole, and whatever contradicts itself. A table is never longer than the file and the machine allow, and
/// what is wrong in it is refused entry by entry.
pub(super) fn read(file: &File, head: &Head) -> Result<(End, Vec<Chunk>), Error> {
    let file_bytes = file.metadata().map_err(Error::io("reading the file"))?.len();
    let end_at = file_bytes.checked_sub(END_BYTES as u64).ok_or(Error::NotWhole)?;
    let mut bytes = [0; END_BYTES];
    file.read_exact_at(&mut bytes, end_at).map_err(Error::io("reading the file"))?;
    let end = End::decode(&bytes)?;
    if end.head_sum != head.sum {
        return Err(Error::Damaged { what: "its head is not the one that was saved" });
    }
    let data_end = match head.form {
        Form::InPlace => end.table_at == head.data_at + head.pages() * PAGE_BYTES,
        Form::Zstd => end.table_at >= head.data_at,
    };
    let table_end = end.entries.checked_mul(ENTRY_BYTES as u64).and_then(|bytes| bytes.checked_add(end.table_at));
    if !data_end || table_end != Some(end_at) || end.entries > head.pages().div_ceil(CHUNK_PAGES) {
        return Err(Error::Damaged { what: "its parts do not fit together" });
    }
    let mut input = Summed::new(file, end.table_at);
    let chunks = entries(&mut input, &end, head)?;
    if input.sum.digest() != end.table_sum || chunks.iter().map(Chunk::pages).sum::<u64>() != end.pages {
        return Err(Error::Damaged { what: "its table of pages is not the one that was saved" });
    }
    Ok((end, chunks))
}

fn entries(input: &mut impl Read, end: &End, head: &Head) -> Result<Vec<Chunk>, Error> {
    /// Entries read at once: 38 KiB.
    const STEP: usize = 256;
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut buffer = [0; STEP * ENTRY_BYTES];
    let mut left = end.entries as usize; // at most the chunks of RAM
    while left > 0 {
        let part = &mut buffer[..left.min(STEP) * ENTRY_BYTES];
        input.read_exact(part).map_err(Error::io("reading the file"))?;
        let (parts, _) = part.as_chunks::<ENTRY_BYTES>();
        for bytes in parts {
            let chunk = Chunk::decode(bytes);
            let in_order = chunks.last().is_none_or(|before| before.number < chunk.number);
            if !in_order || !chunk.is_sound(head.pages(), head.form, head.data_at, end.table_at) {
                return Err(Error::Damaged { what: "an entry of its table of pages is not one that can be" });
            }
            chunks.push(chunk);
        }
        left -= parts.len();
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk() -> Chunk {
        let mut bits = [0; WORDS];
        bits[0] = 0b1011;
        bits[15] = 1 << 63;
        Chunk { number: 2, stored: 0, at: 0, sum: 7, bits }
    }

    fn encoded(chunk: &Chunk) -> [u8; ENTRY_BYTES] {
        let mut bytes = Vec::new();
        chunk.encode(&mut bytes);
        bytes.try_into().unwrap()
    }

    #[test]
    fn an_entry_knows_its_pages() {
        let runs: Vec<_> = chunk().runs().iter().map(|run| (run.first, run.pages)).collect();
        assert_eq!(runs, [(2048, 2), (2051, 1), (3071, 1)]);
        assert_eq!(chunk().pages(), 4);
        assert!(chunk().is_sound(3072, Form::InPlace, 0, 0));
        assert!(!chunk().is_sound(3071, Form::InPlace, 0, 0));
        assert!(!Chunk { bits: [0; WORDS], ..chunk() }.is_sound(9999, Form::InPlace, 0, 0));
    }

    #[test]
    fn frames_lie_between_data_and_table() {
        let stored = |at, stored| Chunk { at, stored, ..chunk() }.is_sound(3072, Form::Zstd, 100, 200);
        assert!(stored(100, 100) && stored(199, 1));
        assert!(!stored(99, 10) && !stored(100, 101) && !stored(150, 0) && !stored(u64::MAX, 1));
        assert!(!Chunk { at: 1, ..chunk() }.is_sound(3072, Form::InPlace, 0, 0));
    }

    #[test]
    fn the_golden_end_is_read_and_written() {
        let end = End { table_at: 0x20_2000, entries: 2, pages: 3, zero_pages: 4, head_sum: 5, table_sum: 6 };
        let bytes = end.encode();
        assert_eq!(bytes[..24], *b"\x8fSTERend\0\x20\x20\0\0\0\0\0\x02\0\0\0\0\0\0\0");
        assert_eq!(End::decode(&bytes).unwrap(), end);
        for bit in 0..END_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(End::decode(&damaged), Err(Error::NotWhole)), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn any_entry_is_read_back_and_none_panics(words in prop::array::uniform19(any::<u64>()), pages in any::<u32>(), to in any::<u64>()) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let chunk = Chunk::decode(&bytes.clone().try_into().unwrap());
            prop_assert_eq!(encoded(&chunk).to_vec(), bytes);
            for form in [Form::InPlace, Form::Zstd] {
                if chunk.is_sound(pages.into(), form, 0, to) {
                    prop_assert!(chunk.runs().iter().all(|run| run.end() <= pages.into()));
                }
            }
        }
    }
}
