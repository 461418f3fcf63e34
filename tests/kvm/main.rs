//! The program as its user runs it, on /dev/kvm of any kind, with the PVH test guest.
//!
//! Where /dev/kvm does not open, every test here is counted as ignored and named; the testbed then runs real Linux all the
//! same (`tests/linux`).
#![expect(clippy::unwrap_used, reason = "a test that cannot do its work has failed")]

mod bad_input;
mod cgroup;
mod disk;
mod faults;
mod host_pair;
mod hostile;
mod life;
mod limits;
mod memory;
mod mid_move;
mod moves;
mod net;
mod refusals;
mod restore;
mod save;
mod save_faults;
mod serial;
mod vm;
mod wire;

use libtest_mimic::{Arguments, Trial};

/// Names each function as a test.
macro_rules! trials {
    ($($module:ident :: { $($test:ident),* $(,)? }),* $(,)?) => {
        vec![$($((concat!(stringify!($module), "::", stringify!($test)), $module::$test as fn())),*),*]
    };
}

fn main() {
    let mut arguments = Arguments::from_args();
    // Most of a test is waiting: for a guest, for a silence that must be missed. More at a time than there are processors.
    arguments.test_threads = arguments.test_threads.or(Some(6));
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
    // What takes longest begins first.
    let tests = [big_tests(), fault_tests(), move_tests(), refusal_tests(), machine_tests()].into_iter().flatten();
    libtest_mimic::run(&arguments, tests.map(trial).collect()).exit();
}

/// Tests that keep a processor busy for long, beside which others wait.
fn big_tests() -> Vec<(&'static str, fn())> {
    trials![
        save::{ four_gib_go_through_a_file },
        moves::{ four_gib_go_quick },
    ]
}

/// Tests of a machine where it is, with their names.
fn machine_tests() -> Vec<(&'static str, fn())> {
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
            a_detached_vm_leaves_its_words_in_its_log,
            a_detached_vm_may_start_paused,
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
        restore::{
            a_reboot_after_a_mapped_restore_finds_empty_memory,
        },
        serial::{
            a_file_is_appended,
            a_socket_has_one_client_at_a_time,
            a_terminal_stops_the_vm_and_is_as_before,
            a_terminal_is_as_before_whatever_signal_ends_the_process,
            a_guest_that_ends_at_once_leaves_no_socket,
            the_console_command_outlives_a_reset,
            null_takes_everything,
        },
    ]
}

/// Tests of a machine that is none, with their names.
fn refusal_tests() -> Vec<(&'static str, fn())> {
    trials![
        bad_input::{
            a_file_that_is_no_kernel_is_refused_by_what_it_is,
            what_does_not_fit_into_ram_is_refused,
            sizes_outside_their_limits_are_refused,
            a_disk_that_is_none_is_refused,
            a_name_that_cannot_be_is_refused,
            everything_wrong_is_said_at_once,
            everything_that_does_not_open_is_said_at_once,
            what_is_wrong_and_what_does_not_open_is_said_by_one_start,
            a_vsock_and_a_kernel_that_cannot_be_are_said_at_once,
            a_detached_failure_is_told_to_its_parent,
            a_dev_kvm_that_is_none_is_refused,
            without_kvm_the_module_to_load_is_named,
            without_the_right_to_kvm_the_group_is_named,
        },
    ]
}

/// Tests of a machine that goes to a file or to another host, with their names.
fn move_tests() -> Vec<(&'static str, fn())> {
    trials![
        save::{
            a_saved_guest_goes_on_where_it_was,
            a_file_tells_what_is_in_it,
            a_file_is_restored_once,
            a_paused_guest_stays_paused,
            a_level_of_processors_stays_what_it_is,
            an_existing_file_is_kept,
            a_full_file_system_leaves_the_guest_running,
            a_disk_behind_the_cache_is_refused,
            a_damaged_file_is_refused,
            damaged_memory_is_found_where_it_is_compared,
            a_disk_must_be_as_it_was_left,
            a_cancelled_save_leaves_the_guest_running,
        },
        moves::{
            the_receiver_says_where_it_listens,
            memory_and_clock_go_along,
            a_guest_that_writes_loses_no_write,
            a_unix_socket_is_a_way,
            a_guest_goes_live_there_and_back,
            a_guest_goes_quick_there_and_back,
            a_disk_goes_along_with_its_lock,
            serial_ports_go_along,
            a_vsock_goes_along,
            a_network_goes_along_and_is_announced,
            a_receiver_may_take_one_machine,
        },
        limits::{
            a_check_names_every_problem,
            no_receiver_is_said,
            a_vm_may_have_another_name_there,
            bandwidth_is_limited_and_the_limit_changed,
            who_copies_beside_a_guest_steps_back,
            a_guest_that_does_not_converge_is_left_where_it_is,
            a_timeout_that_pauses_does_not_wait_for_a_slow_pass,
            a_move_is_cancelled_in_every_phase,
            a_silent_target_is_given_up,
            the_target_keeps_the_figures,
            a_quick_move_foretells_its_standstill,
        },
    ]
}

/// Tests of what keeps a machine from going, and of what may go wrong on its way, with their names.
fn fault_tests() -> Vec<(&'static str, fn())> {
    trials![
        refusals::{
            a_target_with_too_little_memory_refuses,
            a_processor_that_the_target_lacks_is_refused_by_name,
            another_format_is_refused_by_name,
            all_that_is_missing_at_the_target_is_named,
            an_msr_that_the_target_lacks_is_told_if_the_guest_uses_it,
            a_check_tells_how_far_the_clocks_are_apart,
            a_file_of_a_processor_that_this_host_lacks_is_refused_by_name,
        },
        faults::{
            a_cut_before_go_changes_nothing,
            a_target_killed_before_go_changes_nothing,
            a_source_killed_before_go_leaves_nothing_at_the_target,
            a_spoiled_word_before_go_changes_nothing,
            a_spoiled_word_after_go_is_mended_by_asking,
            a_target_out_of_memory_changes_nothing,
            a_receiver_killed_on_the_way_does_not_end_the_move,
            a_cut_at_go_is_mended_by_asking,
            a_target_killed_at_go_gives_the_guest_back,
            a_target_killed_after_its_start_is_left_to_a_person,
            a_source_in_doubt_learns_that_the_guest_runs_there,
            a_target_that_hears_no_go_discards,
            a_receiver_killed_at_go_leaves_the_doubt_to_a_person,
            a_source_killed_from_go_on_leaves_one_guest,
            force_ends_a_copy_in_doubt,
            a_receiver_outlives_its_peers,
        },
        save_faults::{
            a_save_that_is_killed_leaves_no_file_under_its_name,
            a_restore_that_is_killed_leaves_the_file_to_the_next,
            a_read_only_volume_leaves_the_guest_running,
            a_write_that_fails_in_mid_save_leaves_the_guest_running,
            a_volume_that_vanishes_in_mid_save_leaves_the_guest_running,
        },
        mid_move::{
            a_guest_that_ends_in_mid_move_ends_here,
            a_guest_paused_in_mid_move_arrives_paused,
            a_second_move_is_refused,
            a_stop_in_mid_move_ends_the_guest_here,
            force_ends_a_guest_in_mid_move,
            a_balloon_changed_in_mid_move_goes_along,
        },
    ]
}
