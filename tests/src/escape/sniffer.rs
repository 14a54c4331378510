//! Sees every frame that arrives at an interface, and tells which of them go to an address.

use std::{
    io,
    mem::{size_of, zeroed},
    ops::Range,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use super::target::Target;

/// How long a mark may take, which arrives as soon as it is sent.
const PATIENCE: Duration = Duration::from_secs(5);
const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// Where the destination begins: behind the source, which may be anything.
const DESTINATION_IPV4: usize = ETHERNET + 16;
const DESTINATION_IPV6: usize = ETHERNET + 24;
const PROTOCOL_IPV4: usize = ETHERNET + 9;
const NEXT_HEADER_IPV6: usize = ETHERNET + 6;
const TCP: u8 = 6;

/// A packet socket on one interface.
#[derive(Debug)]
pub struct Sniffer(OwnedFd);

impl Sniffer {
    /// Listens on an interface of the namespace of the thread.
    pub fn new(index: u32) -> io::Result<Self> {
        let every = u16::try_from(libc::ETH_P_ALL).expect("a protocol has 16 bits").to_be();
        // SAFETY: no pointer is passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, every.into()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: an address of zeros is a valid one.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).expect("a family has 16 bits");
        address.sll_protocol = every;
        address.sll_ifindex = index.cast_signed();
        // SAFETY: `address` is a packet address and lives through the call.
        if unsafe { libc::bind(fd, (&raw const address).cast(), length::<libc::sockaddr_ll>()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(socket))
    }

    /// Every frame that arrived before the one with a mark.
    pub fn until(&mut self, mark: &[u8]) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + PATIENCE;
        let mut frames = Vec::new();
        while Instant::now() < deadline {
            let Some(frame) = self.next()? else { continue };
            if frame.ends_with(mark) {
                return Ok(frames);
            }
            frames.push(frame);
        }
        bail!("a mark was sent and did not arrive")
    }

    /// The next frame, if there is one soon and it came from the other end.
    fn next(&self) -> io::Result<Option<Vec<u8>>> {
        let mut ready = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut frame = vec![0_u8; 2048];
        // SAFETY: an address of zeros is a valid one.
        let mut from: libc::sockaddr_ll = unsafe { zeroed() };
        let mut size = length::<libc::sockaddr_ll>();
        // SAFETY: every pointer is to a local that lives through the calls and is as long as said.
        let received = unsafe {
            if libc::poll(&raw mut ready, 1, 100) < 1 {
                return Ok(None);
            }
            let buffer = frame.as_mut_ptr().cast();
            libc::recvfrom(ready.fd, buffer, frame.len(), 0, (&raw mut from).cast(), &raw mut size)
        };
        frame.truncate(usize::try_from(received).map_err(|_| io::Error::last_os_error())?);
        Ok(Some(frame).filter(|_| from.sll_pkttype != libc::PACKET_OUTGOING))
    }
}

fn length<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).expect("addresses are short")
}

/// Whether a frame goes to a target: it has the address as its destination, in an option, or further inside. What TCP
/// says is not looked at, since MPTCP repeats addresses that the peer announced.
pub fn reaches(frame: &[u8], target: Target) -> bool {
    let rest = frame.get(routed(frame)).unwrap_or_default();
    target.forms().iter().any(|form| rest.windows(form.len()).any(|window| window == form))
}

/// The part of a frame that says where it goes, or may carry a packet that does.
fn routed(frame: &[u8]) -> Range<usize> {
    let end = frame.len();
    match frame.get(12..ETHERNET) {
        Some(kind) if kind == ETHERTYPE_IPV4 && frame.get(PROTOCOL_IPV4) == Some(&TCP) => {
            DESTINATION_IPV4..ETHERNET + usize::from(frame[ETHERNET] & 0xf) * 4
        }
        Some(kind) if kind == ETHERTYPE_IPV4 => DESTINATION_IPV4..end,
        Some(kind) if kind == ETHERTYPE_IPV6 && frame.get(NEXT_HEADER_IPV6) == Some(&TCP) => {
            DESTINATION_IPV6..DESTINATION_IPV6 + 16
        }
        Some(kind) if kind == ETHERTYPE_IPV6 => DESTINATION_IPV6..end,
        _ => 0..end,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::escape::target::Permission;

    fn frame(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
        let begin = [&[0; 12][..], &ETHERTYPE_IPV4, &[0x45], &[0; 8], &[TCP], &[0; 2]].concat();
        [&begin[..], &source.octets(), &destination.octets()].concat()
    }

    #[test]
    fn a_frame_reaches_its_destination_and_not_its_source() {
        let target = Target::new(7, Permission::Refused);
        let friend = Ipv4Addr::LOCALHOST;
        assert!(reaches(&frame(friend, target.v4()), target));
        assert!(!reaches(&frame(target.v4(), friend), target));
        let told = [frame(friend, friend), target.v4().octets().to_vec()].concat();
        assert!(!reaches(&told, target));
        assert!(!reaches(&frame(friend, Target::new(8, Permission::Refused).v4()), target));
    }
}
