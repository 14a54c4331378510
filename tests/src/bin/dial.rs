//! Makes the calls it reads, one a line, and answers each with 0 or the error number; `connects N CALL` is answered with the
//! nanoseconds that one of N takes, and so is what else can be timed.

use std::io::{self, BufRead, Write};

use anyhow::{Context, Result};
use egress_tests::dial::{Call, Timed};

fn main() -> Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        writeln!(out, "{}", answer(&line?)?)?;
        out.flush()?;
    }
    Ok(())
}

fn answer(line: &str) -> Result<String> {
    let Some(timed) = line.split(' ').next().and_then(Timed::named) else {
        return Ok(line.parse::<Call>()?.make().to_string());
    };
    let mut words = line.splitn(3, ' ').skip(1);
    let mut word = || words.next().context("WHAT N CALL");
    let (count, call): (_, Call) = (word()?.parse()?, word()?.parse()?);
    Ok(call.time(timed, count)?.to_string())
}
