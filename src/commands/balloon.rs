//! `sterna balloon`: memory between guest and host.

use super::Output;
use crate::cli::BalloonArgs;
use crate::control::client::{Client, PATIENCE};
use crate::control::machine::BalloonStatus;
use crate::control::protocol::Request;
use crate::error::Error;
use crate::registry::Registry;
use crate::units::format_size;

/// Asks the guest for memory if a size is given, and prints where it stands.
pub fn balloon(registry: &Registry, args: &BalloonArgs, output: Output) -> Result<(), Error> {
    let mut client = Client::connect(registry, &args.name, PATIENCE)?;
    if let Some(target_bytes) = args.target_bytes {
        client.change(Request::Balloon { target_bytes })?;
    }
    let balloon = client.show(PATIENCE)?.status.balloon;
    output.result(&balloon, |balloon| format!("{}: {}\n", args.name, describe(balloon)))
}

/// One line on a balloon.
pub fn describe(balloon: &BalloonStatus) -> String {
    let given = format_size(balloon.actual_bytes);
    let mut text = format!("{given} given up of {} asked for", format_size(balloon.target_bytes));
    let guest = &balloon.guest;
    let numbers = [("total", guest.total_bytes), ("available", guest.available_bytes), ("free", guest.free_bytes)];
    let numbers: Vec<_> = numbers
        .iter()
        .filter_map(|(name, bytes)| bytes.map(|bytes| format!("{name} {}", format_size(bytes))))
        .collect();
    if !numbers.is_empty() {
        text += &format!("; the guest reports {}", numbers.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::machine::GuestMemory;

    #[test]
    fn only_what_the_guest_reports_is_shown() {
        let mut balloon = BalloonStatus { target_bytes: 64 << 20, actual_bytes: 1 << 20, ..BalloonStatus::default() };
        assert_eq!(describe(&balloon), "1M given up of 64M asked for");
        balloon.guest = GuestMemory { free_bytes: Some(2 << 20), ..GuestMemory::default() };
        assert_eq!(describe(&balloon), "1M given up of 64M asked for; the guest reports free 2M");
    }
}
