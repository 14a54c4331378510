//! What came of the tests in a machine: read from its console, and written to `docs/kernels.md`.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use anyhow::{Context as _, Result};

use crate::workspace::Workspace;

/// Of one kernel.
#[derive(Debug, Default)]
pub struct Outcome {
    /// `uname -r`, and what distributions add.
    kernel: String,
    has_bpf_lsm: bool,
    /// Its version, where it is the first process.
    systemd: String,
    /// What it can do, and cannot.
    features: BTreeMap<String, bool>,
    /// Modules that it does not have.
    lacks: Vec<String>,
    /// By test file.
    files: BTreeMap<String, Counts>,
    /// Tests, each after its file.
    failed: Vec<String>,
    is_complete: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u32,
    failed: u32,
    ended_well: bool,
}

impl Counts {
    const fn is_good(self) -> bool {
        self.ended_well && self.failed == 0 && self.passed > 0
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed", self.passed)?;
        match (self.failed, self.ended_well) {
            (0, true) => Ok(()),
            (0, false) => f.write_str(", did not end"),
            (failed, _) => write!(f, ", {failed} failed"),
        }
    }
}

impl Outcome {
    /// From the console's output.
    pub fn read(log: &Path) -> Result<Self> {
        let bytes = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    /// What machines with the same kernel ran, together.
    pub fn joined(outcomes: Vec<Self>) -> Self {
        outcomes.into_iter().reduce(Self::with).unwrap_or_default()
    }

    fn with(mut self, other: Self) -> Self {
        self.is_complete &= other.is_complete;
        self.systemd += &other.systemd;
        self.features.extend(other.features);
        self.files.extend(other.files);
        self.failed.extend(other.failed);
        self
    }

    fn parse(text: &str) -> Self {
        let (mut outcome, mut current) = (Self::default(), String::new());
        for line in text.lines().map(str::trim) {
            if let Some(counts) = line.strip_prefix("test result: ") {
                let file = outcome.files.entry(current.clone()).or_default();
                file.passed += number_before(counts, " passed");
                file.failed += number_before(counts, " failed");
            }
            if let Some(name) = line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED")) {
                outcome.failed.push(format!("{current} {name}"));
            }
            let Some(said) = line.strip_prefix("=== ") else { continue };
            match said.split_once(' ').unwrap_or((said, "")) {
                ("KERNEL", kernel) => kernel.clone_into(&mut outcome.kernel),
                ("LSM", _) => outcome.has_bpf_lsm = true,
                ("FEATURE", feature) => {
                    let (is_there, name) = feature.split_once(' ').unwrap_or_default();
                    outcome.features.insert(name.to_owned(), is_there == "yes");
                }
                ("SYSTEMD", version) => version.trim_start_matches("systemd ").clone_into(&mut outcome.systemd),
                ("LACKS", module) => outcome.lacks.push(module.to_owned()),
                ("RUN", name) => {
                    name.clone_into(&mut current);
                    outcome.files.entry(current.clone()).or_default();
                }
                ("EXIT", status) => {
                    if let Some(file) = outcome.files.get_mut(&current) {
                        file.ended_well = status.ends_with(" 0");
                    }
                }
                ("DONE", _) => outcome.is_complete = true,
                _ => {}
            }
        }
        outcome
    }

    /// The version of the kernel's package, as Debian's kernels tell it after their name: `… Debian 6.1.176-1 (2026-07-02)`.
    fn package(&self) -> &str {
        self.kernel.split_once("Debian ").map_or("", |(_, rest)| rest.split(' ').next().unwrap_or_default())
    }

    /// Whether it ran to its end.
    pub const fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Whether all tests ran and passed.
    pub fn is_good(&self) -> bool {
        self.is_complete && self.files.values().all(|file| file.is_good())
    }
}

fn number_before(text: &str, word: &str) -> u32 {
    let before = text.split_once(word).map_or("", |(before, _)| before);
    before.rsplit([' ', ';']).next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = |of: fn(&Counts) -> u32| self.files.values().map(of).sum::<u32>();
        write!(f, "{} tests passed, {} failed", sum(|file| file.passed), sum(|file| file.failed))?;
        if !self.failed.is_empty() {
            write!(f, " ({})", self.failed.join(", "))?;
        }
        let endless = self.files.iter().filter(|(_, file)| file.failed == 0 && !file.ended_well);
        endless.map(|(name, _)| name).try_for_each(|name| write!(f, ", {name} did not end"))?;
        if self.is_complete { Ok(()) } else { f.write_str(", and the machine ended early") }
    }
}

const HEAD: &str = "# Kernels

Written by `cargo xtask vm`, which boots these kernels of Debian in QEMU and runs the tests of the kernel programs in them. Older
kernels than 5.10 are refused at the start: they lack ring buffers and inner maps of different lengths.

";

/// What some kernels lack: the name, the version since which it is there, and what happens without it. Those that
/// `features.rs` looks for have the names that it prints.
const FEATURES: [[&str; 3]; 6] = [
    [
        "`setsockopt` programs that know the caller's cgroup",
        "6.1",
        "`status` 1; sources can be forged, see GUARANTEES.md. Source routes and routing headers are the packet guard's to refuse",
    ],
    ["filling a trie by batches", "5.19", "each prefix is a call: large policies take longer"],
    ["`bpf_set_retval`", "5.18", "a refused call returns `EPERM`, whatever `refuseWith` says"],
    [
        "sockets keep their cgroup beside `net_cls` and `net_prio`",
        "5.10.226, 5.15",
        "probed; see [failures](failures.md)",
    ],
    [
        "memory of maps outside `RLIMIT_MEMLOCK`",
        "5.11",
        "the agent lifts the limit for itself, which takes `CAP_SYS_RESOURCE`",
    ],
    ["detaching a link", "5.9", "there is no such kernel among those that are supported"],
];

/// Writes `docs/kernels.md`.
pub fn write(workspace: &Workspace, tests: &[&str], outcomes: &[(&str, Outcome)]) -> Result<()> {
    let path = workspace.root().join("docs/kernels.md");
    fs::write(&path, page(tests, outcomes)).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("xtask: {} is written", path.display());
    Ok(())
}

fn page(tests: &[&str], outcomes: &[(&str, Outcome)]) -> String {
    [HEAD, &results(tests, outcomes), "\nWhat a kernel lacks, and what happens then:\n\n", &features(outcomes)].concat()
}

fn results(tests: &[&str], outcomes: &[(&str, Outcome)]) -> String {
    let names = outcomes.iter().map(|(name, _)| (*name).to_owned());
    let mut table = row("", names) + &rule(outcomes.len() + 1);
    let mut add = |name: &str, cell: &dyn Fn(&Outcome) -> String| {
        table += &row(name, outcomes.iter().map(|(_, outcome)| cell(outcome)));
    };
    add("release", &|outcome| outcome.kernel.split(' ').next().unwrap_or_default().to_owned());
    add("package", &|outcome| outcome.package().to_owned());
    add("BPF LSM active", &|outcome| yes_or_no(outcome.has_bpf_lsm));
    add("systemd", &|outcome| outcome.systemd.clone());
    add("without the modules", &|outcome| outcome.lacks.join(", "));
    for test in tests {
        let counts = |outcome: &Outcome| outcome.files.get(*test).map_or("not run".to_owned(), Counts::to_string);
        add(&format!("`{test}.rs`"), &counts);
    }
    table
}

fn features(outcomes: &[(&str, Outcome)]) -> String {
    let names = outcomes.iter().map(|(name, _)| *name);
    let head = ["since"].into_iter().chain(names).chain(["without it"]).map(str::to_owned);
    let rows = FEATURES.iter().map(|[name, since, without]| {
        let found = |outcome: &Outcome| outcome.features.get(*name).map_or_else(String::new, |&found| yes_or_no(found));
        let cells = outcomes.iter().map(|(_, outcome)| found(outcome));
        row(name, [(*since).to_owned()].into_iter().chain(cells).chain([(*without).to_owned()]))
    });
    row("feature", head) + &rule(outcomes.len() + 3) + &rows.collect::<String>()
}

fn row(name: &str, cells: impl Iterator<Item = String>) -> String {
    cells.fold(format!("| {name} |"), |row, cell| row + " " + &cell + " |") + "\n"
}

fn rule(columns: usize) -> String {
    format!("|{}\n", "---|".repeat(columns))
}

fn yes_or_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "=== LACKS dccp\r\n=== KERNEL 5.10.0-46-cloud-amd64 #1 SMP Debian 5.10.257-1 (2026-06-12)\r\n\
        === FEATURE no `bpf_set_retval`\r\n=== RUN sockets\r\n\
        test result: ok. 9 passed; 0 failed; 0 ignored\r\n=== EXIT sockets 0\r\n=== RUN escape\r\ntest out ... FAILED\r\n\
        test result: FAILED. 3 passed; 1 failed; 0 ignored\r\n=== EXIT escape 101\r\n=== RUN exec\r\n=== EXIT exec 143\r\n\
        === DONE\r\n";

    #[test]
    fn the_console_tells_what_passed() {
        let outcome = Outcome::parse(LOG);
        assert!(outcome.is_complete && !outcome.is_good());
        assert_eq!(outcome.files["sockets"], Counts { passed: 9, failed: 0, ended_well: true });
        assert_eq!(outcome.files["escape"], Counts { passed: 3, failed: 1, ended_well: false });
        assert_eq!(outcome.to_string(), "12 tests passed, 1 failed (escape out), exec did not end");
    }

    #[test]
    fn the_page_names_kernels_results_and_features() {
        let page = page(&["sockets", "escape", "exec", "kernel"], &[("5.10", Outcome::parse(LOG))]);
        for line in [
            "| release | 5.10.0-46-cloud-amd64 |",
            "| package | 5.10.257-1 |",
            "| without the modules | dccp |",
            "| `escape.rs` | 3 passed, 1 failed |",
            "| `exec.rs` | 0 passed, did not end |",
            "| `kernel.rs` | not run |",
            "| `bpf_set_retval` | 5.18 | no | a refused",
        ] {
            assert!(page.contains(&format!("\n{line}")), "{line} in {page}");
        }
    }

    #[test]
    fn the_machines_of_a_kernel_are_told_of_together() {
        let other = "=== SYSTEMD systemd 252 (252.39-1)\n=== RUN systemd\ntest result: ok. 2 passed; 0 failed\n\
            === EXIT systemd 0\n=== DONE\n";
        let joined = Outcome::joined(vec![Outcome::parse(LOG), Outcome::parse(other)]);
        assert!(joined.is_complete() && joined.files.len() == 4);
        let page = page(&["sockets", "systemd"], &[("5.10", joined)]);
        for line in ["| systemd | 252 (252.39-1) |", "| `sockets.rs` | 9 passed |", "| `systemd.rs` | 2 passed |"] {
            assert!(page.contains(&format!("\n{line}")), "{line} in {page}");
        }
        assert!(!Outcome::joined(vec![Outcome::parse(LOG), Outcome::default()]).is_complete());
    }

    #[test]
    fn a_machine_that_ended_early_or_ran_nothing_is_not_good() {
        assert!(!Outcome::parse(LOG.split("=== DONE").next().unwrap()).is_good());
        assert!(!Outcome::parse("=== RUN a\n=== EXIT a 0\n=== DONE\n").is_good());
        assert!(Outcome::parse("=== RUN a\ntest result: ok. 1 passed; 0 failed\n=== EXIT a 0\n=== DONE\n").is_good());
    }
}
