//! The escape battery as a program: `escape attempt …` is a prisoner, `escape battery [WORD…]` runs those vectors that
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
        _ => bail!("escape attempt … | escape battery [WORD…]"),
    }
}
