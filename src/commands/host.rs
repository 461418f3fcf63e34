//! `sterna host check`: what this host can do.

use super::Output;
use crate::error::Error;
use crate::host_check;

/// Prints the findings, and fails where no VM could run.
pub fn check(output: Output) -> Result<(), Error> {
    let report = host_check::run();
    output.result(&report, |report| format!("{}\n", report.to_string().trim_end()))?;
    if report.usable { Ok(()) } else { Err(Error::HostUnusable) }
}
