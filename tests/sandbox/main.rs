//! The sandbox from inside: each case is a process of its own, since nothing leaves it again.
//!
//! The executable starts itself once for each case, with the case's name in its environment, and enters the sandbox before
//! it has threads, as a VM's process does. What this kernel cannot do is read in the report and asserted.
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work has failed")]

mod calls;
mod files;
mod life;
mod sys;

use libtest_mimic::{Arguments, Failed, Trial};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use sterna::sandbox::{Mode, Plan, Report, Storage, enter};

/// Names the case that a child is.
const CASE: &str = "STERNA_SANDBOX_TEST_CASE";
/// The child's [`Place`].
const PLACE: &str = "STERNA_SANDBOX_TEST_PLACE";
/// Longest time for a case.
const LONG: Duration = Duration::from_secs(60);

/// Directories of a case: writable, storage, readable and outside of all.
struct Place(PathBuf);

impl Place {
    /// `name` in the directory `dir`.
    fn path(&self, dir: &str, name: &str) -> PathBuf {
        self.0.join(dir).join(name)
    }

    /// The plan that names three of the four.
    fn plan(&self) -> Plan {
        Plan {
            mode: Mode::On,
            writable_dirs: vec![self.0.join("writable")],
            readable: vec![self.0.join("readable")],
            storage: Storage::At(vec![self.0.join("storage"), self.0.join("not-there")]),
        }
    }

    /// Enters the sandbox.
    fn enter(&self) -> Report {
        enter(&self.plan()).unwrap()
    }
}

/// A name and what it does inside.
type Case = (&'static str, fn(&Place));

/// Names each function as a case.
macro_rules! cases {
    ($($module:ident :: { $($case:ident),* $(,)? }),* $(,)?) => {
        vec![$($((concat!(stringify!($module), "::", stringify!($case)), $module::$case as fn(&Place))),*),*]
    };
}

/// Every case with its name.
fn cases() -> Vec<Case> {
    cases![
        calls::{
            what_takes_over_a_host_is_refused,
            no_program_is_started,
            sockets_are_local_or_ip,
            a_terminal_is_not_typed_into,
            no_memory_is_made_executable,
            signals_go_to_this_process_only,
            threads_that_were_there_are_restricted_too,
            a_log_refuses_nothing,
        },
        files::{
            storage_is_for_files_and_for_nothing_else,
            records_are_made_renamed_and_removed,
            kernels_are_read_only,
            the_system_is_out_of_reach,
            without_a_list_all_data_is_storage,
            a_running_machine_reaches_files_and_no_device,
            proc_shows_this_process_and_no_other,
        },
        life::{
            threads_run,
            a_ring_reads_a_file,
            a_stream_goes_over_tcp_with_descriptors_beside_it,
            a_vcpu_is_made,
            entering_is_quick,
        },
    ]
}

fn main() -> ExitCode {
    if let Some(name) = std::env::var_os(CASE) {
        let place = Place(std::env::var_os(PLACE).unwrap().into());
        let (_, case) = cases().into_iter().find(|(case, _)| name == *case).unwrap();
        case(&place);
        return ExitCode::SUCCESS;
    }
    let no_kvm = kvm_ioctls::Kvm::new().is_err();
    let trial = |(name, _): (&'static str, _)| {
        Trial::test(name, move || run(name)).with_ignored_flag(no_kvm && name == "life::a_vcpu_is_made")
    };
    libtest_mimic::run(&Arguments::from_args(), cases().into_iter().map(trial).collect()).exit_code()
}

/// Runs one case in a child.
fn run(name: &str) -> Result<(), Failed> {
    let dir = tempfile::Builder::new().prefix("sterna-sandbox-").tempdir_in("/var/tmp")?;
    for part in ["writable", "storage", "readable", "outside"] {
        fs::create_dir(dir.path().join(part))?;
        fs::write(dir.path().join(part).join("file"), "what was there")?;
    }
    let said = dir.path().join("said");
    let mut child = Command::new(std::env::current_exe()?)
        .env(CASE, name)
        .env(PLACE, dir.path())
        .stdin(Stdio::null())
        .stdout(fs::File::create(&said)?)
        .stderr(fs::File::options().append(true).open(&said)?)
        .spawn()?;
    let deadline = Instant::now() + LONG;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill()?;
                break child.wait()?;
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let said = fs::read_to_string(said)?;
    print!("{said}");
    if status.success() { Ok(()) } else { Err(format!("{status}: {said}").into()) }
}

/// Fails unless `result` is an error with this number.
#[track_caller]
fn refused<T>(result: std::io::Result<T>, errno: i32, what: impl std::fmt::Debug) {
    let found = result.map(drop).map_err(|error| error.raw_os_error());
    assert_eq!(found, Err(Some(errno)), "{what:?}");
}

/// What landlock refuses is an error with EACCES, or goes through where the report says that there is no landlock.
#[track_caller]
fn fenced<T>(report: &Report, result: std::io::Result<T>, path: &Path) {
    if report.landlock_abi.is_some() {
        refused(result, libc::EACCES, path);
    } else {
        assert!(report.gaps.iter().any(|gap| gap.contains("landlock is not there")), "{report:?}");
        assert!(result.is_ok(), "{path:?} is refused without landlock");
    }
}
