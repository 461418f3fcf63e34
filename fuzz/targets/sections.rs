//! A list of sections, as it comes from another host: what is accepted is what `encode` would have written.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use sterna_migration::{Section, Sections};

#[derive(Arbitrary, Debug)]
enum Input {
    Bytes(Vec<u8>),
    /// A list that is right but for some bytes.
    Spoiled {
        sections: Vec<(Name, u16, Vec<u8>)>,
        patches: Vec<(u16, u8)>,
        cut: Option<u16>,
        more: Vec<u8>,
    },
}

#[derive(Arbitrary, Debug)]
enum Name {
    Good(u8),
    Any(String),
}

fn bytes(input: Input) -> Vec<u8> {
    let (sections, patches, cut, more) = match input {
        Input::Bytes(bytes) => return bytes,
        Input::Spoiled { sections, patches, cut, more } => (sections, patches, cut, more),
    };
    let mut list = Sections::default();
    for (name, version, contents) in sections {
        let name = match name {
            Name::Good(number) => format!("vcpu{number}.x"),
            Name::Any(name) => name,
        };
        let _refused = list.push(Section { name, version, contents });
    }
    let mut bytes = list.encode();
    assert_eq!(Sections::decode(&bytes).as_ref(), Ok(&list));
    for (at, byte) in patches {
        let at = usize::from(at) % bytes.len();
        bytes[at] = byte;
    }
    bytes.truncate(cut.map_or(usize::MAX, usize::from));
    bytes.extend(more);
    bytes
}

fuzz_target!(|input: Input| {
    let bytes = bytes(input);
    match Sections::decode(&bytes) {
        Ok(sections) => assert_eq!(sections.encode(), bytes),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
