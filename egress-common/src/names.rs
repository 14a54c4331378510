//! Names as facts: what is learnt is that an address was an answer for a name, never that it is allowed.
//!
//! What a name may do is said by the rules of each scope, under a pseudo-address of its own: see [`NameId::address`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Address, coded_enum};

/// Claims to one address, of one workload.
pub const MOST_CLAIMS: usize = 4;

/// No answer is believed for longer, in seconds: a week, as RFC 8767, 4 caps what caches keep.
const LONGEST_TTL: u32 = 7 * 24 * 60 * 60;

/// A name, or a pattern of names, that some policy knows: an element of the `NAME_IDS` trie. Never 0, and never given to
/// another name while the maps exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NameId(u32);

/// The first word of `100::/64` (RFC 6666).
const DISCARD_ONLY: u32 = 0x0100_0000;

impl NameId {
    /// From its number; `None` for 0.
    #[inline(always)]
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 { None } else { Some(Self(number)) }
    }

    /// Its number.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The address under which a policy trie says what the name may do. It lies in `100::/64`, which goes nowhere (RFC 6666), and
    /// which as a destination is always refused.
    #[inline(always)]
    pub const fn address(self) -> Address {
        Address::from_network_words([DISCARD_ONLY.to_be(), 0, 0, self.0.to_be()])
    }
}

impl Address {
    /// Whether it lies in `100::/64`: see [`NameId::address`].
    #[inline(always)]
    pub const fn is_discard_only(self) -> bool {
        let [a, b, _, _] = self.network_words();
        a == DISCARD_ONLY.to_be() && b == 0
    }
}

/// The key of the `NAMES` map: an address that was an answer to a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FactKey {
    /// The id of its cgroup: see [`crate::workload`].
    workload: u64,
    address: Address,
}

impl FactKey {
    /// An answer to a workload.
    #[inline(always)]
    pub const fn new(workload: u64, address: Address) -> Self {
        Self { workload, address }
    }

    /// Whose answer it was.
    pub const fn workload(&self) -> u64 {
        self.workload
    }

    /// What the answer was.
    pub const fn address(&self) -> Address {
        self.address
    }
}

/// A name that claims an address for a while, in one word, so that no reader sees half of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim(u64);

impl Claim {
    /// Until so many seconds after boot, suspended time included.
    #[inline(always)]
    pub const fn new(name: NameId, expires: u32) -> Self {
        Self((name.0 as u64) << 32 | expires as u64)
    }

    /// As it stands in the map.
    #[inline(always)]
    pub const fn word(self) -> u64 {
        self.0
    }

    /// The name.
    #[inline(always)]
    pub const fn name(self) -> Option<NameId> {
        NameId::new((self.0 >> 32) as u32)
    }

    /// When it ends, in seconds since boot.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is the time")]
    pub const fn expires(self) -> u32 {
        self.0 as u32
    }

    /// What stands where there was an old one: of the same name, the one that lasts longer.
    #[inline(always)]
    #[must_use]
    pub const fn over(self, old: Self) -> Self {
        if old.0 >> 32 == self.0 >> 32 && old.0 > self.0 { old } else { self }
    }

    #[inline(always)]
    const fn is_live(self, now: u32) -> bool {
        self.0 >> 32 != 0 && self.expires() > now
    }
}

/// Where a claim goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClaimPlace {
    /// Below [`MOST_CLAIMS`].
    pub index: usize,
    /// What is there.
    pub old: Claim,
    /// Whether there was a place for it.
    pub fit: Fit,
}

/// Whether there is a place for a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// Nothing is lost by it.
    Free,
    /// Another name's claim is there, which still holds and ends earlier: it is given up.
    Displaces,
    /// Four others hold at least as long: there is none.
    None,
}

/// A value of the `NAMES` map: the names that claim an address. All zeros is nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Claims([u64; MOST_CLAIMS]);

impl Claims {
    /// From the words of the map.
    #[inline(always)]
    pub const fn from_words(words: [u64; MOST_CLAIMS]) -> Self {
        Self(words)
    }

    /// The words of the map.
    #[inline(always)]
    pub const fn words(self) -> [u64; MOST_CLAIMS] {
        self.0
    }

    /// One claim and nothing else.
    #[inline(always)]
    pub const fn only(claim: Claim) -> Self {
        Self([claim.0, 0, 0, 0])
    }

    /// The claim at an index below [`MOST_CLAIMS`].
    #[inline(always)]
    pub const fn get(&self, index: usize) -> Claim {
        Claim(self.0[index & (MOST_CLAIMS - 1)])
    }

    /// The name at an index, if its claim still holds.
    #[inline(always)]
    pub const fn live(&self, index: usize, now: u32) -> Option<NameId> {
        let claim = self.get(index);
        if claim.is_live(now) { claim.name() } else { None }
    }

    /// Those that still hold.
    pub fn live_claims(self, now: u32) -> impl Iterator<Item = Claim> {
        self.0.into_iter().map(Claim).filter(move |claim| claim.is_live(now))
    }

    /// Whether none holds any longer.
    pub fn are_over(&self, now: u32) -> bool {
        self.live_claims(now).next().is_none()
    }

    /// Where a claim goes: in the place of an older one of the same name, else where none is that holds, else in that of the one
    /// that ends first, if it ends earlier than the new one.
    ///
    /// A place is looked for from one that depends on the name, so that two that are learnt at the same time rarely meet. Each is
    /// looked at by a number that the compiler knows, as older kernels read no other from a program's own memory.
    #[inline(always)]
    pub const fn place(&self, claim: Claim, now: u32) -> ClaimPlace {
        const SAME: u64 = 0;
        const FREE: u64 = 1;
        const TAKEN: u64 = FREE + MOST_CLAIMS as u64;
        let start = claim.0 >> 32;
        let mut best = ClaimPlace { index: 0, old: Claim(self.0[0]), fit: Fit::Free };
        let mut least = u64::MAX;
        let mut index = 0;
        while index < MOST_CLAIMS {
            let there = Claim(self.0[index]);
            let cost = if there.0 >> 32 == start {
                SAME
            } else if there.is_live(now) {
                TAKEN + there.expires() as u64
            } else {
                FREE + ((index as u64).wrapping_sub(start) & (MOST_CLAIMS as u64 - 1))
            };
            if cost < least {
                least = cost;
                best = ClaimPlace { index, old: there, fit: Fit::Free };
            }
            index += 1;
        }
        if least >= TAKEN {
            best.fit = if best.old.expires() < claim.expires() { Fit::Displaces } else { Fit::None };
        }
        best
    }

    /// With a claim where it goes, if there is a place for it; of the same name, the one that lasts longer.
    #[must_use]
    pub fn with(self, claim: Claim, now: u32) -> Self {
        let ClaimPlace { index, old, fit } = self.place(claim, now);
        let mut claims = self;
        if fit != Fit::None {
            claims.0[index] = claim.over(old).0;
        }
        claims
    }
}

/// A value of the `QUOTAS` map: what a workload learnt and what not, counted by the kernel alone, and never set back. How much of
/// the first is gone again is in the `FORGOTTEN` map, which the agent alone writes: so both are exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Account {
    /// Addresses that were learnt.
    pub learnt: u64,
    /// Answers that were not, as there was no room for the workload.
    pub refused: u64,
}

impl Account {
    /// How many there are.
    #[inline(always)]
    pub const fn count(self, forgotten: u64) -> u64 {
        self.learnt.wrapping_sub(forgotten)
    }
}

/// The key of the account of what all workloads together learnt beyond their guaranteed parts. No cgroup has this id.
pub const COMMON: u64 = u64::MAX - 1;

/// How much of the table is guaranteed, and shared evenly among the workloads that may learn: half.
const GUARANTEED_FACTS: u32 = crate::MAX_FACTS / 2;
/// How much of it workloads may have beyond their guaranteed parts: the other half, but for what each processor may add to it
/// before it sees what the others did.
pub const COMMON_FACTS: u32 = crate::MAX_FACTS / 2 - 8192;

/// How many addresses each of so many workloads always finds room for, up to its quota.
pub const fn guaranteed(quota: u32, learners: u32) -> u32 {
    let part = GUARANTEED_FACTS / if learners == 0 { 1 } else { learners };
    if quota < part { quota } else { part }
}

const _: () = assert!(size_of::<FactKey>() == 24 && size_of::<Claims>() == 32);

/// For how long answers hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Lifetime {
    /// At least so many seconds, whatever the record says.
    pub floor: u32,
    /// And so many more: applications hold on to addresses longer than they should.
    pub grace: u32,
}

impl Lifetime {
    /// When what is learnt `now` is no longer believed, in seconds since boot.
    #[inline(always)]
    pub const fn end(self, ttl: u32, now: u32) -> u32 {
        let ttl = if ttl > LONGEST_TTL { LONGEST_TTL } else { ttl };
        let ttl = if ttl < self.floor { self.floor } else { ttl };
        now.saturating_add(ttl).saturating_add(self.grace)
    }
}

coded_enum! {
    /// What became of answers of DNS.
    pub enum Lesson {
        /// An address was learnt, or heard of again.
        Learnt = 0 => "learnt",
        /// A message that is no answer to one question, or malformed.
        Malformed = 1 => "malformed",
        /// A message that is longer than is looked at.
        TooLong = 2 => "too_long",
        /// An address of this host or link, which no name opens.
        Reserved = 3 => "reserved_address",
        /// The workload has as many facts as it may have.
        Quota = 4 => "quota",
        /// There was no memory, or no room in the part of the table that is common.
        NoRoom = 5 => "no_room",
        /// One name too many for an address: of all, the claim that ends first was given up, or not learnt.
        Crowded = 6 => "crowded",
        /// A packet from port 53 to a socket that asked nobody, or from somebody whom it did not ask.
        Unasked = 7 => "unasked",
        /// Others were read on the same processor at the same time: there was no room to read one more.
        Interrupted = 8 => "interrupted",
        /// A datagram whose checksum is wrong.
        Checksum = 9 => "wrong_checksum",
        /// A stream of TCP that could not be followed to its end.
        Lost = 10 => "stream_lost",
    }
}

/// Resolvers that one socket may ask and hear.
const MOST_ASKED: usize = 4;

/// Whom a socket asks, and for whom. All zeros is a socket that asked nobody.
///
/// The hooks that write it run while the socket is locked, but for datagrams; of those the worst is that an answer is not
/// believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Asked {
    workload: u64,
    resolvers: [Address; MOST_ASKED],
    /// Where the next one goes.
    next: u32,
    reserved: u32,
}

impl Asked {
    /// Remembers that a workload asks a resolver; of five, the first is forgotten.
    #[inline(always)]
    pub fn ask(&mut self, workload: u64, resolver: Address) {
        self.workload = workload;
        if self.has(resolver) {
            return;
        }
        self.resolvers[self.next as usize & (MOST_ASKED - 1)] = resolver;
        self.next = self.next.wrapping_add(1);
    }

    /// Whether it asked a resolver.
    #[inline(always)]
    pub fn has(&self, resolver: Address) -> bool {
        let mut is_found = false;
        for asked in &self.resolvers {
            is_found |= *asked == resolver;
        }
        is_found && resolver != Address::UNSPECIFIED
    }

    /// Who asked.
    #[inline(always)]
    pub const fn workload(&self) -> u64 {
        self.workload
    }
}

/// The key of the `RESOLVERS` map: whom the workloads of a scope may ask and believe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ResolverKey {
    scope: u32,
    address: Address,
}

impl ResolverKey {
    /// A resolver of a scope.
    #[inline(always)]
    pub const fn new(scope: crate::Scope, address: Address) -> Self {
        Self { scope: scope.index(), address }
    }
}

const _: () = assert!(size_of::<Asked>() == 80 && size_of::<ResolverKey>() == 20);

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{collections::BTreeMap, net::IpAddr};

    use proptest::prelude::*;
    use zerocopy::FromZeros as _;

    use super::*;

    fn name(number: u32) -> NameId {
        NameId::new(number).unwrap()
    }

    #[test]
    fn a_name_has_an_address_that_is_nobodys() {
        assert_eq!(name(7).address().to_ip(), "100::7".parse::<IpAddr>().unwrap());
        assert!(name(u32::MAX).address().is_discard_only() && NameId::new(0).is_none());
        for other in ["100:0:0:1::", "ff::", "::ffff:100.0.0.0", "::"] {
            assert!(!Address::from(other.parse::<IpAddr>().unwrap()).is_discard_only(), "{other}");
        }
    }

    #[test]
    fn an_answer_holds_for_its_time_and_a_grace() {
        let lifetime = Lifetime { floor: 5, grace: 300 };
        for (ttl, end) in [(0, 305), (5, 305), (60, 360), (u32::MAX, LONGEST_TTL + 300)] {
            assert_eq!(lifetime.end(ttl, 0), end, "{ttl}");
        }
        assert_eq!(lifetime.end(60, u32::MAX - 1), u32::MAX);
    }

    #[test]
    fn a_socket_is_told_apart_from_one_that_asked_somebody_else() {
        let mut asked = Asked::new_zeroed();
        let resolver = |n: u128| Address::from_bits(0xffff_c000_0200 + n);
        assert!(!asked.has(Address::UNSPECIFIED) && !asked.has(resolver(0)));
        for n in 0..4 {
            asked.ask(9, resolver(n));
            asked.ask(9, resolver(n));
        }
        assert!((0..4).all(|n| asked.has(resolver(n))) && !asked.has(resolver(4)));
        asked.ask(10, resolver(4));
        assert!(asked.has(resolver(4)) && !asked.has(resolver(0)) && asked.has(resolver(1)));
        assert_eq!(asked.workload(), 10);
        asked.ask(10, Address::UNSPECIFIED);
        assert!(!asked.has(Address::UNSPECIFIED));
    }

    proptest! {
        /// The four that hold longest are kept, whatever comes later; of those that end at the same time, the earlier ones.
        #[test]
        fn no_claim_displaces_one_that_holds_as_long(made in prop::collection::vec((1..8_u32, 0..50_u32, 0..10_u32), 1..40)) {
            let (mut claims, mut model, mut now) = (Claims::default(), BTreeMap::<u32, u32>::new(), 0);
            for (number, lasts, later) in made {
                now += later;
                model.retain(|_, end| *end > now);
                let end = now + 1 + lasts;
                let fit = claims.place(Claim::new(name(number), end), now).fit;
                claims = claims.with(Claim::new(name(number), end), now);
                let first = model.values().copied().min().unwrap_or(0);
                let expected = if model.contains_key(&number) || model.len() < MOST_CLAIMS {
                    Fit::Free
                } else if first < end {
                    Fit::Displaces
                } else {
                    Fit::None
                };
                prop_assert_eq!(fit, expected);
                if expected == Fit::Displaces {
                    let held = |other: u32| (0..4).any(|index| claims.live(index, now) == NameId::new(other));
                    let gone: std::vec::Vec<u32> = model.keys().copied().filter(|&other| !held(other)).collect();
                    prop_assert_eq!(gone.len(), 1);
                    prop_assert_eq!(model.remove(&gone[0]), Some(first));
                }
                if expected != Fit::None {
                    let there = model.entry(number).or_insert(end);
                    *there = end.max(*there);
                }
                let mut held: std::vec::Vec<(u32, u32)> = (0..4).filter_map(|index| {
                    claims.live(index, now).map(|name| (name.number(), claims.get(index).expires()))
                }).collect();
                held.sort_unstable();
                prop_assert_eq!(held, model.iter().map(|(&name, &end)| (name, end)).collect::<std::vec::Vec<_>>());
                prop_assert_eq!(claims.are_over(now), model.is_empty());
            }
        }

        /// However many workloads there are, the guaranteed parts and what is common fit the table.
        #[test]
        fn the_table_has_room_for_what_is_guaranteed(quota in 0..100_000_u32, learners in 1..200_000_u32) {
            let part = guaranteed(quota, learners);
            prop_assert!(part <= quota);
            prop_assert!(u64::from(part) * u64::from(learners) + u64::from(COMMON_FACTS) < u64::from(crate::MAX_FACTS));
        }
    }
}
