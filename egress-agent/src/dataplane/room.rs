//! Which workloads find no room for what they are answered: told for a while, so that it is noticed.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::facts::Standing;

/// How long it is told after an answer was not learnt.
const TOLD: Duration = Duration::from_mins(1);

/// Why answers to a workload are not learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// It has as many addresses as it may have.
    Quota,
    /// It has its guaranteed part, and the common part is in use; or there was no memory.
    Table,
}

/// A workload that found no room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Its id; [`egress_common::SHARED`] for those that resolve names for the whole host.
    pub workload: u64,
    /// Why.
    pub lack: Lack,
    /// How many addresses it has.
    pub has: u64,
}

/// The workloads that found no room lately.
#[derive(Debug, Default)]
pub(super) struct Shortages(BTreeMap<u64, (Shortage, Instant)>);

impl Shortages {
    /// Takes in how workloads stand; gives those that found room when they were looked at last.
    pub(super) fn look(&mut self, standings: &[Standing], quota: u32, now: Instant) -> Vec<Shortage> {
        self.0.retain(|_, (_, last)| now.saturating_duration_since(*last) < TOLD);
        let mut new = Vec::new();
        for &Standing { workload, has, .. } in standings.iter().filter(|standing| standing.was_refused) {
            let lack = if has >= quota.into() { Lack::Quota } else { Lack::Table };
            let shortage = Shortage { workload, lack, has };
            if self.0.insert(workload, (shortage.clone(), now)).is_none() {
                new.push(shortage);
            }
        }
        new
    }

    /// Those that found no room lately, first those for which the table is too small.
    pub(super) fn all(&self) -> impl Iterator<Item = &Shortage> {
        let of = |lack| self.0.values().map(|(shortage, _)| shortage).filter(move |shortage| shortage.lack == lack);
        of(Lack::Table).chain(of(Lack::Quota))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_new_once_and_told_for_a_while() {
        let (mut shortages, start) = (Shortages::default(), Instant::now());
        let standing = |has, was_refused| Standing { workload: 7, has, was_refused };
        assert!(shortages.look(&[standing(100, false)], 100, start).is_empty());
        let new = shortages.look(&[standing(100, true)], 100, start);
        assert_eq!(new, [Shortage { workload: 7, lack: Lack::Quota, has: 100 }]);
        assert!(shortages.look(&[standing(50, true)], 100, start + TOLD / 2).is_empty());
        assert_eq!(shortages.all().map(|shortage| shortage.lack).collect::<Vec<_>>(), [Lack::Table]);
        assert!(shortages.look(&[standing(50, false)], 100, start + TOLD).is_empty());
        assert_eq!(shortages.all().count(), 1);
        assert!(shortages.look(&[], 100, start + TOLD * 2).is_empty());
        assert_eq!(shortages.all().count(), 0);
    }
}
