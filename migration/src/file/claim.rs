//! Who restores a file: one at a time, and a mark in the file afterwards.
//!
//! A file that was restored once must not be restored again by accident: its disks have moved on since. The claim block, 4096
//! bytes at offset 4096, is zeros until then; the mark is
//!
//! | bytes | field |
//! | --- | --- |
//! | 8 | XXH3 of the 4088 bytes that follow |
//! | 2 | length of the text, at most 1024 |
//! | n | text: when and where |
//! | | zeros |

use super::head::CLAIM_AT;
use super::{Error, sys};
use crate::wire::checksum;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const BLOCK_BYTES: usize = 4096;
const SUM_BYTES: usize = 8;
const TEXT_AT: usize = SUM_BYTES + 2;
const MAX_TEXT_BYTES: usize = 1024;

/// The right to restore a file. It is held while this, the saved file it was made from, or a mapping of it is there.
#[derive(Debug)]
pub struct Claim {
    file: Arc<File>,
    /// When and where the machine was restored from this file before.
    pub restored_before: Option<String>,
    /// Whether [`Self::mark`] can write. Without it, only others who could write are kept out.
    pub writable: bool,
}

impl Claim {
    /// Opens `file` once more and locks it.
    pub(super) fn new(file: &File) -> Result<Self, Error> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let (file, writable) = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => (file, true),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem) =>
            {
                (File::open(&path).map_err(Error::io("opening the file"))?, false)
            }
            Err(error) => return Err(Error::io("opening the file")(error)),
        };
        let lock = |exclusive| sys::lock(&file, exclusive).map_err(Error::io("locking the file"));
        let alone = lock(writable)?;
        if !alone && !lock(false)? {
            return Err(Error::Claimed);
        }
        let restored_before = read(&file)?;
        if !alone && restored_before.is_none() {
            return Err(Error::Claimed);
        }
        Ok(Self { file: Arc::new(file), restored_before, writable })
    }

    /// The opening of the file that has the lock.
    pub(super) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Notes in the file when and where it was restored, durably; a text that is too long is cut.
    ///
    /// # Errors
    /// A read-only file, and the system's.
    pub fn mark(&self, text: &str) -> Result<(), Error> {
        self.write(&encode(text), "marking the file as restored")
    }

    /// Lets others who accept the mark claim the file too, though this machine may have it mapped. Not before the mark stays: taking
    /// it back would take theirs.
    ///
    /// # Errors
    /// The system's.
    pub fn share(&self) -> Result<(), Error> {
        sys::lock(&self.file, false).map(drop).map_err(Error::io("sharing the file"))
    }

    /// Takes the mark back, durably: the machine has not run. The file says what it said before.
    ///
    /// # Errors
    /// As [`Self::mark`]; the mark may then stay.
    pub fn unmark(&self) -> Result<(), Error> {
        let before = self.restored_before.as_deref().map_or([0; BLOCK_BYTES], encode);
        self.write(&before, "taking back the mark that the file was restored")
    }

    fn write(&self, block: &[u8; BLOCK_BYTES], done: &'static str) -> Result<(), Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        self.file.write_all_at(block, CLAIM_AT).and_then(|()| self.file.sync_data()).map_err(Error::io(done))
    }
}

/// What `file` says of an earlier restore.
pub(super) fn read(file: &File) -> Result<Option<String>, Error> {
    let mut block = [0; BLOCK_BYTES];
    file.read_exact_at(&mut block, CLAIM_AT).map_err(Error::io("reading the file"))?;
    Ok(decode(&block))
}

fn encode(text: &str) -> [u8; BLOCK_BYTES] {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = &text.as_bytes()[..end];
    let mut block = [0; BLOCK_BYTES];
    block[SUM_BYTES..TEXT_AT].copy_from_slice(&(text.len() as u16).to_le_bytes());
    block[TEXT_AT..TEXT_AT + text.len()].copy_from_slice(text);
    let sum = checksum(&block[SUM_BYTES..]);
    block[..SUM_BYTES].copy_from_slice(&sum.to_le_bytes());
    block
}

/// A mark that is damaged is a mark: whether the machine ran since then cannot be told any more.
fn decode(block: &[u8; BLOCK_BYTES]) -> Option<String> {
    if block.iter().all(|byte| *byte == 0) {
        return None;
    }
    let length = usize::from(u16::from_le_bytes([block[SUM_BYTES], block[SUM_BYTES + 1]]));
    let text = block.get(TEXT_AT..TEXT_AT + length).and_then(|text| str::from_utf8(text).ok());
    let sound = block[..SUM_BYTES] == checksum(&block[SUM_BYTES..]).to_le_bytes();
    Some(text.filter(|_| sound).unwrap_or("it cannot be told when and where: the mark is damaged").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_mark_is_read_and_written() {
        let block = encode("today, here");
        assert_eq!(block[..22], *b"\xf6\x5e\xba\xad\x02\x3a\x4e\x0a\x0b\0today, here\0");
        assert!(block[22..].iter().all(|byte| *byte == 0));
        assert_eq!(decode(&block).as_deref(), Some("today, here"));
        assert_eq!(decode(&[0; BLOCK_BYTES]), None);
        assert_eq!(decode(&encode(&"ä".repeat(2000))).unwrap().len(), MAX_TEXT_BYTES);
    }

    #[test]
    fn whatever_is_in_the_block_is_a_mark() {
        for bit in 0..BLOCK_BYTES * 8 {
            for mut block in [[0; BLOCK_BYTES], encode("today")] {
                block[bit / 8] ^= 1 << (bit % 8);
                assert!(decode(&block).unwrap().contains("damaged"), "bit {bit}");
            }
        }
    }
}
