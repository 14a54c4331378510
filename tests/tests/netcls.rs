//! Network classes and priorities of cgroup v1 on a host that has both versions.
//!
//! Before Linux 5.15 (in the 5.10 series before 5.10.226) a socket had room for a class or priority or for its
//! cgroup, not for both: whoever set a class or a priority first took every new socket on the machine away from the
//! programs on cgroups other than the root (commit 8520e224f547). On a kernel of which that holds, these tests fail.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    env, fs,
    io::ErrorKind,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use egress_agent::{
    cgroup::{self, mount_point as mount_point_of_cgroup2},
    socket_matching::{self, Matching, Why},
};
use egress_tests::{
    actor::{Actor, Outcome},
    agent::Agent,
    cgroup::Cgroup,
    eventually,
    netns::Netns,
    unique_name,
};
use rustix::{
    io::Errno,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsmount, fsopen},
};

const REFUSED: Outcome = Err(Errno::PERM);
const NOBODY_THERE: Outcome = Err(Errno::CONNREFUSED);

/// A cgroup of version 1 with one controller, removed when dropped.
struct V1 {
    controller: &'static str,
    path: PathBuf,
    /// The hierarchy, if it is mounted nowhere.
    mount: Option<OwnedFd>,
}

impl V1 {
    fn new(controller: &'static str) -> Result<Self> {
        // One that another test gave up is still being taken down, perhaps.
        let found = eventually("a hierarchy of its own", || match hierarchy(controller) {
            Err(error) if error.downcast_ref() == Some(&Errno::BUSY) => None,
            found => Some(found),
        })?;
        let (root, mount) =
            found.with_context(|| format!("the kernel gives no hierarchy with {controller}; see /proc/cgroups"))?;
        let path = root.join(unique_name());
        fs::create_dir(&path)?;
        Ok(Self { controller, path, mount })
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.path.join(file), text).unwrap();
    }

    fn remove(&self) -> Result<()> {
        // A process that just ended still holds its cgroup for a moment.
        eventually("an empty cgroup", || match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => None,
            done => Some(done),
        })??;
        // The kernel gives up a hierarchy with its last mount only if nothing is left below its root by then.
        if self.mount.is_some() {
            eventually("an empty hierarchy", || (cgroups(self.controller).ok()? == 1).then_some(()))?;
        }
        Ok(())
    }
}

/// How many cgroups the hierarchy of a controller has, those that are still being taken down included.
fn cgroups(controller: &str) -> Result<u32> {
    let table = fs::read_to_string("/proc/cgroups")?;
    let line = table.lines().find(|line| line.split('\t').next() == Some(controller));
    Ok(line.and_then(|line| line.split('\t').nth(2)).context("the kernel has no such controller")?.parse()?)
}

impl Drop for V1 {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("cannot remove cgroup {}: {error}", self.path.display());
        }
    }
}

/// Where the hierarchy with a controller is mounted; where it is not, a mount that nobody else can see.
fn hierarchy(controller: &str) -> Result<(PathBuf, Option<OwnedFd>)> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    if let Some(point) = mounts.lines().find_map(|line| mount_point(line, controller)) {
        return Ok((point.to_owned(), None));
    }
    let context = fsopen("cgroup", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_flag(&context, controller)?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    Ok((format!("/proc/self/fd/{}", mount.as_raw_fd()).into(), Some(mount)))
}

/// The mount point of a line of `proc_pid_mountinfo(5)` if it is of cgroup v1, from its root, and has the controller.
fn mount_point<'a>(line: &'a str, controller: &str) -> Option<&'a Path> {
    let (place, system) = line.split_once(" - cgroup ")?;
    let mut place = place.split(' ').skip(3);
    let (root, point) = (place.next()?, place.next()?);
    let options = system.rsplit(' ').next()?;
    (root == "/" && options.split(',').any(|option| option == controller)).then(|| Path::new(point))
}

/// A process and its sockets stay filtered while it gets a mark of cgroup v1.
#[track_caller]
fn stays_filtered(controller: &'static str, mark: (&str, &str)) {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let policies = tempfile::tempdir().unwrap();
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: { name: a }\n\
                 spec: { hosts: [a.example.com], addresses: [192.0.2.2], ports: [{ number: 80, name: http }] }\n";
    fs::write(policies.path().join("a.yaml"), entry).unwrap();
    let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
    let v1 = V1::new(controller).unwrap();
    // Dropped before its cgroups.
    let mut actor = Actor::start(&namespace, &cgroup, None).unwrap();
    let (closed, open): (SocketAddr, SocketAddr) = ("192.0.2.1:80".parse().unwrap(), "192.0.2.2:80".parse().unwrap());
    actor.make_socket().unwrap();
    let mut check = |actor: &mut Actor, when: &str| {
        let new = [actor.dial_tcp(closed).unwrap(), actor.send_udp(closed).unwrap()];
        let kept = [actor.dial_with_made_socket(closed).unwrap(), actor.send_with_made_socket(closed).unwrap()];
        assert_eq!((new, kept), ([REFUSED; 2], [REFUSED; 2]), "{when}");
        for _ in 0..4 {
            assert_eq!(agent.denial().unwrap()["cgroup"]["path"], cgroup.name(), "{when}");
        }
        let allowed = (actor.dial_tcp(open).unwrap(), actor.dial_with_made_socket(open).unwrap());
        assert_eq!(allowed, (NOBODY_THERE, NOBODY_THERE), "{when}");
    };
    check(&mut actor, "before");
    v1.write("cgroup.procs", &actor.pid().to_string());
    check(&mut actor, "in a cgroup of version 1");
    v1.write(mark.0, mark.1);
    let of_process = fs::read_to_string(format!("/proc/{}/cgroup", actor.pid())).unwrap();
    let name = v1.path.file_name().unwrap().to_str().unwrap();
    assert!(of_process.lines().any(|line| line.contains(controller) && line.ends_with(name)), "{of_process}");
    check(&mut actor, "marked");
    actor.make_socket().unwrap();
    check(&mut actor, "with sockets made under the mark");
}

#[test]
fn a_process_with_a_network_class_is_filtered() {
    stays_filtered("net_cls", ("net_cls.classid", "0x100001"));
}

#[test]
fn a_process_with_a_network_priority_is_filtered() {
    stays_filtered("net_prio", ("net_prio.ifpriomap", "lo 3"));
}

/// The cgroup that a process of its own is to enter.
const CGROUP: &str = "EGRESS_TEST_CGROUP";

/// In a process of its own, which enters a cgroup and gets a class.
#[test]
#[ignore = "run by the test below"]
fn a_probe_in_a_process_of_its_own() {
    let Some(path) = env::var_os(CGROUP).map(PathBuf::from) else { return };
    let mount = mount_point_of_cgroup2().unwrap();
    let probe = || socket_matching::probe(cgroup::own(&mount).as_ref());
    fs::write(path.join("cgroup.procs"), "0").unwrap();
    assert!(matches!(probe(), Matching::Works), "{:?}", probe());
    let v1 = V1::new("net_cls").unwrap();
    v1.write("cgroup.procs", "0");
    v1.write("net_cls.classid", "0x100001");
    assert!(matches!(probe(), Matching::Works), "{:?}", probe());
    // Whoever runs where sockets do not belong sees it.
    let elsewhere = cgroup::Cgroup::open(path.parent().unwrap(), &mount).unwrap();
    if !elsewhere.is_root() {
        assert!(matches!(socket_matching::probe(Some(&elsewhere)), Matching::Stopped));
    }
    let root = cgroup::Cgroup::open(&mount, &mount).unwrap();
    assert!(matches!(socket_matching::probe(Some(&root)), Matching::Unknown(Why::InRoot)));
    // So that its cgroup can be removed.
    let procs = v1.path.parent().unwrap().join("cgroup.procs");
    fs::write(procs, std::process::id().to_string()).unwrap();
}

#[test]
fn the_probe_sees_to_which_cgroup_sockets_belong() {
    let cgroup = Cgroup::new().unwrap();
    let inner = cgroup.child("inner").unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "a_probe_in_a_process_of_its_own", "--ignored", "--nocapture"]);
    assert!(command.env(CGROUP, inner.path()).status().unwrap().success());
}
