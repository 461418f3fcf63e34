//! What of a disk moves with a machine: what the guest was told of it. The contents are the image's.
//!
//! The guest goes on seeing the block sizes it was told, whatever the image it finds here: its partition tables and
//! filesystems are laid out for them. Any image will do that [`Image`] opens: what O_DIRECT wants beyond the guest's blocks
//! is met with a bounce buffer, and a discard of parts of a block is left undone.
//!
//! [`Image`]: super::Image

use super::image::{MAX_ALIGNMENT, SECTOR_BYTES, Topology};
use super::{Blk, ID_BYTES, config, padded};
use crate::state::{Saved, StateError};
use serde::{Deserialize, Serialize};

/// Newest layout.
const VERSION: u16 = 1;

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    pub size_bytes: u64,
    pub readonly: bool,
    /// Serial number, padded with zeroes.
    pub id: [u8; ID_BYTES],
    /// Block sizes as the guest was told.
    pub logical: u32,
    pub physical: u32,
}

impl Blk {
    pub(super) fn saved(&self) -> Saved {
        let Topology { logical, physical } = self.topology;
        let (size_bytes, readonly) = (self.image.size_bytes(), self.image.readonly());
        Saved::of(VERSION, &State { size_bytes, readonly, id: self.id, logical, physical })
    }

    pub(super) fn take_over(&mut self, saved: &Saved) -> Result<(), StateError> {
        let State { size_bytes, readonly, id, logical, physical } = saved.decode(VERSION)?;
        let path = self.image.path().display();
        let (here, opened) = (self.image.size_bytes(), self.image.readonly());
        if size_bytes != here {
            return Err(StateError::Value(format!("the guest's disk has {size_bytes} bytes, and image {path} {here}")));
        }
        if readonly != opened {
            let name = |readonly| if readonly { "read-only" } else { "writable" };
            let (theirs, ours) = (name(readonly), name(opened));
            return Err(StateError::Value(format!("the guest's disk is {theirs}, and image {path} is opened {ours}")));
        }
        let blocks = SECTOR_BYTES as u32..=MAX_ALIGNMENT as u32;
        let whole = logical.is_power_of_two() && size_bytes.is_multiple_of(u64::from(logical));
        if !blocks.contains(&logical) || !whole || physical < logical {
            return Err(StateError::Value(format!("its blocks of {logical} and {physical} bytes cannot be")));
        }
        let serial = std::str::from_utf8(&id).unwrap_or_default().trim_end_matches('\0');
        if padded(serial) != Some(id) {
            return Err(StateError::Value("its serial number is not printable".into()));
        }
        self.name = format!("{serial} ({path})");
        self.id = id;
        self.topology = Topology { logical, physical };
        self.config = config(size_bytes, self.topology);
        if self.spare.is_none() {
            self.spare = Some(self.engine());
        }
        Ok(())
    }
}
