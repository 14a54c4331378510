//! Follows the orders on its standard input, one a line, and answers each by a line; its argument is the uid it takes on
//! before. [`egress_tests::actor`] is the other side.

use std::io;

use anyhow::{Context, Result};
use egress_tests::actor::act;

fn main() -> Result<()> {
    let uid = std::env::args().nth(1).map(|uid| uid.parse()).transpose().context("the argument is a uid")?;
    act(io::stdin().lock(), io::stdout().lock(), uid)
}
