//! Tells the binary where the BPF object is. `cargo xtask build` makes it.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=EGRESS_EBPF_OBJECT");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("..");
    let object = env::var_os("EGRESS_EBPF_OBJECT").map_or_else(|| root.join("target/bpf/egress-ebpf.o"), PathBuf::from);
    println!("cargo::rerun-if-changed={}", object.display());
    let object = object.canonicalize().unwrap_or_else(|error| {
        println!("cargo::error=no BPF object at {} ({error}): run `cargo xtask build`", object.display());
        object
    });
    println!("cargo::rustc-env=EGRESS_EBPF_OBJECT={}", object.display());
}
