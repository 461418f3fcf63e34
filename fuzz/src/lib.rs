//! What the fuzz targets share: a hostile driver, and an oracle of what a device may do to it.
//!
//! A target is one file in `targets/`. It refuses to know private parts of the crates: what it reaches, a guest, a peer
//! or a file can reach.

pub mod bus;
pub mod chain;
pub mod drive;
pub mod guest;
pub mod patch;
pub mod wire;
pub mod wiring;

use std::sync::Once;

struct Format;

impl log::Log for Format {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        // Formatted and dropped: what a message does with a guest's values is under test too.
        let _text = record.args().to_string();
    }
    fn flush(&self) {}
}

/// Has every log message formatted, from the first call on.
pub fn format_logs() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_max_level(log::LevelFilter::Trace);
        log::set_logger(&Format).expect("only set here");
    });
}
