//! Where an attempt wants to go. Each attempt has addresses of its own, so what arrives late is never taken for
//! what another attempt sent.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The address of the near namespace.
pub const NEAR4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The same of IPv6.
pub const NEAR6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
/// An address of the far namespace that no attempt is about.
pub const FAR4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The broadcast address of the network of both.
pub const NETWORK4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 255);
/// The port that the policy opens, of TCP and of UDP.
pub const PORT: u16 = 4000;

/// What the policy says of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// It names the address and the port.
    Allowed,
    /// It does not.
    Refused,
}

impl Permission {
    const fn second_byte(self) -> u8 {
        match self {
            Self::Allowed => 19,
            Self::Refused => 18,
        }
    }
}

/// The destination of one attempt, in every form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    number: u16,
    permission: Permission,
}

/// What opens each form of an allowed destination.
pub const OPEN: [&str; 5] = ["198.19.0.0/16", "2001:db8:13::/48", "239.19.0.0/16", "ff15::13:0/112", "fe80::13:0/112"];

impl Target {
    /// The target of the attempt of a number.
    pub const fn new(number: u16, permission: Permission) -> Self {
        Self { number, permission }
    }

    /// Its number.
    pub const fn number(self) -> u16 {
        self.number
    }

    /// What the policy says of it.
    pub const fn permission(self) -> Permission {
        self.permission
    }

    /// An IPv4 address.
    pub const fn v4(self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(198, self.permission.second_byte(), high, low)
    }

    /// An IPv6 address.
    pub const fn v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, self.prefix(), 0, 0, 0, 0, self.number)
    }

    /// An IPv4 multicast group.
    pub const fn group4(self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(239, self.permission.second_byte(), high, low)
    }

    /// An IPv6 multicast group.
    pub const fn group6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xff15, 0, 0, 0, 0, 0, self.prefix(), self.number)
    }

    /// A link-local IPv6 address.
    pub const fn link_local(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, self.prefix(), self.number)
    }

    /// A loopback address, which no rule names.
    pub const fn loopback(self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(127, self.permission.second_byte(), high, low)
    }

    /// The IPv4 address as NAT64 writes it.
    pub fn nat64(self) -> Ipv6Addr {
        let [a, b, c, d] = self.v4().octets().map(u16::from);
        Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, a << 8 | b, c << 8 | d)
    }

    /// The IPv4 address as an IPv6 socket writes it.
    pub const fn mapped(self) -> Ipv6Addr {
        self.v4().to_ipv6_mapped()
    }

    /// An allowed address of the same attempt that is not the target.
    pub const fn friend4(self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(198, Permission::Allowed.second_byte(), 0x80 | high, low)
    }

    /// An allowed multicast group that is not the target.
    pub const fn friend_group4(self) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(239, Permission::Allowed.second_byte(), 0x80 | high, low)
    }

    /// The same as [`Self::friend4`] of IPv6.
    pub const fn friend6(self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0x13, 0, 0, 0, 1, self.number)
    }

    /// Every form as the bytes of a packet.
    pub fn forms(self) -> Vec<Vec<u8>> {
        let v4 = [self.v4(), self.group4(), self.loopback()].map(|form| form.octets().to_vec());
        let v6 = [self.v6(), self.group6(), self.link_local()].map(|form| form.octets().to_vec());
        [&v4[..], &v6[..]].concat()
    }

    const fn prefix(self) -> u16 {
        match self.permission {
            Permission::Allowed => 0x13,
            Permission::Refused => 0x12,
        }
    }
}

/// An address at the port that the policy opens.
pub fn at(address: impl Into<IpAddr>) -> SocketAddr {
    SocketAddr::new(address.into(), PORT)
}
