//! Makes the calls it reads, one a line, and answers each with 0 or the error number; `time N CALL` is answered with the
//! nanoseconds that one of N calls takes.

use std::io::{self, BufRead, Write};

use anyhow::{Context, Result};
use egress_tests::dial::Call;

fn main() -> Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        let line = line?;
        if let Some(timed) = line.strip_prefix("time ") {
            let (count, call) = timed.split_once(' ').context("time N CALL")?;
            writeln!(out, "{}", call.parse::<Call>()?.time(count.parse()?)?)?;
        } else {
            writeln!(out, "{}", line.parse::<Call>()?.make())?;
        }
        out.flush()?;
    }
    Ok(())
}
