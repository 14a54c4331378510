//! The way over an `AF_XDP` socket, whose frames pass no hook of sockets: they stand in memory that is shared with the
//! kernel.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    time::Duration,
};

use crate::escape::{
    Outcome, Step, Vector,
    sys::{Address, bind, check_size, near_index, option, socket},
    target::{NEAR4, Target},
    vectors::raw::{ipv4, udp},
};

const SOL_XDP: i32 = 283;
const XDP_MMAP_OFFSETS: i32 = 1;
const XDP_TX_RING: i32 = 3;
const XDP_UMEM_REG: i32 = 4;
const XDP_UMEM_FILL_RING: i32 = 5;
const XDP_UMEM_COMPLETION_RING: i32 = 6;
const XDP_PGOFF_TX_RING: i64 = 0x8000_0000;
const XDP_COPY: u16 = 2;
const PAGE: usize = 4096;
const FRAMES: usize = 4;
const DESCRIPTORS: u32 = 4;

pub const VECTORS: &[Vector] = &[Vector::new("XDP socket", send).root_only().needs("CONFIG_XDP_SOCKETS")];

fn send(target: Target) -> Outcome {
    let socket = socket(libc::AF_XDP, libc::SOCK_RAW, 0)?;
    let frames = map(-1, FRAMES * PAGE, 0)?;
    let frame = [&[2; 12][..], &[8, 0], &ipv4(NEAR4, target.v4(), libc::IPPROTO_UDP, &udp())].concat();
    // SAFETY: the mapping is longer than the frame, and nobody else uses it yet.
    unsafe { frames.cast::<u8>().copy_from_nonoverlapping(frame.as_ptr(), frame.len()) };
    option(&socket, SOL_XDP, XDP_UMEM_REG, &registration(frames))?;
    for ring in [XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_TX_RING] {
        option(&socket, SOL_XDP, ring, &DESCRIPTORS.to_ne_bytes())?;
    }
    queue(&socket, u32::try_from(frame.len()).expect("it is short"))?;
    bind_when_free(&socket)?;
    // SAFETY: nothing is passed but flags.
    let sent =
        unsafe { libc::sendto(socket.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0) };
    check_size("sendto", sent)
}

/// The queue of the interface is free only some time after the socket of an earlier attempt was closed.
fn bind_when_free(socket: &OwnedFd) -> Outcome {
    let address = address()?;
    for _ in 0..100 {
        match bind(socket, address.clone()) {
            Err(step) if step.errno == libc::EBUSY => std::thread::sleep(Duration::from_millis(10)),
            other => return other,
        }
    }
    bind(socket, address)
}

/// A `struct xdp_umem_reg`.
fn registration(frames: *mut libc::c_void) -> Vec<u8> {
    let [length, page] = [FRAMES * PAGE, PAGE].map(|size| u32::try_from(size).expect("it is small"));
    let mut bytes = (frames.addr() as u64).to_ne_bytes().to_vec();
    bytes.extend(u64::from(length).to_ne_bytes());
    bytes.extend(page.to_ne_bytes());
    bytes.resize(32, 0);
    bytes
}

/// Puts the first frame into the ring of what is to be sent.
fn queue(socket: &OwnedFd, length: u32) -> Outcome {
    let offsets = offsets(socket)?;
    let [producer, _, descriptors, _] = offsets.tx.map(|offset| usize::try_from(offset).expect("it is small"));
    let ring = map(socket.as_raw_fd(), PAGE, XDP_PGOFF_TX_RING)?;
    // SAFETY: the kernel told where in the mapping these are; both are aligned, and the kernel reads them after the
    // producer's count was raised.
    unsafe {
        ring.byte_add(descriptors).cast::<u64>().write_volatile(0);
        ring.byte_add(descriptors + 8).cast::<u32>().write_volatile(length);
        ring.byte_add(producer).cast::<u32>().write_volatile(1);
    }
    Ok(())
}

/// A `struct xdp_mmap_offsets`.
#[repr(C)]
struct Offsets {
    rx: [u64; 4],
    tx: [u64; 4],
    fill: [u64; 4],
    completion: [u64; 4],
}

fn offsets(socket: &OwnedFd) -> Outcome<Offsets> {
    let mut offsets = Offsets { rx: [0; 4], tx: [0; 4], fill: [0; 4], completion: [0; 4] };
    let mut length = libc::socklen_t::try_from(size_of::<Offsets>()).expect("it is small");
    let value = (&raw mut offsets).cast();
    // SAFETY: both pointers are to locals that live through the call; the first is to as many bytes as said.
    let got = unsafe { libc::getsockopt(socket.as_raw_fd(), SOL_XDP, XDP_MMAP_OFFSETS, value, &raw mut length) };
    check_size("getsockopt", got as isize).map(|()| offsets)
}

/// Memory that is shared with the kernel: of a descriptor, or of nobody. It ends with the process.
fn map(fd: i32, length: usize, offset: i64) -> Outcome<*mut libc::c_void> {
    let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE | anonymous);
    // SAFETY: the kernel chooses the address, so no memory that is in use is replaced.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, fd, offset) };
    if memory == libc::MAP_FAILED {
        return Err(Step::new("mmap", &std::io::Error::last_os_error()));
    }
    Ok(memory)
}

/// A `struct sockaddr_xdp` of the first queue of the interface to the far namespace.
fn address() -> Outcome<Address> {
    let mut bytes = u16::try_from(libc::AF_XDP).expect("a family has 16 bits").to_ne_bytes().to_vec();
    bytes.extend(XDP_COPY.to_ne_bytes());
    bytes.extend(near_index()?.to_ne_bytes());
    bytes.resize(16, 0);
    Ok(Address(bytes))
}
