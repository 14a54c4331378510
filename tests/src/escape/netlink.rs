//! Interfaces, addresses and routes by rtnetlink, for machines without the `ip` program.
//!
//! Only the few requests the battery needs: a pair of interfaces across two namespaces, a tunnel, an address, a route.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result};

/// The hardware address of both ends: neither then needs to ask who has an address, and no question delays a packet.
const HARDWARE_ADDRESS: [u8; 6] = [2, 0, 0, 0xe5, 0xca, 0xbe];

const VETH_INFO_PEER: u16 = 1;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_GROUP: u16 = 2;
const IFLA_VXLAN_PORT: u16 = 15;
const VXLAN_PORT: u16 = 4789;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RT_SCOPE_LINK: u8 = 253;
const RT_SCOPE_HOST: u8 = 254;

const GENL_ID_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NLA_F_NESTED: u16 = 1 << 15;
const MPTCP_PM_CMD_ADD_ADDR: u8 = 1;
const MPTCP_PM_CMD_FLUSH_ADDRS: u8 = 4;
const MPTCP_PM_CMD_SET_LIMITS: u8 = 5;
const MPTCP_PM_ATTR_ADDR: u16 = 1;
const MPTCP_PM_ATTR_RCV_ADD_ADDRS: u16 = 2;
const MPTCP_PM_ATTR_SUBFLOWS: u16 = 3;
const MPTCP_PM_ADDR_ATTR_FAMILY: u16 = 1;
const MPTCP_PM_ADDR_ATTR_ADDR4: u16 = 3;
const MPTCP_PM_ADDR_ATTR_ADDR6: u16 = 4;
const MPTCP_PM_ADDR_ATTR_FLAGS: u16 = 6;
const MPTCP_PM_ADDR_FLAG_SIGNAL: u32 = 1;

/// What a route does with packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Sends them out of an interface.
    Out(u32),
    /// Takes them for this host. It stands in the main table, so that more exact routes of that table beat it.
    Here,
}

/// Makes a pair of interfaces: `near` in this namespace, `far` in another.
pub fn pair(near: &str, far: &str, namespace: &OwnedFd) -> Result<()> {
    let mut peer = header(0, 0);
    peer.extend(attribute(IFLA_IFNAME, &text(far)));
    peer.extend(attribute(IFLA_ADDRESS, &HARDWARE_ADDRESS));
    peer.extend(attribute(IFLA_NET_NS_FD, &namespace.as_raw_fd().to_ne_bytes()));
    let data = attribute(VETH_INFO_PEER, &peer);
    let mut body = header(0, 0);
    body.extend(attribute(IFLA_ADDRESS, &HARDWARE_ADDRESS));
    body.extend(link(near, "veth", &data));
    create(libc::RTM_NEWLINK, &body).with_context(|| format!("cannot make the pair {near} and {far}"))
}

/// Makes a VXLAN tunnel of a number to one remote host.
pub fn tunnel(name: &str, id: u32, remote: std::net::Ipv4Addr) -> io::Result<()> {
    let mut data = attribute(IFLA_VXLAN_ID, &(id & 0xff_ffff).to_ne_bytes());
    data.extend(attribute(IFLA_VXLAN_GROUP, &remote.octets()));
    data.extend(attribute(IFLA_VXLAN_PORT, &VXLAN_PORT.to_be_bytes()));
    let mut body = header(0, 0);
    body.extend(link(name, "vxlan", &data));
    create(libc::RTM_NEWLINK, &body)
}

/// Sets an interface up, without a protocol to find its neighbours.
pub fn set_up(index: u32) -> io::Result<()> {
    let flags = (libc::IFF_UP | libc::IFF_NOARP).cast_unsigned();
    request(libc::RTM_NEWLINK, 0, &header(index, flags))
}

/// Removes an interface.
pub fn remove(index: u32) -> io::Result<()> {
    request(libc::RTM_DELLINK, 0, &header(index, 0))
}

/// Gives an interface an address at once, without a check for duplicates.
pub fn address(index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
    let bytes = octets(address);
    let mut body = vec![family(address), prefix, IFA_F_NODAD, 0];
    body.extend(index.to_ne_bytes());
    body.extend(attribute(IFA_LOCAL, &bytes));
    body.extend(attribute(IFA_ADDRESS, &bytes));
    create(libc::RTM_NEWADDR, &body)
}

/// Adds a route to a prefix, which is everything if it has no bits.
pub fn route(to: IpAddr, prefix: u8, route: Route, loopback: u32) -> io::Result<()> {
    let (kind, scope, index) = match route {
        Route::Out(index) => (RTN_UNICAST, RT_SCOPE_LINK, index),
        Route::Here => (RTN_LOCAL, RT_SCOPE_HOST, loopback),
    };
    let mut body = vec![family(to), prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, kind, 0, 0, 0, 0];
    if prefix > 0 {
        body.extend(attribute(RTA_DST, &octets(to)));
    }
    body.extend(attribute(RTA_OIF, &index.to_ne_bytes()));
    create(libc::RTM_NEWROUTE, &body)
}

/// The index of an interface of this namespace.
pub fn index(name: &str) -> io::Result<u32> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: `name` is a C string that lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Lets MPTCP connections of this namespace use addresses that their peers announce.
pub fn accept_announcements() -> io::Result<()> {
    let limits = [(MPTCP_PM_ATTR_RCV_ADD_ADDRS, 8_u32), (MPTCP_PM_ATTR_SUBFLOWS, 8)];
    let body = limits.map(|(kind, limit)| attribute(kind, &limit.to_ne_bytes())).concat();
    multipath(MPTCP_PM_CMD_SET_LIMITS, &body)
}

/// Announces an address to the peers of MPTCP connections of this namespace, and no other.
pub fn announce(address: IpAddr) -> io::Result<()> {
    multipath(MPTCP_PM_CMD_FLUSH_ADDRS, &[])?;
    let family = u16::from(family(address));
    let kind = if address.is_ipv4() { MPTCP_PM_ADDR_ATTR_ADDR4 } else { MPTCP_PM_ADDR_ATTR_ADDR6 };
    let mut endpoint = attribute(MPTCP_PM_ADDR_ATTR_FAMILY, &family.to_ne_bytes());
    endpoint.extend(attribute(kind, &octets(address)));
    endpoint.extend(attribute(MPTCP_PM_ADDR_ATTR_FLAGS, &MPTCP_PM_ADDR_FLAG_SIGNAL.to_ne_bytes()));
    multipath(MPTCP_PM_CMD_ADD_ADDR, &attribute(MPTCP_PM_ATTR_ADDR | NLA_F_NESTED, &endpoint))
}

/// A request to the path manager of MPTCP, which is a family of generic netlink.
fn multipath(command: u8, body: &[u8]) -> io::Result<()> {
    let name = attribute(CTRL_ATTR_FAMILY_NAME, &text("mptcp_pm"));
    let question = message(GENL_ID_CTRL, 0, &[&[CTRL_CMD_GETFAMILY, 1, 0, 0][..], &name].concat());
    let family = family_id(&exchange(libc::NETLINK_GENERIC, &question)?)?;
    let body = [&[command, 1, 0, 0][..], body].concat();
    answer(&exchange(libc::NETLINK_GENERIC, &message(family, libc::NLM_F_ACK, &body))?)
}

/// The number of a family is an attribute of the answer, or the answer is an error.
fn family_id(told: &[u8]) -> io::Result<u16> {
    let mut rest = told.get(20..).unwrap_or_default();
    while let [low, high, kind, 0, value @ ..] = rest {
        let length = usize::from(u16::from_ne_bytes([*low, *high]));
        if u16::from(*kind) == CTRL_ATTR_FAMILY_ID && value.len() >= 2 {
            return Ok(u16::from_ne_bytes([value[0], value[1]]));
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..).unwrap_or_default();
    }
    answer(told).and(Err(io::ErrorKind::NotFound.into()))
}

fn link(name: &str, kind: &str, data: &[u8]) -> Vec<u8> {
    let mut info = attribute(IFLA_INFO_KIND, &text(kind));
    info.extend(attribute(IFLA_INFO_DATA, data));
    let mut body = attribute(IFLA_IFNAME, &text(name));
    body.extend(attribute(IFLA_LINKINFO, &info));
    body
}

/// A `struct ifinfomsg`.
fn header(index: u32, flags: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), flags.to_ne_bytes()].concat()
}

fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    u8::try_from(family).expect("both are small")
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).expect("attributes are short");
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn create(kind: u16, body: &[u8]) -> io::Result<()> {
    request(kind, libc::NLM_F_CREATE | libc::NLM_F_EXCL, body)
}

/// Makes one request and waits for its answer.
fn request(kind: u16, flags: i32, body: &[u8]) -> io::Result<()> {
    answer(&exchange(libc::NETLINK_ROUTE, &message(kind, libc::NLM_F_ACK | flags, body))?)
}

fn message(kind: u16, flags: i32, body: &[u8]) -> Vec<u8> {
    let flags = u16::try_from(libc::NLM_F_REQUEST | flags).expect("flags have 16 bits");
    let length = u32::try_from(body.len() + 16).expect("requests are short");
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

fn exchange(protocol: i32, message: &[u8]) -> io::Result<Vec<u8>> {
    // SAFETY: no pointer is passed.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut answer = vec![0; 4096];
    // SAFETY: both buffers live through the calls and are as long as said.
    let received = unsafe {
        if libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    answer.truncate(usize::try_from(received).map_err(|_| io::Error::last_os_error())?);
    Ok(answer)
}

/// The error number stands behind the header.
fn answer(answer: &[u8]) -> io::Result<()> {
    let code = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match code.ok_or(io::ErrorKind::UnexpectedEof)? {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}
