//! Whom a socket has heard from: what makes a datagram a reply.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Address;

/// For how many seconds after it was heard from last a peer may be answered: as long as connection tracking keeps a stream of
/// UDP (120 s) and `WireGuard` a session (`REJECT_AFTER_TIME`, 180 s).
pub const REPLY_SECONDS: u32 = 180;

/// How many peers of one socket are remembered: those heard from last. A power of two.
pub const MAX_PEERS: usize = 256;

/// A peer, by its index plus one.
type Link = u16;
/// No peer.
const NONE: Link = 0;

/// A peer that a socket has heard from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Peer {
    address: Address,
    /// Seconds since boot.
    heard: u32,
    /// In host byte order.
    port: u16,
    /// The next of the same bucket.
    next: Link,
    /// The one heard from next after this one.
    newer: Link,
    /// The one heard from last before this one.
    older: Link,
}

/// The peers that one socket has heard from, at most [`MAX_PEERS`]. All zeros is a socket that has heard from no peer.
///
/// Peers are found by their bucket, and ordered by a list, so that of two that are heard in the same second the earlier one is
/// forgotten first. Peers choose their addresses and so their bucket: a search then takes longer, at most [`MAX_PEERS`] steps,
/// and finds the same.
///
/// It belongs to its socket, so no other socket's traffic pushes a peer out, and it is gone with it. The kernel runs the hooks
/// that use it under the socket's lock. Links are masked and walks are bounded, so whatever the bytes are, nothing outside is
/// read or written, and each call ends.
///
/// Agents of several versions share it: `map::PEERS` has the version of this layout in its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Peers {
    entries: [Peer; MAX_PEERS],
    buckets: [Link; MAX_PEERS],
    newest: Link,
    oldest: Link,
    /// How many there are: the links up to this one.
    count: u16,
    reserved: u16,
}

// Linux 7.x allocates the storage of sockets by `kmalloc_nolock`, which gives at most 8 KiB, the kernel's own fields included:
// up to 192 bytes.
const _: () = assert!(size_of::<Peers>() == 7688 && size_of::<Peers>() + 192 <= 8192);

impl Peers {
    /// Remembers a peer, heard from `now` seconds after boot.
    #[inline(always)]
    pub fn remember(&mut self, address: Address, port: u16, now: u32) {
        let bucket = bucket(address, port);
        let mut link = self.find(bucket, address, port);
        if link == NONE {
            link = self.vacate();
            let next = self.buckets[bucket];
            let peer = self.at_mut(link);
            (peer.address, peer.port, peer.next) = (address, port, next);
            self.buckets[bucket] = link;
            self.make_newest(link);
        } else if link != self.newest {
            self.take_out(link);
            self.make_newest(link);
        }
        self.at_mut(link).heard = now;
    }

    /// Whether a peer was heard from in the [`REPLY_SECONDS`] before `now`.
    #[inline(always)]
    pub fn has(&self, address: Address, port: u16, now: u32) -> bool {
        let link = self.find(bucket(address, port), address, port);
        link != NONE && now.saturating_sub(self.at(link).heard) <= REPLY_SECONDS
    }

    /// Where a peer is.
    #[inline(always)]
    fn find(&self, bucket: usize, address: Address, port: u16) -> Link {
        let mut link = self.buckets[bucket];
        for _ in 0..MAX_PEERS {
            if link == NONE {
                return NONE;
            }
            let peer = self.at(link);
            if peer.is(address, port) {
                return link;
            }
            link = peer.next;
        }
        NONE
    }

    /// A place for one more: one that was never used, or that of the peer longest unheard, which is forgotten.
    #[inline(always)]
    fn vacate(&mut self) -> Link {
        if (self.count as usize) < MAX_PEERS {
            self.count += 1;
            return self.count;
        }
        let oldest = self.oldest;
        self.take_out(oldest);
        self.take_off(oldest);
        oldest
    }

    /// Takes a peer off the chain of its bucket.
    #[inline(always)]
    fn take_off(&mut self, link: Link) {
        let peer = *self.at(link);
        let bucket = bucket(peer.address, peer.port);
        let mut before = self.buckets[bucket];
        if before == link {
            self.buckets[bucket] = peer.next;
            return;
        }
        for _ in 0..MAX_PEERS {
            if before == NONE {
                return;
            }
            let next = self.at(before).next;
            if next == link {
                self.at_mut(before).next = peer.next;
                return;
            }
            before = next;
        }
    }

    /// Takes a peer out of the order.
    #[inline(always)]
    fn take_out(&mut self, link: Link) {
        let Peer { newer, older, .. } = *self.at(link);
        if newer == NONE {
            self.newest = older;
        } else {
            self.at_mut(newer).older = older;
        }
        if older == NONE {
            self.oldest = newer;
        } else {
            self.at_mut(older).newer = newer;
        }
    }

    /// Puts a peer that is in no order before all others.
    #[inline(always)]
    fn make_newest(&mut self, link: Link) {
        let second = self.newest;
        let peer = self.at_mut(link);
        (peer.newer, peer.older) = (NONE, second);
        if second == NONE {
            self.oldest = link;
        } else {
            self.at_mut(second).newer = link;
        }
        self.newest = link;
    }

    #[inline(always)]
    const fn at(&self, link: Link) -> &Peer {
        &self.entries[index(link)]
    }

    #[inline(always)]
    const fn at_mut(&mut self, link: Link) -> &mut Peer {
        &mut self.entries[index(link)]
    }
}

impl Peer {
    /// In one comparison, so that the verifier has one branch for each step of a walk.
    #[inline(always)]
    const fn is(&self, address: Address, port: u16) -> bool {
        let (own, other) = (self.address.network_words(), address.network_words());
        let differs = (own[0] ^ other[0]) | (own[1] ^ other[1]) | (own[2] ^ other[2]) | (own[3] ^ other[3]);
        differs | (self.port ^ port) as u32 == 0
    }
}

/// Below [`MAX_PEERS`], whatever the link is.
#[inline(always)]
const fn index(link: Link) -> usize {
    link.wrapping_sub(1) as usize & (MAX_PEERS - 1)
}

/// Below [`MAX_PEERS`].
#[inline(always)]
const fn bucket(address: Address, port: u16) -> usize {
    let [a, b, c, d] = address.network_words();
    let mixed = (a ^ b.rotate_left(7) ^ c.rotate_left(14) ^ d.rotate_left(21) ^ port as u32).wrapping_mul(0x9E37_79B1);
    (mixed >> 20) as usize & (MAX_PEERS - 1)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{net::IpAddr, vec::Vec};

    use proptest::prelude::*;

    use zerocopy::FromZeros as _;

    use super::*;

    fn no_peers() -> Peers {
        Peers::new_zeroed()
    }

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn a_peer_may_be_answered_for_a_while() {
        let mut peers = no_peers();
        peers.remember(address("192.0.2.1"), 5353, 1000);
        for (at, port, now, expected) in [
            ("192.0.2.1", 5353, 1000, true),
            ("192.0.2.1", 5353, 1000 + REPLY_SECONDS, true),
            ("192.0.2.1", 5353, 1001 + REPLY_SECONDS, false),
            ("192.0.2.1", 5354, 1000, false),
            ("192.0.2.2", 5353, 1000, false),
            ("::", 0, 0, false),
        ] {
            assert_eq!(peers.has(address(at), port, now), expected, "{at} {port} {now}");
        }
    }

    #[test]
    fn a_socket_that_has_heard_from_no_peer_has_none_in_the_first_second() {
        assert!(!no_peers().has(address("::"), 0, 0));
        let mut peers = no_peers();
        peers.remember(address("192.0.2.1"), 1, 0);
        assert!(peers.has(address("192.0.2.1"), 1, 0) && !peers.has(address("::"), 0, 0));
    }

    /// Thousands are heard in one second.
    #[test]
    fn the_last_256_are_remembered_whatever_their_addresses() {
        let every = |n: u32| (Address::from_bits(0xffff_c612_0000 + u128::from(n)), 1024);
        let of_one_bucket = |n: &u32| bucket(every(*n).0, 1024) == 7;
        for clients in [
            (0..5_000).map(every).collect::<Vec<_>>(),
            (0..500_000).filter(of_one_bucket).map(every).take(1_000).collect(),
        ] {
            let mut peers = no_peers();
            for (heard, &(address, port)) in clients.iter().enumerate() {
                peers.remember(address, port, 7);
                let known = |at: usize| peers.has(clients[at].0, clients[at].1, 7);
                assert!((heard.saturating_sub(MAX_PEERS - 1)..=heard).all(known), "{heard}");
                assert!((0..heard.saturating_sub(MAX_PEERS - 1)).rev().take(300).all(|at| !known(at)), "{heard}");
            }
        }
    }

    /// What is known, the slow way: the last to be heard from is last.
    #[derive(Default)]
    struct Model(Vec<(u128, u16, u32)>);

    impl Model {
        fn remember(&mut self, bits: u128, port: u16, now: u32) {
            self.0.retain(|&(other, other_port, _)| (other, other_port) != (bits, port));
            self.0.push((bits, port, now));
            if self.0.len() > MAX_PEERS {
                self.0.remove(0);
            }
        }

        fn has(&self, bits: u128, port: u16, now: u32) -> bool {
            self.0.iter().any(|&(other, other_port, heard)| {
                (other, other_port) == (bits, port) && now.saturating_sub(heard) <= REPLY_SECONDS
            })
        }
    }

    /// Addresses of all buckets, and of few.
    fn bits() -> impl Strategy<Value = u128> {
        let of_few_buckets =
            || (0..60_000_u128).filter(|&bits| bucket(Address::from_bits(bits), 1) < 2).take(400).collect::<Vec<_>>();
        prop_oneof![0..400_u128, prop::sample::select(of_few_buckets())]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The peers that are known are exactly the last 256 that were heard from, while they may be answered.
        #[test]
        fn the_last_to_be_heard_from_are_known_and_no_others(
            heard in prop::collection::vec((bits(), 1..3_u16, 0..101_u32), 1..2_000),
            later in 0..2 * REPLY_SECONDS,
        ) {
            let (mut peers, mut model, mut now) = (no_peers(), Model::default(), 0);
            for &(bits, port, passed) in &heard {
                now += passed / 100;
                peers.remember(Address::from_bits(bits), port, now);
                model.remember(bits, port, now);
                prop_assert!(peers.has(Address::from_bits(bits), port, now));
            }
            now += later;
            for &(bits, port, _) in &heard {
                prop_assert_eq!(peers.has(Address::from_bits(bits), port, now), model.has(bits, port, now));
            }
        }

        /// Bytes that no call left so: each call ends, and nothing outside is touched.
        #[test]
        fn whatever_the_bytes_are_each_call_ends(
            bytes in prop::collection::vec(any::<u8>(), size_of::<Peers>()),
            heard in prop::collection::vec((bits(), 1..3_u16), 1..50),
        ) {
            let mut peers = Peers::read_from_bytes(&bytes).unwrap();
            for (bits, port) in heard {
                peers.has(Address::from_bits(bits), port, 7);
                peers.remember(Address::from_bits(bits), port, 7);
            }
        }
    }
}
