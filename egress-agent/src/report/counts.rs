//! What became of the reports: counted by workload, for `status` and for the log.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};

/// Where a report was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The ring buffer of the kernel was full, or the workload had its share of it.
    Ring,
    /// More waited to be written than there is room for.
    Queue,
    /// It could not be written.
    Output,
}

impl Stage {
    /// As in text and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Queue => "queue",
            Self::Output => "output",
        }
    }
}

/// Reports that a workload lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The path of its cgroup, or the id where that is not known; null for those whose workload is not known.
    pub cgroup: Option<String>,
    /// Where.
    pub stage: Stage,
    /// How many denials.
    pub count: u64,
}

/// What became of the reports, as `status` tells it: fields are only ever added to the shape.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reports {
    /// Denials that were written.
    pub written: u64,
    /// Denials that the agent before had not read, and that this one took over.
    #[serde(default)]
    pub inherited: u64,
    /// Denials that were not, most first.
    pub lost: Vec<Loss>,
    /// Why the last one that was tried could not be written; null if it was.
    pub error: Option<String>,
}

/// Most workloads that are told apart.
const MAX_WORKLOADS: usize = 1024;
/// Most workloads that are told of.
const MAX_TOLD: usize = 64;

/// The counts themselves. All copies are one.
#[derive(Debug, Clone, Default)]
pub struct Counts(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    written: AtomicU64,
    inherited: AtomicU64,
    lost: Mutex<HashMap<(Option<u64>, Stage), u64>>,
    names: Mutex<HashMap<u64, String>>,
    error: Mutex<Option<String>>,
}

impl Counts {
    /// So many denials were taken over from the agent before.
    pub fn add_inherited(&self, count: usize) {
        self.0.inherited.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// So many denials were written.
    pub fn add_written(&self, count: u64) {
        self.0.written.fetch_add(count, Ordering::Relaxed);
    }

    /// So many denials of a workload were lost.
    pub fn add_lost(&self, workload: u64, stage: Stage, count: u64) {
        let mut lost = lock(&self.0.lost);
        let is_known = lost.contains_key(&(Some(workload), stage)) || lost.len() < MAX_WORKLOADS;
        *lost.entry((is_known.then_some(workload), stage)).or_default() += count;
    }

    /// The cgroup of a workload, for whoever is told.
    pub fn name(&self, workload: u64, path: impl FnOnce() -> Option<String>) {
        let mut names = lock(&self.0.names);
        if names.contains_key(&workload) {
            return;
        }
        if names.len() >= MAX_WORKLOADS {
            names.clear();
        }
        names.extend(path().map(|path| (workload, path)));
    }

    /// The path of the cgroup of a workload, or its id.
    pub fn name_of(&self, workload: u64) -> String {
        lock(&self.0.names).get(&workload).cloned().unwrap_or_else(|| workload.to_string())
    }

    /// Why nothing can be written, or that it can be; whether that is new.
    pub fn set_error(&self, error: Option<String>) -> bool {
        let mut before = lock(&self.0.error);
        let is_new = before.is_some() != error.is_some();
        *before = error;
        is_new
    }

    /// Denials that were lost, of a stage.
    pub fn lost(&self, stage: Stage) -> u64 {
        lock(&self.0.lost).iter().filter(|((_, of), _)| *of == stage).map(|(_, count)| count).sum()
    }

    /// The workloads that lost the most at a stage, for the log.
    pub fn losers_at(&self, stage: Stage) -> String {
        let lost = lock(&self.0.lost);
        let at_stage = lost.iter().filter(|((_, of), _)| *of == stage);
        let losers = at_stage.filter_map(|(&(workload, _), &count)| Some((workload?, count))).collect();
        drop(lost);
        self.losers(losers)
    }

    /// Those that lost the most of workloads, for the log.
    pub fn losers(&self, mut lost: Vec<(u64, u64)>) -> String {
        lost.sort_unstable_by_key(|&(_, count)| std::cmp::Reverse(count));
        let told: Vec<String> = lost.iter().take(3).map(|&(workload, _)| self.name_of(workload)).collect();
        told.join(", ")
    }

    /// What `status` tells; of the ring buffer, the kernel knows.
    pub fn tell(&self) -> Reports {
        let mut lost: Vec<Loss> = lock(&self.0.lost)
            .iter()
            .map(|(&(workload, stage), &count)| Loss { cgroup: workload.map(|id| self.name_of(id)), stage, count })
            .collect();
        sort(&mut lost);
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Reports {
            written: of(&self.0.written),
            inherited: of(&self.0.inherited),
            lost,
            error: lock(&self.0.error).clone(),
        }
    }

    /// What is not as it should be.
    pub fn degraded(&self) -> Option<String> {
        let error = lock(&self.0.error).clone()?;
        Some(format!("denials cannot be written, and are counted as lost: {error}"))
    }
}

/// The most first; those beyond the most that are told become one.
pub fn sort(lost: &mut Vec<Loss>) {
    lost.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.cgroup.cmp(&b.cgroup)));
    if lost.len() <= MAX_TOLD {
        return;
    }
    for other in lost.split_off(MAX_TOLD) {
        match lost.iter_mut().find(|loss| loss.cgroup.is_none() && loss.stage == other.stage) {
            Some(others) => others.count += other.count,
            None => lost.push(Loss { cgroup: None, ..other }),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_loss_vanishes_however_many_workloads_there_are() {
        let counts = Counts::default();
        counts.name(3, || Some("/flood".to_owned()));
        counts.add_lost(3, Stage::Output, 2);
        for workload in 0..5_000 {
            counts.add_lost(workload, Stage::Queue, 1);
        }
        counts.add_lost(3, Stage::Queue, 10);
        let told = counts.tell().lost;
        assert_eq!(told.iter().map(|loss| loss.count).sum::<u64>(), 5_012);
        assert!(told.len() < MAX_TOLD + 3);
        let of_flood: Vec<u64> =
            told.iter().filter(|loss| loss.cgroup.as_deref() == Some("/flood")).map(|loss| loss.count).collect();
        assert_eq!((of_flood, counts.lost(Stage::Queue)), (vec![11, 2], 5_010));
        assert!(counts.losers_at(Stage::Queue).starts_with("/flood, "));
    }

    #[test]
    fn trouble_is_new_once() {
        let counts = Counts::default();
        assert!(counts.set_error(Some("a".to_owned())) && !counts.set_error(Some("b".to_owned())));
        assert!(counts.degraded().is_some_and(|told| told.ends_with(": b")));
        assert!(counts.set_error(None) && counts.degraded().is_none());
    }
}
