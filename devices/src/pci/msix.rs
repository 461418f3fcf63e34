//! MSI-X of one function: vector table, pending bits, masks (PCI 3.0, 6.8.2).
//!
//! A vector costs nothing until the guest unmasks it: only then is it made and routed, and routed again only when its
//! message has changed. A vector that is triggered while masked is pending, and delivered when it is unmasked.

use crate::{MsiMessage, MsiVector, Wiring};
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

/// One vector as the interrupt controller sees it.
#[derive(Default)]
struct Connection {
    vector: Option<Arc<dyn MsiVector>>,
    routed: Option<MsiMessage>,
    /// A failure has been logged.
    failed: bool,
}

/// The vectors of one function.
pub struct Msix {
    /// Name of the device, for messages.
    name: String,
    wiring: Arc<dyn Wiring>,
    enabled: bool,
    masked: bool,
    entries: Vec<Entry>,
    connections: Vec<Connection>,
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
}

impl Msix {
    /// `count` masked vectors.
    pub fn new(name: &str, count: u16, wiring: Arc<dyn Wiring>) -> Self {
        Self {
            name: name.to_owned(),
            wiring,
            enabled: false,
            masked: false,
            entries: vec![AFTER_RESET; usize::from(count)],
            connections: (0..count).map(|_| Connection::default()).collect(),
        }
    }

    /// Vectors.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Takes over message control as the guest wrote it.
    pub fn set_control(&mut self, control: u16) {
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        if (enabled, masked) == (self.enabled, self.masked) {
            return;
        }
        (self.enabled, self.masked) = (enabled, masked);
        for vector in 0..self.entries.len() {
            if enabled {
                self.deliver(vector);
            } else {
                self.disconnect(vector);
            }
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

    /// Connects `vector` if it is unmasked, and delivers what is pending.
    fn deliver(&mut self, vector: usize) {
        let (Some(entry), Some(connection)) = (self.entries.get_mut(vector), self.connections.get_mut(vector)) else {
            return;
        };
        if !self.enabled || self.masked || entry.masked {
            return;
        }
        let delivered = connection.connect(&*self.wiring, entry.message).and_then(|line| {
            if entry.pending {
                line.signal()?;
                entry.pending = false;
            }
            Ok(())
        });
        connection.note(delivered, &self.name, vector);
    }

    fn disconnect(&mut self, vector: usize) {
        let (Some(entry), Some(connection)) = (self.entries.get_mut(vector), self.connections.get_mut(vector)) else {
            return;
        };
        entry.pending = false;
        let disconnected = connection.disconnect();
        connection.note(disconnected, &self.name, vector);
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
}

impl Connection {
    fn connect(&mut self, wiring: &dyn Wiring, message: MsiMessage) -> std::io::Result<&Arc<dyn MsiVector>> {
        let vector = match self.vector.take() {
            Some(vector) => vector,
            None => wiring.msi_vector()?,
        };
        let vector = self.vector.insert(vector);
        if self.routed != Some(message) {
            vector.route(Some(message))?;
            self.routed = Some(message);
        }
        Ok(vector)
    }

    fn disconnect(&mut self) -> std::io::Result<()> {
        match &self.vector {
            Some(vector) if self.routed.take().is_some() => vector.route(None),
            _ => Ok(()),
        }
    }

    /// Says once that interrupts are in trouble: a guest could make us say it without end.
    fn note(&mut self, result: std::io::Result<()>, name: &str, vector: usize) {
        if let Err(error) = result
            && !std::mem::replace(&mut self.failed, true)
        {
            log::error!("{name}: interrupt vector {vector} cannot be connected or raised: {error}");
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
    fn nothing_is_made_or_routed_before_a_vector_is_unmasked() {
        let (mut msix, recorder) = msix(3);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        program(&mut msix, 1, message(0x41), true);
        msix.set_control(CONTROL_ENABLE);
        msix.trigger(0);
        assert_eq!(recorder.calls(), []);
        program(&mut msix, 1, message(0x41), false);
        assert_eq!(recorder.calls(), [Call::Made, Call::Route(Some(message(0x41)))]);
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
        let delivered = [Call::Made, Call::Route(Some(message(0x50))), Call::Signal(message(0x50))];
        assert_eq!((pending(&msix), recorder.calls()), (0, delivered.to_vec()));
    }

    #[test]
    fn the_function_mask_holds_interrupts_back_too() {
        let (mut msix, recorder) = msix(2);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 0, message(1), false);
        recorder.calls();
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        msix.trigger(0);
        assert_eq!((pending(&msix), recorder.calls()), (1, vec![]));
        msix.set_control(CONTROL_ENABLE);
        assert_eq!((pending(&msix), recorder.calls()), (0, vec![Call::Signal(message(1))]));
    }

    #[test]
    fn only_a_changed_message_is_routed_again() {
        let (mut msix, recorder) = msix(1);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 0, message(1), false);
        msix.write_table(12, &[1]);
        msix.write_table(12, &[0]);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(recorder.calls(), [Call::Made, Call::Route(Some(message(1)))]);
        msix.write_table(12, &[1]);
        program(&mut msix, 0, message(2), false);
        msix.trigger(0);
        assert_eq!(recorder.calls(), [Call::Route(Some(message(2))), Call::Signal(message(2))]);
    }

    #[test]
    fn switching_msix_off_disconnects_and_drops() {
        let (mut msix, recorder) = msix(2);
        msix.set_control(CONTROL_ENABLE);
        program(&mut msix, 0, message(1), false);
        msix.trigger(1);
        recorder.calls();
        msix.set_control(0);
        msix.trigger(0);
        assert_eq!((pending(&msix), recorder.calls()), (0, vec![Call::Route(None)]));
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(recorder.calls(), [Call::Route(Some(message(1)))]);
        msix.reset();
        assert_eq!((msix.entries(), recorder.calls()), ([AFTER_RESET; 2].as_slice(), vec![Call::Route(None)]));
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
        let delivered = [Call::Made, Call::Route(Some(message(1))), Call::Signal(message(1))];
        assert_eq!((pending(&msix), recorder.calls()), (0, delivered.to_vec()));
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
