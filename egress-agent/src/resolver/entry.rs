//! What is known of one name: its addresses, and what is still to be done for it.
//!
//! An address that an answer leaves out stays for the grace, since clients keep what they were told. While nobody
//! answers, everything stays: an outage of the resolver must not become one of the workloads.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use tokio::time::Instant;

use egress_common::{Address, Reserved};

use super::{ask::Answers, timing::Timing};

/// More addresses than this are dropped: what a name costs is not up to whoever serves it.
pub(super) const MOST_ADDRESSES: usize = 512;
/// How many refused addresses of one name are told of.
const MOST_TOLD: usize = 16;

/// Why no name opens an address.
fn reserved(address: IpAddr) -> Option<Reserved> {
    Address::from(address).reserved()
}

/// One name.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: Arc<str>,
    pub(super) phase: Phase,
    /// With the time at which it is given up, if the last answer left it out.
    addresses: BTreeMap<IpAddr, Option<Instant>>,
    /// The families whose last question failed.
    v4_fails: bool,
    v6_fails: bool,
    /// Questions that failed in a row, in either family.
    failures: u32,
    /// What went wrong the last time.
    pub(super) error: Option<String>,
    answered: Option<Instant>,
    told: BTreeSet<IpAddr>,
    is_crowded: bool,
    /// What was handed out.
    handed: BTreeSet<IpAddr>,
}

/// What is to be done for a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing: the hosts file has it.
    Hosts,
    /// To be asked as soon as others are answered.
    Waiting,
    /// A question is under way.
    Asking,
    /// To be asked at some time.
    Idle(Instant),
}

impl Entry {
    /// Of a name that nothing is known of.
    pub(super) fn new(name: Arc<str>) -> Self {
        Self {
            name,
            phase: Phase::Waiting,
            addresses: BTreeMap::new(),
            v4_fails: false,
            v6_fails: false,
            failures: 0,
            error: None,
            answered: None,
            told: BTreeSet::new(),
            is_crowded: false,
            handed: BTreeSet::new(),
        }
    }

    /// All addresses that it may have.
    pub(super) fn addresses(&self) -> BTreeSet<IpAddr> {
        self.addresses.keys().copied().collect()
    }

    /// All addresses that it may have, from now on known to whoever uses them.
    pub(super) fn hand_out(&mut self) -> BTreeSet<IpAddr> {
        self.handed = self.addresses();
        self.handed.clone()
    }

    /// Whether it has other addresses than were handed out.
    pub(super) fn is_changed(&self) -> bool {
        !self.addresses.keys().eq(&self.handed)
    }

    /// Whether it was answered, or failed, once.
    pub(super) const fn is_answered(&self) -> bool {
        self.answered.is_some()
    }

    /// Whether it has addresses that nobody confirms any more.
    pub(super) fn is_stale(&self) -> bool {
        self.addresses.keys().any(|&address| self.fails(address))
    }

    /// When there is something to do for it that is not yet under way.
    pub(super) fn wake(&self) -> Option<Instant> {
        let ask = if let Phase::Idle(at) = self.phase { Some(at) } else { None };
        let leaving = self.addresses.iter().filter(|(address, _)| !self.fails(**address)).filter_map(|(_, at)| *at);
        leaving.chain(ask).min()
    }

    /// Does what is due; whether it is to be asked.
    pub(super) fn turn(&mut self, now: Instant) -> bool {
        self.give_up(now);
        let is_due = matches!(self.phase, Phase::Idle(at) if at <= now);
        if is_due {
            self.phase = Phase::Waiting;
        }
        is_due
    }

    /// Asks again as if nothing had failed: somebody else is asked. The floor stands.
    pub(super) fn ask_again(&mut self, now: Instant, timing: &Timing) -> bool {
        self.failures = 0;
        match self.phase {
            Phase::Hosts | Phase::Waiting => false,
            Phase::Asking => {
                self.phase = Phase::Waiting;
                true
            }
            Phase::Idle(at) => {
                self.phase = Phase::Idle(at.min(self.answered.unwrap_or(now) + timing.floor()));
                false
            }
        }
    }

    /// Takes the answers to its question.
    pub(super) fn answer(&mut self, answers: &Answers, now: Instant, timing: &mut Timing) {
        self.answered = Some(now);
        let fresh = self.acceptable(answers);
        self.leave_out(&fresh, answers, now, timing);
        (self.v4_fails, self.v6_fails) = (answers.v4.is_err(), answers.v6.is_err());
        self.come_in(fresh);
        self.give_up(now);
        self.tell_of_failure(answers.error());
        let again = answers.ttl().map(|ttl| timing.after_answer(ttl));
        let retry = (self.failures > 0).then(|| timing.after_failures(self.failures));
        let delay = again.into_iter().chain(retry).min().unwrap_or(timing.floor());
        self.phase = Phase::Idle(now + delay);
    }

    /// Takes what the hosts file says, which is believed whatever it is and holds until the file says something else.
    pub(super) fn take_hosts(&mut self, addresses: &BTreeSet<IpAddr>, now: Instant, timing: &Timing) {
        self.answered = Some(now);
        (self.v4_fails, self.v6_fails, self.failures, self.error) = (false, false, 0, None);
        for (address, leaving) in &mut self.addresses {
            if !addresses.contains(address) {
                leaving.get_or_insert(timing.leaving(now));
            }
        }
        self.come_in(addresses.clone());
        self.give_up(now);
        self.phase = Phase::Hosts;
    }

    /// The hosts file has it no longer. What only that file may give goes at once: no answer would ever take it back.
    pub(super) fn leave_hosts(&mut self) {
        self.addresses.retain(|&address, _| reserved(address).is_none());
        self.phase = Phase::Waiting;
    }

    const fn fails(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(_) => self.v4_fails,
            IpAddr::V6(_) => self.v6_fails,
        }
    }

    /// The addresses of the answers that may be opened by name.
    fn acceptable(&mut self, answers: &Answers) -> BTreeSet<IpAddr> {
        let all: BTreeSet<IpAddr> = answers.found().flat_map(|found| &found.addresses).copied().collect();
        let acceptable = |address: &IpAddr| match reserved(*address) {
            None => true,
            Some(reason) => {
                if self.told.len() < MOST_TOLD && self.told.insert(*address) {
                    tracing::warn!(name = %self.name, %address, reason = reason.as_str(), "an answer is refused: no name opens this address");
                }
                false
            }
        };
        all.into_iter().filter(acceptable).collect()
    }

    /// Starts the grace of what the answers no longer have. An outage stops the clock: what the first answer after it
    /// leaves out stays as long as if it had just left.
    fn leave_out(&mut self, fresh: &BTreeSet<IpAddr>, answers: &Answers, now: Instant, timing: &Timing) {
        let (v4_failed, v6_failed) = (self.v4_fails, self.v6_fails);
        for (&address, leaving) in &mut self.addresses {
            if fresh.contains(&address) || answers.of(address).is_err() {
                continue;
            }
            let was_out = if address.is_ipv4() { v4_failed } else { v6_failed };
            if was_out || leaving.is_none() {
                *leaving = Some(timing.leaving(now));
            }
        }
    }

    /// Adds what an answer has. Where there are too many, those go first that leave first anyway.
    fn come_in(&mut self, fresh: BTreeSet<IpAddr>) {
        let dropped = fresh.len().saturating_sub(MOST_ADDRESSES);
        self.addresses.extend(fresh.into_iter().take(MOST_ADDRESSES).map(|address| (address, None)));
        let excess = self.addresses.len().saturating_sub(MOST_ADDRESSES);
        let mut leaving: Vec<(Instant, IpAddr)> =
            self.addresses.iter().filter_map(|(address, at)| Some(((*at)?, *address))).collect();
        leaving.sort_unstable();
        // Those of a family that fails are not leaving; they are the last to go.
        let is_unconfirmed = |(address, at): &(&IpAddr, &Option<Instant>)| at.is_none() && self.fails(**address);
        let others = self.addresses.iter().filter(is_unconfirmed).map(|(address, _)| *address);
        let gone: Vec<IpAddr> = leaving.into_iter().map(|(_, address)| address).chain(others).take(excess).collect();
        for address in gone {
            self.addresses.remove(&address);
        }
        self.tell_of_crowd(dropped + excess);
    }

    fn tell_of_crowd(&mut self, dropped: usize) {
        if dropped > 0 && !self.is_crowded {
            tracing::warn!(name = %self.name, dropped, limit = MOST_ADDRESSES, "a name has too many addresses");
        }
        self.is_crowded = dropped > 0;
    }

    fn give_up(&mut self, now: Instant) {
        let (v4_fails, v6_fails) = (self.v4_fails, self.v6_fails);
        let fails = |address: &IpAddr| if address.is_ipv4() { v4_fails } else { v6_fails };
        self.addresses.retain(|address, leaving| fails(address) || leaving.is_none_or(|at| at > now));
    }

    /// Counts, and speaks when it starts and when it ends.
    fn tell_of_failure(&mut self, error: Option<String>) {
        match &error {
            Some(error) if self.error.is_none() => {
                tracing::warn!(name = %self.name, %error, known = self.addresses.len(), "a name cannot be resolved");
            }
            None if self.error.is_some() => tracing::info!(name = %self.name, "a name can be resolved again"),
            Some(_) | None => {}
        }
        self.failures = if error.is_some() { self.failures.saturating_add(1) } else { 0 };
        self.error = error;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, Ipv6Addr},
        time::Duration,
    };

    use proptest::{
        collection::{btree_set, vec},
        prelude::*,
        sample::select,
    };

    use super::*;
    use crate::resolver::ask::{Answer, Found};

    /// In seconds.
    const GRACE: u32 = 50;
    const SECOND: Duration = Duration::from_secs(1);

    fn timing() -> Timing {
        Timing::new(SECOND, SECOND * GRACE)
    }

    fn some_addresses() -> Vec<IpAddr> {
        let some = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "127.0.0.1", "2001:db8::1", "2001:db8::2"];
        some.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// The slow, obvious way: with every second that its family is answered for, an address that the answer leaves out
    /// has one second less to stay.
    #[derive(Debug, Default)]
    struct Reference {
        left: BTreeMap<IpAddr, u32>,
        fresh: BTreeSet<IpAddr>,
        v4_fails: bool,
        v6_fails: bool,
    }

    impl Reference {
        const fn fails(&self, address: IpAddr) -> bool {
            if address.is_ipv4() { self.v4_fails } else { self.v6_fails }
        }

        fn second(&mut self) {
            for address in some_addresses() {
                if !self.fresh.contains(&address) && !self.fails(address) {
                    self.left.entry(address).and_modify(|left| *left -= 1);
                }
            }
            self.left.retain(|_, left| *left > 0);
        }

        fn answer(&mut self, answers: &Answers) {
            for address in some_addresses() {
                let Ok(found) = answers.of(address) else { continue };
                if found.addresses.contains(&address) && reserved(address).is_none() {
                    self.left.insert(address, GRACE);
                    self.fresh.insert(address);
                    continue;
                }
                self.fresh.remove(&address);
                if self.fails(address) {
                    self.left.entry(address).and_modify(|left| *left = GRACE);
                }
            }
            (self.v4_fails, self.v6_fails) = (answers.v4.is_err(), answers.v6.is_err());
        }

        fn addresses(&self) -> BTreeSet<IpAddr> {
            self.left.keys().copied().collect()
        }
    }

    fn answer(is_wanted: fn(&IpAddr) -> bool) -> impl Strategy<Value = Answer> {
        let addresses = btree_set(select(some_addresses().into_iter().filter(is_wanted).collect::<Vec<_>>()), 0..3);
        prop_oneof![
            2 => addresses.prop_map(|addresses| Ok(found(addresses))),
            1 => Just(Err("no answer".to_owned())),
        ]
    }

    fn history() -> impl Strategy<Value = Vec<(u32, Answers)>> {
        let answers = (answer(IpAddr::is_ipv4), answer(IpAddr::is_ipv6)).prop_map(|(v4, v6)| Answers { v4, v6 });
        vec((0..60_u32, answers), 0..12)
    }

    proptest! {
        #[test]
        fn it_has_what_counting_every_second_gives(history in history()) {
            let (mut now, mut timing) = (Instant::now(), timing());
            let (mut entry, mut reference) = (Entry::new("a".into()), Reference::default());
            for (wait, answers) in history {
                for _ in 0..wait {
                    now += SECOND;
                    reference.second();
                    entry.turn(now);
                    prop_assert_eq!(entry.addresses(), reference.addresses());
                    prop_assert!(entry.wake().is_none_or(|at| at > now));
                }
                entry.answer(&answers, now, &mut timing);
                reference.answer(&answers);
                prop_assert_eq!(entry.addresses(), reference.addresses());
                prop_assert_eq!(&entry.error, &answers.error());
                let latest = SECOND * if answers.ttl().is_some() { 60 } else { 330 };
                let is_in_time = |at| at >= now + SECOND && at <= now + latest;
                prop_assert!(matches!(entry.phase, Phase::Idle(at) if is_in_time(at)), "{:?}", entry.phase);
            }
        }
    }

    fn found(addresses: BTreeSet<IpAddr>) -> Found {
        Found { addresses, ttl: Duration::from_mins(1) }
    }

    fn many_v4(numbers: std::ops::Range<u32>) -> Found {
        found(numbers.map(|number| Ipv4Addr::from_bits(0x0a00_0000 + number).into()).collect())
    }

    #[test]
    fn a_name_has_a_limited_number_of_addresses_and_fresh_ones_come_first() {
        let (mut entry, now, mut timing) = (Entry::new("a".into()), Instant::now(), timing());
        let v6 = || Ok(found(BTreeSet::new()));
        entry.answer(&Answers { v4: Ok(many_v4(0..600)), v6: v6() }, now, &mut timing);
        assert_eq!(entry.addresses().len(), MOST_ADDRESSES);
        let fresh = many_v4(1000..1300);
        entry.answer(&Answers { v4: Ok(fresh.clone()), v6: v6() }, now, &mut timing);
        assert_eq!(entry.addresses().len(), MOST_ADDRESSES);
        assert!(entry.addresses().is_superset(&fresh.addresses));
    }

    #[test]
    fn addresses_that_nobody_confirms_count_and_go_last() {
        let (mut entry, now, mut timing) = (Entry::new("a".into()), Instant::now(), timing());
        let v6 = |numbers: std::ops::Range<u128>| {
            found(numbers.map(|number| Ipv6Addr::from_bits((0x2001_0db8 << 96) + number).into()).collect())
        };
        entry.answer(&Answers { v4: Ok(many_v4(0..400)), v6: Ok(v6(0..100)) }, now, &mut timing);
        entry.answer(&Answers { v4: Err("no answer".to_owned()), v6: Ok(v6(200..300)) }, now, &mut timing);
        let addresses = entry.addresses();
        assert_eq!(addresses.len(), MOST_ADDRESSES);
        assert_eq!(addresses.iter().filter(|address| address.is_ipv4()).count(), 400);
        assert!(addresses.is_superset(&v6(200..300).addresses));
        entry.answer(&Answers { v4: Err("no answer".to_owned()), v6: Ok(v6(300..500)) }, now, &mut timing);
        assert_eq!(entry.addresses().len(), MOST_ADDRESSES);
        assert!(entry.addresses().is_superset(&v6(300..500).addresses));
    }
}
