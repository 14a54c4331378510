//! The results as a page.

use std::{fmt::Write, fs};

use super::{
    Who,
    battery::{Case, Verdict},
    expectations::{closed_as_a_whole, documented},
    target::Permission,
};

/// `docs/escapes.md`: a Markdown table, one row for each vector.
pub fn markdown(cases: &[Case]) -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's release");
    let version: Vec<&str> = release.split(['.', '-']).take(2).collect();
    let mut page = format!(
        "# Ways off the host\n\n\
         What `escape.rs` found under Linux {} with the packet guard on: each way is tried by root and by an ordinary user, to a destination\n\
         that the policy refuses and to one that it allows. \"leaked\": a packet for the refused destination was seen outside. Written by\n\
         `EGRESS_ESCAPE_TABLE=FILE cargo xtask test -- -p egress-tests --test escape`.\n\n\
         | way | refused: root | refused: user | allowed: root | allowed: user | closed by, or documented as |\n\
         |---|---|---|---|---|---|\n",
        version.join("."),
    );
    for rows in cases.chunk_by(|a, b| a.vector.name == b.vector.name) {
        let cell = |who, permission| {
            let case = rows.iter().find(|case| case.who == who && case.permission == permission);
            case.map_or_else(String::new, |case| case.verdict.to_string())
        };
        let [root, user] = [Who::Root, Who::User].map(|who| cell(who, Permission::Refused));
        let [allowed_root, allowed_user] = [Who::Root, Who::User].map(|who| cell(who, Permission::Allowed));
        let (name, why) = (rows[0].vector.name, why(rows));
        writeln!(page, "| {name} | {root} | {user} | {allowed_root} | {allowed_user} | {why} |")
            .expect("writing to a string cannot fail");
    }
    page
}

/// Where a leak is documented, or what closes the way.
fn why(rows: &[Case]) -> &'static str {
    let refused = || rows.iter().filter(|case| case.permission == Permission::Refused);
    let name = rows[0].vector.name;
    if let Some(leak) = refused().find(|case| case.verdict == Verdict::Leaked) {
        documented(name, leak.who).map_or("", |known| known.row)
    } else if refused().any(|case| matches!(case.verdict, Verdict::Blocked(_))) {
        closed_as_a_whole(name).map_or("connect and sendmsg", |way| way.layer)
    } else {
        ""
    }
}
