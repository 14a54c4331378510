//! The escapee battery as a program: `escapee attempt …` is a prisoner, `escapee battery [WORD…]` runs those vectors that
//! have one of the words in their names and writes a table. [`egress_tests::escape`] says what it is.

use anyhow::{Result, bail};
use egress_tests::escape::{battery, prisoner, table, vectors};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((what, rest)) if what == "attempt" => prisoner::attempt(rest),
        Some((what, words)) if what == "battery" => {
            let cases = battery::run(words)?;
            print!("{}", table::markdown(&cases));
            battery::check(&cases)
        }
        Some((what, rest)) if what == "use" => vectors::use_inherited(rest),
        _ => bail!("escapee attempt … | escapee battery [WORD…]"),
    }
}
