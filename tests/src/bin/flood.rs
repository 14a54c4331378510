//! Is refused until it is killed, in a way that makes reports of it dear; [`egress_tests::flood`] is the other side. Arguments:
//! the kind, refusals in a second (0 for as many as can be), where to, the cgroup, and what is only there to be read.

use std::path::Path;

use anyhow::{Context, Result};
use egress_tests::flood::flood;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut argument = || args.next().context("flood KIND RATE ADDRESS CGROUP");
    let (kind, rate, to) = (argument()?, argument()?.parse()?, argument()?.parse()?);
    flood(&kind, rate, to, Path::new(&argument()?))
}
