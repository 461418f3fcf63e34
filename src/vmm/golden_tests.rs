//! What this program puts into messages and files beside the state of the machine's parts, as version 1 has it, for ever.
//!
//! A golden file never changes. JSON carries no version: a field that is added has a default, so that these are read.

use super::Description;
use super::description::{DiskMark, RunSection};
use super::receive::TargetReport;
use super::vm::Identity;
use crate::config::{DiskConfig, NetConfig, SerialConfig, VmConfig, VsockConfig};
use crate::control::movement::{Downtime, Failure, Kind, MoveStatus, Phase, RamStatus, Stall};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;
use sterna_arch::CpuModel;
use sterna_devices::Saved;
use sterna_migration::{Section, Sections};
use uuid::Uuid;

/// A machine that has everything, one that has as little as possible, and the first as an older program tells of it: a line each.
const DESCRIPTIONS: &str = include_str!("golden/description-1.json");
/// A move with all its figures, one that has just begun, and one that an older program tells of, without what came later.
const REPORTS: &str = include_str!("golden/report-1.json");
/// Its layout is `arch`'s, whose golden bytes are there.
const CPU: &str = r#"{"leaves":[{"function":2147483649,"index":2,"flags":1,"registers":[1,2,3,4294967295]}],
    "msrs":[{"index":266,"value":9223372036854775808}],"xsave_bytes":4096,"tsc_khz":2596142}"#;
const CHECKED: &str = include_str!("golden/checked-1.json");

fn config() -> VmConfig {
    let disk = |id: &str, readonly| DiskConfig {
        id: id.into(),
        path: format!("/srv/{id}.img").into(),
        readonly,
        direct: !readonly,
        serial: "S1".into(),
    };
    VmConfig {
        name: "web".into(),
        kernel: "/boot/vmlinuz".into(),
        initrd: Some("/boot/initrd".into()),
        cmdline: "console=ttyS0 \"a b\"".into(),
        memory_bytes: 1 << 30,
        cpus: 2,
        cpu: CpuModel::V3,
        disks: vec![disk("disk0", false), disk("iso", true)],
        nets: vec![NetConfig { id: "net0".into(), tap: "tap0".into(), create: true, mac: [2, 0, 0, 0xab, 0, 1] }],
        vsock: Some(VsockConfig { cid: 3, socket: "/run/web.vsock".into() }),
        serial: SerialConfig::Socket("/run/sterna/web.console".into()),
    }
}

fn description() -> Description {
    let mark = |readonly, block_device, sample| DiskMark { size_bytes: 1 << 20, readonly, block_device, sample };
    Description {
        program: "0.1.0".into(),
        host: "a".into(),
        written_unix_ns: 1_764_000_000_000_000_000,
        config: config(),
        own_console: true,
        identity: Identity { uuid: Uuid::from_u128(7), epoch: 3 },
        cpu: serde_json::from_str(CPU).unwrap(),
        state_msrs: vec![631, 3_221_225_603],
        present_bytes: 123 << 20,
        disks: vec![mark(false, true, vec![5, u64::MAX]), mark(true, false, vec![])],
    }
}

fn least() -> Description {
    let config = VmConfig {
        initrd: None,
        cpu: CpuModel::Host,
        disks: vec![],
        nets: vec![],
        vsock: None,
        serial: SerialConfig::Null,
        ..config()
    };
    Description { config, own_console: false, state_msrs: vec![], disks: vec![], ..description() }
}

fn report() -> MoveStatus {
    MoveStatus {
        incoming: true,
        phase: Phase::Done,
        percent: 100,
        ram: RamStatus {
            total: 1 << 30,
            present: 9,
            transferred: 8,
            remaining: 7,
            duplicate: 6,
            normal: 5,
            dirty_sync_count: 4,
            dirty_rate: 3,
            bandwidth: 2,
        },
        total_time: 1234,
        expected_downtime: Some(20),
        downtime: Some(21),
        downtime_parts: Some(Downtime {
            stop_us: 1,
            pages_us: 2,
            state_us: 3,
            restore_us: 4,
            hand_over_us: 5,
            start_us: 6,
            total_us: 21,
        }),
        precopy_stall: Some(Stall { longest_us: 10, total_us: 11 }),
        verdict: Some("converges".into()),
        warnings: vec!["the clocks differ".into()],
        error: Some("no".into()),
        failure: Some(Failure::Broken),
        guest: "The guest has started here.".into(),
        ..begun()
    }
}

fn begun() -> MoveStatus {
    MoveStatus::begin(Uuid::from_u128(9), 4, Kind::Live, "tcp:b:7300".into(), 1 << 30)
}

/// `values` are what the lines of `golden` say, and are written so.
#[track_caller]
fn assert_golden<T: Serialize + DeserializeOwned + PartialEq + Debug>(golden: &str, values: &[T]) {
    let written: Vec<_> = values.iter().map(|value| serde_json::to_string(value).unwrap()).collect();
    let lines: Vec<_> = golden.lines().take(values.len()).collect();
    assert_eq!(written, lines, "what version 1 writes has changed");
    for (value, line) in values.iter().zip(lines) {
        assert_eq!(serde_json::from_str::<T>(line).unwrap(), *value);
    }
}

#[test]
fn version_1_of_a_description_is_read_for_ever() {
    assert_golden(DESCRIPTIONS, &[description(), least()]);
    let golden = DESCRIPTIONS.lines().next().unwrap().as_bytes();
    assert_eq!(description().encode().unwrap(), golden);
    assert_eq!(Description::decode(golden).unwrap(), description());
    let older = Description::decode(DESCRIPTIONS.lines().nth(2).unwrap().as_bytes()).unwrap();
    assert_eq!(older, Description { state_msrs: vec![], ..description() });
}

/// Else the fuzzer does not get beyond what is missing in them.
#[test]
fn the_seeds_of_the_fuzzer_are_descriptions() {
    for seed in
        [include_str!("../../fuzz/seeds/arrival/full.json"), include_str!("../../fuzz/seeds/arrival/short.json")]
    {
        let description = Description::decode(seed.as_bytes()).unwrap();
        assert_eq!(description.inconsistency(), None);
    }
}

#[test]
fn each_word_in_a_description_is_read_for_ever() {
    let words = [(CpuModel::Host, "host"), (CpuModel::V2, "x86-64-v2"), (CpuModel::V3, "x86-64-v3")];
    for (model, word) in words {
        assert_golden(&format!("\"{word}\""), &[model]);
    }
    assert_golden(
        "\"stdio\"\n\"null\"\n{\"file\":\"/a\"}\n{\"socket\":\"/b\"}",
        &[SerialConfig::Stdio, SerialConfig::Null, SerialConfig::File("/a".into()), SerialConfig::Socket("/b".into())],
    );
}

#[test]
fn version_1_of_a_report_is_read_for_ever() {
    assert_golden(REPORTS, &[report(), begun()]);
    let older: MoveStatus = serde_json::from_str(REPORTS.lines().nth(2).unwrap()).unwrap();
    assert_eq!(older, MoveStatus { precopy_stall: None, warnings: vec![], failure: None, ..report() });
}

#[test]
fn each_word_in_a_report_is_read_for_ever() {
    use Phase::*;
    assert_golden("\"live\"\n\"quick\"\n\"save\"\n\"restore\"", &[Kind::Live, Kind::Quick, Kind::Save, Kind::Restore]);
    let phases = [Preparing, Copying, Saving, Transferring, Restoring, Done, Failed, Cancelled, TimedOut, InDoubt];
    let words = "preparing copying saving transferring restoring done failed cancelled timed-out in-doubt";
    assert_golden(&words.split(' ').map(|word| format!("\"{word}\"\n")).collect::<String>(), &phases);
    let failures = [Failure::Refused, Failure::Unreachable, Failure::Broken, Failure::Ended];
    assert_golden("\"refused\"\n\"unreachable\"\n\"broken\"\n\"ended\"", &failures);
}

#[test]
fn version_1_of_what_a_target_finds_is_read_for_ever() {
    let report = TargetReport {
        host: "b".into(),
        program: "0.1.0".into(),
        unix_ns: 1_764_000_000_000_000_000,
        problems: vec!["no tap".into()],
        warnings: vec!["the clocks differ".into(), String::new()],
        unknown_msrs: vec![631],
    };
    let older: TargetReport = serde_json::from_str(CHECKED.lines().nth(1).unwrap()).unwrap();
    assert_golden(CHECKED, &[report]);
    assert_eq!((older.host.as_str(), older.unknown_msrs), ("b", vec![]));
}

#[test]
fn version_1_of_how_a_guest_stood_is_read_for_ever() {
    let golden = b"\x01\x80\xa0\x94\xa5\x8d\x1d".to_vec();
    let state = RunSection { paused: true, uptime_ns: 1_000_000_000_000 };
    let mut sections = Sections::default();
    state.push(&mut sections).unwrap();
    let section = Section { name: "run".into(), version: 1, contents: golden };
    assert_eq!(sections.iter().collect::<Vec<_>>(), [&section]);
    assert_eq!(RunSection::take(&mut sections).unwrap(), state);
    let running = Saved::of(1, &RunSection { paused: false, uptime_ns: 0 });
    assert_eq!(running.contents, [0, 0]);
}
