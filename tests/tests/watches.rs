//! A workload that leaves the agent no inotify watch holds up nothing. The limit is one of the whole system, so this test is
//! alone in its program, and lowers it for a moment.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::fs;

use egress_tests::{
    dial::{Call, Dialer, Method},
    eventually, program,
    world::World,
};

const LIMIT: &str = "/proc/sys/fs/inotify/max_user_watches";

/// Lower while this is there.
struct Lowered(String);

impl Lowered {
    fn to(limit: &str) -> Self {
        let lowered = Self(fs::read_to_string(LIMIT).unwrap());
        fs::write(LIMIT, limit).unwrap();
        lowered
    }
}

impl Drop for Lowered {
    fn drop(&mut self) {
        fs::write(LIMIT, self.0.trim()).unwrap();
    }
}

fn policy(open: &str) -> String {
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec:\n  \
         workloads: [{{ cgroup: '**/web' }}]\n  dns: {{ servers: None }}\n  allow: [{{ to: [{{ cidr: {open} }}] }}]\n"
    )
}

#[test]
fn cgroups_that_cannot_be_watched_hold_up_no_policy_and_are_found_all_the_same() {
    let world = World::opening(&[]).unwrap();
    world.write(&policy("192.0.2.1")).unwrap();
    let agent = world.start(&[]).unwrap();
    let lowered = Lowered::to("1");
    let _nested = world.cgroup.descendant("a/b/c").unwrap();
    world.write(&policy("192.0.2.2")).unwrap();
    world.place.reload().unwrap();
    let (code, status) = world.place.status().unwrap();
    assert_eq!(code, Some(1), "{status:#}");
    assert!(status["degraded"].to_string().contains("raise fs.inotify.max_user_watches"), "{status:#}");

    // Nothing tells of it, and it is found.
    let web = world.cgroup.descendant("a/b/c/web").unwrap();
    let mut dialer = Dialer::start(program("dial").unwrap(), &web, &world.namespace).unwrap();
    let mut is_open = |to: &str| {
        let call = Call { method: Method::TcpConnect, mapped: false, to: to.parse().unwrap() };
        !dialer.is_refused(&call).unwrap()
    };
    assert!(!is_open("192.0.2.1:80"));
    eventually("a cgroup that nothing told of", || is_open("192.0.2.2:80").then_some(())).unwrap();
    assert!(!is_open("192.0.2.1:80"));

    drop(lowered);
    eventually("a status that is well", || (world.place.status().unwrap().0 == Some(0)).then_some(())).unwrap();
    drop(agent);
}
