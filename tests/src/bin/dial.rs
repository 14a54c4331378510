//! Makes the calls it reads, one a line, and answers each with 0 or the error number.

use std::io::{self, BufRead, Write};

use anyhow::Result;
use egress_tests::dial::Call;

fn main() -> Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let call: Call = line?.parse()?;
        writeln!(out, "{}", call.make())?;
        out.flush()?;
    }
    Ok(())
}
