//! Whether /dev/kvm opens: unit tests that need it are counted as ignored where it does not. Of this crate and of `sterna`.

use std::fs::File;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(kvm_opens)");
    // A path that is not there would have this run each time.
    println!("cargo::rerun-if-changed=Cargo.toml");
    if File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        println!("cargo::rerun-if-changed=/dev/kvm");
        println!("cargo::rustc-cfg=kvm_opens");
    }
}
