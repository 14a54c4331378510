//! Addresses that an answer of DNS never opens.
//!
//! Whoever serves a name chooses its addresses. Were they all believed, a policy that names a partner's host would let
//! that partner open this host's own services, or the metadata service of the cloud it runs in.

use crate::{Address, address::MAPPED, coded_enum};

coded_enum! {
    /// Why no name opens an address.
    pub enum Reserved {
        /// This host, by no address at all.
        Unspecified = 0 => "unspecified",
        /// This host.
        Loopback = 1 => "loopback",
        /// The link, which is where clouds put their metadata services.
        LinkLocal = 2 => "link-local",
        /// Many hosts.
        Multicast = 3 => "multicast",
        /// Every host.
        Broadcast = 4 => "broadcast",
        /// No host (RFC 6666); the rules of names stand under such addresses.
        DiscardOnly = 5 => "discard-only",
    }
}

impl Address {
    /// Why no name opens it; `None` if one may. What is written as an IPv6 address and judged as an IPv4 one counts as that.
    #[inline(always)]
    pub const fn reserved(self) -> Option<Reserved> {
        let [a, b, c, d] = self.inside().network_words();
        if a == 0 && b == 0 && c == MAPPED.to_be() { reserved_v4(u32::from_be(d)) } else { self.reserved_v6() }
    }

    #[inline(always)]
    const fn reserved_v6(self) -> Option<Reserved> {
        let first = u32::from_be(self.network_words()[0]);
        if self.is_unspecified() {
            Some(Reserved::Unspecified)
        } else if self.is_loopback_v6() {
            Some(Reserved::Loopback)
        } else if first >> 22 == 0xfe80 >> 6 {
            Some(Reserved::LinkLocal)
        } else if first >> 24 == 0xff {
            Some(Reserved::Multicast)
        } else if self.is_discard_only() {
            Some(Reserved::DiscardOnly)
        } else {
            None
        }
    }
}

#[inline(always)]
const fn reserved_v4(address: u32) -> Option<Reserved> {
    match address >> 24 {
        0 => Some(Reserved::Unspecified),
        127 => Some(Reserved::Loopback),
        169 if address >> 16 == 0xa9fe => Some(Reserved::LinkLocal),
        224..=239 => Some(Reserved::Multicast),
        _ if address == u32::MAX => Some(Reserved::Broadcast),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    #[track_caller]
    fn check(addresses: &[&str], expect: Option<Reserved>) {
        for text in addresses {
            assert_eq!(Address::from(text.parse::<IpAddr>().unwrap()).reserved(), expect, "{text}");
        }
    }

    #[test]
    fn what_belongs_to_this_host_or_link_is_refused() {
        check(&["0.0.0.0", "0.1.2.3", "::"], Some(Reserved::Unspecified));
        check(&["127.0.0.1", "127.255.255.255", "::1"], Some(Reserved::Loopback));
        check(&["169.254.169.254", "169.254.0.0", "fe80::1", "febf:ffff::1"], Some(Reserved::LinkLocal));
        check(&["224.0.0.1", "239.255.255.255", "ff02::1"], Some(Reserved::Multicast));
        check(&["255.255.255.255"], Some(Reserved::Broadcast));
        check(&["100::", "100::1", "100::ffff:ffff:ffff:ffff"], Some(Reserved::DiscardOnly));
    }

    #[test]
    fn ipv4_in_ipv6_clothes_is_judged_as_ipv4() {
        check(&["::ffff:127.0.0.1", "64:ff9b::127.0.0.1"], Some(Reserved::Loopback));
        check(&["::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"], Some(Reserved::LinkLocal));
        check(&["::ffff:0.0.0.0", "64:ff9b::"], Some(Reserved::Unspecified));
        check(&["::ffff:224.0.0.1", "64:ff9b::224.0.0.1"], Some(Reserved::Multicast));
        check(&["::ffff:255.255.255.255", "64:ff9b::255.255.255.255"], Some(Reserved::Broadcast));
    }

    #[test]
    fn everything_else_is_not() {
        check(&["1.0.0.0", "126.255.255.255", "128.0.0.0", "169.253.255.255", "169.255.0.0", "10.0.0.1"], None);
        check(&["223.255.255.255", "240.0.0.1", "255.255.255.254"], None);
        check(&["::2", "fe00::1", "fec0::1", "fd00::1", "2001:db8::1", "100:0:0:1::"], None);
        check(&["::ffff:192.0.2.1", "64:ff9b::192.0.2.1", "64:ff9b:1::127.0.0.1"], None);
    }
}
