//! `cargo xtask kube`: the tests that need a real Kubernetes API server, and what they need.
//!
//! The server is built from Debian's source package, since nobody ships it as a program that could be unpacked: etcd, kubectl
//! and Go come as packages. All of it lies below `target/kube`.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;

use crate::{build, companions, root, test, workspace::Workspace};

mod server;

/// The test files; what needs no server runs in `cargo xtask test` as well.
const TESTS: [&str; 2] = ["crd", "cluster"];

#[derive(Args)]
pub struct Options {
    /// Run this test file alone; may be repeated
    #[arg(long = "test", value_name = "FILE", value_parser = TESTS)]
    tests: Vec<String>,
    /// Run no test, but measure a large cluster that changes all the time; two minutes
    #[arg(long, conflicts_with = "tests")]
    scale: bool,
    /// Arguments for the test programs, such as `NAME` or `--nocapture`
    #[arg(last = true, value_name = "ARGS")]
    arguments: Vec<OsString>,
}

pub fn kube(workspace: &Workspace, options: &Options) -> Result<()> {
    root::ensure("testing with the kernel")?;
    let toolchain = build::toolchain(workspace)?;
    let mut environment = companions::ensure_with_runc(workspace)?;
    environment.push(("EGRESS_KUBE", server::ensure(workspace)?.into()));
    build::build_with(workspace, &toolchain)?;
    if options.scale {
        let words = ["bench", "--package", "egress-tests", "--bench", "cluster"].map(OsString::from);
        return test::cargo(workspace, &environment, &words, "measuring");
    }
    let files: Vec<&str> = match options.tests.as_slice() {
        [] => TESTS.to_vec(),
        named => named.iter().map(String::as_str).collect(),
    };
    let selection = files.iter().flat_map(|file| ["--test", file]);
    let selection: Vec<OsString> =
        ["--package", "egress-tests"].into_iter().chain(selection).map(OsString::from).collect();
    let rest = ["--", "--include-ignored"].map(OsString::from).into_iter().chain(options.arguments.iter().cloned());
    test::some(workspace, &environment, &selection, &rest.collect::<Vec<_>>())
}
