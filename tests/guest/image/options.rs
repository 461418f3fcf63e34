//! The command line: which words there are, and their values.

use crate::line;

/// How pages to dirty are chosen.
#[derive(Clone, Copy, PartialEq)]
pub enum Pattern {
    /// One after the other, over and over.
    Sequential,
    /// Any, evenly.
    Random,
    /// Nine in ten writes go to the first tenth.
    Hot,
}

/// What the command line asks for; see the crate's documentation.
pub struct Options {
    pub touch_mib: u64,
    pub dirty_mib: u64,
    pub rate_mib: u64,
    pub at_mib: u64,
    pub pattern: Pattern,
    pub full_pages: bool,
    pub verify_s: u64,
    pub tick_ms: u64,
    pub tally: bool,
    pub cpus: u32,
    pub disk_sectors: u64,
    pub disk_index: u32,
    pub irq: bool,
    pub net_address: Option<[u8; 4]>,
    pub fuzz: Option<(u64, u64)>,
    pub evil_ring: &'static str,
    pub halt: bool,
    pub button: bool,
    pub off: bool,
    pub fault: bool,
}

impl Options {
    /// Reads `text`; words that mean nothing here are named on the console and passed over.
    pub fn parse(text: &'static str) -> Self {
        let mut options = Self {
            touch_mib: 0,
            dirty_mib: 0,
            rate_mib: 0,
            at_mib: 16,
            pattern: Pattern::Sequential,
            full_pages: false,
            verify_s: 0,
            tick_ms: 0,
            tally: false,
            cpus: 1,
            disk_sectors: 0,
            disk_index: 0,
            irq: false,
            net_address: None,
            fuzz: None,
            evil_ring: "",
            halt: false,
            button: false,
            off: false,
            fault: false,
        };
        for word in text.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            if options.set(key, value).is_none() {
                line!("ignored word: {word}");
            }
        }
        options.touch_mib = options.touch_mib.max(options.dirty_mib);
        options
    }

    fn set(&mut self, key: &str, value: &'static str) -> Option<()> {
        match key {
            "touch" => self.touch_mib = value.parse().ok()?,
            "dirty" => self.dirty_mib = value.parse().ok()?,
            "rate" => self.rate_mib = value.parse().ok()?,
            "at" => self.at_mib = value.parse().ok()?,
            "pattern" => {
                self.pattern = match value {
                    "seq" => Pattern::Sequential,
                    "rand" => Pattern::Random,
                    "hot" => Pattern::Hot,
                    _ => return None,
                }
            }
            "full" => self.full_pages = true,
            "verify" => self.verify_s = value.parse().ok()?,
            "tick" => self.tick_ms = value.parse().ok()?,
            "tally" => self.tally = true,
            "cpus" => self.cpus = value.parse().ok()?,
            "disk" => self.disk_sectors = if value.is_empty() { 64 } else { value.parse().ok()? },
            "disk-index" => self.disk_index = value.parse().ok()?,
            "irq" => self.irq = true,
            "net" => self.net_address = Some(self.net_address.unwrap_or([10, 0, 0, 2])),
            "ip" => self.net_address = Some(address(value)?),
            "fuzz-pci" => {
                let (seed, count) = value.split_once(',')?;
                self.fuzz = Some((seed.parse().ok()?, count.parse().ok()?));
            }
            "evil-ring" => self.evil_ring = value,
            "halt" => self.halt = true,
            "button" => self.button = true,
            "off" => self.off = true,
            "fault" => self.fault = true,
            _ => return None,
        }
        Some(())
    }
}

fn address(text: &str) -> Option<[u8; 4]> {
    let mut bytes = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut bytes {
        *byte = parts.next()?.parse().ok()?;
    }
    parts.next().is_none().then_some(bytes)
}
