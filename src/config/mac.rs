//! Ethernet addresses: as text, and made up where none is given.

use serde::{Deserialize, Deserializer, Serializer, de::Error};

/// Writes the address as text.
pub fn serialize<S: Serializer>(mac: &[u8; 6], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format(mac))
}

/// Reads the address from text.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 6], D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).ok_or_else(|| D::Error::custom(format!("'{text}' is not a MAC address")))
}

/// `02:1b:00:00:00:01`.
pub fn format(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Six pairs of hexadecimal digits with colons between them.
pub fn parse(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut pairs = text.split(':');
    for byte in &mut mac {
        let pair = pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    pairs.next().is_none().then_some(mac)
}

/// A locally administered unicast address that is the same each time for interface `index` of the machine `vm`
/// (FNV-1a of both), so that a guest finds its interface again.
pub fn derive(vm: &str, index: usize) -> [u8; 6] {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in vm.bytes().chain([0]).chain((index as u64).to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let [a, b, c, d, e, ..] = hash.to_be_bytes();
    [0x02, a, b, c, d, e]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_strictly_and_written_back() {
        assert_eq!(parse("52:54:00:aB:cd:0f"), Some([0x52, 0x54, 0, 0xab, 0xcd, 0x0f]));
        assert_eq!(format(&[0x52, 0x54, 0, 0xab, 0xcd, 0x0f]), "52:54:00:ab:cd:0f");
        for text in
            ["", "52:54:00:ab:cd", "52:54:00:ab:cd:0f:11", "52-54-00-ab-cd-0f", "+5:54:00:ab:cd:0f", "5:5:0:a:c:0"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn made_up_addresses_differ_and_stay() {
        assert_eq!(derive("web", 0), derive("web", 0));
        assert_ne!(derive("web", 0), derive("web", 1));
        assert_ne!(derive("web", 0), derive("db", 0));
        assert_eq!(derive("web", 7)[0], 0x02);
    }
}
