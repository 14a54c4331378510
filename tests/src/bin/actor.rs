//! Follows the orders on its standard input, one a line, and answers each by a line; its argument is whom it
//! becomes before. [`egress_tests::actor`] is the other side.

use std::io;

use anyhow::{Context, Result};
use egress_tests::actor::act;

fn main() -> Result<()> {
    let identity = std::env::args().nth(1).context("the argument is an identity")?.parse()?;
    act(io::stdin().lock(), io::stdout().lock(), identity)
}
