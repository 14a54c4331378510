//! What waits to be told, bounded, with a fair share for each workload.
//!
//! Workloads take turns, level by level, as cgroups lie below each other: a workload that refuses at full speed, alone or by
//! many cgroups of its own, waits behind itself. Where there is no room left, the longest queue gives way, and what it loses is
//! returned, to be counted.

use std::collections::{BTreeMap, VecDeque};

use egress_common::LEVELS;

/// Something of a size that is of a workload.
pub trait Waiting {
    /// The workload: its ancestors, the highest first.
    fn lineage(&self) -> [u64; LEVELS];
    /// What it takes, in bytes.
    fn size(&self) -> usize;
}

/// Most bytes that wait.
pub const MAX_BYTES: usize = 8 << 20;
/// Most of them that are of one workload.
const MAX_OF_ONE: usize = MAX_BYTES / 4;

/// What waits.
#[derive(Debug)]
pub struct Queue<T> {
    root: Node<T>,
    bytes: usize,
    len: usize,
}

/// The queues of a level, or what waits in one.
#[derive(Debug)]
enum Node<T> {
    Level { children: BTreeMap<u64, Node<T>>, turns: VecDeque<u64>, bytes: usize },
    Lane { waiting: VecDeque<T>, bytes: usize },
}

impl<T: Waiting> Default for Queue<T> {
    fn default() -> Self {
        Self { root: Node::level(), bytes: 0, len: 0 }
    }
}

impl<T: Waiting> Queue<T> {
    /// Adds what is to wait; what had to give way.
    pub fn push(&mut self, item: T) -> Vec<T> {
        let (lineage, size) = (item.lineage(), item.size());
        if self.root.bytes_of(&lineage) + size > MAX_OF_ONE {
            return vec![item];
        }
        let mut lost = Vec::new();
        while self.bytes + size > MAX_BYTES {
            // Many at once: to find the longest queue takes time.
            let before = lost.len();
            self.bytes -= self.root.give_way(&mut lost);
            self.len -= lost.len() - before;
        }
        self.root.push(&lineage, item);
        self.bytes += size;
        self.len += 1;
        lost
    }

    /// The next, by turns.
    pub fn pop(&mut self) -> Option<T> {
        let item = self.root.pop()?;
        self.bytes -= item.size();
        self.len -= 1;
        Some(item)
    }

    /// How much waits.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<T: Waiting> Node<T> {
    const fn level() -> Self {
        Self::Level { children: BTreeMap::new(), turns: VecDeque::new(), bytes: 0 }
    }

    const fn bytes(&self) -> usize {
        match self {
            Self::Level { bytes, .. } | Self::Lane { bytes, .. } => *bytes,
        }
    }

    fn bytes_of(&self, lineage: &[u64]) -> usize {
        match (self, lineage) {
            (Self::Level { children, .. }, [id, below @ ..]) => children.get(id).map_or(0, |node| node.bytes_of(below)),
            (node, _) => node.bytes(),
        }
    }

    fn push(&mut self, lineage: &[u64], item: T) {
        match (self, lineage) {
            (Self::Level { children, turns, bytes }, [id, below @ ..]) => {
                *bytes += item.size();
                let child = children.entry(*id).or_insert_with(|| {
                    turns.push_back(*id);
                    if below.is_empty() { Self::Lane { waiting: VecDeque::new(), bytes: 0 } } else { Self::level() }
                });
                child.push(below, item);
            }
            (Self::Lane { waiting, bytes }, _) => {
                *bytes += item.size();
                waiting.push_back(item);
            }
            (Self::Level { .. }, []) => {}
        }
    }

    fn pop(&mut self) -> Option<T> {
        let item = match self {
            Self::Level { children, turns, .. } => {
                // One that gave way may be empty.
                let mut item = None;
                while item.is_none() {
                    let id = turns.pop_front()?;
                    let child = children.get_mut(&id)?;
                    item = child.pop();
                    if child.bytes() > 0 {
                        turns.push_back(id);
                    } else {
                        children.remove(&id);
                    }
                }
                item?
            }
            Self::Lane { waiting, .. } => waiting.pop_front()?,
        };
        match self {
            Self::Level { bytes, .. } | Self::Lane { bytes, .. } => *bytes -= item.size(),
        }
        Some(item)
    }

    /// The longest queue loses its last eighth; how much that is, in bytes.
    fn give_way(&mut self, lost: &mut Vec<T>) -> usize {
        let given = match self {
            Self::Level { children, .. } => {
                children.values_mut().max_by_key(|node| node.bytes()).map_or(0, |longest| longest.give_way(lost))
            }
            Self::Lane { waiting, .. } => {
                let kept = waiting.len() - waiting.len().div_ceil(8);
                let tail = waiting.split_off(kept);
                let given = tail.iter().map(Waiting::size).sum();
                lost.extend(tail);
                given
            }
        };
        match self {
            Self::Level { bytes, .. } | Self::Lane { bytes, .. } => *bytes -= given,
        }
        given
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, PartialEq, Eq)]
    struct Item([u64; LEVELS], usize, usize);

    impl Waiting for Item {
        fn lineage(&self) -> [u64; LEVELS] {
            self.0
        }

        fn size(&self) -> usize {
            self.1
        }
    }

    #[test]
    fn workloads_take_turns_whatever_cgroups_they_make() {
        let mut queue = Queue::default();
        for number in 0..300 {
            queue.push(Item([1, 1, number as u64 % 100 + 10], 10, number));
        }
        for number in 0..3 {
            queue.push(Item([2, 2, 2], 10, number));
        }
        let told: Vec<u64> = std::iter::from_fn(|| queue.pop()).map(|item| item.0[0]).take(7).collect();
        assert_eq!(told, [1, 2, 1, 2, 1, 2, 1]);
    }

    #[test]
    fn a_flood_loses_its_own() {
        let mut queue = Queue::default();
        let mut lost: Vec<Item> = Vec::new();
        for number in 0..MAX_BYTES {
            lost.extend(queue.push(Item([1, 1, 1 + number as u64 % 5], 1000, number)));
            if number % 10_000 == 0 {
                lost.extend(queue.push(Item([1, 9, 9], 1000, number)));
            }
            if number > 100_000 {
                break;
            }
        }
        assert!(lost.len() > 90_000 && lost.iter().all(|item| item.0[1] == 1));
        let left: Vec<Item> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(left.iter().filter(|item| item.0[1] == 9).count(), 11);
        assert_eq!(left.len() + lost.len(), 100_002 + 11);
    }

    proptest! {
        /// Nothing vanishes, nothing is told twice, what is of one workload is told in its order, and there is an end of it.
        #[test]
        fn all_is_told_or_lost(items in prop::collection::vec((0..3_u64, 0..3_u64, 0..3_u64, 1..MAX_BYTES / 20, any::<bool>()), 0..200)) {
            let (mut queue, mut told, mut lost) = (Queue::default(), Vec::new(), Vec::new());
            for (number, &(a, b, c, size, pops)) in items.iter().enumerate() {
                lost.extend(queue.push(Item([a, b, c], size, number)));
                prop_assert!(queue.bytes <= MAX_BYTES);
                if pops {
                    told.extend(queue.pop());
                }
            }
            told.extend(std::iter::from_fn(|| queue.pop()));
            prop_assert!(queue.is_empty());
            let mut numbers: Vec<usize> = told.iter().chain(&lost).map(|item| item.2).collect();
            numbers.sort_unstable();
            prop_assert_eq!(numbers, (0..items.len()).collect::<Vec<_>>());
            for (index, item) in told.iter().enumerate() {
                let later = told[index..].iter().filter(|other| other.0 == item.0);
                prop_assert!(later.map(|other| other.2).is_sorted());
            }
        }
    }
}
