//! `cargo xtask dist`: writes the manual pages and the completions of the agent below a directory, as they lie below
//! `share` of an installation.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result};
use clap::{Command, CommandFactory as _};
use clap_complete::{Shell, generate_to};
use egress_agent::cli::Cli;

/// Where the shells look, by default or on Debian, and the name each looks for.
const COMPLETIONS: [(Shell, &str, &str); 3] = [
    (Shell::Bash, "bash-completion/completions", "egress-agent"),
    (Shell::Zsh, "zsh/vendor-completions", "_egress-agent"),
    (Shell::Fish, "fish/vendor_completions.d", "egress-agent.fish"),
];

fn main() -> ExitCode {
    match env::args_os().nth(1).context("the argument is a directory").and_then(|share| write(Path::new(&share))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn write(share: &Path) -> Result<()> {
    manual(Cli::command(), &directory(share, "man/man1")?)?;
    COMPLETIONS.into_iter().try_for_each(|(shell, below, name)| completion(shell, &directory(share, below)?, name))
}

/// A page for the program and one for each subcommand.
fn manual(command: Command, directory: &Path) -> Result<()> {
    clap_mangen::generate_to(command, directory).context("cannot write the manual pages")
}

fn completion(shell: Shell, directory: &Path, name: &str) -> Result<()> {
    let written = generate_to(shell, &mut Cli::command(), "egress-agent", directory);
    let written = written.with_context(|| format!("cannot write the completion of {shell}"))?;
    fs::rename(&written, directory.join(name)).with_context(|| format!("cannot rename {}", written.display()))
}

fn directory(share: &Path, below: &str) -> Result<PathBuf> {
    let directory = share.join(below);
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory)
}
