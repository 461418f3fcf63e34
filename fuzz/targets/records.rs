//! A record of a move as it lies on the disk: it is refused in words, or it says what is true and what to type.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::OnceLock;
use sterna::records::Records;
use tempfile::TempDir;

fuzz_target!(|bytes: &[u8]| {
    static DIR: OnceLock<TempDir> = OnceLock::new();
    let dir = DIR.get_or_init(|| tempfile::tempdir_in("/dev/shm").expect("a directory"));
    let records = Records::at(dir.path().to_owned());
    fs::write(dir.path().join("web.move"), bytes).expect("written");
    match records.read("web") {
        Ok(record) => {
            let record = record.expect("the file is there");
            let found = record.without_process();
            assert!(!found.truth.is_empty() && !found.next.is_empty());
            let text = serde_json::to_vec(&record).expect("what was read can be written");
            assert_eq!(serde_json::from_slice::<sterna_migration::handover::Record>(&text).expect("and read"), record);
            assert_eq!(records.all(), [record]);
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(records.all().is_empty());
        }
    }
    records.remove("web").expect("the file was there");
});
