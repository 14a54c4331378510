//! `cargo xtask soak`: everything that wears an agent down, side by side, for minutes; `tests/tests/soak.rs` is the test.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;

use crate::{build, companions, root, test, vm, workspace::Workspace};

#[derive(Args)]
pub struct Options {
    /// How many minutes
    #[arg(default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    minutes: u64,
    /// Under this kernel of `vm --list`, in QEMU, instead of the running one; can be given again
    #[arg(long = "kernel", value_name = "KERNEL")]
    kernels: Vec<String>,
}

pub fn soak(workspace: &Workspace, options: &Options) -> Result<()> {
    if !options.kernels.is_empty() {
        return vm::soak(workspace, &options.kernels, options.minutes);
    }
    root::ensure("testing with the kernel")?;
    let toolchain = build::toolchain(workspace)?;
    let mut environment = companions::ensure(workspace)?;
    environment.push(("EGRESS_SOAK_MINUTES", options.minutes.to_string().into()));
    build::build_with(workspace, &toolchain)?;
    let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
    test::some(workspace, &environment, &words("--test soak"), &words("-- --nocapture"))
}
