//! `sterna inspect`: what is in a saved file, for people and programs, without a VM. What a newer program wrote is named, and the rest
//! shown; what it says is the file's own words, and harmless to a terminal.

use super::Output;
use crate::cli::InspectArgs;
use crate::error::Error;
use crate::units::format_size;
use crate::vmm::{self, Description};
use serde::Serialize;
use serde_json::Value;
use std::fmt::Write;
use sterna_arch::state::{VcpuState, VcpuView};
use sterna_devices::Saved as SavedState;
use sterna_migration::PAGE_BYTES;
use sterna_migration::file::{Form, Hooks, Saved, SavedFile, Statistics};

/// As many of a vCPU's registers stand in a line for people.
const REGISTERS_A_LINE: usize = 5;

/// Threads that read memory.
const READERS: usize = 4;

/// All that is told of a file.
#[derive(Serialize)]
struct Contents {
    /// Who wrote it, and when.
    saved: Saved,
    format_version: u16,
    epoch: u64,
    compressed: bool,
    /// Where and when it was restored, if it was.
    restored: Option<String>,
    /// Its end record is there, and everything but memory matches its checksums.
    whole: bool,
    /// Memory matches its checksums, where that was looked at.
    memory_verified: Option<bool>,
    memory: Memory,
    sections: Vec<Part>,
    vcpus: Vec<VcpuView>,
    /// In the file's own words.
    description: Value,
    /// As far as this program knows all of it.
    #[serde(skip)]
    known: Option<Description>,
    /// What this program cannot read, and why.
    unread: Vec<String>,
}

#[derive(Serialize)]
struct Memory {
    ram_bytes: u64,
    saved_bytes: u64,
    zero_bytes: u64,
    file_bytes: u64,
    disk_bytes: u64,
}

#[derive(Serialize)]
struct Part {
    name: String,
    version: u16,
    bytes: usize,
}

/// Prints what is in a file. A file that is damaged or not whole is an error that says so.
pub fn inspect(args: &InspectArgs, output: Output) -> Result<(), Error> {
    let failed = |source: sterna_migration::file::Error| Error::Start {
        name: args.file.display().to_string(),
        source: vmm::Error::saved(&args.file, source),
    };
    let file = SavedFile::open(&args.file).map_err(failed)?;
    let mut unread = Vec::new();
    let bytes = &file.contents().description;
    let description = serde_json::from_slice(bytes).unwrap_or(Value::Null);
    let known = known(bytes).map_err(|why| unread.push(format!("the description: {why}"))).ok();
    let Statistics { ram_pages, pages, zero_pages, file_bytes, disk_bytes } = file.statistics().map_err(failed)?;
    let mut sections = Vec::new();
    let mut vcpus = Vec::new();
    for section in file.sections().iter() {
        if section.name.starts_with("vcpu") {
            let state = SavedState { version: section.version, contents: section.contents.clone() };
            match state.decode::<VcpuState>(VcpuState::VERSION) {
                Ok(state) => vcpus.push(state.view()),
                Err(why) => unread.push(format!("{}: {why}", section.name)),
            }
        }
        let (name, bytes) = (section.name.clone(), section.contents.len());
        sections.push(Part { name, version: section.version, bytes });
    }
    if args.verify {
        file.verify(READERS, Hooks::none()).map_err(failed)?;
    }
    let contents = Contents {
        saved: file.saved().clone(),
        format_version: file.format_version(),
        epoch: file.contents().epoch,
        compressed: file.form() != Form::InPlace,
        restored: file.restored_before().map_err(failed)?,
        whole: true,
        memory_verified: args.verify.then_some(true),
        memory: Memory {
            ram_bytes: ram_pages * PAGE_BYTES,
            saved_bytes: pages * PAGE_BYTES,
            zero_bytes: zero_pages * PAGE_BYTES,
            file_bytes,
            disk_bytes,
        },
        sections,
        vcpus,
        description,
        known,
        unread,
    };
    output.result(&contents, text)
}

/// The description in `bytes`, or why it is not one that this program knows.
fn known(bytes: &[u8]) -> Result<Description, String> {
    let description = Description::decode(bytes).map_err(|error| error.to_string())?;
    description.inconsistency().map_or(Ok(description), Err)
}

fn view_line(view: &VcpuView) -> String {
    let VcpuView { rip, rsp, cr3, mode, mp_state, .. } = view;
    format!("{mp_state}, {mode}, rip {rip:#x}, rsp {rsp:#x}, cr3 {cr3:#x}")
}

fn text(contents: &Contents) -> String {
    let Contents { saved, memory, .. } = contents;
    let mut text = String::new();
    let mut row = |label: &str, value: String| {
        let _ = writeln!(text, "{label:<12}{}", harmless(&value)); // writing to a String cannot fail
    };
    row("machine", format!("{} ({}), epoch {}", saved.machine, saved.uuid, contents.epoch));
    row("saved", format!("{} on {} by sterna {}", saved.time, saved.host, saved.program));
    row(
        "format",
        format!("version {}{}", contents.format_version, if contents.compressed { ", compressed" } else { "" }),
    );
    let memory_word =
        if contents.memory_verified.is_some() { ", memory verified" } else { "; --verify reads memory too" };
    row("state", format!("whole{memory_word}"));
    row("restored", contents.restored.clone().unwrap_or_else(|| "never".into()));
    row(
        "memory",
        format!(
            "{} of RAM, {} saved, {} zeros; {} on disk",
            format_size(memory.ram_bytes),
            format_size(memory.saved_bytes),
            format_size(memory.zero_bytes),
            format_size(memory.disk_bytes)
        ),
    );
    let config = contents.known.as_ref().map(|description| &description.config);
    if let Some(config) = config {
        let initrd = config.initrd.as_ref().map(|path| format!(", initrd {}", path.display()));
        row("kernel", format!("{}{}", config.kernel.display(), initrd.unwrap_or_default()));
        row("cmdline", config.cmdline.clone());
        row("cpus", format!("{}, {}", config.cpus, config.cpu));
    }
    for (index, vcpu) in contents.vcpus.iter().enumerate() {
        row(&format!("  vcpu{index}"), view_line(vcpu));
        for some in vcpu.registers.chunks(REGISTERS_A_LINE) {
            let some: Vec<_> = some.iter().map(|(name, value)| format!("{name} {value:#x}")).collect();
            row("", some.join(", "));
        }
    }
    for disk in config.into_iter().flat_map(|config| &config.disks) {
        row("disk", format!("{} {}{}", disk.id, disk.path.display(), if disk.readonly { ", read-only" } else { "" }));
    }
    for net in config.into_iter().flat_map(|config| &config.nets) {
        row("net", format!("{} {}", net.id, net.tap));
    }
    if let Some(config) = config {
        let vsock = config.vsock.as_ref();
        row("vsock", vsock.map_or("none".into(), |vsock| format!("cid {}, {}", vsock.cid, vsock.socket.display())));
        row("serial", config.serial.to_string());
    }
    for what in &contents.unread {
        row("not read", what.clone());
    }
    let parts: Vec<_> = contents.sections.iter().map(|part| format!("{} v{}", part.name, part.version)).collect();
    row("parts", parts.join(", "));
    text
}

/// `text` from a file as a terminal may have it: nothing in it moves the cursor or turns the direction of writing.
fn harmless(text: &str) -> String {
    let turns = |c: char| matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if c.is_control() || turns(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    #[test]
    fn what_a_newer_program_wrote_is_named_and_the_rest_shown_without_harm() {
        let saved = Saved {
            program: "9.0\x1b[2J".into(),
            host: "h\nrestored    never".into(),
            time: "t".into(),
            time_unix_ns: 0,
            machine: "web".into(),
            uuid: Uuid::nil(),
        };
        let bytes = br#"{"newer\u001b[31m": 1}"#;
        let why = known(bytes).unwrap_err();
        let contents = Contents {
            saved,
            format_version: 1,
            epoch: 0,
            compressed: false,
            restored: None,
            whole: true,
            memory_verified: None,
            memory: Memory { ram_bytes: 1 << 20, saved_bytes: 0, zero_bytes: 0, file_bytes: 0, disk_bytes: 0 },
            sections: Vec::new(),
            vcpus: Vec::new(),
            description: serde_json::from_slice(bytes).unwrap(),
            known: None,
            unread: vec![why],
        };
        let text = text(&contents);
        assert!(text.contains("by sterna 9.0") && text.contains("not read    unknown field `newer"), "{text}");
        assert!(!text.contains('\x1b') && !text.contains("\nrestored    never\nformat"), "{text}");
        let json = serde_json::to_value(&contents).unwrap();
        assert_eq!(json["description"]["newer\x1b[31m"], 1);
    }
}
