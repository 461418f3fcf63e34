//! MC146818 real-time clock and CMOS RAM at an index and a data port.
//!
//! The time is the host's (UTC) plus what the guest has set, BCD or binary and 12 or 24 hours as status B says, with
//! the century in register 0x32. The clock never interrupts: alarm, periodic and update flags in status C stay
//! clear, so firmware tables must not give it an interrupt. It refuses to keep its own time.

use super::registers;
use crate::state::{Saved, StateError};
use crate::{BusDevice, Effect};
use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

const INDEX_PORT: u64 = 0;
const DATA_PORT: u64 = 1;
/// Bit 7 of the index masks NMIs on a PC.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Status A: an update comes within 244 us.
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Status B: updates are stopped while the guest sets the time.
const SET: u8 = 1 << 7;
/// Status B: binary instead of BCD.
const BINARY: u8 = 1 << 2;
/// Status B: hours 0 to 23 instead of 1 to 12 with bit 7 for the afternoon.
const HOURS_24: u8 = 1 << 1;
const AFTERNOON: u8 = 1 << 7;
/// Status D: the battery is good.
const VALID: u8 = 1 << 7;

/// The registers that the running time is written into.
const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

/// How long before an update UPDATE_IN_PROGRESS is set.
const UPDATE_WARNING_NS: u32 = 244_000;
const SECONDS_PER_DAY: i64 = 86_400;

/// The clock. See the module.
pub struct Rtc {
    clock: fn() -> SystemTime,
    state: State,
}

/// All the clock remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Register that the data port accesses.
    pub index: u8,
    /// CMOS bytes. Those of time and date only count while status B's SET stops the clock.
    pub cmos: [u8; 128],
    /// How far the guest has set its clock from the host's, seconds.
    pub offset_s: i64,
}

/// The same as it is saved, without the time: the next host has a clock of its own.
#[derive(Serialize, Deserialize)]
struct SavedState {
    index: u8,
    cmos: Vec<u8>,
    offset_s: i64,
}

impl Default for Rtc {
    fn default() -> Self {
        Self::with_clock(SystemTime::now)
    }
}

impl Rtc {
    /// A clock that shows what `clock` returns.
    pub fn with_clock(clock: fn() -> SystemTime) -> Self {
        let mut cmos = [0; 128];
        cmos[usize::from(STATUS_A)] = 0x26; // 32 kHz time base, 1024 Hz rate: what PC firmware sets
        cmos[usize::from(STATUS_B)] = HOURS_24;
        Self { clock, state: State { index: 0, cmos, offset_s: 0 } }
    }

    /// All of its state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Its state: what the guest has set, and no time of the host's.
    pub fn save(&self) -> Saved {
        let State { index, mut cmos, offset_s } = self.state;
        if !self.stopped() {
            TIME.iter().for_each(|register| cmos[usize::from(*register)] = 0);
        }
        Saved::of(1, &SavedState { index, cmos: cmos.to_vec(), offset_s })
    }

    /// Takes over a state. May be repeated.
    ///
    /// # Errors
    /// A state that is not one of this clock, which is then as it was.
    pub fn restore(&mut self, saved: &Saved) -> Result<(), StateError> {
        let SavedState { index, cmos, offset_s } = saved.decode(1)?;
        let wrong = |what: String| Err(StateError::Value(what));
        let Ok(cmos) = <[u8; 128]>::try_from(cmos.as_slice()) else {
            return wrong(format!("it has {} bytes of CMOS, not 128", cmos.len()));
        };
        let byte = |register: u8| cmos[usize::from(register)];
        if index & !INDEX_MASK != 0 {
            return wrong(format!("its index register holds {index:#04x}"));
        }
        if byte(STATUS_A) & UPDATE_IN_PROGRESS | byte(STATUS_C) | byte(STATUS_D) != 0 {
            return wrong("it has status bits that nobody can set".into());
        }
        self.state = State { index, cmos, offset_s };
        Ok(())
    }

    /// A reset leaves a battery-backed clock alone but for its index.
    pub fn reset(&mut self) {
        self.state.index = 0;
    }

    fn byte(&self, register: u8) -> u8 {
        self.state.cmos[usize::from(register & INDEX_MASK)]
    }

    fn set_byte(&mut self, register: u8, value: u8) {
        self.state.cmos[usize::from(register & INDEX_MASK)] = value;
    }

    fn format(&self) -> Format {
        Format { binary: self.byte(STATUS_B) & BINARY != 0, hours_24: self.byte(STATUS_B) & HOURS_24 != 0 }
    }

    fn stopped(&self) -> bool {
        self.byte(STATUS_B) & SET != 0
    }

    /// Host time since the epoch: whole seconds, negative before 1970, and nanoseconds.
    fn host_time(&self) -> (i64, u32) {
        let whole = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX / 2);
        match (self.clock)().duration_since(UNIX_EPOCH) {
            Ok(after) => (whole(after.as_secs()), after.subsec_nanos()),
            Err(before) => (-whole(before.duration().as_secs()), 0),
        }
    }

    /// Writes the running time into the registers.
    fn latch(&mut self) {
        let date = Date::from_epoch(self.host_time().0.saturating_add(self.state.offset_s));
        let format = self.format();
        for (register, value) in [
            (SECONDS, date.second),
            (MINUTES, date.minute),
            (WEEKDAY, date.weekday),
            (DAY, date.day),
            (MONTH, date.month),
            (YEAR, date.year_of_century),
            (CENTURY, date.century),
        ] {
            self.set_byte(register, format.encode(value));
        }
        self.set_byte(HOURS, format.encode_hour(date.hour));
    }

    /// Takes the time from the registers. One that is no date leaves the clock as it was.
    fn commit(&mut self) {
        let format = self.format();
        let field = |register| format.decode(self.byte(register));
        let date = Date {
            second: field(SECONDS),
            minute: field(MINUTES),
            hour: format.decode_hour(self.byte(HOURS)),
            weekday: field(WEEKDAY),
            day: field(DAY),
            month: field(MONTH),
            year_of_century: field(YEAR),
            century: field(CENTURY),
        };
        if let Some(seconds) = date.to_epoch() {
            self.state.offset_s = seconds.saturating_sub(self.host_time().0);
        }
    }

    fn read_register(&mut self) -> u8 {
        let register = self.state.index;
        match register {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY if !self.stopped() => self.latch(),
            STATUS_A => {
                let soon = !self.stopped() && self.host_time().1 >= 1_000_000_000 - UPDATE_WARNING_NS;
                return self.byte(STATUS_A) | if soon { UPDATE_IN_PROGRESS } else { 0 };
            }
            STATUS_C => return 0,
            STATUS_D => return VALID,
            _ => {}
        }
        self.byte(register)
    }

    fn write_register(&mut self, value: u8) {
        let register = self.state.index;
        match register {
            STATUS_A => self.set_byte(STATUS_A, value & !UPDATE_IN_PROGRESS),
            STATUS_B => {
                let was_stopped = self.stopped();
                if !was_stopped {
                    self.latch();
                }
                self.set_byte(STATUS_B, value);
                if was_stopped && !self.stopped() {
                    self.commit();
                }
            }
            STATUS_C | STATUS_D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY if !self.stopped() => {
                self.latch();
                self.set_byte(register, value);
                self.commit();
            }
            _ => self.set_byte(register, value),
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (port, byte) in registers(offset).zip(data) {
            *byte = if port == DATA_PORT { self.read_register() } else { 0xff };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        for (port, value) in registers(offset).zip(data) {
            match port {
                INDEX_PORT => self.state.index = value & INDEX_MASK,
                DATA_PORT => self.write_register(*value),
                _ => {}
            }
        }
        Effect::None
    }
}

/// How status B has the registers written.
#[derive(Clone, Copy)]
struct Format {
    binary: bool,
    hours_24: bool,
}

impl Format {
    fn encode(self, value: u8) -> u8 {
        if self.binary { value } else { ((value / 10) << 4) | (value % 10) }
    }

    /// What is no BCD becomes 255, which no field of a date may be.
    fn decode(self, byte: u8) -> u8 {
        match (self.binary, byte >> 4, byte & 0xf) {
            (true, ..) => byte,
            (false, tens @ 0..=9, ones @ 0..=9) => tens * 10 + ones,
            _ => u8::MAX,
        }
    }

    fn encode_hour(self, hour: u8) -> u8 {
        match (self.hours_24, hour) {
            (true, _) => self.encode(hour),
            (false, 0) => self.encode(12),
            (false, 1..=11) => self.encode(hour),
            (false, 12) => self.encode(12) | AFTERNOON,
            (false, _) => self.encode(hour - 12) | AFTERNOON,
        }
    }

    fn decode_hour(self, byte: u8) -> u8 {
        if self.hours_24 {
            return self.decode(byte);
        }
        match self.decode(byte & !AFTERNOON) {
            hour @ 1..=12 => hour % 12 + if byte & AFTERNOON != 0 { 12 } else { 0 },
            _ => u8::MAX,
        }
    }
}

/// A date and time of the proleptic Gregorian calendar, as the registers split it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    century: u8,
    year_of_century: u8,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// Days in 400 years, after which the calendar repeats.
const ERA_DAYS: i64 = 146_097;
/// Days from 0000-03-01 to 1970-01-01. Years that begin in March put the leap day last.
const EPOCH_FROM_MARCH_0: i64 = 719_468;

impl Date {
    /// The date `seconds` after 1970-01-01T00:00Z. Years outside 0 to 9999 wrap: there are two digits of century.
    fn from_epoch(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_PER_DAY);
        let second_of_day = seconds.rem_euclid(SECONDS_PER_DAY);
        let march_days = days + EPOCH_FROM_MARCH_0;
        let day_of_era = march_days.rem_euclid(ERA_DAYS);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = march_days.div_euclid(ERA_DAYS) * 400 + year_of_era + i64::from(month <= 2);
        Self {
            century: two_digits(year.div_euclid(100).rem_euclid(100)),
            year_of_century: two_digits(year.rem_euclid(100)),
            month: two_digits(month),
            day: two_digits(day_of_year - (153 * march_month + 2) / 5 + 1),
            weekday: two_digits((days + 4).rem_euclid(7) + 1),
            hour: two_digits(second_of_day / 3600),
            minute: two_digits(second_of_day / 60 % 60),
            second: two_digits(second_of_day % 60),
        }
    }

    /// Seconds since 1970-01-01T00:00Z, or `None` if there is no such date. The weekday does not count.
    fn to_epoch(self) -> Option<i64> {
        if self.century > 99 || self.year_of_century > 99 || self.hour > 23 || self.minute > 59 || self.second > 59 {
            return None;
        }
        let year = i64::from(self.century) * 100 + i64::from(self.year_of_century);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let days_in_month = match self.month {
            2 => 28 + u8::from(leap),
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        if self.day == 0 || self.day > days_in_month {
            return None;
        }
        let month = i64::from(self.month);
        let march_year = year - i64::from(month <= 2);
        let march_month = (month + 9) % 12;
        let year_of_era = march_year.rem_euclid(400);
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = march_year.div_euclid(400) * ERA_DAYS + day_of_era - EPOCH_FROM_MARCH_0;
        let second_of_day = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        Some(days * SECONDS_PER_DAY + second_of_day)
    }
}

/// All callers pass 0 to 99.
fn two_digits(value: i64) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
