//! Makes the calls it reads without a pause, in many threads, until its input ends; [`egress_tests::hammer`] is the other
//! side. Arguments: the file that both share, and the number of threads.

use std::{fs::File, io};

use anyhow::{Context, Result};
use egress_tests::hammer::hammer;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut argument = || args.next().context("hammer FILE THREADS");
    let file = File::options().read(true).write(true).open(argument()?)?;
    hammer(&file, argument()?.parse()?, io::stdin().lock(), io::stdout().lock())
}
