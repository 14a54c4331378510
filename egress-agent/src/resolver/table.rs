//! All names that are wanted, and the order in which they are asked. Knows neither files nor sockets.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    ask::Answers,
    entry::{Entry, Phase},
    hosts::Hosts,
    timing::Timing,
};
use crate::compile::Names;

/// The names.
#[derive(Debug)]
pub(super) struct Table {
    timing: Timing,
    entries: BTreeMap<Arc<str>, Entry>,
    /// When which name has something to do: [`Entry::wake`] of each.
    agenda: BTreeSet<(Instant, Arc<str>)>,
    /// Names in [`Phase::Waiting`], first come first served; and some that no longer are.
    waiting: VecDeque<Arc<str>>,
    /// Names for which [`Entry::is_changed`].
    changed: BTreeSet<Arc<str>>,
}

impl Table {
    pub(super) fn new(timing: Timing) -> Self {
        Self {
            timing,
            entries: BTreeMap::new(),
            agenda: BTreeSet::new(),
            waiting: VecDeque::new(),
            changed: BTreeSet::new(),
        }
    }

    /// The least time between two questions for one name.
    pub(super) const fn floor(&self) -> Duration {
        self.timing.floor()
    }

    /// Forgets the names that are not among these, and takes in those that are new.
    pub(super) fn want(&mut self, names: &BTreeSet<String>, hosts: &Hosts, now: Instant) {
        let unwanted: Vec<Arc<str>> = self.entries.keys().filter(|name| !names.contains(&***name)).cloned().collect();
        for name in &unwanted {
            self.forget(name);
        }
        for name in names {
            if !self.entries.contains_key(name.as_str()) {
                let name: Arc<str> = name.as_str().into();
                self.entries.insert(name.clone(), Entry::new(name.clone()));
                match hosts.get(&name) {
                    Some(addresses) => self.update(&name, |entry, timing| entry.take_hosts(addresses, now, timing)),
                    None => self.waiting.push_back(name),
                }
            }
        }
    }

    /// Takes in what the hosts file says.
    pub(super) fn take_hosts(&mut self, hosts: &Hosts, now: Instant) {
        let names: Vec<Arc<str>> = self.entries.keys().cloned().collect();
        for name in names {
            match hosts.get(&name) {
                Some(addresses) => self.update(&name, |entry, timing| entry.take_hosts(addresses, now, timing)),
                None if self.is_in(&name, Phase::Hosts) => {
                    self.update(&name, |entry, _| entry.leave_hosts());
                    self.waiting.push_back(name);
                }
                None => {}
            }
        }
    }

    /// Does what is due.
    pub(super) fn turn(&mut self, now: Instant) {
        while let Some((at, name)) = self.agenda.first()
            && *at <= now
        {
            let name = name.clone();
            let mut is_to_be_asked = false;
            self.update(&name, |entry, _| is_to_be_asked = entry.turn(now));
            if is_to_be_asked {
                self.waiting.push_back(name);
            }
        }
    }

    /// When there is something to do next.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.agenda.first().map(|(at, _)| *at)
    }

    /// The next name to ask for, which then counts as asked.
    pub(super) fn next(&mut self) -> Option<Arc<str>> {
        loop {
            let name = self.waiting.pop_front()?;
            if self.is_in(&name, Phase::Waiting) {
                self.update(&name, |entry, _| entry.phase = Phase::Asking);
                return Some(name);
            }
        }
    }

    /// Takes the answers to a question. Those to a question that no longer matters are dropped.
    pub(super) fn answer(&mut self, name: &str, answers: &Answers, now: Instant) {
        if self.is_in(name, Phase::Asking) {
            self.update(name, |entry, timing| entry.answer(answers, now, timing));
        }
    }

    /// Asks for every name again, those under way included.
    pub(super) fn ask_again(&mut self, now: Instant) {
        let names: Vec<Arc<str>> = self.entries.keys().cloned().collect();
        for name in names {
            let mut is_to_be_asked = false;
            self.update(&name, |entry, timing| is_to_be_asked = entry.ask_again(now, timing));
            if is_to_be_asked {
                self.waiting.push_back(name);
            }
        }
    }

    /// Whether some name has other addresses than were handed out.
    pub(super) fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Whether every name was answered, or failed, once.
    pub(super) fn is_answered(&self) -> bool {
        self.entries.values().all(Entry::is_answered)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Hands out all addresses.
    pub(super) fn names(&mut self) -> Names {
        self.changed.clear();
        let all = self.entries.iter_mut().map(|(name, entry)| (name.to_string(), entry.hand_out()));
        Names(all.filter(|(_, addresses)| !addresses.is_empty()).collect())
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    fn is_in(&self, name: &str, phase: Phase) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.phase == phase)
    }

    fn forget(&mut self, name: &Arc<str>) {
        if let Some(at) = self.entries.remove(name).and_then(|entry| entry.wake()) {
            self.agenda.remove(&(at, name.clone()));
        }
        self.changed.remove(name);
    }

    /// Changes an entry and keeps all that depends on it true.
    fn update(&mut self, name: &str, change: impl FnOnce(&mut Entry, &mut Timing)) {
        let Some(entry) = self.entries.get_mut(name) else { return };
        let (name, woke, had) = (entry.name.clone(), entry.wake(), entry.addresses());
        change(entry, &mut self.timing);
        tell_of_change(&name, &had, &entry.addresses());
        let wakes = entry.wake();
        if entry.is_changed() {
            self.changed.insert(name.clone());
        } else {
            self.changed.remove(&name);
        }
        if woke != wakes {
            woke.map(|at| self.agenda.remove(&(at, name.clone())));
            wakes.map(|at| self.agenda.insert((at, name)));
        }
    }
}

fn tell_of_change(name: &str, had: &BTreeSet<IpAddr>, has: &BTreeSet<IpAddr>) {
    if had != has {
        let list = |addresses: Vec<String>| addresses.join(",");
        let added = list(has.difference(had).map(ToString::to_string).collect());
        let removed = list(had.difference(has).map(ToString::to_string).collect());
        tracing::info!(%name, added, removed, addresses = has.len(), "addresses of a name changed");
    }
}
