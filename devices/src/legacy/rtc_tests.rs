//! The clock as a guest reads and sets it, on a host whose time stands still.

use super::super::testing::{inb, touch_everything};
use super::*;
use crate::state::testing::{from_hex, to_hex};
use std::time::Duration;

/// Version 1, which must be read for ever.
const GOLDEN: &str = "
078001000000000000000000002602000000000000000000000000000000000000000000000000000000000000000000
000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000
00000000000000000000000000000000000000000000000000000000000000000000a5ffc50a";

/// 2024-02-29T23:59:58.9999Z, a Thursday.
fn leap_day() -> SystemTime {
    UNIX_EPOCH + Duration::new(1_709_251_198, 999_900_000)
}

fn get(rtc: &mut Rtc, register: u8) -> u8 {
    rtc.write(INDEX_PORT, &[register | 0x80]);
    inb(rtc, DATA_PORT)
}

fn set(rtc: &mut Rtc, register: u8, value: u8) {
    rtc.write(INDEX_PORT, &[register]);
    rtc.write(DATA_PORT, &[value]);
}

const FIELDS: [u8; 8] = [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS];

fn read_all(rtc: &mut Rtc) -> [u8; 8] {
    FIELDS.map(|register| get(rtc, register))
}

#[test]
fn the_host_time_is_shown_in_every_format() {
    let mut rtc = Rtc::with_clock(leap_day);
    assert_eq!(read_all(&mut rtc), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
    set(&mut rtc, STATUS_B, HOURS_24 | BINARY);
    assert_eq!(read_all(&mut rtc), [20, 24, 2, 29, 5, 23, 59, 58]);
    set(&mut rtc, STATUS_B, 0);
    assert_eq!(get(&mut rtc, HOURS), 0x11 | AFTERNOON);
}

#[test]
fn twelve_hour_clocks_have_no_hour_zero() {
    for (binary, noon, midnight) in [(true, 12 | 0x80, 12), (false, 0x12 | 0x80, 0x12)] {
        let format = Format { binary, hours_24: false };
        assert_eq!((format.encode_hour(12), format.encode_hour(0)), (noon, midnight));
        for hour in 0..24 {
            assert_eq!(format.decode_hour(format.encode_hour(hour)), hour);
        }
        assert_eq!(format.decode_hour(0), u8::MAX);
    }
}

#[test]
fn an_update_is_announced_and_the_other_statuses_are_right() {
    let mut rtc = Rtc::with_clock(leap_day);
    assert_eq!(get(&mut rtc, STATUS_A), 0x26 | UPDATE_IN_PROGRESS);
    assert_eq!((get(&mut rtc, STATUS_C), get(&mut rtc, STATUS_D)), (0, VALID));
    set(&mut rtc, STATUS_B, HOURS_24 | SET);
    assert_eq!(get(&mut rtc, STATUS_A), 0x26, "a stopped clock does not update");
    let mut rtc = Rtc::with_clock(|| UNIX_EPOCH);
    assert_eq!(get(&mut rtc, STATUS_A), 0x26);
}

#[test]
fn the_guest_sets_its_own_time() {
    let mut rtc = Rtc::with_clock(leap_day);
    let before = rtc.state().offset_s;
    set(&mut rtc, STATUS_B, HOURS_24 | SET);
    for (register, value) in FIELDS.into_iter().zip([0x19, 0x99, 0x12, 0x31, 6, 0x08, 0x30, 0x00]) {
        set(&mut rtc, register, value);
    }
    assert_eq!(rtc.state().offset_s, before, "nothing counts before SET is cleared");
    set(&mut rtc, STATUS_B, HOURS_24);
    assert_eq!(read_all(&mut rtc), [0x19, 0x99, 0x12, 0x31, 6, 0x08, 0x30, 0x00]);
    assert_eq!(rtc.state().offset_s, 946_629_000 - 1_709_251_198);
    set(&mut rtc, HOURS, 0x09);
    assert_eq!(read_all(&mut rtc), [0x19, 0x99, 0x12, 0x31, 6, 0x09, 0x30, 0x00]);
}

#[test]
fn a_time_that_does_not_exist_leaves_the_clock_alone() {
    for (register, value) in
        [(DAY, 0x30), (DAY, 0), (MONTH, 0x13), (MONTH, 0), (HOURS, 0x24), (MINUTES, 0x60), (SECONDS, 0x0f)]
    {
        let mut rtc = Rtc::with_clock(leap_day);
        set(&mut rtc, register, value);
        assert_eq!(rtc.state().offset_s, 0, "{register:#x} = {value:#x}");
    }
}

#[test]
fn cmos_bytes_are_kept() {
    let mut rtc = Rtc::with_clock(leap_day);
    set(&mut rtc, 0x0f, 0x5a);
    set(&mut rtc, 0x7f, 0xa5);
    rtc.reset();
    assert_eq!((get(&mut rtc, 0x0f), get(&mut rtc, 0x7f)), (0x5a, 0xa5));
    assert_eq!(inb(&mut rtc, INDEX_PORT), 0xff);
}

#[test]
fn what_the_guest_has_set_comes_along_and_the_time_does_not() {
    let mut rtc = Rtc::with_clock(leap_day);
    let fresh = rtc.save();
    read_all(&mut rtc);
    rtc.write(INDEX_PORT, &[0]);
    assert_eq!(rtc.save(), fresh, "to read the time is to keep it");
    set(&mut rtc, 0x50, 0x5a);
    set(&mut rtc, STATUS_A, 0x2f);
    set(&mut rtc, STATUS_B, HOURS_24 | BINARY);
    set(&mut rtc, HOURS, 22);
    let mut there = Rtc::with_clock(|| leap_day() + Duration::from_secs(60));
    there.restore(&rtc.save()).unwrap();
    assert_eq!((there.state().index, inb(&mut there, DATA_PORT)), (HOURS, 23), "an hour less, and a minute on");
    assert_eq!((get(&mut there, MINUTES), get(&mut there, 0x50)), (0, 0x5a));
    assert_eq!((get(&mut there, STATUS_A) & 0x7f, get(&mut there, STATUS_B)), (0x2f, 6));
    // A clock that is stopped is a time that the guest is about to set.
    set(&mut rtc, STATUS_B, HOURS_24 | BINARY | SET);
    set(&mut rtc, YEAR, 99);
    there.restore(&rtc.save()).unwrap();
    assert_eq!(get(&mut there, YEAR), 99);
}

#[test]
fn a_state_of_version_1_is_read_and_nothing_else() {
    let mut rtc = Rtc::with_clock(leap_day);
    set(&mut rtc, 0x7f, 0xa5);
    set(&mut rtc, DAY, 0x28);
    assert_eq!(to_hex(&rtc.save()), to_hex(&from_hex(1, GOLDEN)));
    let mut there = Rtc::with_clock(leap_day);
    there.restore(&from_hex(1, GOLDEN)).unwrap();
    let before = there.save();
    assert_eq!(before, rtc.save());
    let damage = |at: usize, byte: u8| {
        let mut saved = rtc.save();
        saved.contents[at] = byte;
        saved
    };
    let cmos = |register: u8| 3 + usize::from(register);
    for (saved, expected) in [
        (damage(0, 0xff), "its index register holds 0xff"),
        (damage(1, 0xff), "its bytes are damaged"),
        (damage(cmos(STATUS_A), 0x80), "it has status bits that nobody can set"),
        (damage(cmos(STATUS_C), 1), "it has status bits that nobody can set"),
        (damage(cmos(STATUS_D), VALID), "it has status bits that nobody can set"),
        (Saved::of(1, &(0x80u8, vec![0u8; 128], 0i64)), "its index register holds 0x80"),
        (Saved::of(1, &(0u8, vec![0u8; 127], 0i64)), "it has 127 bytes of CMOS, not 128"),
    ] {
        assert_eq!(there.restore(&saved).unwrap_err().to_string(), expected);
        assert_eq!(there.save(), before);
    }
    for offset_s in [i64::MIN, i64::MAX] {
        there.restore(&Saved::of(1, &(0u8, vec![0u8; 128], offset_s))).unwrap();
        touch_everything(&mut there);
    }
}

#[test]
fn dates_go_both_ways() {
    for seconds in (-62_167_219_200..253_402_300_800).step_by(86_400 * 13 + 3_607) {
        assert_eq!(Date::from_epoch(seconds).to_epoch(), Some(seconds));
    }
    assert_eq!(Date::from_epoch(0).weekday, 5, "1970 began on a Thursday");
    for extreme in [i64::MIN, i64::MAX] {
        Date::from_epoch(extreme);
    }
}

#[test]
fn every_access_is_answered() {
    touch_everything(&mut Rtc::default());
}
