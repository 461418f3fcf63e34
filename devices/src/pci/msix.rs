//! MSI-X of one function: vector table, pending bits, masks (PCI 3.0, 6.8.2).
//!
//! A vector that is triggered while masked is pending, and delivered when it is unmasked. The interrupt controller keeps
//! nothing of a vector, so that a table can be replaced as a whole.

use crate::state::StateError;
use crate::{MsiMessage, Wiring};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Bytes of a table entry.
pub const ENTRY_BYTES: usize = 16;
/// Message control: the function's vectors are masked.
pub const CONTROL_MASK: u16 = 1 << 14;
/// Message control: MSI-X is on.
pub const CONTROL_ENABLE: u16 = 1 << 15;

/// One vector as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where the message goes.
    pub message: MsiMessage,
    /// Bit 0 of vector control.
    pub masked: bool,
    /// Triggered while masked.
    pub pending: bool,
}

/// One vector as it is saved.
#[derive(Debug, Serialize, Deserialize)]
pub struct EntryState {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Bit 0 of vector control.
    pub masked: bool,
    /// Triggered while masked.
    pub pending: bool,
}

/// The vectors of one function.
pub struct Msix {
    /// Name of the device, for messages.
    name: String,
    wiring: Arc<dyn Wiring>,
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
    /// A failure has been logged.
    failed: bool,
}

const AFTER_RESET: Entry = Entry { message: MsiMessage { address: 0, data: 0 }, masked: true, pending: false };

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let control = u128::from(self.masked);
        (u128::from(self.message.address) | u128::from(self.message.data) << 64 | control << 96).to_le_bytes()
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY_BYTES]) {
        let bits = u128::from_le_bytes(bytes);
        // The message address is of whole double words.
        self.message = MsiMessage { address: bits as u64 & !3, data: (bits >> 64) as u32 };
        self.masked = bits >> 96 & 1 != 0;
    }

    fn save(self) -> EntryState {
        let Entry { message: MsiMessage { address, data }, masked, pending } = self;
        EntryState { address, data, masked, pending }
    }
}

impl Msix {
    /// `count` masked vectors.
    pub fn new(name: &str, count: u16, wiring: Arc<dyn Wiring>) -> Self {
        let entries = vec![AFTER_RESET; usize::from(count)];
        Self { name: name.to_owned(), wiring, enabled: false, masked: false, entries, failed: false }
    }

    /// Vectors.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Takes over message control as the guest wrote it.
    pub fn set_control(&mut self, control: u16) {
        (self.enabled, self.masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        if self.enabled {
            self.deliver_all();
        } else {
            self.entries.iter_mut().for_each(|entry| entry.pending = false);
        }
    }

    /// Raises `vector`. One that does not exist, as NO_VECTOR, raises nothing.
    pub fn trigger(&mut self, vector: u16) {
        let vector = usize::from(vector);
        if let Some(entry) = self.entries.get_mut(vector).filter(|_| self.enabled) {
            entry.pending = true;
            self.deliver(vector);
        }
    }

    /// Delivers what is pending and may be delivered.
    pub fn deliver_all(&mut self) {
        (0..self.entries.len()).for_each(|vector| self.deliver(vector));
    }

    fn deliver(&mut self, vector: usize) {
        let may = self.enabled && !self.masked;
        let Some(entry) = self.entries.get_mut(vector).filter(|entry| may && entry.pending && !entry.masked) else {
            return;
        };
        match self.wiring.signal(entry.message) {
            Ok(()) => entry.pending = false,
            // Said once: a guest could make us say it without end.
            Err(error) if !std::mem::replace(&mut self.failed, true) => {
                log::error!("{}: interrupt vector {vector} cannot be raised: {error}", self.name);
            }
            Err(_) => {}
        }
    }

    /// Reads the vector table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.entries.iter().skip(offset / ENTRY_BYTES).flat_map(|entry| entry.to_bytes());
        data.fill(0);
        for (byte, entry) in data.iter_mut().zip(bytes.skip(offset % ENTRY_BYTES)) {
            *byte = entry;
        }
    }

    /// Writes the vector table.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        let mut data = data.iter();
        let mut start = offset % ENTRY_BYTES;
        for vector in offset / ENTRY_BYTES..self.entries.len() {
            if data.len() == 0 {
                break;
            }
            if let Some(entry) = self.entries.get_mut(vector) {
                let mut bytes = entry.to_bytes();
                // The table's byte comes first in the pair: `zip` must not take one of the data for nothing.
                for (byte, new) in bytes.iter_mut().skip(start).zip(data.by_ref()) {
                    *byte = *new;
                }
                entry.set_bytes(bytes);
            }
            start = 0;
            self.deliver(vector);
        }
    }

    /// Reads the pending bit array.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        let bytes = self.entries.chunks(8).map(|entries| {
            entries.iter().enumerate().fold(0, |byte, (bit, entry)| byte | u8::from(entry.pending) << bit)
        });
        data.fill(0);
        for (byte, pending) in data.iter_mut().zip(bytes.skip(offset)) {
            *byte = pending;
        }
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.set_control(0);
        self.entries.fill(AFTER_RESET);
    }

    /// The table and what is pending. Message control lies in configuration space.
    pub fn save(&self) -> Vec<EntryState> {
        self.entries.iter().map(|entry| entry.save()).collect()
    }

    /// Whether [`Self::restore`] may be called with these.
    ///
    /// # Errors
    /// Another number of vectors, or a value that the guest cannot have brought about.
    pub fn check(&self, control: u16, saved: &[EntryState]) -> Result<(), StateError> {
        if saved.len() != self.entries.len() {
            let (theirs, ours) = (saved.len(), self.entries.len());
            return Err(StateError::Value(format!("it has {theirs} interrupt vectors, and the device {ours}")));
        }
        let enabled = control & CONTROL_ENABLE != 0;
        let wrong = saved.iter().position(|entry| entry.address & 3 != 0 || (entry.pending && !enabled));
        wrong.map_or(Ok(()), |vector| {
            Err(StateError::Value(format!("its interrupt vector {vector} is in a state that does not exist")))
        })
    }

    /// Takes over message control and what was saved, and raises nothing: the interrupt controllers may not be as the
    /// guest left them yet. [`Self::deliver_all`] follows when it goes on.
    pub fn restore(&mut self, control: u16, saved: &[EntryState]) {
        (self.enabled, self.masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        for (entry, EntryState { address, data, masked, pending }) in self.entries.iter_mut().zip(saved) {
            let message = MsiMessage { address: *address, data: *data };
            *entry = Entry { message, masked: *masked, pending: *pending };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Call, Recorder};
    use super::*;
    use std::sync::atomic::Ordering;

    fn msix(count: u16) -> (Msix, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        (Msix::new("test0", count, recorder.clone()), recorder)
    }

    fn message(data: u32) -> MsiMessage {
        MsiMessage { address: 0xfee0_1000, data }
    }

    /// Writes an entry a double word at a time, mask last, as Linux does.
    fn program(msix: &mut Msix, vector: usize, message: MsiMessage, masked: bool) {
        let at = vector * ENTRY_BYTES;
        msix.write_table(at, &(message.address as u32).to_le_bytes());
        msix.write_table(at + 4, &((message.address >> 32) as u32).to_le_bytes());
        msix.write_table(at + 8, &message.data.to_le_bytes());
        msix.write_table(at + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &Msix) -> u64 {
        let mut bytes = [0xff; 8];
        msix.read_pending(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn nothing_is_sent_before_a_vector_is_unmasked() {
        let (mut msix, recorder) = msix(3);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        program(&mut msix, 1, message(0x41), true);
        msix.set_control(CONTROL_ENABLE);
        msix.trigger(0);
        program(&mut msix, 1, message(0x41), false);
        assert_eq!(recorder.calls(), []);
        msix.trigger(1);
        assert_eq!(recorder.calls(), [Call::Signal(message(0x41))]);
    }

    #[test]
    fn a_masked_vector_is_pending_and_delivered_once_when_unmasked() {
        let (mut msix, recorder) = msix(10);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 9, message(0x50), true);
        msix.trigger(9);
        msix.trigger(9);
        assert_eq!((pending(&msix), recorder.calls()), (1 << 9, vec![]));
        program(&mut msix, 9, message(0x50), false);
        assert_eq!((pending(&msix), recorder.calls()), (0, vec![Call::Signal(message(0x50))]));
    }

    #[test]
    fn the_function_mask_holds_interrupts_back_too() {
        let (mut msix, recorder) = msix(2);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 0, message(1), false);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        msix.trigger(0);
        assert_eq!((pending(&msix), recorder.calls()), (1, vec![]));
        msix.set_control(CONTROL_ENABLE);
        assert_eq!((pending(&msix), recorder.calls()), (0, vec![Call::Signal(message(1))]));
    }

    #[test]
    fn an_interrupt_goes_where_the_message_says_now() {
        let (mut msix, recorder) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 0, message(1), false);
        msix.trigger(0);
        msix.write_table(12, &[1]);
        program(&mut msix, 0, message(2), false);
        msix.trigger(0);
        assert_eq!(recorder.calls(), [1, 2].map(|data| Call::Signal(message(data))));
    }

    #[test]
    fn switching_msix_off_drops_what_is_pending() {
        let (mut msix, recorder) = msix(2);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 0, message(1), false);
        msix.trigger(1);
        msix.set_control(0);
        msix.trigger(0);
        assert_eq!((pending(&msix), recorder.calls()), (0, vec![]));
        msix.set_control(CONTROL_ENABLE);
        msix.reset();
        assert_eq!((msix.entries(), recorder.calls()), ([AFTER_RESET; 2].as_slice(), vec![]));
    }

    #[test]
    fn an_interrupt_survives_a_controller_that_refuses() {
        let (mut msix, recorder) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        recorder.refuses.store(true, Ordering::Relaxed);
        program(&mut msix, 0, message(1), false);
        msix.trigger(0);
        assert_eq!(pending(&msix), 1);
        recorder.refuses.store(false, Ordering::Relaxed);
        msix.trigger(0);
        assert_eq!((pending(&msix), recorder.calls()), (0, vec![Call::Signal(message(1))]));
    }

    #[test]
    fn a_restored_table_raises_nothing_until_it_goes_on() {
        let (mut from, _) = msix(3);
        from.set_control(CONTROL_ENABLE | CONTROL_MASK);
        program(&mut from, 1, message(0x41), false);
        from.trigger(1);
        from.trigger(2);
        let (mut to, recorder) = msix(3);
        to.check(CONTROL_ENABLE, &from.save()).unwrap();
        to.restore(CONTROL_ENABLE, &from.save());
        assert_eq!((to.entries(), recorder.calls()), (from.entries(), vec![]));
        to.deliver_all();
        assert_eq!((pending(&to), recorder.calls()), (1 << 2, vec![Call::Signal(message(0x41))]));
    }

    #[test]
    fn the_table_takes_any_width_at_any_offset() {
        let (mut msix, _) = msix(2);
        msix.write_table(6, &[0x11; 20]);
        let mut bytes = [0xff; 40];
        msix.read_table(0, &mut bytes);
        let mut expected = [0; 40];
        expected[6..12].fill(0x11);
        expected[12] = 1; // reserved bits of vector control stay 0
        expected[16..26].fill(0x11);
        expected[16] = 0x10; // the address is of whole double words
        expected[28] = 1;
        assert_eq!(bytes, expected);
        msix.write_table(usize::MAX, &[0xff; 8]);
        msix.write_table(32, &[0xff; 8]);
        msix.read_table(0, &mut bytes);
        assert_eq!(bytes, expected);
        msix.trigger(2);
        msix.trigger(0xffff);
    }
}
