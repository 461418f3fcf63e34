//! From what a person wrote, on the command line or in a TOML file, to a [`VmConfig`].
//!
//! Both give the same [`Draft`] of texts; the command line's wins, name by name (all disks are one name). Nothing is
//! judged before all of it is read, so that every mistake is reported at once.

use super::fields::{Fields, scalar, unknown_key};
use super::{DiskConfig, NetConfig, Problems, SerialConfig, VmConfig, VsockConfig, mac};
use crate::units;
use std::path::{PathBuf, absolute};
use sterna_arch::{CpuModel, UnknownCpuModel};

/// RAM of a machine for which none is given.
pub const DEFAULT_MEMORY_BYTES: u64 = 512 << 20;
/// vCPUs of a machine for which no number is given.
pub const DEFAULT_CPUS: u32 = 1;
/// Kernel command line of a machine for which none is given.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0";

/// What may stand at the top of a file: the names of the flags.
const KEYS: [&str; 11] =
    ["name", "kernel", "initrd", "cmdline", "memory", "cpus", "cpu", "disk", "net", "vsock", "serial"];

/// A machine as somebody described it; what was left out is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Draft {
    /// Text of `name`.
    pub name: Option<String>,
    /// Text of `kernel`.
    pub kernel: Option<String>,
    /// Text of `initrd`.
    pub initrd: Option<String>,
    /// Text of `cmdline`.
    pub cmdline: Option<String>,
    /// Text of `memory`: a size.
    pub memory: Option<String>,
    /// Text of `cpus`: a number.
    pub cpus: Option<String>,
    /// Text of `cpu`.
    pub cpu: Option<String>,
    /// Text of `serial`.
    pub serial: Option<String>,
    /// Each `disk`.
    pub(crate) disks: Option<Vec<Fields>>,
    /// Each `net`.
    pub(crate) nets: Option<Vec<Fields>>,
    /// `vsock`.
    pub(crate) vsock: Option<Fields>,
}

impl Draft {
    /// Adds devices in the command line's form, `key=value,key=value` each.
    pub fn with_devices(
        mut self,
        disks: &[String],
        nets: &[String],
        vsock: Option<&str>,
        problems: &mut Problems,
    ) -> Self {
        let mut parse = |kind: &str, texts: &[String]| {
            let parsed = texts.iter().enumerate().map(|(i, text)| Fields::parse(format!("{kind} {i}"), text, problems));
            Some(parsed.collect::<Vec<_>>()).filter(|list| !list.is_empty())
        };
        self.disks = parse("disk", disks);
        self.nets = parse("net", nets);
        self.vsock = vsock.map(|text| Fields::parse("vsock".into(), text, problems));
        self
    }

    /// Reads a TOML file's `text`; `file` is its name in messages.
    pub fn from_toml(file: &str, text: &str, problems: &mut Problems) -> Self {
        let mut draft = Draft::default();
        let table = match text.parse::<toml::Table>() {
            Ok(table) => table,
            Err(error) => {
                let line =
                    error.span().map_or(1, |span| text.bytes().take(span.start).filter(|b| *b == b'\n').count() + 1);
                problems.add(format!("{file}, line {line}: {}", error.message().trim().replace('\n', "; ")));
                return draft;
            }
        };
        for (key, value) in &table {
            match (key.as_str(), value) {
                ("disk", value) => draft.disks = devices(file, "disk", value, problems),
                ("net", value) => draft.nets = devices(file, "net", value, problems),
                ("vsock", value) => draft.vsock = device(file, "vsock".into(), value, problems),
                (key, _) if !KEYS.contains(&key) => problems.add(format!("{file}: {}", unknown_key(key, &KEYS))),
                (key, value) => match scalar(value) {
                    Some(text) => draft.set(key, text),
                    None => problems.add(format!("{file}: `{key}` must be a text or a number")),
                },
            }
        }
        draft
    }

    /// Sets the one of the plain texts that is called `key`.
    fn set(&mut self, key: &str, text: String) {
        let field = match key {
            "name" => &mut self.name,
            "kernel" => &mut self.kernel,
            "initrd" => &mut self.initrd,
            "cmdline" => &mut self.cmdline,
            "memory" => &mut self.memory,
            "cpus" => &mut self.cpus,
            "cpu" => &mut self.cpu,
            _ => &mut self.serial,
        };
        *field = Some(text);
    }

    /// This draft, with `other` where it says nothing.
    pub fn or(self, other: Draft) -> Draft {
        Draft {
            name: self.name.or(other.name),
            kernel: self.kernel.or(other.kernel),
            initrd: self.initrd.or(other.initrd),
            cmdline: self.cmdline.or(other.cmdline),
            memory: self.memory.or(other.memory),
            cpus: self.cpus.or(other.cpus),
            cpu: self.cpu.or(other.cpu),
            serial: self.serial.or(other.serial),
            disks: self.disks.or(other.disks),
            nets: self.nets.or(other.nets),
            vsock: self.vsock.or(other.vsock),
        }
    }

    /// The machine. Where a text was not understood, `problems` says so and a default stands in its place; what is
    /// missing stays empty, and [`VmConfig::validate`] names it. Paths become absolute: whoever finds them in a record, a file or
    /// on another host has another current directory.
    pub fn build(self, default_serial: SerialConfig, problems: &mut Problems) -> VmConfig {
        let name = self.name.unwrap_or_default();
        let disks = self.disks.unwrap_or_default();
        let nets = self.nets.unwrap_or_default();
        VmConfig {
            kernel: path(self.kernel.unwrap_or_default()),
            initrd: self.initrd.map(path),
            cmdline: self.cmdline.unwrap_or_else(|| DEFAULT_CMDLINE.to_owned()),
            memory_bytes: size_or_default(self.memory, problems),
            cpus: number_or("cpus", self.cpus, DEFAULT_CPUS, problems),
            cpu: self.cpu.and_then(|text| cpu(&text, problems)).unwrap_or_default(),
            disks: disks.into_iter().enumerate().map(|(index, fields)| disk(fields, index, problems)).collect(),
            nets: nets.into_iter().enumerate().map(|(index, fields)| net(fields, index, &name, problems)).collect(),
            vsock: self.vsock.map(|fields| vsock(fields, problems)),
            serial: self.serial.and_then(|text| serial(&text, problems)).unwrap_or(default_serial),
            name,
        }
    }
}

/// `text` as a path from the root. One that cannot be made absolute is empty, which [`VmConfig::validate`] names.
fn path(text: String) -> PathBuf {
    absolute(&text).unwrap_or_else(|_| text.into())
}

fn cpu(text: &str, problems: &mut Problems) -> Option<CpuModel> {
    text.parse().map_err(|error: UnknownCpuModel| problems.add(format!("cpu: {error}"))).ok()
}

/// An array of devices.
fn devices(file: &str, kind: &str, value: &toml::Value, problems: &mut Problems) -> Option<Vec<Fields>> {
    let Some(list) = value.as_array() else {
        problems.add(format!("{file}: `{kind}` must be a list; begin each with [[{kind}]]"));
        return None;
    };
    let places = list.iter().enumerate();
    Some(places.filter_map(|(index, value)| device(file, format!("{kind} {index}"), value, problems)).collect())
}

/// One device: a table, or a text in the command line's form.
fn device(file: &str, place: String, value: &toml::Value, problems: &mut Problems) -> Option<Fields> {
    match value {
        toml::Value::Table(table) => Some(Fields::from_table(place, table, problems)),
        toml::Value::String(text) => Some(Fields::parse(place, text, problems)),
        _ => {
            problems.add(format!("{file}: {place} must be a table of keys and values"));
            None
        }
    }
}

fn disk(mut fields: Fields, index: usize, problems: &mut Problems) -> DiskConfig {
    let id = fields.take("id").unwrap_or_else(|| format!("disk{index}"));
    let disk = DiskConfig {
        path: path(fields.take("path").unwrap_or_default()),
        readonly: fields.take_switch("readonly", false, problems),
        direct: fields.take_switch("direct", true, problems),
        serial: fields.take("serial").unwrap_or_else(|| id.clone()),
        id,
    };
    fields.finish(&["path", "readonly", "id", "direct", "serial"], problems);
    disk
}

fn net(mut fields: Fields, index: usize, vm: &str, problems: &mut Problems) -> NetConfig {
    let mac = fields.take("mac").and_then(|text| {
        let mac = mac::parse(&text);
        if mac.is_none() {
            problems.add(format!("net {index}: '{text}' is not a MAC address; write it like 02:00:00:00:00:01"));
        }
        mac
    });
    let net = NetConfig {
        id: fields.take("id").unwrap_or_else(|| format!("net{index}")),
        tap: fields.take("tap").unwrap_or_default(),
        create: fields.take_switch("create", false, problems),
        mac: mac.unwrap_or_else(|| mac::derive(vm, index)),
    };
    fields.finish(&["tap", "mac", "id", "create"], problems);
    net
}

fn vsock(mut fields: Fields, problems: &mut Problems) -> VsockConfig {
    let vsock = VsockConfig {
        cid: number_or("vsock: `cid`", fields.take("cid"), 3, problems),
        socket: path(fields.take("socket").unwrap_or_default()),
    };
    fields.finish(&["cid", "socket"], problems);
    vsock
}

fn serial(text: &str, problems: &mut Problems) -> Option<SerialConfig> {
    match text.split_once('=') {
        None if text == "stdio" => Some(SerialConfig::Stdio),
        None if text == "null" => Some(SerialConfig::Null),
        Some(("file", file)) if !file.is_empty() => Some(SerialConfig::File(path(file.to_owned()))),
        Some(("socket", socket)) if !socket.is_empty() => Some(SerialConfig::Socket(path(socket.to_owned()))),
        _ => {
            problems.add(format!("serial: '{text}' must be stdio, null, file=PATH or socket=PATH"));
            None
        }
    }
}

fn size_or_default(text: Option<String>, problems: &mut Problems) -> u64 {
    let Some(text) = text else { return DEFAULT_MEMORY_BYTES };
    units::parse_size(&text).unwrap_or_else(|error| {
        problems.add(format!("memory: {error}"));
        DEFAULT_MEMORY_BYTES
    })
}

fn number_or(place: &str, text: Option<String>, default: u32, problems: &mut Problems) -> u32 {
    let Some(text) = text else { return default };
    text.parse().unwrap_or_else(|_| {
        problems.add(format!("{place}: '{text}' is not a whole number from 0 to {}", u32::MAX));
        default
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(toml: &str) -> (VmConfig, Problems) {
        let mut problems = Problems::default();
        let config = Draft::from_toml("vm.toml", toml, &mut problems).build(SerialConfig::Stdio, &mut problems);
        (config, problems)
    }

    const FULL: &str = r#"
        name = "web"
        kernel = "/boot/vmlinuz"
        memory = "1G"
        cpus = 2
        serial = "file=/tmp/web.log"
        [[disk]]
        path = "/img/a"
        [[disk]]
        path = "/img/b"
        readonly = true
        direct = false
        id = "data"
        [[net]]
        tap = "tap0"
        mac = "02:00:00:00:00:07"
        [vsock]
        cid = 3
        socket = "/tmp/web.vsock"
    "#;

    #[test]
    fn a_file_says_all_that_flags_can_say() {
        let (from_file, problems) = read(FULL);
        assert_eq!(problems, Problems::default());
        let mut problems = Problems::default();
        let text = |text: &str| Some(text.to_owned());
        let flags = Draft {
            name: text("web"),
            kernel: text("/boot/vmlinuz"),
            memory: text("1G"),
            cpus: text("2"),
            serial: text("file=/tmp/web.log"),
            ..Draft::default()
        }
        .with_devices(
            &["path=/img/a".into(), "path=/img/b,readonly=on,direct=off,id=data".into()],
            &["tap=tap0,mac=02:00:00:00:00:07".into()],
            Some("cid=3,socket=/tmp/web.vsock"),
            &mut problems,
        );
        assert_eq!(flags.build(SerialConfig::Stdio, &mut problems), from_file);
        assert_eq!(problems, Problems::default());
        assert_eq!(
            from_file.disks[0],
            DiskConfig {
                id: "disk0".into(),
                path: "/img/a".into(),
                readonly: false,
                direct: true,
                serial: "disk0".into(),
            }
        );
        assert!(from_file.disks[1].readonly && !from_file.disks[1].direct);
    }

    #[test]
    fn the_command_line_wins_name_by_name() {
        let mut problems = Problems::default();
        let file = Draft::from_toml("vm.toml", FULL, &mut problems);
        let flags = Draft { memory: Some("2G".into()), ..Draft::default() };
        let flags = flags.with_devices(&["path=/img/c".into()], &[], None, &mut problems);
        let config = flags.or(file).build(SerialConfig::Stdio, &mut problems);
        assert_eq!(problems, Problems::default());
        assert_eq!((config.memory_bytes, config.cpus), (2 << 30, 2));
        assert_eq!(config.disks.iter().map(|disk| disk.path.to_str().unwrap()).collect::<Vec<_>>(), ["/img/c"]);
        assert_eq!(config.nets[0].tap, "tap0");
    }

    #[test]
    fn relative_paths_do_not_leave_the_directory_they_were_typed_in() {
        let (config, problems) = read(
            "kernel = 'k'\ninitrd = 'i'\nserial = 'file=s'\n[[disk]]\npath = 'd'\n[vsock]\ncid = 3\nsocket = 'v'\n[[disk]]\npath = ''",
        );
        assert_eq!(problems, Problems::default());
        let here = std::env::current_dir().unwrap();
        assert_eq!((&config.kernel, config.initrd.as_ref().unwrap()), (&here.join("k"), &here.join("i")));
        assert_eq!((&config.disks[0].path, &config.vsock.unwrap().socket), (&here.join("d"), &here.join("v")));
        assert_eq!(config.serial, SerialConfig::File(here.join("s")));
        assert_eq!(config.disks[1].path, PathBuf::new());
    }

    #[test]
    fn defaults_stand_where_nothing_is_said() {
        let (config, problems) = read("name = 'web'\n[[net]]\ntap = 'tap0'");
        assert_eq!(problems, Problems::default());
        assert_eq!((config.memory_bytes, config.cpus), (DEFAULT_MEMORY_BYTES, DEFAULT_CPUS));
        assert_eq!(config.cmdline, "console=ttyS0");
        assert_eq!(config.nets[0].mac, mac::derive("web", 0));
    }

    #[test]
    fn unknown_keys_are_named_with_the_nearest() {
        let (_, problems) = read("kernal = 'x'\nmemory_bytes = 1\nqqq = 1\n[[disk]]\npth = 'x'\n[vsock]\nport = 1");
        assert_eq!(
            problems.list(),
            [
                "vm.toml: unknown key `kernal`; did you mean `kernel`?",
                "vm.toml: unknown key `memory_bytes`; did you mean `memory`?",
                "vm.toml: unknown key `qqq`; there are name, kernel, initrd, cmdline, memory, cpus, cpu, disk, net, vsock, serial",
                "disk 0: unknown key `pth`; did you mean `path`?",
                "vsock: unknown key `port`; there are cid, socket",
            ]
            .map(|line| line.to_owned())
        );
    }

    #[test]
    fn values_of_the_wrong_kind_are_all_reported() {
        let (_, problems) = read("memory = '1Q'\ncpus = 'two'\ndisk = 'x'\nnet = [1]\nserial = 'tty'\nname = ['x']");
        let list = problems.list().join("\n");
        for part in [
            "memory: '1Q' is not a size",
            "cpus: 'two'",
            "[[disk]]",
            "net 0 must be",
            "serial: 'tty'",
            "`name` must be",
        ] {
            assert!(list.contains(part), "{part} is missing in:\n{list}");
        }
        assert_eq!(problems.list().len(), 6);
    }

    #[test]
    fn a_syntax_error_has_its_line() {
        let (_, problems) = read("name = 'web'\nmemory = = 1");
        assert!(problems.list()[0].starts_with("vm.toml, line 2: "), "{problems}");
    }
}
