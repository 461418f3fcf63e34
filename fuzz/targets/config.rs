//! A machine's description in TOML: every mistake is a sentence, and sizes and numbers keep to their limits.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna::config::{Draft, Problems, SerialConfig};

fuzz_target!(|text: &str| {
    let mut problems = Problems::default();
    let draft = Draft::from_toml("vm.toml", text, &mut problems);
    let config = draft.build(SerialConfig::Stdio, &mut problems);
    // What the file names is not opened, but looked at: only names that fuzzing cannot make mean something on this host.
    let paths = config.disks.iter().map(|disk| &disk.path).chain(&config.initrd).chain([&config.kernel]);
    if paths.into_iter().all(|path| !path.to_string_lossy().contains('/')) {
        problems.append(config.validate());
    }
    for problem in problems.list() {
        assert!(!problem.is_empty());
    }
    assert_eq!(problems.list().is_empty(), problems.clone().none_or(()).is_ok());
});
