//! Real Linux on real hosts: a stock Debian kernel under Sterna, on the testbed's hosts, driven as an operator would.
//!
//! Needs what `make testbed-files` builds. One testbed serves all tests, one after the other: on a software CPU a host's start is
//! the dearest part.

mod devices;
mod faults;
mod life;
mod moves;
mod shapes;
mod world;

use libtest_mimic::{Arguments, Trial};

/// Names each function as a test.
macro_rules! trials {
    ($($module:ident :: { $($test:ident),* $(,)? }),* $(,)?) => {
        vec![$($((concat!(stringify!($module), "::", stringify!($test)), $module::$test as fn() -> world::Result)),*),*]
    };
}

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let tests = trials![
        shapes::{
            the_host_image_passes_its_own_check,
            vmlinux_boots_with_one_vcpu,
            vmlinux_boots_by_the_64_bit_protocol,
            four_vcpus_come_up,
            five_gib_reach_above_the_hole,
            a_kernel_panic_ends_the_vm,
            an_image_in_use_is_refused_on_both_hosts,
            qemu_boots_the_same_guest,
        },
        devices::{
            the_kernel_is_content,
            disks_are_what_they_were_said_to_be,
            a_read_only_disk_is_not_written,
            fio_verifies_two_disks,
            discard_shrinks_the_image,
            write_zeroes_makes_zeros_of_a_range,
            the_host_pings_the_guest,
            tcp_carries_100_mb_each_way,
            vsock_echoes_both_ways,
            entropy_and_clock_chip_answer,
            the_balloon_moves_memory,
            the_balloon_yields_when_memory_runs_out,
            free_pages_return_to_the_host,
        },
        life::{
            a_pause_of_ten_seconds_is_no_lockup_and_the_clock_is_right,
            a_reboot_comes_back_with_everything,
            a_pulse_keeps_every_device_at_work,
            stop_powers_the_guest_off,
        },
        moves::{
            quick_there_and_back_under_load,
            live_there_quick_back_live_again_under_ping,
            a_saved_guest_wakes_on_the_other_host_a_day_later,
            a_second_copy_has_a_generation_of_its_own,
            shaped_and_lossy_links_carry_a_move,
            a_guest_that_dirties_faster_than_the_link_is_named_and_left_or_stopped,
        },
        faults::{
            the_target_host_dies_while_copying,
            the_source_host_dies_while_copying,
            the_target_host_dies_at_the_hand_over,
            the_source_host_dies_right_after_go,
            the_target_host_dies_right_after_the_guest_started_there,
        },
    ];
    let trial = |(name, test): (&'static str, fn() -> world::Result)| {
        Trial::test(name, move || attempt(name, test).map_err(|error| chain(&*error).into()))
    };
    let conclusion = libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect());
    world::end();
    conclusion.exit();
}

/// How often a test may start on QEMU's software CPU.
const ATTEMPTS: u32 = 2;

/// Runs a test; on QEMU's software CPU, which may lose a guest (docs/testbed.md says why), once more on fresh hosts and said aloud.
/// What fails each time has failed.
fn attempt(name: &str, test: fn() -> world::Result) -> world::Result {
    for attempt in 1..ATTEMPTS {
        let Err(error) = test() else { return Ok(()) };
        let Some(hosts) = world::software_cpu() else { return Err(error) };
        let why = chain(&*error);
        eprintln!(
            "\nFAILED ({attempt} of {ATTEMPTS}) on QEMU's software CPU, starts again on fresh hosts: {name}\n{why}\n{hosts}"
        );
        world::end();
    }
    test()
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {}", chain(source)))
}
