//! The agent as it is shipped: linked statically, without debug information, and without a path of this machine in it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{TARGET, VERSION};
use crate::{process, toolchain, workspace::Workspace};

/// Of Cargo.toml.
const PROFILE: &str = "static";

pub fn build(workspace: &Workspace) -> Result<PathBuf> {
    let mut cargo = workspace.cargo();
    let flags = [vec!["-Ctarget-feature=+crt-static".to_owned()], toolchain::remaps(workspace)?].concat();
    cargo
        .args(["build", "--locked", "--package", "egress-agent", "--profile", PROFILE, "--target", TARGET])
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    process::run(&mut cargo, "building the static agent")?;
    let program = workspace.target(TARGET).join(PROFILE).join("egress-agent");
    check(&program)?;
    Ok(program)
}

fn check(program: &Path) -> Result<()> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let interpreter = has_interpreter(&bytes).with_context(|| format!("{} is no ELF file", program.display()))?;
    ensure!(!interpreter, "{} is not linked statically", program.display());
    let said = process::capture(Command::new(program).arg("--version"), "starting the static agent")?;
    ensure!(said.trim() == format!("egress-agent {VERSION}"), "the static agent calls itself {said:?}");
    Ok(())
}

/// Whether a program of 64 bits, little endian, asks for a dynamic linker; `None` if it is something else. Offsets are those
/// of `elf(5)`.
fn has_interpreter(elf: &[u8]) -> Option<bool> {
    const PT_INTERP: usize = 3;
    let number = |at: usize, bytes: usize| {
        let field = elf.get(at..at.checked_add(bytes)?)?;
        Some(field.iter().rev().fold(0, |number, &byte| number << 8 | usize::from(byte)))
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (headers, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    let types = (0..count).map(|index| number(headers.checked_add(index * size)?, 4));
    let types: Vec<usize> = types.collect::<Option<_>>()?;
    Some(types.contains(&PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_asks_for_a_dynamic_linker_is_told_from_one_that_does_not() {
        // Rust's test programs are linked dynamically unless told otherwise.
        let own = fs::read("/proc/self/exe").unwrap();
        assert_eq!(has_interpreter(&own), Some(cfg!(not(target_feature = "crt-static"))));
        let mut without = own.clone();
        // No program headers at all.
        without[0x38..0x3a].fill(0);
        assert_eq!(has_interpreter(&without), Some(false));
    }

    #[test]
    fn what_is_no_program_is_said_to_be_none() {
        assert_eq!(has_interpreter(b"#!/bin/sh\n"), None);
        let own = fs::read("/proc/self/exe").unwrap();
        assert_eq!(has_interpreter(&own[..0x40]), None);
    }
}
