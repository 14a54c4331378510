//! What was seen of each invariant.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Rows by name. Workers add to it from their threads.
#[derive(Debug)]
pub struct Table {
    slowness: u32,
    rows: Mutex<BTreeMap<&'static str, Row>>,
}

#[derive(Debug, Clone)]
enum Row {
    /// How much was done.
    Count(u64),
    /// What must not be, how often it was, and the first case.
    Never(u64, String),
    /// The most that was seen, the bound, and how often it was looked at.
    Most { seen: u64, bound: u64, unit: &'static str, looks: u64 },
}

impl Row {
    fn holds(&self) -> bool {
        match self {
            Self::Count(_) => true,
            Self::Never(count, _) => *count == 0,
            Self::Most { seen, bound, .. } => seen <= bound,
        }
    }
}

impl Table {
    /// Without rows. Whatever takes time may take so many times longer.
    pub fn new(slowness: u32) -> Self {
        Self { slowness, rows: Mutex::default() }
    }

    /// A time on this machine that is one of ordinary hardware.
    pub fn slow(&self, time: Duration) -> Duration {
        time * self.slowness
    }

    /// So much more of it was done.
    pub fn count(&self, name: &'static str, more: u64) {
        self.with(name, Row::Count(0), |row| {
            if let Row::Count(count) = row {
                *count += more;
            }
        });
    }

    /// It was seen so often, and should never be.
    pub fn expect_none(&self, name: &'static str, seen: u64, case: &str) {
        self.with(name, Row::Never(0, String::new()), |row| {
            if let Row::Never(count, first) = row {
                if *count == 0 && seen > 0 {
                    case.clone_into(first);
                }
                *count += seen;
            }
        });
    }

    /// It took so long, and may take no longer than this.
    pub fn at_most(&self, name: &'static str, took: Duration, bound: Duration) {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.most(name, milliseconds(took), milliseconds(self.slow(bound)), " ms");
    }

    /// It is so much, and may be no more than this.
    pub fn number_at_most(&self, name: &'static str, seen: u64, bound: u64) {
        self.most(name, seen, bound, "");
    }

    fn most(&self, name: &'static str, value: u64, bound: u64, unit: &'static str) {
        self.with(name, Row::Most { seen: 0, bound, unit, looks: 0 }, |row| {
            if let Row::Most { seen, looks, .. } = row {
                *seen = value.max(*seen);
                *looks += 1;
            }
        });
    }

    fn with(&self, name: &'static str, fresh: Row, change: impl FnOnce(&mut Row)) {
        change(self.rows.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_insert(fresh));
    }

    /// Whether every invariant held.
    pub fn holds(&self) -> bool {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).values().all(Row::holds)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let width = rows.keys().map(|name| name.len()).max().unwrap_or(0);
        for (name, row) in rows.iter() {
            let mark = if row.holds() { "ok    " } else { "BROKEN" };
            match row {
                Row::Count(count) => writeln!(f, "       {name:width$}  {count}")?,
                Row::Never(count, first) => writeln!(f, "{mark} {name:width$}  {count}  {first}")?,
                Row::Most { seen, bound, unit, looks } => {
                    writeln!(f, "{mark} {name:width$}  {seen}{unit} of {bound}{unit} at most, in {looks}")?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_broken_invariant_breaks_the_table_and_is_shown_with_its_first_case() {
        let table = Table::new(10);
        table.count("calls", 3);
        table.at_most("time", Duration::from_millis(9), Duration::from_millis(1));
        table.expect_none("wrong", 0, "nothing");
        assert!(table.holds(), "{table}");
        table.expect_none("wrong", 2, "the first");
        table.expect_none("wrong", 1, "the second");
        assert!(!table.holds());
        let text = table.to_string();
        assert!(text.contains("BROKEN wrong  3  the first") && text.contains("ok     time   9 ms of 10 ms"), "{text}");
    }
}
