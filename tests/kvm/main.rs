//! The program as its user runs it, on /dev/kvm of any kind, with the PVH test guest.
//!
//! Where /dev/kvm does not open, every test here is counted as ignored and named; the testbed then runs real Linux all the
//! same (`tests/linux`).
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work has failed")]

mod bad_input;
mod disk;
mod hostile;
mod life;
mod memory;
mod net;
mod serial;
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
    let trial = |(name, test): (&str, fn())| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
        .with_ignored_flag(kvm.is_err())
    };
    libtest_mimic::run(&arguments, tests().into_iter().map(trial).collect()).exit();
}

/// Every test with its name.
fn tests() -> Vec<(&'static str, fn())> {
    trials![
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
        disk::{
            what_the_guest_writes_is_in_the_image,
            several_disks_keep_their_order,
            a_read_only_disk_refuses_writes,
            an_image_in_use_is_refused_by_its_holders_name,
            readers_share_an_image,
            the_lock_is_held_across_a_reboot,
            pauses_in_the_middle_of_disk_io_lose_nothing,
        },
        hostile::{
            a_bad_ring_stops_its_disk_until_reset,
            random_register_writes_end_well,
        },
        memory::{
            a_guest_without_a_balloon_driver_gives_nothing,
            a_vm_costs_little_beside_its_guest,
        },
        net::{
            a_created_tap_carries_pings_and_vanishes,
            an_existing_tap_is_used_and_stays,
            a_busy_tap_is_refused_by_its_holder,
            a_missing_tap_is_refused_with_the_command_that_makes_it,
            a_start_that_fails_leaves_no_tap,
        },
        serial::{
            a_file_is_appended,
            a_socket_has_one_client_at_a_time,
            the_console_command_outlives_a_reset,
            null_takes_everything,
        },
        bad_input::{
            a_file_that_is_no_kernel_is_refused_by_what_it_is,
            what_does_not_fit_into_ram_is_refused,
            sizes_outside_their_limits_are_refused,
            a_disk_that_is_none_is_refused,
            a_name_that_cannot_be_is_refused,
            everything_wrong_is_said_at_once,
            everything_that_does_not_open_is_said_at_once,
            a_detached_failure_is_told_to_its_parent,
            without_kvm_the_module_to_load_is_named,
            without_the_right_to_kvm_the_group_is_named,
        },
    ]
}
