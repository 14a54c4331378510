//! The results as a page.

use std::fmt::Write;

use super::{
    battery::{Case, Verdict},
    expectations::documented,
    target::Permission,
};

/// A Markdown table, one row for each case.
pub fn markdown(cases: &[Case]) -> String {
    let mut page = String::from("| vector | who | destination | result | documented as |\n|---|---|---|---|---|\n");
    for case in cases {
        let row = documented(case.vector.name, case.who).filter(|_| leaks(case)).map_or("", |known| known.row);
        let Case { vector, who, permission, verdict } = case;
        writeln!(page, "| {} | {who} | {permission} | {verdict} | {row} |", vector.name)
            .expect("writing to a string cannot fail");
    }
    page
}

fn leaks(case: &Case) -> bool {
    case.verdict == Verdict::Leaked && case.permission == Permission::Refused
}
