//! What the kernel does with a process that is moved between cgroups while it holds sockets, and what the tests of this
//! package may build on. No agent: a program that refuses everything marks one cgroup.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{fs, net::SocketAddr};

use egress_tests::{
    actor::{Actor, On, Outcome, Who},
    cgroup::Cgroup,
    dial::{Call, Method},
    foreign::{Attached, Hook, How, Program},
    netns::Netns,
};
use rustix::io::Errno;

const REFUSED: Outcome = Err(Errno::PERM);
/// Where every address is local and nobody listens, this is how TCP ends that no filter stopped.
const NOBODY_THERE: Outcome = Err(Errno::CONNREFUSED);
const SENT: Outcome = Ok(());

fn address() -> SocketAddr {
    "192.0.2.1:80".parse().unwrap()
}

/// Refuses TCP and UDP over IPv4 in a cgroup.
fn refuse_in(cgroup: &Cgroup) -> [Attached; 2] {
    [Hook::Connect4, Hook::Sendmsg4].map(|hook| Program::refuse(hook).unwrap().attach(cgroup, How::Link).unwrap())
}

#[test]
fn a_process_that_moves_leaves_the_filter_with_new_sockets_only() {
    let (closed, open) = (Cgroup::new().unwrap(), Cgroup::new().unwrap());
    let namespace = Netns::with_every_address_local().unwrap();
    let _refuse = refuse_in(&closed);
    let mut actor = Actor::start(&namespace, &closed, None).unwrap();
    actor.make_socket().unwrap();
    assert_eq!(actor.dial_tcp(address()).unwrap(), REFUSED);
    assert_eq!(actor.send_udp(address()).unwrap(), REFUSED);
    actor.move_to(&open).unwrap();
    assert_eq!(actor.dial_tcp(address()).unwrap(), NOBODY_THERE);
    assert_eq!(actor.send_udp(address()).unwrap(), SENT);
    assert_eq!(actor.dial_with_made_socket(address()).unwrap(), REFUSED);
    assert_eq!(actor.send_with_made_socket(address()).unwrap(), REFUSED);

    actor.make_socket().unwrap();
    actor.move_to(&closed).unwrap();
    assert_eq!(actor.dial_tcp(address()).unwrap(), REFUSED);
    for _ in 0..2 {
        assert_eq!(actor.dial_with_made_socket(address()).unwrap(), NOBODY_THERE);
        assert_eq!(actor.send_with_made_socket(address()).unwrap(), SENT);
    }
}

#[test]
fn two_threads_of_a_process_have_cgroups_of_their_own() {
    let (domain, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let [closed, open] = ["closed", "open"].map(|name| domain.child(name).unwrap());
    closed.make_threaded().unwrap();
    open.make_threaded().unwrap();
    let _refuse = refuse_in(&closed);
    let mut actor = Actor::start(&namespace, &open, None).unwrap();
    actor.thread_in(&closed).unwrap();
    assert_ne!(actor.tid(), Some(actor.pid()));
    assert_eq!(actor.dial_from_thread(address()).unwrap(), REFUSED);
    assert_eq!(actor.send_from_thread(address()).unwrap(), REFUSED);
    assert_eq!(actor.dial_tcp(address()).unwrap(), NOBODY_THERE);
    assert_eq!(actor.send_udp(address()).unwrap(), SENT);

    // A socket belongs to the cgroup of the thread that made it, whoever uses it.
    let call = Call { method: Method::UdpConnect, mapped: false, to: address() };
    actor.make_socket_by(Who::Thread).unwrap();
    assert_eq!(actor.call(Who::Main, On::Made, &call).unwrap(), REFUSED);
    actor.make_socket().unwrap();
    assert_eq!(actor.call(Who::Thread, On::Made, &call).unwrap(), SENT);

    actor.thread_in(&domain).unwrap();
    assert_eq!(actor.dial_from_thread(address()).unwrap(), NOBODY_THERE);
    actor.move_to(&closed).unwrap();
    assert_eq!(actor.dial_from_thread(address()).unwrap(), REFUSED);
}

#[test]
fn a_thread_goes_only_where_its_process_may_share() {
    let (cgroup, other, namespace) = (Cgroup::new().unwrap(), Cgroup::new().unwrap(), Netns::new().unwrap());
    let mut actor = Actor::start(&namespace, &cgroup, None).unwrap();
    let error = actor.thread_in(&other).unwrap_err();
    let error = error.downcast_ref::<std::io::Error>().unwrap();
    assert_eq!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP));
}

#[test]
fn a_program_far_above_is_asked() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let chain = cgroup.nested(40).unwrap();
    let deepest = chain.last().unwrap();
    let refuse = refuse_in(&cgroup);
    let mut actor = Actor::start(&namespace, deepest, None).unwrap();
    assert_eq!(deepest.name(), format!("{}{}", cgroup.name(), "/nested".repeat(40)));
    assert_eq!(actor.dial_tcp(address()).unwrap(), REFUSED);
    drop(refuse);
    assert_eq!(actor.dial_tcp(address()).unwrap(), NOBODY_THERE);

    let path = cgroup.path().to_owned();
    drop((actor, cgroup));
    assert!(!path.exists(), "a cgroup is removed with all below it");
}

#[test]
fn another_user_dials() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let mut actor = Actor::start(&namespace, &cgroup, Some(65_534)).unwrap();
    assert_eq!(actor.dial_tcp(address()).unwrap(), NOBODY_THERE);
    let status = fs::read_to_string(format!("/proc/{}/status", actor.pid())).unwrap();
    assert!(status.contains("\nUid:\t65534\t65534\t65534\t65534\n"), "{status}");
    assert!(status.contains("\nCapEff:\t0000000000000000\n"), "{status}");
}

#[test]
fn calls_over_ipv6_have_programs_of_their_own() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let _refuse = refuse_in(&cgroup);
    let mut actor = Actor::start(&namespace, &cgroup, None).unwrap();
    actor.make_socket().unwrap();
    let to = "[2001:db8::1]:80".parse().unwrap();
    assert_eq!(actor.dial_with_made_socket(to).unwrap(), NOBODY_THERE);
    assert_eq!(actor.send_with_made_socket(to).unwrap(), SENT);
    // Also where the destination is of IPv4.
    let call = Call { method: Method::TcpConnect, mapped: true, to: address() };
    assert_eq!(actor.call(Who::Main, On::Made, &call).unwrap(), NOBODY_THERE);
}
