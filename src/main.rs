//! The `sterna` program: reads the command line, carries out the command, reports its failure once.

use log::LevelFilter;
use std::process::ExitCode;
use sterna::cli::Cli;
use sterna::{allocator, commands, exit, log as logger};

fn main() -> ExitCode {
    allocator::share_one_heap();
    let cli = Cli::of_this_process();
    logger::start(LevelFilter::Warn, cli.verbose);
    match commands::run(cli) {
        Ok(()) => ExitCode::from(exit::DONE),
        Err(error) if error.is_closed_output() => ExitCode::from(exit::DONE),
        Err(error) => {
            eprintln!("{}", error.report());
            ExitCode::from(error.exit_code())
        }
    }
}
