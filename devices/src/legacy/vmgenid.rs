//! Virtual machine generation id, as Microsoft specifies it: 16 bytes in guest memory that tell a machine from its copies.
//!
//! A guest that finds another id than before knows that it was restored a second time, and makes its random numbers and
//! keys anew. The id is kept when the machine moves, pauses or reboots, and replaced when a restore makes another copy;
//! which of them it is, the caller knows. The guest learns the address from a table and of a change by
//! [`super::Power::notify_generation`]. There are no registers.

use crate::state::{Saved, StateError};
use crate::virtio::GuestRam;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use std::io;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// An id, in the order of its bytes in memory.
pub type Generation = [u8; 16];

/// Version 1.
#[derive(Serialize, Deserialize)]
struct State {
    generation: Generation,
}

/// The id and its place.
#[derive(Debug)]
pub struct VmGenId {
    address: GuestAddress,
    generation: Generation,
}

impl VmGenId {
    /// An id that belongs at `address`, which must be aligned to 8 bytes. [`Self::write`] puts it there.
    pub fn new(address: GuestAddress, generation: Generation) -> Self {
        Self { address, generation }
    }

    /// An id that no other machine has.
    ///
    /// # Errors
    /// The kernel has no random bytes.
    pub fn random() -> io::Result<Generation> {
        let mut generation = Generation::default();
        // Up to 256 bytes come whole.
        getrandom(&mut generation, GetRandomFlags::empty())?;
        Ok(generation)
    }

    /// The id.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Puts the id into guest memory, as before a boot. A move has no need of it: the memory holds it already.
    ///
    /// # Errors
    /// The memory does not reach there.
    pub fn write(&self, ram: &GuestRam) -> Result<(), GuestMemoryError> {
        ram.write_slice(&self.generation, self.address)
    }

    /// Replaces the id, here and in guest memory. The guest does not look by itself: it must be notified.
    ///
    /// # Errors
    /// The memory does not reach there; the id is as it was.
    pub fn set_generation(&mut self, ram: &GuestRam, generation: Generation) -> Result<(), GuestMemoryError> {
        let new = Self { generation, ..*self };
        new.write(ram)?;
        *self = new;
        Ok(())
    }

    /// The id; its place is a matter of the machine's layout.
    pub fn save(&self) -> Saved {
        let Self { address: _, generation } = self;
        Saved::of(1, &State { generation: *generation })
    }

    /// Takes over an id; any is good. Guest memory, which holds it, comes by itself.
    ///
    /// # Errors
    /// A state that is none.
    pub fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        let State { generation } = saved.decode(1)?;
        self.generation = generation;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

    const AT: GuestAddress = GuestAddress(0x2000);
    const OLD: Generation = *b"0123456789abcdef";
    const NEW: Generation = *b"fedcba9876543210";

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()
    }

    fn in_memory(ram: &GuestRam) -> Generation {
        ram.read_obj(AT).unwrap()
    }

    #[test]
    fn a_new_id_stands_in_memory_and_its_page_is_dirty() {
        let (ram, mut device) = (ram(), VmGenId::new(AT, OLD));
        assert_eq!(in_memory(&ram), [0; 16]);
        device.write(&ram).unwrap();
        assert_eq!(in_memory(&ram), OLD);
        device.set_generation(&ram, NEW).unwrap();
        assert_eq!((in_memory(&ram), device.generation()), (NEW, NEW));
        let region = ram.find_region(AT).unwrap();
        assert_eq!([0x1000, 0x2000, 0x3000].map(|page| region.bitmap().dirty_at(page)), [false, true, false]);
    }

    #[test]
    fn memory_that_does_not_reach_there_leaves_the_id_as_it_was() {
        for address in [0x4000, 0x3ff8, u64::MAX - 8] {
            let mut device = VmGenId::new(GuestAddress(address), OLD);
            device.set_generation(&ram(), NEW).unwrap_err();
            assert_eq!(device.generation(), OLD);
        }
    }

    #[test]
    fn random_ids_differ() {
        assert_ne!(VmGenId::random().unwrap(), VmGenId::random().unwrap());
    }

    #[test]
    fn version_1_is_read_for_ever() {
        let mut device = VmGenId::new(AT, OLD);
        let golden = Saved { version: 1, contents: NEW.to_vec() };
        assert_ne!(device.save(), golden);
        device.restore(&golden).unwrap();
        assert_eq!((device.generation(), device.save()), (NEW, golden));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_whole_or_not_at_all(
            version in 0u16..3,
            contents in prop::collection::vec(any::<u8>(), 0..34),
        ) {
            let mut device = VmGenId::new(AT, OLD);
            let good = version == 1 && contents.len() == 16;
            let saved = Saved { version, contents };
            prop_assert_eq!(device.restore(&saved).is_ok(), good);
            prop_assert_eq!(device.save() == saved, good);
            prop_assert!(good || device.generation() == OLD);
        }
    }
}
