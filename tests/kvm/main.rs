//! The program as its user runs it, on /dev/kvm of any kind, with the PVH test guest.
//!
//! Where /dev/kvm does not open, every test here is counted as ignored and named; the testbed then runs real Linux all the
//! same (`tests/linux`).
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work has failed")]

mod life;
mod vm;

use libtest_mimic::{Arguments, Trial};

/// Names each function as a test.
macro_rules! trials {
    ($($module:ident :: { $($test:ident),* $(,)? }),* $(,)?) => {
        vec![$($((concat!(stringify!($module), "::", stringify!($test)), $module::$test as fn())),*),*]
    };
}

fn main() {
    let mut arguments = Arguments::from_args();
    // Two at a time: the guests of some tests need a core each.
    arguments.test_threads = arguments.test_threads.or(Some(2));
    let kvm = kvm_ioctls::Kvm::new();
    if let Err(error) = &kvm {
        eprintln!("/dev/kvm does not open ({error}): every test below is ignored");
    }
    let tests = trials![
        life::{
            power_off_ends_with_success,
            reset_starts_the_guest_again,
            triple_fault_is_told,
            panic_is_told,
            pause_stops_everything_and_resume_goes_on,
            an_idle_guest_uses_no_cpu,
            stop_presses_the_power_button,
            stop_says_when_the_guest_does_not_react,
            sigterm_presses_the_power_button,
            a_crash_leaves_the_name_free,
            every_vcpu_comes_up,
            ram_above_4_gib_is_usable,
            a_vm_may_start_paused,
            memory_is_whole_after_many_pauses,
            a_detached_vm_is_found_by_its_name,
        },
    ];
    let trial = |(name, test): (&str, fn())| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
        .with_ignored_flag(kvm.is_err())
    };
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit();
}
