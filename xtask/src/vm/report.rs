//! What came of the tests in a machine: read from its console, and written to `docs/kernels.md`.

use std::{collections::BTreeMap, fmt, fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};

use crate::workspace::Workspace;

/// Of one kernel.
#[derive(Debug, Default)]
pub struct Outcome {
    /// `uname -r`, and what distributions add.
    kernel: String,
    has_bpf_lsm: bool,
    /// Modules that it does not have.
    lacks: Vec<String>,
    /// By test file.
    files: BTreeMap<String, Counts>,
    is_complete: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Counts {
    passed: u32,
    failed: u32,
    ended_well: bool,
}

impl Outcome {
    /// From the console's output.
    pub fn read(log: &Path) -> Result<Self> {
        let bytes = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    fn parse(text: &str) -> Self {
        let (mut outcome, mut current) = (Self::default(), String::new());
        for line in text.lines().map(str::trim) {
            if let Some(counts) = line.strip_prefix("test result: ") {
                let file = outcome.files.entry(current.clone()).or_default();
                file.passed += number_before(counts, " passed");
                file.failed += number_before(counts, " failed");
            }
            let Some(said) = line.strip_prefix("=== ") else { continue };
            match said.split_once(' ').unwrap_or((said, "")) {
                ("KERNEL", kernel) => kernel.clone_into(&mut outcome.kernel),
                ("LSM", _) => outcome.has_bpf_lsm = true,
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

    /// Whether all tests ran and passed.
    pub fn is_good(&self) -> bool {
        self.is_complete && self.files.values().all(|file| file.ended_well && file.failed == 0 && file.passed > 0)
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
        if self.is_complete { Ok(()) } else { f.write_str(", and it ended early") }
    }
}

const HEAD: &str = "# Kernels

Written by `cargo xtask vm`, which boots these kernels of Debian in QEMU and runs the tests of the kernel programs in them. Older
kernels than 5.10 are refused at the start: they lack ring buffers and inner maps of different lengths.

";

const TAIL: &str = "
What a kernel lacks, and what happens then:

| feature | since | without it |
|---|---|---|
| `setsockopt` programs that know the caller's cgroup | 6.1 | `status` 1; sources can be forged, see GUARANTEES.md. Source routes and routing headers are the packet guard's to refuse |
| `bpf_set_retval` | 5.18 | a refused call returns `EPERM`, whatever `refuseWith` says |
| filling a trie by batches | 5.19 | each prefix is a call: large policies take longer |
| detaching a link | 5.11 | the set of the agent before is detached when its pins are removed |
| memory of maps outside `RLIMIT_MEMLOCK` | 5.11 | the agent lifts the limit for itself, which takes `CAP_SYS_RESOURCE` |
| sockets keep their cgroup beside `net_cls` and `net_prio` | 5.10.226, 5.15 | probed; see [failures](failures.md) |
";

/// Writes `docs/kernels.md`.
pub fn write(workspace: &Workspace, tests: &[&str], outcomes: &[(&str, Outcome)]) -> Result<()> {
    let path = workspace.root().join("docs/kernels.md");
    fs::write(&path, page(tests, outcomes)).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("xtask: {} is written", path.display());
    Ok(())
}

fn page(tests: &[&str], outcomes: &[(&str, Outcome)]) -> String {
    let mut page = HEAD.to_owned();
    let names: Vec<&str> = outcomes.iter().map(|(name, _)| *name).collect();
    let _ = writeln!(page, "| | {} |\n|---|{}", names.join(" | "), "---|".repeat(outcomes.len()));
    let row = |page: &mut String, name: &str, cell: &dyn Fn(&Outcome) -> String| {
        let cells: Vec<String> = outcomes.iter().map(|(_, outcome)| cell(outcome)).collect();
        let _ = writeln!(page, "| {name} | {} |", cells.join(" | "));
    };
    row(&mut page, "release", &|outcome| outcome.kernel.split(' ').next().unwrap_or_default().to_owned());
    row(&mut page, "BPF LSM active", &|outcome| if outcome.has_bpf_lsm { "yes" } else { "no" }.to_owned());
    for test in tests {
        row(&mut page, &format!("`{test}.rs`"), &|outcome| match outcome.files.get(*test) {
            Some(Counts { passed, failed: 0, .. }) => format!("{passed} passed"),
            Some(Counts { passed, failed, .. }) => format!("{passed} passed, {failed} failed"),
            None => "not run".to_owned(),
        });
    }
    page + TAIL
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "=== KERNEL 5.10.0-46-cloud-amd64 #1 SMP\r\n=== LACKS dccp\r\n=== RUN sockets\r\n\
        test result: ok. 9 passed; 0 failed; 0 ignored\r\n=== EXIT sockets 0\r\n=== RUN escape\r\n\
        test result: FAILED. 3 passed; 1 failed; 0 ignored\r\n=== EXIT escape 101\r\n=== DONE\r\n";

    #[test]
    fn the_console_tells_what_passed() {
        let outcome = Outcome::parse(LOG);
        assert!(outcome.is_complete && !outcome.is_good());
        assert_eq!(outcome.files["sockets"], Counts { passed: 9, failed: 0, ended_well: true });
        assert_eq!(outcome.files["escape"], Counts { passed: 3, failed: 1, ended_well: false });
        assert_eq!(outcome.to_string(), "12 tests passed, 1 failed");
        let page = page(&["sockets", "escape", "kernel"], &[("5.10", outcome)]);
        assert!(
            page.contains("| release | 5.10.0-46-cloud-amd64 |") && page.contains("| `kernel.rs` | not run |"),
            "{page}"
        );
    }

    #[test]
    fn a_machine_that_ended_early_or_ran_nothing_is_not_good() {
        assert!(!Outcome::parse(LOG.split("=== DONE").next().unwrap()).is_good());
        assert!(!Outcome::parse("=== RUN a\n=== EXIT a 0\n=== DONE\n").is_good());
        assert!(Outcome::parse("=== RUN a\ntest result: ok. 1 passed; 0 failed\n=== EXIT a 0\n=== DONE\n").is_good());
    }
}
