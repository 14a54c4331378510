//! Which compiler and linker make the BPF object.
//!
//! [`survey`] looks at the machine, [`choose`] decides by what was found alone, and [`Toolchain`] is the outcome made
//! ready. A rustc is only ever used with the `core` it came with: mixed versions never work.

mod private;
mod survey;

use std::{env, fs, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use crate::workspace::Workspace;
use survey::{Nightly, Private, Survey};

pub const TARGET: &str = "bpfel-unknown-none";

const WAYS: &str = "one of these is needed:
  - rustup: `rustup toolchain install nightly --component rust-src` and `cargo install bpf-linker`
  - a rustc with `core` for bpfel-unknown-none (its target-libdir), and bpf-linker on PATH
  - EGRESS_BPF_RUSTC and EGRESS_BPF_LINKER set to such a pair
  - Debian or Ubuntu (apt-get, apt-cache, dpkg-deb), whose packages are then used privately";

/// A compiler for the kernel programs, ready to be called.
#[derive(Debug)]
pub struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

#[derive(Debug)]
enum Compiler {
    /// rustup's nightly, which builds `core` from its sources.
    Nightly,
    /// A rustc that brings `core` for the target.
    Rustc(PathBuf),
}

impl Toolchain {
    /// Finds a toolchain, fetching one if the machine has none, and says which and why.
    pub fn ensure(workspace: &Workspace) -> Result<Self> {
        let (choice, reason) = choose(&survey::survey(workspace))?;
        eprintln!("xtask: BPF toolchain: {reason}");
        Ok(match choice {
            Choice::Nightly { linker } => Self { compiler: Compiler::Nightly, linker },
            Choice::Installed { rustc, linker } => Self { compiler: Compiler::Rustc(rustc), linker },
            Choice::Private => {
                let (rustc, linker) = private::ensure(workspace)?;
                Self { compiler: Compiler::Rustc(rustc), linker }
            }
        })
    }

    /// `cargo SUBCOMMAND` for the kernel programs, with a target directory of their own.
    pub fn cargo(&self, workspace: &Workspace, subcommand: &str, more_flags: &[&str]) -> Result<Command> {
        let mut command = match &self.compiler {
            Compiler::Nightly => {
                let mut rustup = Command::new("rustup");
                rustup.args(["run", "nightly", "cargo", subcommand, "-Z", "build-std=core"]);
                workspace.cargo_from(rustup)
            }
            Compiler::Rustc(rustc) => {
                let mut cargo = workspace.cargo();
                // `core` for the target and the intrinsics that aya uses are unstable features of every release.
                cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1").arg(subcommand);
                cargo
            }
        };
        let flags = [rustflags(workspace)?, more_flags.iter().map(ToString::to_string).collect()].concat();
        command
            .args(["--package", "egress-ebpf", "--release", "--target", TARGET])
            .arg("--target-dir")
            .arg(workspace.target("bpf"))
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &self.linker)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            // Parallel code generation would make the bytes depend on the number of cores.
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
        Ok(command)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    Nightly { linker: PathBuf },
    Installed { rustc: PathBuf, linker: PathBuf },
    Private,
}

/// The first way that works, and one line about it.
fn choose(found: &Survey) -> Result<(Choice, String)> {
    let linker = found.given_linker.as_ref().or(found.path_linker.as_ref());
    if let Some(rustc) = &found.given_rustc {
        let linker = linker.context("EGRESS_BPF_RUSTC is set and no bpf-linker is on PATH: set EGRESS_BPF_LINKER")?;
        let reason = format!("{} with {}, because EGRESS_BPF_RUSTC is set", rustc.display(), linker.display());
        return Ok((Choice::Installed { rustc: rustc.clone(), linker: linker.clone() }, reason));
    }
    let mut passed_over = vec![match (found.nightly, linker) {
        (Nightly::Complete, Some(linker)) => {
            let reason = format!("rustup's nightly with {}, because it has rust-src", linker.display());
            return Ok((Choice::Nightly { linker: linker.clone() }, reason));
        }
        (Nightly::Complete, None) => "rustup's nightly has no bpf-linker beside it",
        (Nightly::WithoutSource, _) => "rustup's nightly has no rust-src",
        (Nightly::Missing, _) => "there is no rustup nightly",
    }];
    passed_over.push(match (&found.rustc_with_target, linker) {
        (Some(rustc), Some(linker)) => {
            let (rustc, linker) = (rustc.clone(), linker.clone());
            let passed_over = passed_over.join(", ");
            let reason =
                format!("{} with {}, because it has {TARGET} and {passed_over}", rustc.display(), linker.display());
            return Ok((Choice::Installed { rustc, linker }, reason));
        }
        (Some(_), None) => "the installed rustc with a BPF target has no bpf-linker beside it",
        (None, _) => "no installed rustc has a BPF target",
    });
    let passed_over = passed_over.join(" and ");
    match found.private {
        Private::Ready => Ok((Choice::Private, format!("target/toolchain, because {passed_over}"))),
        Private::Possible => {
            Ok((Choice::Private, format!("Debian's, fetched into target/toolchain, because {passed_over}")))
        }
        Private::Impossible => bail!("nothing here compiles for BPF ({passed_over}, and apt-get is missing); {WAYS}"),
    }
}

/// Debug information for BTF, the instruction set of Linux 5.1 and later, and no path of this machine in the result.
fn rustflags(workspace: &Workspace) -> Result<Vec<String>> {
    let flags = ["-Cdebuginfo=2", "-Clink-arg=--btf", "-Ctarget-cpu=v3"].map(str::to_owned);
    Ok(flags.into_iter().chain(remaps(workspace)?).collect())
}

/// Flags that keep the paths of this machine out of the result.
pub fn remaps(workspace: &Workspace) -> Result<Vec<String>> {
    let sources = registry_sources()?.into_iter().map(|source| remap(&source, "registry"));
    Ok([remap(workspace.root(), ".")].into_iter().chain(sources).collect())
}

fn remap(from: &std::path::Path, to: &str) -> String {
    format!("--remap-path-prefix={}={to}", from.display())
}

/// Where cargo unpacks crates: one directory for each registry, named after it and its address.
fn registry_sources() -> Result<Vec<PathBuf>> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(env::home_dir()?.join(".cargo")));
    let directory = home.context("neither CARGO_HOME nor HOME is set")?.join("registry/src");
    let Ok(entries) = fs::read_dir(&directory) else { return Ok(Vec::new()) };
    let mut sources = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    sources.sort();
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bare() -> Survey {
        Survey {
            given_rustc: None,
            given_linker: None,
            path_linker: None,
            nightly: Nightly::Missing,
            rustc_with_target: None,
            private: Private::Impossible,
        }
    }

    fn everything() -> Survey {
        Survey {
            given_rustc: Some("/given/rustc".into()),
            given_linker: Some("/given/linker".into()),
            path_linker: Some("/bin/bpf-linker".into()),
            nightly: Nightly::Complete,
            rustc_with_target: Some("/bin/rustc".into()),
            private: Private::Ready,
        }
    }

    #[test]
    fn the_override_comes_first() {
        let (choice, reason) = choose(&everything()).unwrap();
        assert_eq!(choice, Choice::Installed { rustc: "/given/rustc".into(), linker: "/given/linker".into() });
        assert_eq!(reason, "/given/rustc with /given/linker, because EGRESS_BPF_RUSTC is set");
    }

    #[test]
    fn an_override_without_any_linker_is_an_error_and_not_passed_over() {
        let found = Survey { given_linker: None, path_linker: None, ..everything() };
        assert!(choose(&found).unwrap_err().to_string().contains("set EGRESS_BPF_LINKER"));
    }

    #[test]
    fn nightly_with_sources_comes_before_an_installed_target() {
        let found = Survey { given_rustc: None, given_linker: None, ..everything() };
        assert_eq!(choose(&found).unwrap().0, Choice::Nightly { linker: "/bin/bpf-linker".into() });
    }

    #[test]
    fn an_installed_target_comes_before_the_private_toolchain() {
        let found = Survey { given_rustc: None, given_linker: None, nightly: Nightly::WithoutSource, ..everything() };
        let (choice, reason) = choose(&found).unwrap();
        assert_eq!(choice, Choice::Installed { rustc: "/bin/rustc".into(), linker: "/bin/bpf-linker".into() });
        assert!(reason.ends_with("because it has bpfel-unknown-none and rustup's nightly has no rust-src"));
    }

    #[test]
    fn without_a_linker_only_the_private_toolchain_is_left() {
        let found = Survey { given_rustc: None, given_linker: None, path_linker: None, ..everything() };
        let (choice, reason) = choose(&found).unwrap();
        assert_eq!(choice, Choice::Private);
        assert!(reason.contains("rustup's nightly has no bpf-linker beside it"));
    }

    #[test]
    fn a_private_toolchain_that_is_still_to_be_fetched_says_so() {
        let (choice, reason) = choose(&Survey { private: Private::Possible, ..bare() }).unwrap();
        assert_eq!(choice, Choice::Private);
        assert!(reason.starts_with("Debian's, fetched into target/toolchain, because there is no rustup nightly and"));
    }

    #[test]
    fn where_nothing_fits_the_error_lists_the_ways() {
        let error = choose(&bare()).unwrap_err().to_string();
        for way in ["rust-src", "target-libdir", "EGRESS_BPF_RUSTC", "Debian"] {
            assert!(error.contains(way), "{way} is missing in: {error}");
        }
    }
}
