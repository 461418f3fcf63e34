//! Sizes and durations as people write them: `512M`, `1.5GiB`, `50ms`.

use std::time::Duration;

/// Factors of size units; `K` means `KiB`.
const SIZES: [(&str, u64); 6] = [("B", 1), ("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40), ("", 1)];

/// Milliseconds in each unit of time.
const DURATIONS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000)];

/// Why a size or a duration was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a number with a unit of size.
    #[error("'{0}' is not a size; write it like 512M or 2GiB (K, M, G and T count in 1024)")]
    Size(String),
    /// Not a number with a unit of time.
    #[error("'{0}' is not a duration; write it like 50ms, 10s or 2m")]
    Duration(String),
    /// The number does not fit.
    #[error("'{0}' is too large")]
    TooLarge(String),
}

/// Bytes in `text`: a number, perhaps with a fraction, and one of B, K, KiB, M, MiB, G, GiB, T, TiB. No unit means bytes.
pub fn parse_size(text: &str) -> Result<u64, Error> {
    let unknown = || Error::Size(text.to_owned());
    let (number, unit) = split(text).ok_or_else(unknown)?;
    let unit = unit.strip_suffix("iB").filter(|prefix| !prefix.is_empty()).unwrap_or(unit);
    let (_, factor) = SIZES.iter().find(|(name, _)| *name == unit).ok_or_else(unknown)?;
    scale(number, *factor).ok_or_else(|| Error::TooLarge(text.to_owned()))?.ok_or_else(unknown)
}

/// The duration in `text`: a number, perhaps with a fraction, and one of ms, s, m, h.
pub fn parse_duration(text: &str) -> Result<Duration, Error> {
    let unknown = || Error::Duration(text.to_owned());
    let (number, unit) = split(text).ok_or_else(unknown)?;
    let (_, factor) = DURATIONS.iter().find(|(name, _)| *name == unit).ok_or_else(unknown)?;
    let millis = scale(number, *factor).ok_or_else(|| Error::TooLarge(text.to_owned()))?.ok_or_else(unknown)?;
    Ok(Duration::from_millis(millis))
}

/// `bytes` in the largest unit that divides it, or with one digit after the point where that would be a long number.
pub fn format_size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)];
    const SHORT: u64 = 10_000;
    let Some((largest, factor)) = UNITS.iter().find(|(_, factor)| bytes >= *factor) else { return format!("{bytes}B") };
    match UNITS.iter().find(|(_, factor)| bytes.is_multiple_of(*factor)) {
        Some((name, exact)) if bytes / exact < SHORT || exact == factor => format!("{}{name}", bytes / exact),
        _ => format!("{:.1}{largest}", bytes as f64 / *factor as f64),
    }
}

/// `duration` in its two largest units: `3d 4h`, `2m 10s`, `0s`.
pub fn format_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// A number and the unit behind it.
fn split(text: &str) -> Option<(&str, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    number.starts_with(|c: char| c.is_ascii_digit()).then(|| (number, unit.trim_start()))
}

/// `number` times `factor`, the fraction cut off. The outer `None` says that it does not fit, the inner that it is no
/// number.
fn scale(number: &str, factor: u64) -> Option<Option<u64>> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if fraction.is_empty() || fraction.contains('.') || fraction.len() > 9 {
        return Some(None);
    }
    let Ok(fraction_digits) = fraction.parse::<u64>() else { return Some(None) };
    let parts = u128::from(fraction_digits) * u128::from(factor) / 10u128.pow(fraction.len() as u32);
    let whole = whole.parse::<u64>().ok()?.checked_mul(factor)?;
    whole.checked_add(u64::try_from(parts).ok()?).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_every_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("10B", 10),
            ("1K", 1024),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("1.5G", 3 << 29),
            ("2 GiB", 2 << 30),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_by_name() {
        for text in ["", "M", "-1M", "1.M", "1.2.3M", "512MB", "1X", "iB", "1iB", "0x10", "1e3", ".5G"] {
            assert_eq!(parse_size(text), Err(Error::Size(text.to_owned())), "{text}");
        }
        for text in ["99999999999999999999", "20000000T"] {
            assert_eq!(parse_size(text), Err(Error::TooLarge(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(parse_duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(parse_duration("0.5s"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        for text in ["10", "10 S", "s", "-1s", "1d"] {
            assert_eq!(parse_duration(text), Err(Error::Duration(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn sizes_and_durations_are_written_short() {
        for (bytes, text) in [
            (0, "0B"),
            (1000, "1000B"),
            (1024, "1K"),
            (512 << 20, "512M"),
            (3 << 29, "1536M"),
            ((1 << 30) + 1, "1.0G"),
            (24_684_092 << 10, "23.5G"),
            (1 << 60, "1048576T"),
        ] {
            assert_eq!(format_size(bytes), text);
        }
        for (seconds, text) in [(0, "0s"), (59, "59s"), (130, "2m 10s"), (3660, "1h 1m"), (90_000, "1d 1h")] {
            assert_eq!(format_duration(Duration::from_secs(seconds)), text);
        }
    }
}
