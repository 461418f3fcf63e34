//! Keys that speak to Sterna and not to the guest: Ctrl-] and one more.
//!
//! It refuses to know what a command does.

/// Ctrl-], as in telnet.
pub const ESCAPE: u8 = 0x1d;

/// What a key turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Goes to the guest.
    Pass(u8),
    /// Nothing yet: the next key decides.
    Pending,
    /// Ctrl-] q.
    Quit,
    /// Ctrl-] and a key without a meaning, or h.
    Help,
}

/// Whether the last key was Ctrl-].
#[derive(Debug, Default)]
pub struct Escape {
    pending: bool,
}

impl Escape {
    /// Takes the next key.
    pub fn feed(&mut self, key: u8) -> Key {
        match (std::mem::take(&mut self.pending), key) {
            (false, ESCAPE) => {
                self.pending = true;
                Key::Pending
            }
            (false, _) | (true, ESCAPE) => Key::Pass(key),
            (true, b'q' | b'Q') => Key::Quit,
            (true, _) => Key::Help,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(keys: &[u8]) -> Vec<Key> {
        let mut escape = Escape::default();
        keys.iter().map(|key| escape.feed(*key)).collect()
    }

    #[test]
    fn only_the_key_after_the_escape_is_a_command() {
        assert_eq!(feed(b"qh"), [Key::Pass(b'q'), Key::Pass(b'h')]);
        assert_eq!(feed(b"\x1dqq"), [Key::Pending, Key::Quit, Key::Pass(b'q')]);
        assert_eq!(feed(b"\x1dhx"), [Key::Pending, Key::Help, Key::Pass(b'x')]);
        assert_eq!(feed(b"\x1d\x03"), [Key::Pending, Key::Help]);
    }

    #[test]
    fn the_escape_twice_goes_through_once() {
        assert_eq!(feed(b"\x1d\x1dq"), [Key::Pending, Key::Pass(ESCAPE), Key::Pass(b'q')]);
    }
}
