//! `cargo xtask docs`: writes every generated file or, with `--check`, names those that are stale.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use egress_tests::pages;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    match std::env::args().skip(1).collect::<Vec<_>>().as_slice() {
        [] => write(),
        [check] if check == "--check" => check_all(),
        _ => bail!("the only argument is --check"),
    }
}

fn write() -> Result<()> {
    for page in pages::all().iter().filter(|page| page.is_stale()) {
        page.write().with_context(|| format!("cannot write {}", page.path))?;
        println!("{} is written", page.path);
    }
    Ok(())
}

fn check_all() -> Result<()> {
    let stale: Vec<&str> = pages::all().iter().filter(|page| page.is_stale()).map(|page| page.path).collect();
    if !stale.is_empty() {
        bail!("stale: {}; `cargo xtask docs` writes them", stale.join(", "));
    }
    Ok(())
}
