//! Addresses and prefixes as documents write them.

use std::net::IpAddr;

use ipnet::IpNet;

use super::diagnostic::quoted;
use crate::prefix::canonical;

/// Why a text is no address: what is wrong, and what to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadAddress {
    /// What is wrong.
    pub message: String,
    /// What to write.
    pub help: &'static str,
}

/// A prefix that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// Host bits masked, IPv4 in IPv6 clothes turned into IPv4.
    pub net: IpNet,
    /// Whether host bits had to be masked.
    pub had_host_bits: bool,
}

/// An address or a CIDR prefix.
pub fn network(text: &str) -> Result<Network, BadAddress> {
    let Some((address, length)) = text.split_once('/') else {
        return address(text).map(|address| Network { net: IpNet::from(address), had_host_bits: false });
    };
    let address: IpAddr = address.parse().map_err(|_| bad(text, hint(address)))?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let help = if address.is_ipv4() {
        "IPv4 prefixes have a length of 0 to 32"
    } else {
        "IPv6 prefixes have a length of 0 to 128"
    };
    let digits =
        length.len() <= 3 && length.bytes().all(|b| b.is_ascii_digit()) && (length == "0" || !length.starts_with('0'));
    let length: u8 = length.parse().ok().filter(|&length| digits && length <= most).ok_or_else(|| bad(text, help))?;
    let net = IpNet::new(address, length).map_err(|_| bad(text, help))?;
    Ok(Network { net: canonical(net), had_host_bits: net.trunc() != net })
}

/// One address, IPv4 in IPv6 clothes turned into IPv4.
pub fn address(text: &str) -> Result<IpAddr, BadAddress> {
    let address: IpAddr = text.parse().map_err(|_| bad(text, hint(text)))?;
    Ok(canonical(IpNet::from(address)).addr())
}

fn bad(text: &str, help: &'static str) -> BadAddress {
    BadAddress { message: format!("{} is not an IP address or prefix", quoted(text)), help }
}

fn hint(text: &str) -> &'static str {
    let octets: Vec<&str> = text.split('.').collect();
    let numbers = octets.iter().all(|octet| !octet.is_empty() && octet.bytes().all(|b| b.is_ascii_digit()));
    match text {
        "" => "write an address, as `203.0.113.7` or `203.0.113.0/24`",
        _ if text.contains('%') => "write the address without a zone: rules hold on every interface",
        _ if text.contains('*') => "write a prefix, as `10.0.0.0/8`, in place of `*`",
        _ if text.starts_with('[') => "write IPv6 addresses without brackets; ports have a field of their own",
        _ if text.starts_with("unix:") => "sockets of this host need no rule; leave the address out",
        _ if numbers && octets.iter().any(|octet| octet.len() > 1 && octet.starts_with('0')) => {
            "write the four numbers without leading zeros, which some readers take for octal"
        }
        _ if numbers && octets.len() == 4 => "the four numbers of an IPv4 address are 0 to 255",
        _ if numbers => "an IPv4 address has four numbers",
        _ if text.contains('-') && octets.len() > 4 => "write a range as prefixes, such as `10.0.0.0/8`",
        _ if text.contains(':') && text.contains('.') && !text.contains("::") => "ports have a field of their own",
        _ if text.contains(':') => "an IPv6 address is up to eight groups of hexadecimal digits, `::` at most once",
        _ => "names belong in the field for hosts",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_bits_are_masked_and_ipv4_is_unwrapped() {
        for (text, net, had_host_bits) in [
            ("10.1.2.3", "10.1.2.3/32", false),
            ("10.1.2.3/8", "10.0.0.0/8", true),
            ("0.0.0.0/0", "0.0.0.0/0", false),
            ("001:db8::/32", "1:db8::/32", false),
            ("2001:db8::1/64", "2001:db8::/64", true),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8", false),
            ("::ffff:10.0.0.1", "10.0.0.1/32", false),
            ("64:ff9b::10.0.0.1", "10.0.0.1/32", false),
        ] {
            assert_eq!(network(text), Ok(Network { net: net.parse().unwrap(), had_host_bits }), "{text}");
        }
    }

    #[test]
    fn other_notations_are_refused_with_a_hint() {
        for text in [
            "",
            "10.0.0",
            "10.0.0.256",
            "010.0.0.1",
            "10.0.0.0/33",
            "10.0.0.0/08",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "::1/129",
        ] {
            assert!(network(text).is_err(), "{text}");
        }
        for text in [
            "fe80::1%eth0",
            "fe80::%eth0/64",
            "[::1]",
            "10.*",
            "10.0.0.1:80",
            "db",
            "1.1.1.1/8/8",
            " 1.1.1.1",
            "1::2::3",
        ] {
            assert!(network(text).is_err(), "{text}");
        }
        assert_eq!(
            network("fe80::1%eth0").unwrap_err().help,
            "write the address without a zone: rules hold on every interface"
        );
        assert!(address("10.0.0.0/8").is_err());
    }
}
