//! Whom a socket has heard from: what makes a datagram a reply.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Address;

/// For how many seconds after it was heard from last a peer may be answered: as long as connection tracking keeps a stream of
/// UDP (120 s) and `WireGuard` a session (`REJECT_AFTER_TIME`, 180 s).
pub const REPLY_SECONDS: u32 = 180;

/// Peers are kept in sets of so many; of a full set, the one longest unheard is forgotten.
const WAYS: usize = 8;
/// How many sets; a power of two.
const SETS: usize = 32;

/// Somebody a socket has heard from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Peer {
    address: Address,
    /// In host byte order.
    port: u16,
    reserved: u16,
    /// Seconds since boot, and never 0 where there is a peer.
    heard: u32,
}

/// The peers that one socket has heard from, at most 256. All zeros is a socket that has heard from nobody.
///
/// It belongs to its socket, so nobody else's traffic pushes a peer out, and it is gone with it. The kernel runs the hooks
/// that use it under the socket's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Peers([[Peer; WAYS]; SETS]);

// Linux 7.x allocates the storage of sockets by `kmalloc_nolock`, which gives at most 8 KiB, the kernel's own fields included.
const _: () = assert!(size_of::<Peers>() == 6144);

impl Peers {
    /// Remembers a peer, heard from `now` seconds after boot.
    #[inline(always)]
    pub fn remember(&mut self, address: Address, port: u16, now: u32) {
        let set = self.set_mut(address, port);
        let mut oldest = 0;
        for way in 0..WAYS {
            if is(&set[way], address, port) {
                oldest = way;
                break;
            }
            if set[way].heard < set[oldest & (WAYS - 1)].heard {
                oldest = way;
            }
        }
        set[oldest & (WAYS - 1)] = Peer { address, port, reserved: 0, heard: now.max(1) };
    }

    /// Whether a peer was heard from in the [`REPLY_SECONDS`] before `now`.
    #[inline(always)]
    pub fn has(&self, address: Address, port: u16, now: u32) -> bool {
        let set = &self.0[index(address, port)];
        let mut is_found = false;
        for peer in set {
            is_found |= is(peer, address, port) && peer.heard != 0 && now.saturating_sub(peer.heard) <= REPLY_SECONDS;
        }
        is_found
    }

    #[inline(always)]
    fn set_mut(&mut self, address: Address, port: u16) -> &mut [Peer; WAYS] {
        &mut self.0[index(address, port)]
    }
}

#[inline(always)]
fn is(peer: &Peer, address: Address, port: u16) -> bool {
    peer.address == address && peer.port == port
}

/// Below [`SETS`]. Peers choose their addresses, and can only push out those of the same socket.
#[inline(always)]
const fn index(address: Address, port: u16) -> usize {
    let [a, b, c, d] = address.network_words();
    let mixed = (a ^ b.rotate_left(7) ^ c.rotate_left(14) ^ d.rotate_left(21) ^ port as u32).wrapping_mul(0x9E37_79B1);
    (mixed >> 20) as usize & (SETS - 1)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{collections::HashMap, net::IpAddr};

    use proptest::prelude::*;

    use zerocopy::FromZeros as _;

    use super::*;

    fn nobody() -> Peers {
        Peers::new_zeroed()
    }

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn a_peer_may_be_answered_for_a_while() {
        let mut peers = nobody();
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
    fn nobody_is_not_a_peer_in_the_first_second() {
        assert!(!nobody().has(address("::"), 0, 0));
        let mut peers = nobody();
        peers.remember(address("192.0.2.1"), 1, 0);
        assert!(peers.has(address("192.0.2.1"), 1, 0));
    }

    #[test]
    fn hundreds_of_peers_at_a_time_are_remembered() {
        let mut peers = nobody();
        let clients = || (0..200_u32).map(|n| (Address::from_bits(0xffff_c000_0200 + u128::from(n)), 1024));
        for (address, port) in clients() {
            peers.remember(address, port, 7);
        }
        let known = clients().filter(|&(address, port)| peers.has(address, port, 7)).count();
        assert!(known > 190, "{known}");
    }

    proptest! {
        /// Nobody is ever taken for a peer who is none, and who was heard from last is always known.
        #[test]
        fn who_is_remembered_was_heard(heard in prop::collection::vec((0..2000_u128, 0..4_u16, 0..500_u32), 1..600)) {
            let (mut peers, mut model) = (nobody(), HashMap::new());
            let mut now = 0;
            for (bits, port, later) in heard {
                now += later / 100;
                peers.remember(Address::from_bits(bits), port, now);
                prop_assert!(peers.has(Address::from_bits(bits), port, now));
                model.insert((bits, port), now);
            }
            for bits in 0..2000 {
                for port in 0..4 {
                    let is_recent = model.get(&(bits, port)).is_some_and(|&heard: &u32| now.saturating_sub(heard.max(1)) <= REPLY_SECONDS);
                    prop_assert!(is_recent || !peers.has(Address::from_bits(bits), port, now));
                }
            }
        }
    }
}
