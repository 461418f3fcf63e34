//! Builds the guest image: one bare-metal `rustc` call, so that no second toolchain, target or package is needed.

use std::env;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let Some(out_dir) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        eprintln!("OUT_DIR is not set: build this with cargo");
        return ExitCode::FAILURE;
    };
    println!("cargo:rerun-if-changed=image");
    let status = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .args(["image/main.rs", "--edition=2024", "--crate-name=guest", "--crate-type=bin"])
        .args(["--target=x86_64-unknown-linux-gnu", "-Dwarnings", "-Cpanic=abort", "-Copt-level=3"])
        .args(["-Coverflow-checks=on", "-Crelocation-model=static", "-Ccodegen-units=1", "-Cstrip=debuginfo"])
        .args(["-Clinker=ld", "-Clinker-flavor=ld", "-Clink-arg=-Timage/link.ld", "-Clink-arg=--build-id=none"])
        .args(["-Clink-arg=-znoexecstack", "-Clink-arg=--no-warn-rwx-segments"])
        .arg("-o")
        .arg(out_dir.join("guest.elf"))
        .status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) => {
            eprintln!("building the guest image failed: {status}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("cannot start rustc for the guest image: {error}");
            ExitCode::FAILURE
        }
    }
}
