//! Addresses: one 16-byte form for both families.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The third word of an IPv4-mapped address, `::ffff:0:0/96` (RFC 4291, 2.5.5.2).
pub(crate) const MAPPED: u32 = 0x0000_ffff;
/// The first word of the well-known NAT64 prefix `64:ff9b::/96` (RFC 6052, 2.1).
const NAT64: u32 = 0x0064_ff9b;

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`: four words in network byte order.
///
/// One form for both families means one map, one code path, and no IPv4-mapped detour around an IPv4 rule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Address([u32; 4]);

impl Address {
    /// `::`: no address.
    pub const UNSPECIFIED: Self = Self([0; 4]);

    /// From the words of `bpf_sock_addr.user_ip6`, which are in network byte order.
    #[inline(always)]
    pub const fn from_network_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// From an IPv6 header.
    #[inline(always)]
    pub const fn from_network_bytes(bytes: [u8; 16]) -> Self {
        Self(zerocopy::transmute!(bytes))
    }

    /// From `bpf_sock_addr.user_ip4`, which is in network byte order.
    #[inline(always)]
    pub const fn from_network_v4(word: u32) -> Self {
        Self([0, 0, MAPPED.to_be(), word])
    }

    /// The words, in network byte order.
    #[inline(always)]
    pub const fn network_words(self) -> [u32; 4] {
        self.0
    }

    /// The address whose rules judge this one: the IPv4 address inside a NAT64 address, else the address itself.
    ///
    /// A NAT64 gateway turns `64:ff9b::a.b.c.d` into IPv4 on the way, so a rule for `a.b.c.d` must hold for it. Loopback
    /// and unspecified addresses are no IPv4 address behind a gateway: a rule that opens this host must not send packets
    /// there.
    #[inline(always)]
    #[must_use]
    pub const fn judged(self) -> Self {
        let first_byte = u32::from_be(self.0[3]) >> 24;
        let is_of_this_host = first_byte == 127 || first_byte == 0;
        if is_of_this_host { self } else { self.inside() }
    }

    /// The IPv4 address inside a NAT64 address, else the address itself.
    #[inline(always)]
    #[must_use]
    pub(crate) const fn inside(self) -> Self {
        let [a, b, c, d] = self.0;
        if a == NAT64.to_be() && b == 0 && c == 0 { Self::from_network_v4(d) } else { self }
    }

    /// `0.0.0.0`, `::` or `::ffff:0.0.0.0`.
    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        let [a, b, c, d] = self.0;
        a == 0 && b == 0 && d == 0 && (c == 0 || c == MAPPED.to_be())
    }

    /// `127.0.0.0/8` or `::1`.
    #[inline(always)]
    pub const fn is_loopback(self) -> bool {
        let [a, b, c, d] = self.0;
        self.is_loopback_v6() || (a == 0 && b == 0 && c == MAPPED.to_be() && u32::from_be(d) >> 24 == 127)
    }

    /// `::1`.
    #[inline(always)]
    pub const fn is_loopback_v6(self) -> bool {
        let [a, b, c, d] = self.0;
        a == 0 && b == 0 && c == 0 && d == 1_u32.to_be()
    }

    /// The address, IPv4 where it is IPv4-mapped.
    pub const fn to_ip(self) -> IpAddr {
        let bits = self.to_bits();
        match Ipv6Addr::from_bits(bits).to_ipv4_mapped() {
            Some(v4) => IpAddr::V4(v4),
            None => IpAddr::V6(Ipv6Addr::from_bits(bits)),
        }
    }

    /// The 128 bits as a number, for arithmetic on prefixes.
    pub const fn to_bits(self) -> u128 {
        let [a, b, c, d] = self.0;
        ((u32::from_be(a) as u128) << 96)
            | ((u32::from_be(b) as u128) << 64)
            | ((u32::from_be(c) as u128) << 32)
            | u32::from_be(d) as u128
    }

    /// The inverse of [`Address::to_bits`].
    #[expect(clippy::cast_possible_truncation, reason = "each word takes its own 32 bits of the number")]
    pub const fn from_bits(bits: u128) -> Self {
        Self([
            ((bits >> 96) as u32).to_be(),
            ((bits >> 64) as u32).to_be(),
            ((bits >> 32) as u32).to_be(),
            (bits as u32).to_be(),
        ])
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        Self::from_network_v4(address.to_bits().to_be())
    }
}

impl From<Ipv6Addr> for Address {
    fn from(address: Ipv6Addr) -> Self {
        Self::from_bits(address.to_bits())
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl core::fmt::Debug for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(&self.to_ip(), f)
    }
}

/// Key of a policy trie, laid out as the kernel's `struct bpf_lpm_trie_key`: length in bits, then the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PrefixKey {
    prefix_len: u32,
    address: Address,
}

impl PrefixKey {
    /// `address/prefix_len`, with `prefix_len` between 0 and 128 also for IPv4.
    #[inline(always)]
    pub const fn new(address: Address, prefix_len: u8) -> Self {
        Self { prefix_len: prefix_len as u32, address }
    }

    /// The key that looks up one address.
    #[inline(always)]
    pub const fn host(address: Address) -> Self {
        Self::new(address, 128)
    }
}

const _: () = assert!(size_of::<Address>() == 16 && align_of::<Address>() == 4);
const _: () = assert!(size_of::<PrefixKey>() == 20 && align_of::<PrefixKey>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn ipv4_and_its_mapped_form_are_one_address() {
        assert_eq!(address("10.1.2.3"), address("::ffff:10.1.2.3"));
        assert_eq!(address("::ffff:10.1.2.3").to_ip(), "10.1.2.3".parse::<IpAddr>().unwrap());
        assert_ne!(address("10.1.2.3"), address("::10.1.2.3"));
    }

    #[test]
    fn bytes_are_in_network_order() {
        assert_eq!(address("1.2.3.4").as_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 1, 2, 3, 4]);
        assert_eq!(&PrefixKey::new(address("2001:db8::1"), 32).as_bytes()[4..8], [0x20, 0x01, 0x0d, 0xb8]);
    }

    #[test]
    fn a_nat64_address_is_judged_as_the_ipv4_address_inside() {
        assert_eq!(address("64:ff9b::10.1.2.3").judged(), address("10.1.2.3"));
        assert_eq!(address("64:ff9b:1::10.1.2.3").judged(), address("64:ff9b:1::10.1.2.3"));
        assert_eq!(address("64:ff9b::1:0:0").judged(), address("64:ff9b::1:0:0"));
        for own in ["64:ff9b::127.0.0.1", "64:ff9b::127.255.0.1", "64:ff9b::0.0.0.0", "64:ff9b::0.1.2.3"] {
            assert_eq!(address(own).judged(), address(own), "a gateway is not this host");
        }
    }

    #[test]
    fn every_unspecified_form_is_recognised() {
        for text in ["0.0.0.0", "::", "::ffff:0.0.0.0"] {
            assert!(address(text).is_unspecified(), "{text}");
        }
        for text in ["0.0.0.1", "::1", "::1:0:0", "127.0.0.1"] {
            assert!(!address(text).is_unspecified(), "{text}");
        }
    }
}
