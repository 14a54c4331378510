//! `cargo xtask`: builds, tests and runs this workspace, and fetches what that takes.
//!
//! It drives cargo, Debian's package tools, for the chart pip, for the API server Go, and nothing else. It holds no product code, installs nothing on the
//! system, and writes below `target/` only; but for `docs` and `chart`, which write the generated files.

mod build;
mod chart;
mod ci;
mod companions;
mod debian;
mod dist;
mod docs;
mod image;
mod install;
mod kube;
mod process;
mod root;
mod run;
mod soak;
mod step;
mod test;
mod toolchain;
mod vm;
mod workspace;

use std::{ffi::OsString, process::ExitCode};

use clap::{Parser, Subcommand};

use workspace::Workspace;

/// Builds, tests and runs the workspace. Whatever is missing is fetched into target/; nothing is installed.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = AFTER_HELP, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Environment:
  EGRESS_BPF_RUSTC   the rustc that compiles the kernel programs; it must have `core` for bpfel-unknown-none
  EGRESS_BPF_LINKER  the bpf-linker that goes with it, or with an installed toolchain (else: bpf-linker on PATH)

Without them, the first of these is taken, and the choice is printed:
  1. rustup's nightly with the rust-src component, and bpf-linker on PATH
  2. a rustc that has `core` for bpfel-unknown-none, and bpf-linker on PATH
  3. Debian's rustc and a bpf-linker built for it, kept under target/toolchain

  SOURCE_DATE_EPOCH  the time that `dist` puts into packages (else: that of the last commit)";

#[derive(Subcommand)]
enum Command {
    /// Build the kernel programs, then the agent: target/release/egress-agent
    Build,
    /// Build, then run all tests; the kernel tests need root (sudo is used otherwise)
    Test {
        /// Arguments for `cargo test`, such as `-p egress-tests` or `NAME -- --nocapture`
        #[arg(last = true, value_name = "ARGS")]
        arguments: Vec<OsString>,
    },
    /// Build, then run the demo; with arguments: run egress-agent with them (as root, through sudo otherwise)
    Run {
        /// Arguments for egress-agent
        #[arg(last = true, value_name = "ARGS")]
        arguments: Vec<OsString>,
    },
    /// Build, then write the generated files: schemas, the CRD, reference pages
    Docs,
    /// Render the Helm chart into deploy/kubernetes, and check both by Helm and by the schemas of Kubernetes
    Chart(chart::Options),
    /// Boot kernels of Debian in QEMU and run the kernel tests in them; all of them, if none is named
    Vm(vm::Options),
    /// Run floods, churn, kills, stalled readers and hostile processes side by side for minutes, and print what was seen of
    /// each invariant
    Soak(soak::Options),
    /// Build a Kubernetes API server, once, and run the tests that need one
    Kube(kube::Options),
    /// Build what is shipped to hosts, in target/dist: a tarball and a Debian package of the agent, linked statically, with
    /// lists of what is in it (SBOM) and checksums
    Dist,
    /// Build the container image, in target/image, and run the test of it, in containers of runc
    Image,
    /// All checks before a push: fmt, clippy, rustc warnings, docs, licences and sources, tests
    Ci,
}

fn main() -> ExitCode {
    match command(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn command(command: &Command) -> anyhow::Result<()> {
    let workspace = Workspace::find()?;
    match command {
        Command::Build => build::build(&workspace),
        Command::Test { arguments } => test::test(&workspace, arguments),
        Command::Run { arguments } => run::run(&workspace, arguments),
        Command::Docs => docs::docs(&workspace),
        Command::Chart(options) => chart::chart(&workspace, options),
        Command::Vm(options) => vm::vm(&workspace, options),
        Command::Soak(options) => soak::soak(&workspace, options),
        Command::Kube(options) => kube::kube(&workspace, options),
        Command::Dist => dist::dist(&workspace),
        Command::Image => image::image(&workspace),
        Command::Ci => ci::ci(&workspace),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
