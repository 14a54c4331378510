//! Makes the calls it reads, one a line, and answers each with 0 or the error number; `time N CALL` is answered with the
//! nanoseconds that one of N calls takes, `packets N CALL` and `sockets N CALL` with those of a datagram and of a socket.

use std::io::{self, BufRead, Write};

use anyhow::{Context, Result};
use egress_tests::dial::Call;

fn main() -> Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        writeln!(out, "{}", answer(&line?)?)?;
        out.flush()?;
    }
    Ok(())
}

fn answer(line: &str) -> Result<String> {
    let timed: fn(&Call, u32) -> io::Result<f64> = match line.split_once(' ').context("an empty line")?.0 {
        "time" => Call::time,
        "packets" => Call::time_packets,
        "sockets" => Call::time_sockets,
        _ => return Ok(line.parse::<Call>()?.make().to_string()),
    };
    let mut words = line.splitn(3, ' ').skip(1);
    let mut word = || words.next().context("WHAT N CALL");
    let (count, call) = (word()?.parse()?, word()?.parse()?);
    Ok(timed(&call, count)?.to_string())
}
