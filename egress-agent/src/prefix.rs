//! Prefixes of the one address space that rules live in: IPv6, with IPv4 at `::ffff:0:0/96`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use egress_common::{Address, PrefixKey};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Bits before the IPv4 address in `::ffff:a.b.c.d` and in `64:ff9b::a.b.c.d`.
const V4_OFFSET: u8 = 96;
/// The first 96 bits of `::ffff:a.b.c.d` and of `64:ff9b::a.b.c.d`.
const MAPPED: u128 = 0xffff;
const NAT64: u128 = 0x0064_ff9b << 64;

/// A prefix with its host bits zero. Ordered by address, then from short to long, so that a prefix comes right before
/// all that it covers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    bits: u128,
    len: u8,
}

impl Prefix {
    /// `::/0`: every IPv6 address.
    pub const V6_ROOT: Self = Self { bits: 0, len: 0 };
    /// `::ffff:0:0/96`: every IPv4 address. No rule for IPv6 reaches into it.
    pub const V4_ROOT: Self = Self { bits: 0xffff << 32, len: V4_OFFSET };

    /// The longest that has no host bits set is `bits/128`; host bits are masked.
    fn new(bits: u128, len: u8) -> Self {
        Self { bits: bits & mask(len), len }
    }

    /// First address of the prefix.
    pub fn address(self) -> Address {
        Address::from_bits(self.bits)
    }

    /// First address of the prefix, as a number.
    pub const fn bits(self) -> u128 {
        self.bits
    }

    /// Length in bits, 96 to 128 for IPv4.
    pub const fn length(self) -> u8 {
        self.len
    }

    /// The key of the kernel's trie.
    pub fn key(self) -> PrefixKey {
        PrefixKey::new(self.address(), self.len)
    }

    /// Whether every address of `other` is in this prefix.
    pub fn covers(self, other: Self) -> bool {
        self.len <= other.len && other.bits & mask(self.len) == self.bits
    }

    /// Whether an address is in this prefix.
    pub fn contains(self, address: Address) -> bool {
        address.to_bits() & mask(self.len) == self.bits
    }

    /// The prefix one bit shorter; `None` for `::/0`.
    pub fn parent(self) -> Option<Self> {
        self.len.checked_sub(1).map(|len| Self::new(self.bits, len))
    }

    /// The other half of the parent; `None` for `::/0`.
    pub fn sibling(self) -> Option<Self> {
        let shift = 128_u8.checked_sub(self.len).filter(|&shift| shift < 128)?;
        Some(Self { bits: self.bits ^ (1 << shift), len: self.len })
    }
}

/// The first `len` bits.
const fn mask(len: u8) -> u128 {
    if len == 0 { 0 } else { u128::MAX << (128 - len) }
}

/// Masks host bits, and turns what is IPv4 in IPv6 clothes (`::ffff:a.b.c.d/n`, NAT64 `64:ff9b::a.b.c.d/n`) into IPv4.
/// NAT64 forms of loopback and unspecified addresses stay IPv6, as [`Address::judged`] has it.
pub fn canonical(net: IpNet) -> IpNet {
    let net = net.trunc();
    let IpNet::V6(v6) = net else { return net };
    let bits = v6.addr().to_bits();
    let Some(length) = v6.prefix_len().checked_sub(V4_OFFSET) else { return net };
    #[expect(clippy::cast_possible_truncation, reason = "the IPv4 address is the last 32 bits")]
    let v4 = Ipv4Addr::from_bits(bits as u32);
    let is_of_this_host = length >= 8 && (v4.octets()[0] == 127 || v4.octets()[0] == 0);
    match bits >> 32 {
        MAPPED => IpNet::V4(Ipv4Net::new_assert(v4, length)),
        NAT64 if !is_of_this_host => IpNet::V4(Ipv4Net::new_assert(v4, length)),
        _ => net,
    }
}

impl From<IpNet> for Prefix {
    fn from(net: IpNet) -> Self {
        match canonical(net) {
            IpNet::V4(v4) => Self::new(Address::from(v4.addr()).to_bits(), V4_OFFSET + v4.prefix_len()),
            IpNet::V6(v6) => Self::new(v6.addr().to_bits(), v6.prefix_len()),
        }
    }
}

impl From<IpAddr> for Prefix {
    fn from(address: IpAddr) -> Self {
        Self::new(Address::from(address).judged().to_bits(), 128)
    }
}

impl From<Prefix> for IpNet {
    fn from(prefix: Prefix) -> Self {
        if Prefix::V4_ROOT.covers(prefix) {
            let IpAddr::V4(v4) = prefix.address().to_ip() else { unreachable!("the prefix is IPv4-mapped") };
            return Self::V4(Ipv4Net::new_assert(v4, prefix.len - V4_OFFSET));
        }
        Self::V6(Ipv6Net::new_assert(Ipv6Addr::from_bits(prefix.bits), prefix.len))
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpNet::from(*self).fmt(f)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn host_bits_are_masked() {
        assert_eq!(canonical(net("10.1.2.3/8")), net("10.0.0.0/8"));
        assert_eq!(canonical(net("2001:db8::1/32")), net("2001:db8::/32"));
    }

    #[test]
    fn ipv4_in_ipv6_clothes_is_ipv4() {
        assert_eq!(canonical(net("::ffff:10.1.2.3/104")), net("10.0.0.0/8"));
        assert_eq!(canonical(net("64:ff9b::10.1.2.3/128")), net("10.1.2.3/32"));
        assert_eq!(canonical(net("::ffff:0:0/96")), net("0.0.0.0/0"));
        assert_eq!(canonical(net("64:ff9b::/96")), net("0.0.0.0/0"));
        assert_eq!(canonical(net("::ffff:127.0.0.0/104")), net("127.0.0.0/8"));
        assert_eq!(canonical(net("64:ff9b::127.0.0.1/128")), net("64:ff9b::127.0.0.1/128"));
        assert_eq!(canonical(net("64:ff9b::/104")), net("64:ff9b::/104"));
        assert_eq!(canonical(net("::/0")), net("::/0"));
        assert_eq!(canonical(net("::/64")), net("::/64"));
        assert_eq!(canonical(net("64:ff9b::/64")), net("64:ff9b::/64"));
    }

    #[test]
    fn a_prefix_comes_right_before_what_it_covers() {
        let mut prefixes: Vec<Prefix> =
            ["10.128.0.0/9", "::/0", "10.0.0.0/8", "0.0.0.0/0", "10.0.0.0/32"].map(|text| net(text).into()).into();
        prefixes.sort_unstable();
        let sorted: Vec<String> = prefixes.iter().map(Prefix::to_string).collect();
        assert_eq!(sorted, ["::/0", "0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/32", "10.128.0.0/9"]);
    }

    #[test]
    fn siblings_share_a_parent() {
        let left = Prefix::from(net("10.0.0.0/9"));
        let right = Prefix::from(net("10.128.0.0/9"));
        assert_eq!(left.sibling(), Some(right));
        assert_eq!(right.parent(), Some(net("10.0.0.0/8").into()));
        assert_eq!(Prefix::V6_ROOT.sibling(), None);
        assert_eq!(Prefix::V6_ROOT.parent(), None);
    }
}
