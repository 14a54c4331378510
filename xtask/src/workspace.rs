//! Where things are in this workspace, and how cargo is called in it.
//!
//! Paths only: nothing here creates or checks a file.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

pub struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The workspace whose xtask this is.
    pub fn find() -> Result<Self> {
        // `cargo run` says where the package is today; the compiled-in path is where it was when xtask was built.
        let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&package).parent().context("xtask lies at the root of the file system")?;
        let root = root.canonicalize().with_context(|| format!("cannot read the workspace {}", root.display()))?;
        Ok(Self { root })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path below `target/`.
    pub fn target(&self, path: &str) -> PathBuf {
        self.root.join("target").join(path)
    }

    pub fn agent(&self) -> PathBuf {
        self.target("release/egress-agent")
    }

    /// The file that the agent's build script embeds.
    pub fn bpf_object(&self) -> PathBuf {
        self.target("bpf/egress-ebpf.o")
    }

    /// Cargo, as if called by hand at the root of the workspace.
    pub fn cargo(&self) -> Command {
        self.cargo_from(Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())))
    }

    /// As [`Self::cargo`], for a command line that ends in another cargo.
    pub fn cargo_from(&self, mut command: Command) -> Command {
        command.current_dir(&self.root).env("CARGO_TARGET_DIR", self.root.join("target"));
        // What cargo told this process about xtask is not true of other packages.
        for (name, _) in env::vars_os() {
            if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
                command.env_remove(name);
            }
        }
        command
    }
}
