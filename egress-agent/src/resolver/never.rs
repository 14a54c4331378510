//! Addresses that an answer from the network never opens.
//!
//! Whoever serves a name chooses its addresses. Were they all believed, a policy that names a partner's host would let
//! that partner open this host's own services, or the metadata service of the cloud it runs in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::Ipv6Net;

/// NAT64's well-known prefix (RFC 6052); the IPv4 address is in its last four bytes.
const NAT64: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);

/// Why an address is refused; `None` if it is not. IPv4 addresses written as IPv6 ones are judged as what they are.
pub(super) fn reason(address: IpAddr) -> Option<&'static str> {
    match address.to_canonical() {
        IpAddr::V4(address) => of_v4(address),
        IpAddr::V6(address) if NAT64.contains(&address) => {
            let [.., a, b, c, d] = address.octets();
            of_v4(Ipv4Addr::new(a, b, c, d))
        }
        IpAddr::V6(address) => of_v6(address),
    }
}

fn of_v4(address: Ipv4Addr) -> Option<&'static str> {
    let rows = [
        (address.octets()[0] == 0, "unspecified"),
        (address.is_loopback(), "loopback"),
        (address.is_link_local(), "link-local"),
        (address.is_multicast(), "multicast"),
        (address.is_broadcast(), "broadcast"),
    ];
    rows.into_iter().find_map(|(is_so, reason)| is_so.then_some(reason))
}

fn of_v6(address: Ipv6Addr) -> Option<&'static str> {
    let rows = [
        (address.is_unspecified(), "unspecified"),
        (address.is_loopback(), "loopback"),
        (address.is_unicast_link_local(), "link-local"),
        (address.is_multicast(), "multicast"),
    ];
    rows.into_iter().find_map(|(is_so, reason)| is_so.then_some(reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(addresses: &[&str], expect: Option<&str>) {
        for text in addresses {
            assert_eq!(reason(text.parse().unwrap()), expect, "{text}");
        }
    }

    #[test]
    fn what_belongs_to_this_host_or_link_is_refused() {
        check(&["0.0.0.0", "0.1.2.3", "::"], Some("unspecified"));
        check(&["127.0.0.1", "127.255.255.255", "::1"], Some("loopback"));
        check(&["169.254.169.254", "169.254.0.0", "fe80::1", "febf:ffff::1"], Some("link-local"));
        check(&["224.0.0.1", "239.255.255.255", "ff02::1"], Some("multicast"));
        check(&["255.255.255.255"], Some("broadcast"));
    }

    #[test]
    fn ipv4_in_ipv6_clothes_is_judged_as_ipv4() {
        check(&["::ffff:127.0.0.1", "64:ff9b::127.0.0.1"], Some("loopback"));
        check(&["::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"], Some("link-local"));
        check(&["::ffff:0.0.0.0", "64:ff9b::"], Some("unspecified"));
        check(&["::ffff:224.0.0.1", "64:ff9b::224.0.0.1"], Some("multicast"));
        check(&["::ffff:255.255.255.255", "64:ff9b::255.255.255.255"], Some("broadcast"));
    }

    #[test]
    fn everything_else_is_not() {
        check(&["1.0.0.0", "126.255.255.255", "128.0.0.0", "169.253.255.255", "169.255.0.0", "10.0.0.1"], None);
        check(&["223.255.255.255", "240.0.0.1", "255.255.255.254"], None);
        check(&["::2", "fe00::1", "fec0::1", "fd00::1", "2001:db8::1"], None);
        check(&["::ffff:192.0.2.1", "64:ff9b::192.0.2.1", "64:ff9b:1::127.0.0.1"], None);
    }
}
