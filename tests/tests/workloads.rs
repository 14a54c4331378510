//! Whom policies select: cgroups, units and users of a real agent, and processes that move among them.
//!
//! Nobody listens anywhere, and every address is local. What tells how a process is judged is which of a few addresses
//! it reaches: each policy opens one, and refuses another by a rule of its own.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use egress_agent::cgroup::mount_point;
use egress_tests::{
    actor::{Actor, Identity, On, Outcome, Who},
    agent::{Agent, Place, binary, run_command},
    cgroup::Cgroup,
    dial::{Call, Method},
    eventually,
    netns::Netns,
};
use rustix::{io::Errno, process::Signal};
use serde_json::Value;
use tempfile::TempDir;

const REFUSED: Outcome = Err(Errno::PERM);
/// How TCP ends that no filter stopped.
const NOBODY_THERE: Outcome = Err(Errno::CONNREFUSED);
/// What every policy of these tests refuses, by a rule of its own.
const DENIED: &str = "198.51.100.1";
/// Users without a name.
const USER: u32 = 4_700_001;
const OTHER_USER: u32 = 4_700_002;

/// What the policy of a name opens: `a` opens 192.0.2.1, and so on.
fn address(policy: &str) -> SocketAddr {
    let number = 1 + policy.bytes().next().unwrap() - b'a';
    format!("192.0.2.{number}:80").parse().unwrap()
}

/// A policy for those whom `workloads` selects.
fn policy(name: &str, workloads: &str) -> String {
    let opened = address(name).ip();
    document(
        name,
        &format!(
            "workloads: [{workloads}], services: [], allow: [{{ to: [{{ cidr: {opened}/32 }}] }}], \
             deny: [{{ to: [{{ cidr: {DENIED}/32 }}] }}]"
        ),
    )
}

fn document(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: {name} }}\nspec: {{ {spec} }}\n"
    )
}

/// `workloads` for a cgroup and what is below it.
fn at(cgroup: &Cgroup) -> String {
    below(cgroup, "")
}

/// `workloads` for a pattern below a cgroup.
fn below(cgroup: &Cgroup, pattern: &str) -> String {
    format!("{{ cgroup: '{}{pattern}' }}", cgroup.name().trim_start_matches('/'))
}

/// An agent that filters a cgroup by one policy file.
struct World {
    // In the order in which they are to go.
    agent: Option<Agent>,
    namespace: Netns,
    top: Cgroup,
    place: Place,
    policies: TempDir,
}

impl World {
    /// Filters `top` by documents.
    fn new(top: Cgroup, documents: &[String], more: &[&str]) -> Self {
        let policies = tempfile::tempdir().unwrap();
        fs::write(policies.path().join("policies.yaml"), documents.concat()).unwrap();
        let place = Place::new().unwrap();
        let agent = Agent::start_in(&place, policies.path(), &top, more).unwrap();
        Self { agent: Some(agent), namespace: Netns::with_every_address_local().unwrap(), top, place, policies }
    }

    fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().unwrap()
    }

    fn actor(&self, cgroup: &Cgroup) -> Actor {
        Actor::start(&self.namespace, cgroup, None).unwrap()
    }

    fn actor_as(&self, cgroup: &Cgroup, identity: Identity) -> Actor {
        Actor::start_as(&self.namespace, cgroup, identity).unwrap()
    }

    /// The next denial, after one is brought about.
    fn denial_of(&mut self, actor: &mut Actor) -> Value {
        assert_eq!(actor.dial_tcp(to(DENIED)).unwrap(), REFUSED);
        self.next_denial_of(DENIED)
    }

    /// The next denial to an address; others before it are passed over.
    fn next_denial_of(&mut self, address: &str) -> Value {
        loop {
            let denial = self.agent().denial().unwrap();
            if denial["destination"]["address"] == address {
                return denial;
            }
        }
    }

    /// How many cgroups are placed by exactly these policies.
    fn placed_by(&self, policies: &[&str]) -> usize {
        let status = self.place.status().unwrap().1;
        let policies: Vec<String> = policies.iter().map(|name| format!("EgressPolicy/default/{name}")).collect();
        let scopes = status["scopes"].as_array().unwrap();
        let scope = scopes.iter().find(|scope| scope["policies"] == Value::from(policies.clone()));
        scope.map_or(0, |scope| scope["cgroups"].as_array().unwrap().len())
    }

    /// Elements of the map that the kernel asks for cgroups.
    fn placements(&self) -> u64 {
        let status = self.place.status().unwrap().1;
        let maps = status["maps"].as_array().unwrap();
        maps.iter().find(|map| map["name"] == "WORKLOADS").unwrap()["entries"].as_u64().unwrap()
    }

    fn write(&self, documents: &[String]) {
        let (new, path) = (self.policies.path().join("new"), self.policies.path().join("policies.yaml"));
        fs::write(&new, documents.concat()).unwrap();
        fs::rename(new, path).unwrap();
    }
}

/// The names of the policies, of `a`, `b` and `c`, whose address is reached.
fn open_by(actor: &mut Actor, who: Who, on: On) -> String {
    let is_open = |name: &&str| {
        let call = Call { method: Method::TcpConnect, mapped: false, to: address(name) };
        let outcome = actor.call(who, on, &call).unwrap();
        assert!([REFUSED, NOBODY_THERE].contains(&outcome), "{outcome:?}");
        outcome == NOBODY_THERE
    };
    ["a", "b", "c"].into_iter().filter(is_open).collect()
}

/// The same for new sockets of the first thread.
fn open(actor: &mut Actor) -> String {
    open_by(actor, Who::Main, On::New)
}

/// The same for sockets that were made before.
fn open_with_made(actor: &mut Actor) -> String {
    open_by(actor, Who::Main, On::Made)
}

fn becomes(actor: &mut Actor, expected: &str) {
    eventually(expected, || (open(actor) == expected).then_some(())).unwrap();
}

#[test]
fn a_selector_rules_what_it_names_and_all_below_and_nothing_beside() {
    let top = Cgroup::slice().unwrap();
    let cgroups: Vec<(Cgroup, &str)> = [
        ("glob-1", "a"),
        ("glob-1/deep/er", "a"),
        ("glob-12", ""),
        ("x/glob-1", ""),
        ("nginx.service", "b"),
        ("nginx.service/worker", "b"),
        ("nginx2.service", ""),
        ("x/nginx.service", ""),
        ("app.service/nginx.service", ""),
        ("inner.slice", "c"),
        ("inner.slice/any.scope", "c"),
        ("inner.slice/nginx.service", "bc"),
        ("app.service/inner.slice", ""),
    ]
    .into_iter()
    .map(|(path, expected)| (top.descendant(path).unwrap(), expected))
    .collect();
    let documents = [
        policy("a", &below(&top, "/glob-?")),
        policy("b", "{ unit: nginx.service }"),
        policy("c", "{ unit: inner.slice }"),
    ];
    let mut world = World::new(top, &documents, &[]);
    let mut actor = world.actor(&world.top);
    assert_eq!(open(&mut actor), "");
    for (cgroup, expected) in &cgroups {
        actor.move_to(cgroup).unwrap();
        assert_eq!(&open(&mut actor), expected, "{}", cgroup.name());
        let denial = world.denial_of(&mut actor);
        assert_eq!(denial["cgroup"]["path"], cgroup.name());
        if expected.is_empty() {
            assert_eq!((&denial["reason"], &denial["rule"]), (&"no_rule".into(), &Value::Null), "{denial}");
        } else {
            let (kind, name, path) = (&denial["rule"]["kind"], &denial["rule"]["name"], &denial["rule"]["path"]);
            assert_eq!(
                (kind, name, path),
                (&"EgressPolicy".into(), &expected[..1].into(), &"deny[0]".into()),
                "{denial}"
            );
            assert_eq!(denial["reason"], "rule");
        }
    }
}

#[test]
fn what_no_policy_selects_has_the_node_default() {
    for (default, expected) in [("Deny", ""), ("Allow", "abc"), ("Audit", "abc")] {
        let top = Cgroup::new().unwrap();
        let [selected, other] = ["selected", "other"].map(|name| top.child(name).unwrap());
        let world = World::new(top, &[policy("a", &at(&selected))], &["--default", default]);
        assert_eq!(open(&mut world.actor(&other)), expected, "{default}");
        assert_eq!(open(&mut world.actor(&world.top)), expected, "{default}");
        assert_eq!(open(&mut world.actor(&selected)), "a", "{default}");
    }
}

#[test]
fn policies_that_select_the_same_unite_where_they_meet() {
    let top = Cgroup::new().unwrap();
    let [one, other] = ["one", "other"].map(|name| top.child(name).unwrap());
    let inner = one.child("inner").unwrap();
    let documents = [policy("a", &at(&one)), policy("b", &at(&inner)), policy("c", &at(&top))];
    let world = World::new(top, &documents, &[]);
    let mut actor = world.actor(&inner);
    assert_eq!(open(&mut actor), "abc");
    for (cgroup, expected) in [(&one, "ac"), (&other, "c"), (&world.top, "c"), (&inner, "abc")] {
        actor.move_to(cgroup).unwrap();
        assert_eq!(open(&mut actor), expected, "{}", cgroup.name());
    }
}

#[test]
fn an_audit_policy_reports_for_those_it_selects_and_changes_nothing() {
    let top = Cgroup::new().unwrap();
    let [audited, other] = ["audited", "other"].map(|name| top.child(name).unwrap());
    let audit = policy("b", &at(&audited)).replace("spec: {", "spec: { mode: Audit,");
    let allow = document("all", "services: [], defaultAction: Allow");
    let mut world = World::new(top, &[audit, allow], &[]);
    let mut actor = world.actor(&other);
    assert_eq!((open(&mut actor), actor.dial_tcp(to(DENIED)).unwrap()), ("abc".to_owned(), NOBODY_THERE));
    let mut actor = world.actor(&audited);
    assert_eq!(actor.dial_tcp(to(DENIED)).unwrap(), NOBODY_THERE);
    // The first that is reported: the other cgroup was not.
    let report = world.agent().denial().unwrap();
    assert_eq!((&report["verdict"], &report["rule"]["name"]), (&"would_deny".into(), &"b".into()), "{report}");
    assert_eq!(report["cgroup"]["path"], audited.name());
    assert_eq!(open(&mut actor), "abc");
}

/// A cgroup that the agent could not place: made while it stands still.
fn made_behind_its_back(world: &World, name: &str) -> Cgroup {
    world.agent.as_ref().unwrap().signal(Signal::STOP).unwrap();
    world.top.child(name).unwrap()
}

#[test]
fn a_cgroup_that_is_not_placed_yet_is_refused_until_it_is() {
    let top = Cgroup::new().unwrap();
    let covered = top.child("covered").unwrap();
    let documents = [policy("a", &below(&top, "/web-*")), policy("b", &at(&covered))];
    let mut world = World::new(top, &documents, &["--default", "Allow"]);
    let web = made_behind_its_back(&world, "web-1");
    let [other, inner] = [world.top.child("other").unwrap(), covered.child("inner").unwrap()];
    let (mut in_web, mut in_other, mut in_inner) = (world.actor(&web), world.actor(&other), world.actor(&inner));
    let below = web.child("below").unwrap();
    let mut below_web = world.actor(&below);
    assert_eq!([open(&mut in_web), open(&mut below_web), open(&mut in_other)], ["", "", ""]);
    assert_eq!(open(&mut in_inner), "b", "nothing is unknown below a cgroup that is covered");
    assert_eq!(open(&mut world.actor(&world.top)), "abc", "the parent itself is known");

    world.agent().signal(Signal::CONT).unwrap();
    becomes(&mut in_web, "a");
    becomes(&mut below_web, "a");
    becomes(&mut in_other, "abc");
    let denial = world.next_denial_of("192.0.2.1");
    assert_eq!((&denial["reason"], &denial["rule"]), (&"unknown_workload".into(), &Value::Null), "{denial}");
    assert_eq!(denial["cgroup"]["path"], web.name());
}

#[test]
fn with_inherit_a_cgroup_that_is_not_placed_yet_is_judged_as_its_parent() {
    let top = Cgroup::new().unwrap();
    let documents = [policy("a", &below(&top, "/web-*")), policy("b", &at(&top))];
    let world = World::new(top, &documents, &["--unknown-workloads", "Inherit"]);
    let web = made_behind_its_back(&world, "web-1");
    let mut actor = world.actor(&web);
    assert_eq!(open(&mut actor), "b");
    world.agent.as_ref().unwrap().signal(Signal::CONT).unwrap();
    becomes(&mut actor, "ab");
}

#[test]
fn an_audit_policy_makes_nobody_unknown() {
    let top = Cgroup::new().unwrap();
    let audit = policy("a", &below(&top, "/web-*")).replace("spec: {", "spec: { mode: Audit,");
    let world = World::new(top, &[audit], &["--default", "Allow"]);
    let web = made_behind_its_back(&world, "web-1");
    let mut actor = world.actor(&web);
    assert_eq!(open(&mut actor), "abc");
}

#[test]
fn without_the_agent_known_cgroups_are_judged_as_before_and_new_ones_as_unknown() {
    for (unknown, expected) in [("Deny", ""), ("Inherit", "b")] {
        let top = Cgroup::new().unwrap();
        let known = top.child("web-1").unwrap();
        let default = document("b", "services: [], allow: [{ to: [{ cidr: 192.0.2.2/32 }] }]");
        let documents = [policy("a", &below(&top, "/web-*")), default];
        let mut world = World::new(top, &documents, &["--unknown-workloads", unknown]);
        let mut actor = world.actor(&known);
        assert_eq!(open(&mut actor), "ab");
        world.agent = None;
        let [below, new] = ["web-1/below", "web-2"].map(|path| world.top.descendant(path).unwrap());
        for cgroup in [&known, &below] {
            actor.move_to(cgroup).unwrap();
            assert_eq!(open(&mut actor), "ab", "{}", cgroup.name());
        }
        actor.move_to(&new).unwrap();
        assert_eq!(open(&mut actor), expected);
        drop(actor);
    }
}

#[test]
fn the_nearest_ancestor_that_is_placed_speaks_for_a_deep_cgroup() {
    let top = Cgroup::new().unwrap();
    let chain = top.nested(42).unwrap();
    let deep = format!("{}/nested", "/nested".repeat(39));
    let documents = [policy("a", &below(&top, "/nested")), policy("b", &below(&top, &deep))];
    let world = World::new(top, &documents, &[]);
    let mut actor = world.actor(&chain[38]);
    assert_eq!(open(&mut actor), "a");
    for cgroup in &chain[39..] {
        actor.move_to(cgroup).unwrap();
        assert_eq!(open(&mut actor), "ab", "{}", cgroup.name());
    }
    actor.move_to(&chain[0]).unwrap();
    assert_eq!(open(&mut actor), "a");
    // One that is made later, too.
    let more = chain[41].child("more").unwrap();
    actor.move_to(&more).unwrap();
    assert_eq!(open(&mut actor), "ab");
    drop(actor);
}

/// The kernel can be told of 64 levels, the root included: see `docs/workloads.md`.
#[test]
fn a_cgroup_too_deep_to_be_placed_is_unknown_where_a_selector_may_reach_it() {
    for (unknown, expected) in [("Deny", ""), ("Inherit", "abc")] {
        let top = Cgroup::new().unwrap();
        let chain = top.nested(70).unwrap();
        // The first of the chain is at level 2.
        let [placed, too_deep] = [60, 61].map(|index: usize| chain[index].child("leaf").unwrap());
        assert_eq!(placed.name().matches('/').count(), 63);
        let documents = [policy("a", &below(&top, "/**/leaf"))];
        let world = World::new(top, &documents, &["--default", "Allow", "--unknown-workloads", unknown]);
        let mut actor = world.actor(&placed);
        assert_eq!(open(&mut actor), "a", "{unknown}");
        for cgroup in [&too_deep, &chain[62], &chain[69]] {
            actor.move_to(cgroup).unwrap();
            assert_eq!(open(&mut actor), expected, "{unknown}: {}", cgroup.name());
        }
        actor.move_to(&chain[61]).unwrap();
        assert_eq!(open(&mut actor), "abc", "{unknown}");
    }
}

#[test]
fn a_process_that_moves_is_judged_where_it_is_also_on_its_old_sockets() {
    let top = Cgroup::new().unwrap();
    let [one, two] = ["one", "two"].map(|name| top.child(name).unwrap());
    let world = World::new(top, &[policy("a", &at(&one)), policy("b", &at(&two))], &[]);
    let mut actor = world.actor(&one);
    actor.make_socket().unwrap();
    assert_eq!((open(&mut actor), open_with_made(&mut actor)), ("a".to_owned(), "a".to_owned()));
    actor.move_to(&two).unwrap();
    assert_eq!((open(&mut actor), open_with_made(&mut actor)), ("b".to_owned(), "b".to_owned()));
    assert_eq!(actor.send_with_made_socket(address("a")).unwrap(), REFUSED);
    assert_eq!(actor.send_with_made_socket(address("b")).unwrap(), Ok(()));
}

#[test]
fn an_old_socket_outside_the_attach_point_is_judged_as_an_unplaced_cgroup_below_it() {
    let outside = Cgroup::new().unwrap();
    for (more, expected) in [(&[][..], ""), (&["--unknown-workloads", "Inherit"][..], "b")] {
        let top = Cgroup::new().unwrap();
        let one = top.child("one").unwrap();
        let default = document("b", "services: [], allow: [{ to: [{ cidr: 192.0.2.2/32 }] }]");
        let mut world = World::new(top, &[policy("a", &at(&one)), default], more);
        let mut actor = world.actor(&one);
        actor.make_socket().unwrap();
        actor.move_to(&outside).unwrap();
        assert_eq!((open(&mut actor), open_with_made(&mut actor)), ("abc".to_owned(), expected.to_owned()));
        let denial = world.next_denial_of("192.0.2.1");
        assert_eq!(denial["reason"], if expected.is_empty() { "unknown_workload" } else { "no_rule" });
        assert_eq!(denial["cgroup"]["path"], outside.name());
    }
}

#[test]
fn a_thread_is_judged_by_its_own_cgroup() {
    let top = Cgroup::new().unwrap();
    let domain = top.child("domain").unwrap();
    let [one, two] = ["one", "two"].map(|name| domain.child(name).unwrap());
    one.make_threaded().unwrap();
    two.make_threaded().unwrap();
    let world = World::new(top, &[policy("a", &at(&one)), policy("b", &at(&two)), policy("c", &at(&domain))], &[]);
    let mut actor = world.actor(&one);
    actor.thread_in(&two).unwrap();
    assert_eq!(open(&mut actor), "ac");
    assert_eq!(open_by(&mut actor, Who::Thread, On::New), "bc");
    actor.make_socket().unwrap();
    assert_eq!(open_by(&mut actor, Who::Thread, On::Made), "bc", "whoever uses a socket is judged");
    actor.thread_in(&domain).unwrap();
    assert_eq!(open_by(&mut actor, Who::Thread, On::New), "c");
    actor.move_to(&two).unwrap();
    assert_eq!((open(&mut actor), open_by(&mut actor, Who::Thread, On::New)), ("bc".to_owned(), "bc".to_owned()));
}

#[test]
fn a_cgroup_namespace_hides_nobody() {
    let top = Cgroup::new().unwrap();
    let [one, two] = ["one", "two"].map(|name| top.child(name).unwrap());
    let world = World::new(top, &[policy("a", &at(&one)), policy("b", &at(&two))], &[]);
    let mut actor = world.actor_as(&one, Identity::InCgroupNamespace);
    let namespace = |pid: &str| fs::read_link(Path::new("/proc").join(pid).join("ns/cgroup")).unwrap();
    assert_eq!(open(&mut actor), "a");
    assert_ne!(namespace(&actor.pid().to_string()), namespace("self"));
    actor.move_to(&two).unwrap();
    assert_eq!(open(&mut actor), "b");
}

#[test]
fn a_user_is_selected_by_its_real_id_whichever_cgroup_it_is_in() {
    let top = Cgroup::new().unwrap();
    let [one, two] = ["one", "two"].map(|name| top.child(name).unwrap());
    let documents = [policy("a", &format!("{{ user: {USER} }}")), policy("b", &at(&two))];
    let mut world = World::new(top, &documents, &[]);
    for (identity, in_one, in_two) in [
        (Identity::Same, "", "b"),
        (Identity::User(USER), "a", "ab"),
        (Identity::User(OTHER_USER), "", "b"),
        (Identity::Effective(USER, OTHER_USER), "a", "ab"),
        (Identity::Effective(OTHER_USER, USER), "", "b"),
        (Identity::Effective(USER, 0), "a", "ab"),
        (Identity::RootOfUserNamespace(USER), "a", "ab"),
        (Identity::RootOfUserNamespace(OTHER_USER), "", "b"),
    ] {
        let mut actor = world.actor_as(&one, identity);
        assert_eq!(open(&mut actor), in_one, "{identity:?}");
        actor.move_to(&two).unwrap();
        assert_eq!(open(&mut actor), in_two, "{identity:?}");
        actor.move_to(&world.top).unwrap();
        assert_eq!(open(&mut actor), in_one, "{identity:?}");
    }
    let denial = world.denial_of(&mut world.actor_as(&one, Identity::RootOfUserNamespace(USER)));
    assert_eq!((&denial["rule"]["name"], &denial["process"]["uid"]), (&"a".into(), &USER.into()), "{denial}");
}

#[test]
fn a_user_is_selected_by_name() {
    let top = Cgroup::new().unwrap();
    let mut world = World::new(top, &[policy("a", "{ user: nobody }"), policy("b", "{ user: no-such-user }")], &[]);
    let warning = world.agent().log().iter().find(|line| line.contains("no-such-user")).cloned();
    assert!(warning.unwrap().contains("WARN"));
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let nobody = passwd.lines().find(|line| line.starts_with("nobody:")).unwrap().split(':').nth(2).unwrap();
    let mut actor = world.actor_as(&world.top, Identity::User(nobody.parse().unwrap()));
    assert_eq!(open(&mut actor), "a");
    assert_eq!(open(&mut world.actor(&world.top)), "");
}

/// Starts the agent in a cgroup, and waits until its policy is in force.
fn agent_in(cgroup: &Cgroup, place: &Place, policies: &Path, top: &Cgroup) -> Agent {
    let namespace = Netns::new().unwrap();
    let mut command = namespace.command(binary().unwrap(), Some(cgroup)).unwrap();
    command.arg("run").arg("--policies").arg(policies).arg("--cgroup").arg(top.path()).args(["--output", "json"]);
    Agent::spawn_in(Some(place), command).unwrap()
}

#[test]
fn the_agents_own_cgroup_passes_and_its_neighbours_do_not() {
    let top = Cgroup::new().unwrap();
    let [own, other] = ["own", "other"].map(|name| top.child(name).unwrap());
    let inner = own.child("inner").unwrap();
    let (policies, place, namespace) =
        (tempfile::tempdir().unwrap(), Place::new().unwrap(), Netns::with_every_address_local().unwrap());
    for documents in [String::new(), policy("a", &below(&top, "/*"))] {
        fs::write(policies.path().join("policies.yaml"), &documents).unwrap();
        let mut agent = agent_in(&own, &place, policies.path(), &top);
        agent.wait_for("policy applied generation=1 ").unwrap();
        let expected = if documents.is_empty() { "" } else { "a" };
        let mut actor = Actor::start(&namespace, &own, None).unwrap();
        assert_eq!(open(&mut actor), "abc");
        for cgroup in [&other, &inner] {
            actor.move_to(cgroup).unwrap();
            assert_eq!(open(&mut actor), expected, "{}", cgroup.name());
        }
    }
}

#[test]
fn an_agent_never_filters_the_cgroup_it_is_in() {
    let (top, policies, place) = (Cgroup::new().unwrap(), tempfile::tempdir().unwrap(), Place::new().unwrap());
    let mut agent = agent_in(&top, &place, policies.path(), &top);
    assert_eq!(agent.exit_status().unwrap().code(), Some(2));
    let (_, log) = agent.rest().unwrap();
    assert!(log.join("\n").contains(&format!("runs in cgroup {}", top.name())), "{log:#?}");
}

#[test]
fn status_tells_each_scope_with_its_policies_cgroups_and_users() {
    let top = Cgroup::new().unwrap();
    let [one, two, three] = ["one", "two", "three"].map(|name| top.child(name).unwrap());
    let documents =
        [policy("a", &below(&top, "/t*")), policy("b", &at(&one)), policy("c", &format!("{{ user: {USER} }}"))];
    let world = World::new(top, &documents, &[]);
    let status = world.place.status().unwrap().1;
    let mut told: Vec<Value> = status["scopes"].as_array().unwrap().clone();
    told.sort_by_key(|scope| (scope["users"].to_string(), scope["policies"].to_string()));
    let told: Vec<_> = told
        .iter()
        .map(|scope| {
            assert!(scope["prefixes"].as_u64().unwrap() > 0);
            (scope["policies"].clone(), scope["cgroups"].clone(), scope["users"].clone(), scope["workloads"].clone())
        })
        .collect();
    let scope = |policies: &[&str], cgroups: &[&Cgroup], users: &[u32]| {
        let policies = policies.iter().map(|name| format!("EgressPolicy/default/{name}")).collect::<Vec<_>>();
        let cgroups = cgroups.iter().map(|cgroup| cgroup.name()).collect::<Vec<_>>();
        let workloads = cgroups.len() + users.len();
        (policies.into(), cgroups.into(), users.into(), workloads.into())
    };
    let expected: Vec<(Value, Value, Value, Value)> = vec![
        scope(&["a", "c"], &[], &[USER]),
        scope(&["b", "c"], &[], &[USER]),
        scope(&["c"], &[], &[USER]),
        scope(&["a"], &[&three, &two], &[]),
        scope(&["b"], &[&one], &[]),
        scope(&[], &[&world.top], &[]),
    ];
    assert_eq!(told, expected);
    let text = String::from_utf8(world.place.output(&["status", "--output", "text"]).unwrap().stdout).unwrap();
    assert!(text.contains("EgressPolicy/default/a; 2 workloads"), "{text}");
}

/// Attaches to the root of this machine: with nothing but Allow for all that no test made.
/// An agent in the root cgroup, which filters it.
fn at_the_root(documents: &[String]) -> (Agent, TempDir) {
    let policies = tempfile::tempdir().unwrap();
    fs::write(policies.path().join("policies.yaml"), documents.concat()).unwrap();
    let root = mount_point().unwrap();
    let args = ["--default", "Allow", "--unknown-workloads", "Inherit"];
    let run = run_command(policies.path(), &root, &args).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ >\"$0\" && exec \"$@\""]).arg(root.join("cgroup.procs"));
    command.arg(run.get_program()).args(run.get_args());
    let mut agent = Agent::spawn(command).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    (agent, policies)
}

#[test]
fn at_the_root_the_tasks_of_the_root_cgroup_pass_and_the_start_counts_them() {
    let [selected, other] = [(); 2].map(|()| Cgroup::new().unwrap());
    let inner = selected.child("inner").unwrap();
    let namespace = Netns::with_every_address_local().unwrap();
    let every = policy("b", "{ cgroup: 'no-such-*' }, { unit: no-such.service }, { user: 4700003 }");
    let (mut agent, _policies) = at_the_root(&[policy("a", &at(&selected)), every]);
    let warning = agent.log().iter().find(|line| line.contains("in the root cgroup itself")).unwrap().clone();
    let tasks: usize = warning.split("tasks=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(warning.contains("WARN") && tasks > 0, "{warning}");
    let mut actor = Actor::start(&namespace, &selected, None).unwrap();
    actor.make_socket().unwrap();
    for (cgroup, expected) in [(&selected, "a"), (&inner, "a"), (&other, "abc")] {
        actor.move_to(cgroup).unwrap();
        assert_eq!(open(&mut actor), expected, "{}", cgroup.name());
    }
    fs::write(mount_point().unwrap().join("cgroup.procs"), actor.pid().to_string()).unwrap();
    assert_eq!((open(&mut actor), open_with_made(&mut actor)), ("abc".to_owned(), "abc".to_owned()));
    // One that is made later.
    let later = selected.child("later").unwrap();
    actor.move_to(&later).unwrap();
    assert_eq!(open(&mut actor), "a");
    drop(actor);
}

#[test]
fn an_agent_in_the_root_cgroup_says_that_no_policy_can_name_it() {
    let only_allows = document("root", "workloads: [{ cgroup: / }], defaultAction: Allow");
    let (mut agent, _policies) = at_the_root(&[only_allows]);
    let warning = agent.log().iter().find(|line| line.contains("in the root cgroup itself")).unwrap();
    assert!(warning.contains("WARN") && warning.contains("the agent is one of them"), "{warning}");
}

#[test]
fn a_start_that_would_refuse_the_whole_host_needs_force() {
    let policies = tempfile::tempdir().unwrap();
    let command = run_command(policies.path(), &mount_point().unwrap(), &["--default", "Deny"]).unwrap();
    let mut agent = Agent::spawn(command).unwrap();
    assert_eq!(agent.exit_status().unwrap().code(), Some(2));
    let (_, log) = agent.rest().unwrap();
    assert!(log.join("\n").contains("--force"), "{log:#?}");
}

#[test]
fn removed_cgroups_are_forgotten_and_their_names_can_be_used_again() {
    let top = Cgroup::new().unwrap();
    let cgroups: Vec<Cgroup> = (0..5).map(|number| top.child(format!("web-{number}")).unwrap()).collect();
    let world = World::new(top, &[policy("a", &web(&cgroups[0]))], &["--default", "Allow"]);
    let before = world.placements();
    assert_eq!(world.placed_by(&["a"]), 5);
    let mut actor = world.actor(&world.top);
    for round in 0..3 {
        cgroups[1..].iter().for_each(|cgroup| fs::remove_dir(cgroup.path()).unwrap());
        eventually("four cgroups to be forgotten", || (world.placements() == before - 4).then_some(())).unwrap();
        assert_eq!(world.placed_by(&["a"]), 1);
        cgroups[1..].iter().for_each(|cgroup| fs::create_dir(cgroup.path()).unwrap());
        actor.move_to(&cgroups[1 + round]).unwrap();
        becomes(&mut actor, "a");
        actor.move_to(&world.top).unwrap();
        eventually("all to be placed", || (world.placed_by(&["a"]) == 5).then_some(())).unwrap();
    }
    drop(actor);
}

/// `workloads` for the neighbours of a cgroup whose names begin as its own.
fn web(one: &Cgroup) -> String {
    let name = one.name();
    let (parent, _) = name.trim_start_matches('/').rsplit_once('/').unwrap();
    format!("{{ cgroup: '{parent}/web-*' }}")
}

/// A flag that is raised when this is dropped, also by a test that fails: who waits for it must not wait for ever.
struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn cgroups_that_come_and_go_leave_nothing_behind_and_disturb_nobody() {
    const CHURN: usize = 1_000;
    let top = Cgroup::new().unwrap();
    let steady = top.child("web-steady").unwrap();
    let world = World::new(top, &[policy("a", &web(&steady))], &[]);
    let before = world.placements();
    let is_over = AtomicBool::new(false);
    let mut actor = world.actor(&steady);
    let dials = thread::scope(|threads| {
        let end = Raised(&is_over);
        let dialling = threads.spawn(|| {
            let mut dials = 0_u32;
            while !is_over.load(Ordering::Relaxed) {
                assert_eq!(open(&mut actor), "a", "after {dials} dials");
                dials += 1;
            }
            dials
        });
        for number in 0..CHURN {
            let path = world.top.path().join(format!("web-{number}"));
            fs::create_dir(&path).unwrap();
            fs::remove_dir(&path).unwrap();
        }
        // More than there is room for beside the first, all there at once.
        let many: Vec<Cgroup> =
            (0..CHURN * 2).map(|number| world.top.child(format!("web-many-{number}")).unwrap()).collect();
        let all = many.len() + 1;
        eventually("all to be placed", || (world.placed_by(&["a"]) == all).then_some(())).unwrap();
        assert!(world.placements() >= all as u64);
        for cgroup in &many {
            fs::remove_dir(cgroup.path()).unwrap();
        }
        eventually("all to be forgotten", || (world.placements() == before).then_some(())).unwrap();
        drop(end);
        dialling.join().unwrap()
    });
    assert!(dials > 100, "{dials}");
    assert_eq!(world.placed_by(&["a"]), 1);
}

#[test]
fn more_cgroups_at_once_than_there_was_room_for_are_placed() {
    const MANY: usize = 1_500;
    let top = Cgroup::new().unwrap();
    let first = top.child("web-first").unwrap();
    let world = World::new(top, &[policy("a", &web(&first))], &[]);
    // It finds all of them at once, and none that went.
    world.agent.as_ref().unwrap().signal(Signal::STOP).unwrap();
    let cgroups: Vec<Cgroup> = (0..MANY).map(|number| world.top.child(format!("web-{number}")).unwrap()).collect();
    world.agent.as_ref().unwrap().signal(Signal::CONT).unwrap();
    let mut actor = world.actor(&cgroups[MANY - 1]);
    becomes(&mut actor, "a");
    assert_eq!(world.placed_by(&["a"]), MANY + 1);
    assert_eq!(world.placements(), MANY as u64 + 3, "with the top, and what holds elsewhere");
}

/// Of a process, in MB: what it has in memory. In seconds: what it took of the CPUs.
fn usage(pid: u32) -> (u64, f64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Fields 14 and 15 of `proc_pid_stat(5)`; what is cut off here are the first two.
    let ticks = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().skip(11).take(2);
    let ticks: u32 = ticks.map(|ticks| ticks.parse::<u32>().unwrap()).sum();
    (resident.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1000, f64::from(ticks) / 100.0)
}

#[test]
fn ten_thousand_cgroups_are_placed_and_one_more_soon() {
    const MANY: usize = 10_000;
    let top = Cgroup::new().unwrap();
    let cgroups: Vec<Cgroup> = (0..MANY).map(|number| top.child(format!("web-{number}")).unwrap()).collect();
    let start = Instant::now();
    let world = World::new(top, &[policy("a", &web(&cgroups[0]))], &[]);
    let (started, pid) = (start.elapsed(), world.agent.as_ref().unwrap().pid());
    let (memory, cpu) = usage(pid);
    assert_eq!(world.placed_by(&["a"]), MANY);

    let mut actor = world.actor(&cgroups[MANY / 2]);
    assert_eq!(open(&mut actor), "a");
    let mut slowest = Duration::ZERO;
    for number in 0..10 {
        let start = Instant::now();
        let more = world.top.child(format!("web-more-{number}")).unwrap();
        actor.move_to(&more).unwrap();
        while open(&mut actor) != "a" {}
        slowest = slowest.max(start.elapsed());
        actor.move_to(&world.top).unwrap();
    }
    drop(actor);
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    let (memory_after, cpu_after) = usage(pid);
    println!(
        "{MANY} cgroups: started in {started:?}, {memory} MB, {cpu} s of CPU; one more is placed in at most {slowest:?}; \
         after ten more {memory_after} MB, {cpu_after} s"
    );
}

/// What every policy of [`flows_that_both_policies_allow_are_never_refused`] opens, and one that none opens.
const COMMON: &str = "192.0.2.100";
const NEVER: &str = "192.0.2.200";

fn opens_common(name: &str, workloads: &str) -> String {
    let common = format!("allow: [{{ to: [{{ cidr: {COMMON}/32 }}], ports: [{{ protocol: UDP }}] }}, ");
    policy(name, workloads).replace("allow: [", &common)
}

#[test]
fn flows_that_both_policies_allow_are_never_refused() {
    const SWAPS: usize = 200;
    let top = Cgroup::new().unwrap();
    let [one, two] = ["one", "two"].map(|name| top.child(name).unwrap());
    let inner = one.child("inner").unwrap();
    let user = format!("{{ user: {USER} }}");
    let entry = format!(
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: common }}\n\
         spec: {{ hosts: [a.example.com], addresses: [{COMMON}], ports: [{{ number: 80, name: u, protocol: UDP }}] }}\n"
    );
    let (one_, two_) = (at(&one), at(&two));
    let variants: Vec<[String; 3]> = [
        (one_.clone(), two_.clone()),
        (two_.clone(), one_.clone()),
        (below(&top, "/*"), user.clone()),
        (below(&top, "/**/inner"), one_),
        (user, at(&top)),
        (below(&top, "/nobody"), two_),
    ]
    .into_iter()
    .map(|(a, b)| [opens_common("a", &a), opens_common("b", &b), entry.clone()])
    .collect();
    let world = World::new(top, &variants[0], &[]);
    let is_over = AtomicBool::new(false);
    let mut actors = [
        world.actor(&one),
        world.actor(&two),
        world.actor(&inner),
        world.actor_as(&two, Identity::User(USER)),
        world.actor_as(&world.top, Identity::User(USER)),
    ];
    let dials: Vec<u32> = thread::scope(|threads| {
        let end = Raised(&is_over);
        let dialling: Vec<_> = actors
            .iter_mut()
            .enumerate()
            .map(|(index, actor)| {
                let is_over = &is_over;
                threads.spawn(move || {
                    let mut dials = 0;
                    while !is_over.load(Ordering::Relaxed) {
                        // Leaves the agent some of the CPUs.
                        thread::sleep(Duration::from_micros(200));
                        assert_eq!(actor.send_udp(to(COMMON)).unwrap(), Ok(()), "actor {index} after {dials} dials");
                        assert_eq!(actor.send_udp(to(NEVER)).unwrap(), REFUSED, "actor {index} after {dials} dials");
                        dials += 1;
                    }
                    dials
                })
            })
            .collect();
        for swap in 1..=SWAPS {
            world.write(&variants[swap % variants.len()]);
            world.place.reload().unwrap();
            if dialling.iter().any(thread::ScopedJoinHandle::is_finished) {
                break;
            }
        }
        drop(end);
        dialling.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(dials.iter().all(|&dials| dials > 100), "{dials:?}");
    let generation = world.place.status().unwrap().1["policy"]["generation"].as_u64().unwrap();
    assert!(generation > SWAPS as u64, "{generation}");
    println!("{SWAPS} swaps, {} dials each way", dials.iter().sum::<u32>());
}

fn to(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), 80)
}
