//! The Kubernetes API as a source: a real agent, real sockets in cgroups that are named as the kubelet names those of pods,
//! and a small server in place of the API, which can be as unwell as a test wants it.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{fs, mem::ManuallyDrop, net::SocketAddr, process::Command};

use egress_tests::{
    actor::{Actor, Outcome},
    agent::{Agent, Place, binary},
    asker::{self, Asker, Heard, Transport},
    cgroup::Cgroup,
    eventually,
    fake_kube::{FakeKube, Fault, Resource},
    netns::{Netns, connect},
};
use rustix::io::Errno;
use serde_json::{Value, json};
use tempfile::TempDir;

const REFUSED: Outcome = Err(Errno::PERM);
/// How TCP ends that no filter stopped: every address is local, and nobody listens.
const NOBODY_THERE: Outcome = Err(Errno::CONNREFUSED);
const MYSQL: &str = "203.0.113.10:3306";
const CONTAINER: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// A node, the API of its cluster, and an agent.
struct Node {
    // In the order in which they are to go.
    agent: Option<Agent>,
    namespace: Netns,
    api: FakeKube,
    pods: Cgroup,
    top: Cgroup,
    place: Place,
    files: TempDir,
}

impl Node {
    /// Without an agent. The cgroup of all pods is one of its own.
    fn new() -> Self {
        let top = Cgroup::new().unwrap();
        Self {
            agent: None,
            namespace: Netns::with_every_address_local().unwrap(),
            api: FakeKube::start().unwrap(),
            pods: top.child("kubepods").unwrap(),
            top,
            place: Place::new().unwrap(),
            files: tempfile::tempdir().unwrap(),
        }
    }

    /// With an enforced namespace `shop`, and in it a pod `ratings`.
    fn shop() -> Self {
        let node = Self::new();
        node.namespace("shop", Some("enforce"));
        node.pod("shop", "ratings", &json!({ "app": "ratings" }));
        node
    }

    fn command(&self, more: &[&str]) -> Command {
        let mut command = Command::new(binary().unwrap());
        command
            .args(["run", "--kubernetes", "--node-name", "node", "--output", "json", "--cgroup"])
            .arg(self.pods.path());
        command.args(more).env("KUBECONFIG", self.api.kubeconfig());
        command
    }

    fn spawn(&mut self, more: &[&str]) -> &mut Agent {
        let agent = Agent::spawn_in(Some(&self.place), self.command(more)).unwrap();
        self.agent.insert(agent)
    }

    fn start(&mut self, more: &[&str]) {
        self.spawn(more).wait_for("policy applied generation=1 ").unwrap();
    }

    /// Starts an agent, and then a process in the pod `ratings`.
    fn start_with_ratings(&mut self, more: &[&str]) -> Actor {
        self.start(more);
        self.run("ratings")
    }

    /// The next denial of which a field says so; others before it are passed over.
    fn denial_with(&mut self, field: &str, value: &str) -> Value {
        loop {
            let denial = self.agent().denial().unwrap();
            if denial[field] == value {
                return denial;
            }
        }
    }

    fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().unwrap()
    }

    fn namespace(&self, name: &str, mode: Option<&str>) {
        let labels = mode.map_or_else(|| json!({}), |mode| json!({ "egress.filter/mode": mode }));
        self.api.apply(Resource::Namespaces, json!({ "metadata": { "name": name, "labels": labels } }));
    }

    /// The API knows a pod of this node, whose uid is made of its name.
    fn pod(&self, namespace: &str, name: &str, labels: &Value) {
        self.api.apply(
            Resource::Pods,
            json!({
                "metadata": {
                    "name": name, "namespace": namespace, "uid": uid(name), "labels": labels,
                    "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "1", "controller": true }],
                },
                "spec": { "nodeName": "node" },
                "status": {
                    "phase": "Running", "podIP": "10.0.0.1",
                    "containerStatuses": [{ "name": "app", "containerID": format!("containerd://{CONTAINER}") }],
                },
            }),
        );
    }

    /// A process in the container of a pod.
    fn run(&self, name: &str) -> Actor {
        self.start_in(&format!("burstable/pod{}/{CONTAINER}", uid(name)))
    }

    /// A process in a cgroup below that of all pods, which goes with it.
    fn start_in(&self, path: &str) -> Actor {
        let cgroup = ManuallyDrop::new(self.pods.descendant(path).unwrap());
        Actor::start(&self.namespace, &cgroup, None).unwrap()
    }

    fn entry(&self, namespace: &str, name: &str, spec: &Value) {
        self.api.apply(
            Resource::ServiceEntries,
            json!({
                "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
                "metadata": { "name": name, "namespace": namespace }, "spec": spec,
            }),
        );
    }

    fn policy(&self, namespace: &str, name: &str, spec: &Value) {
        self.api.apply(
            Resource::EgressPolicies,
            json!({
                "apiVersion": "egress.filter/v1alpha1", "kind": "EgressPolicy",
                "metadata": { "name": name, "namespace": namespace }, "spec": spec,
            }),
        );
    }

    /// The exit status of `status`, and what it tells.
    fn status(&self) -> (Option<i32>, Value) {
        self.place.status().unwrap()
    }

    /// Waits until `status` tells of something that is not as it should be.
    fn degraded(&self, text: &str) -> String {
        let look = || {
            let (code, status) = self.status();
            let degraded =
                status["degraded"].as_array()?.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n");
            (degraded.contains(text) && code == Some(1)).then_some(degraded)
        };
        eventually(&format!("{text:?} in the status"), look).unwrap()
    }

    /// Waits until nothing is amiss.
    fn healthy(&self) {
        eventually("a healthy status", || (self.status().0 == Some(0)).then_some(())).unwrap();
    }
}

fn uid(name: &str) -> String {
    let digit = name.bytes().fold(0_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    format!("{digit:08x}-0000-4000-8000-000000000000")
}

fn mysql() -> Value {
    json!({
        "hosts": ["mysql.example.com"], "addresses": ["203.0.113.10/32"], "location": "MESH_EXTERNAL",
        "ports": [{ "number": 3306, "name": "tcp", "protocol": "TCP" }],
    })
}

fn to(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

/// Waits until a call ends so.
#[track_caller]
fn becomes(actor: &mut Actor, address: &str, outcome: Outcome) {
    let dial = || (actor.dial_tcp(to(address)).unwrap() == outcome).then_some(());
    eventually(&format!("{address} to end with {outcome:?}"), dial).unwrap();
}

#[track_caller]
fn is(actor: &mut Actor, address: &str, outcome: Outcome) {
    assert_eq!(actor.dial_tcp(to(address)).unwrap(), outcome, "{address}");
}

#[test]
fn a_service_entry_opens_for_running_pods_and_closes_when_it_is_deleted() {
    let mut node = Node::shop();
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, REFUSED);
    // Before its cgroup is placed, the reason is another.
    let denial = loop {
        is(&mut ratings, MYSQL, REFUSED);
        let denial = node.agent().denial().unwrap();
        if denial["reason"] == "no_rule" {
            break denial;
        }
    };
    let pod = json!({
        "namespace": "shop", "name": "ratings", "container": "app", "owner": { "kind": "ReplicaSet", "name": "rs" },
    });
    assert_eq!((&denial["pod"], &denial["container_id"]), (&pod, &json!(CONTAINER)));
    node.entry("shop", "mysql", &mysql());
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    is(&mut ratings, "203.0.113.10:3307", REFUSED);
    node.api.delete(Resource::ServiceEntries, "shop", "mysql");
    becomes(&mut ratings, MYSQL, REFUSED);
    let (code, status) = node.status();
    assert_eq!((code, &status["kubernetes"]["synced"]), (Some(0), &json!(true)), "{status:#}");
    assert_eq!(status["kubernetes"]["resources"].as_array().unwrap().len(), 4);
}

#[test]
fn the_label_of_the_namespace_decides_and_is_followed() {
    let mut node = Node::new();
    for (name, mode) in
        [("strict", Some("enforce")), ("watched", Some("audit")), ("plain", None), ("kube-system", None)]
    {
        node.namespace(name, mode);
        node.pod(name, name, &json!({}));
    }
    node.start(&["--default", "Deny"]);
    let [mut strict, mut watched, mut plain, mut system] =
        ["strict", "watched", "plain", "kube-system"].map(|name| node.run(name));
    becomes(&mut strict, MYSQL, REFUSED);
    becomes(&mut watched, MYSQL, NOBODY_THERE);
    becomes(&mut system, MYSQL, NOBODY_THERE);
    is(&mut plain, MYSQL, REFUSED);
    let would = node.denial_with("verdict", "would_deny");
    assert_eq!(would["pod"]["namespace"], "watched");
    node.namespace("strict", Some("audit"));
    becomes(&mut strict, MYSQL, NOBODY_THERE);
    node.namespace("watched", Some("enforce"));
    becomes(&mut watched, MYSQL, REFUSED);
    node.namespace("watched", Some("enforced"));
    let degraded = node.degraded("Namespace/watched");
    assert!(degraded.contains("`enforced` is neither `enforce` nor `audit`"), "{degraded}");
}

#[test]
fn a_pod_that_is_not_known_is_refused_until_it_is() {
    let mut node = Node::new();
    node.namespace("shop", Some("enforce"));
    node.entry("shop", "mysql", &mysql());
    node.start(&["--default", "Allow"]);
    let mut early = node.run("early");
    becomes(&mut early, MYSQL, REFUSED);
    assert_eq!(node.agent().denial().unwrap()["reason"], "unknown_workload");
    // Its namespace is not known, so what holds of it is not.
    node.pod("late", "early", &json!({}));
    is(&mut early, MYSQL, REFUSED);
    node.namespace("late", None);
    becomes(&mut early, MYSQL, NOBODY_THERE);
    let mut inherits = Node::new();
    inherits.namespace("shop", Some("enforce"));
    inherits.start(&["--default", "Allow", "--unknown-workloads", "Inherit"]);
    let mut unknown = inherits.run("unknown");
    becomes(&mut unknown, MYSQL, NOBODY_THERE);
}

#[test]
fn pods_are_known_by_the_paths_of_the_systemd_driver() {
    let mut node = Node::new();
    node.pods = node.top.child("kubepods.slice").unwrap();
    node.namespace("shop", Some("enforce"));
    node.pod("shop", "ratings", &json!({}));
    node.entry("shop", "mysql", &mysql());
    node.start(&["--default", "Allow"]);
    let (class, uid) = ("kubepods-besteffort", uid("ratings").replace('-', "_"));
    let path = format!("{class}.slice/{class}-pod{uid}.slice/cri-containerd-{CONTAINER}.scope");
    let mut ratings = node.start_in(&path);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    is(&mut ratings, "203.0.113.9:80", REFUSED);
    let denial = node.denial_with("reason", "no_rule");
    assert_eq!(denial["pod"]["container"], "app");
}

#[test]
fn a_pod_deleted_by_force_is_judged_as_before_while_it_runs() {
    let mut node = Node::shop();
    node.entry("shop", "mysql", &mysql());
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    node.api.delete(Resource::Pods, "shop", "ratings");
    // Something else happens, so that it is known that the deletion was heard of.
    node.entry("shop", "other", &json!({
        "hosts": ["o.example.com"], "addresses": ["203.0.113.11"], "ports": [{ "number": 80, "name": "tcp", "protocol": "TCP" }],
    }));
    becomes(&mut ratings, "203.0.113.11:80", NOBODY_THERE);
    is(&mut ratings, MYSQL, NOBODY_THERE);
    is(&mut ratings, "203.0.113.9:80", REFUSED);
}

#[test]
fn an_invalid_object_leaves_its_last_valid_version_and_its_author_is_told() {
    let mut node = Node::shop();
    node.entry("shop", "mysql", &mysql());
    node.policy("shop", "web", &json!({ "allow": [{ "to": [{ "cidr": "198.51.100.0/24" }] }], "later": true }));
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    is(&mut ratings, "198.51.100.1:80", NOBODY_THERE);
    node.entry(
        "shop",
        "mysql",
        &json!({ "hosts": ["db\u{7}.example.com"], "ports": [{ "number": 99999, "name": "tcp" }] }),
    );
    let degraded = node.degraded("ServiceEntry/shop/mysql");
    assert!(degraded.contains("its last valid version stays in force") && !degraded.contains('\u{7}'), "{degraded}");
    is(&mut ratings, MYSQL, NOBODY_THERE);
    node.policy("shop", "web", &json!({ "workloads": [{ "cgroup": "system.slice" }] }));
    node.degraded("EgressPolicy/shop/web: spec.workloads: selecting by `cgroup`");
    is(&mut ratings, "198.51.100.1:80", NOBODY_THERE);
    let events = eventually("two events", || Some(node.api.events()).filter(|events| events.len() >= 2)).unwrap();
    let of = |kind: &str| events.iter().find(|event| event["regarding"]["kind"] == kind).unwrap();
    assert!(of("EgressPolicy")["note"].as_str().unwrap().contains("selecting by `cgroup`"), "{events:#?}");
    assert_eq!((&of("ServiceEntry")["reason"], &of("ServiceEntry")["type"]), (&json!("Invalid"), &json!("Warning")));
    let conditions = || {
        let patches = node.api.patches();
        let accepted: Vec<Value> = patches.iter().map(|(_, patch)| patch["status"]["conditions"][0].clone()).collect();
        (accepted.len() >= 2).then_some(accepted)
    };
    let conditions = eventually("two patches", conditions).unwrap();
    assert_eq!((&conditions[0]["status"], &conditions[0]["observedGeneration"]), (&json!("True"), &json!(1)));
    assert_eq!((&conditions[1]["status"], &conditions[1]["observedGeneration"]), (&json!("False"), &json!(2)));
    assert!(node.api.patches()[0].0.ends_with("/namespaces/shop/egresspolicies/web/status"));
    let log = node.agent().log().join("\n");
    assert!(log.contains("unknown field `later`") && !log.contains('\u{7}'), "{log}");
    node.entry("shop", "mysql", &mysql());
    node.policy("shop", "web", &json!({}));
    node.healthy();
}

#[test]
fn an_object_of_ten_megabytes_is_refused_alone() {
    let mut node = Node::shop();
    let addresses: Vec<String> =
        (0..500_000_u32).map(|n| format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255)).collect();
    node.entry(
        "shop",
        "huge",
        &json!({ "hosts": ["h.example.com"], "addresses": addresses, "ports": [{ "number": 80, "name": "a" }] }),
    );
    node.entry("shop", "mysql", &mysql());
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    is(&mut ratings, "10.0.0.1:80", REFUSED);
    assert!(node.degraded("ServiceEntry/shop/huge").contains("more than 2097152 bytes; it has no effect"));
}

#[test]
fn a_tenant_cannot_open_or_close_pods_of_another() {
    let mut node = Node::new();
    for name in ["mine", "theirs"] {
        node.namespace(name, Some("enforce"));
        node.pod(name, name, &json!({ "app": "web" }));
    }
    node.start(&["--default", "Allow"]);
    let (mut mine, mut theirs) = (node.run("mine"), node.run("theirs"));
    becomes(&mut theirs, MYSQL, REFUSED);
    becomes(&mut mine, MYSQL, REFUSED);
    let open = json!([{ "to": [{ "cidr": "0.0.0.0/0" }] }]);
    for (name, workloads) in [
        ("by-cgroup", json!([{ "cgroup": "**" }])),
        ("by-unit", json!([{ "unit": "*" }])),
        ("by-user", json!([{ "user": 0 }])),
        ("by-namespace", json!([{ "pod": { "namespaces": ["theirs"] } }])),
        ("by-namespace-labels", json!([{ "pod": { "namespaceLabels": { "egress.filter/mode": "enforce" } } }])),
    ] {
        node.policy("mine", name, &json!({ "workloads": workloads, "allow": open }));
        node.degraded(&format!("EgressPolicy/mine/{name}: spec.workloads: selecting by"));
    }
    // Seen by `mine` alone.
    let for_mine = json!({ "exportTo": ["."], "hosts": ["m.example.com"], "addresses": ["203.0.113.20"],
        "ports": [{ "number": 80, "name": "tcp", "protocol": "TCP" }] });
    node.entry("mine", "own", &for_mine);
    becomes(&mut mine, "203.0.113.20:80", NOBODY_THERE);
    is(&mut theirs, "203.0.113.20:80", REFUSED);
    node.policy(
        "mine",
        "own",
        &json!({ "workloads": [{ "pod": { "matchLabels": { "app": "web" } } }], "allow": open }),
    );
    becomes(&mut mine, MYSQL, NOBODY_THERE);
    is(&mut theirs, MYSQL, REFUSED);
    // Without a selector, it is for the pods of its namespace.
    node.policy("mine", "own", &json!({ "deny": [{ "to": [{ "cidr": "203.0.113.20/32" }] }], "allow": open }));
    becomes(&mut mine, "203.0.113.20:80", REFUSED);
    node.policy(
        "egress-system",
        "all",
        &json!({ "workloads": [{ "pod": { "matchLabels": { "app": "web" } } }], "allow": open }),
    );
    becomes(&mut theirs, MYSQL, NOBODY_THERE);
}

#[test]
fn entries_count_only_where_they_are_meant_to() {
    let mut node = Node::shop();
    node.entry("shop", "mysql", &mysql());
    let mut ratings = node.start_with_ratings(&["--default", "Allow", "--service-entries-from", "infra,platform"]);
    becomes(&mut ratings, MYSQL, REFUSED);
    node.entry("infra", "mysql", &mysql());
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
}

#[test]
fn the_networks_and_resolvers_of_the_cluster_are_those_that_are_named() {
    let mut node = Node::shop();
    let mut ratings = node.start_with_ratings(&[
        "--default",
        "Allow",
        "--internal-cidrs",
        "10.0.0.0/8,fd00::/8",
        "--cluster-dns",
        "192.0.2.53",
    ]);
    becomes(&mut ratings, "10.1.2.3:8080", NOBODY_THERE);
    is(&mut ratings, "[fd00::1]:8080", NOBODY_THERE);
    is(&mut ratings, "192.0.2.53:53", NOBODY_THERE);
    is(&mut ratings, "192.0.2.53:80", REFUSED);
    is(&mut ratings, MYSQL, REFUSED);
    node.policy("shop", "narrow", &json!({ "deny": [{ "to": [{ "cidr": "10.1.0.0/16" }] }] }));
    becomes(&mut ratings, "10.1.2.3:8080", REFUSED);
    is(&mut ratings, "10.2.0.1:8080", NOBODY_THERE);
}

/// In the network namespace of its own that each pod has, made by root; and not in one that a process of a pod makes.
#[test]
fn names_are_learnt_in_the_network_namespaces_of_pods() {
    const SERVER: &str = "198.51.100.53";
    let mut node = Node::shop();
    let own = Netns::with_every_address_local().unwrap();
    let far = Netns::new().unwrap();
    connect((&own, "pod", "198.51.100.1/24"), (&far, "far", "198.51.100.53/24")).unwrap();
    own.ip(&["route", "del", "local", "0.0.0.0/0", "dev", "lo"]).unwrap();
    own.ip(&["route", "add", "local", "192.0.2.0/24", "dev", "lo"]).unwrap();
    far.run(|| asker::serve(SERVER.parse().unwrap(), &Heard::default())).unwrap().unwrap();
    let ports = json!([{ "number": 443, "name": "tls", "protocol": "TLS" }]);
    node.entry("shop", "api", &json!({ "hosts": ["*.example.com"], "ports": ports, "resolution": "NONE" }));
    let container =
        ManuallyDrop::new(node.pods.descendant(&format!("burstable/pod{}/{CONTAINER}", uid("ratings"))).unwrap());
    let (mut asker, mut liar) = (Asker::start(&own, &container).unwrap(), Asker::start(&own, &container).unwrap());
    assert_eq!(liar.order("unshare").unwrap(), "");
    liar.order(&format!("ip address add {SERVER}/32 dev lo")).unwrap();
    assert_eq!(liar.order(&format!("serve {SERVER}")).unwrap(), "");
    node.start(&["--cluster-dns", SERVER]);
    let is_refused =
        |asker: &mut Asker, address: &str| asker.is_refused(format!("{address}:443").parse().unwrap()).unwrap();
    liar.ask(Transport::Udp, SERVER.parse().unwrap(), "192-0-2-1.example.com").unwrap();
    assert!(is_refused(&mut asker, "192.0.2.1"));
    for (transport, address) in [(Transport::Udp, "192.0.2.2"), (Transport::Tcp, "192.0.2.3")] {
        assert!(is_refused(&mut asker, address));
        asker.ask(transport, SERVER.parse().unwrap(), &format!("{}.example.com", address.replace('.', "-"))).unwrap();
        assert!(!is_refused(&mut asker, address), "{transport:?}");
    }
}

#[test]
fn a_workload_selector_opens_the_pods_that_it_selects() {
    let mut node = Node::shop();
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, "192.0.2.80:9080", REFUSED);
    node.entry(
        "shop",
        "reviews",
        &json!({
            "hosts": ["reviews.example.com"], "location": "MESH_INTERNAL", "resolution": "STATIC",
            "ports": [{ "number": 80, "targetPort": 9080, "name": "http", "protocol": "HTTP" }],
            "workloadSelector": { "labels": { "app": "reviews" } },
        }),
    );
    let pod = |namespace: &str, name: &str, app: &str, address: &str, phase: &str| {
        node.api.apply(
            Resource::Pods,
            json!({
                "metadata": { "name": name, "namespace": namespace, "uid": name, "labels": { "app": app } },
                "spec": { "nodeName": "elsewhere" }, "status": { "phase": phase, "podIP": address },
            }),
        );
    };
    pod("shop", "a", "reviews", "192.0.2.80", "Running");
    pod("other", "b", "reviews", "192.0.2.81", "Running");
    pod("shop", "c", "details", "192.0.2.82", "Running");
    becomes(&mut ratings, "192.0.2.80:9080", NOBODY_THERE);
    for closed in ["192.0.2.80:80", "192.0.2.81:9080", "192.0.2.82:9080"] {
        is(&mut ratings, closed, REFUSED);
    }
    pod("shop", "a", "reviews", "192.0.2.80", "Failed");
    becomes(&mut ratings, "192.0.2.80:9080", REFUSED);
}

#[test]
fn files_and_objects_are_used_together_and_a_file_hides_its_namesake() {
    let mut node = Node::shop();
    let file = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: { name: mysql, namespace: shop }\nspec:\n  \
                hosts: [f.example.com]\n  addresses: [203.0.113.30]\n  ports: [{ number: 3306, name: tcp, protocol: TCP }]\n";
    fs::write(node.files.path().join("a.yaml"), file).unwrap();
    node.entry("shop", "mysql", &mysql());
    node.entry("shop", "other", &json!({
        "hosts": ["o.example.com"], "addresses": ["203.0.113.31"], "ports": [{ "number": 80, "name": "tcp", "protocol": "TCP" }],
    }));
    let policies = node.files.path().to_str().unwrap().to_owned();
    let mut ratings = node.start_with_ratings(&["--default", "Allow", "--policies", &policies]);
    becomes(&mut ratings, "203.0.113.30:3306", NOBODY_THERE);
    is(&mut ratings, "203.0.113.31:80", NOBODY_THERE);
    is(&mut ratings, MYSQL, REFUSED);
    node.degraded("ServiceEntry/shop/mysql: a policy file has a document of this name");
    fs::remove_file(node.files.path().join("a.yaml")).unwrap();
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    node.healthy();
    // What is wrong in a file does not keep objects from being followed.
    fs::write(node.files.path().join("b.yaml"), "x: [").unwrap();
    node.degraded("the last good policy stays in force");
    node.api.delete(Resource::ServiceEntries, "shop", "mysql");
    becomes(&mut ratings, MYSQL, REFUSED);
}

#[test]
fn while_the_api_is_unwell_what_was_known_stays_and_then_it_is_followed() {
    let mut node = Node::shop();
    node.entry("shop", "mysql", &mysql());
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    let entries = Resource::ServiceEntries;
    for (fault, told) in [
        (Fault::Forbidden, "the role of the service account lacks this"),
        (Fault::Unauthorized, "the token is not accepted"),
        (Fault::Html, "serviceentries.networking.istio.io/v1: "),
        (Fault::EndsAtOnce, "ends every watch at once"),
        (Fault::Garbage, "serviceentries.networking.istio.io/v1: "),
    ] {
        node.api.set_fault(entries, Some(fault));
        let degraded = node.degraded(told);
        assert!(degraded.contains("what was known last stays in force") && !degraded.contains('\u{7}'), "{degraded}");
        is(&mut ratings, MYSQL, NOBODY_THERE);
        node.api.delete(entries, "shop", "mysql");
        is(&mut ratings, MYSQL, NOBODY_THERE);
        node.api.set_fault(entries, None);
        becomes(&mut ratings, MYSQL, REFUSED);
        node.healthy();
        node.entry("shop", "mysql", &mysql());
        becomes(&mut ratings, MYSQL, NOBODY_THERE);
    }
}

#[test]
fn an_api_that_is_away_or_has_forgotten_is_caught_up_with() {
    let mut node = Node::shop();
    node.entry("shop", "mysql", &mysql());
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    node.api.set_away(true);
    node.degraded("what was known last stays in force");
    node.api.delete(Resource::ServiceEntries, "shop", "mysql");
    is(&mut ratings, MYSQL, NOBODY_THERE);
    let lists = node.api.lists(Resource::ServiceEntries);
    node.api.set_away(false);
    becomes(&mut ratings, MYSQL, REFUSED);
    assert_eq!(node.api.lists(Resource::ServiceEntries), lists, "the watch went on where it ended");
    node.healthy();
    // 410: what changed meanwhile is not known any more.
    node.api.set_away(true);
    node.degraded("what was known last stays in force");
    node.entry("shop", "mysql", &mysql());
    node.api.forget();
    node.api.set_away(false);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    assert!(node.api.lists(Resource::ServiceEntries) > lists);
    node.healthy();
}

#[test]
fn nothing_is_put_in_force_before_everything_is_known() {
    let mut node = Node::shop();
    node.api.set_fault(Resource::EgressPolicies, Some(Fault::Forbidden));
    node.spawn(&["--default", "Allow"]);
    let line = node.agent().wait_for("waiting for the Kubernetes API").unwrap();
    assert!(line.contains("egresspolicies.egress.filter/v1alpha1: 403"), "{line}");
    let mut ratings = node.run("ratings");
    is(&mut ratings, MYSQL, NOBODY_THERE);
    node.api.set_fault(Resource::EgressPolicies, None);
    becomes(&mut ratings, MYSQL, REFUSED);
    // An agent that starts while the API is away leaves in force what the one before it left.
    node.agent.take().unwrap().kill().unwrap();
    node.api.set_away(true);
    node.spawn(&["--default", "Allow"]);
    node.agent().wait_for("waiting for the Kubernetes API").unwrap();
    is(&mut ratings, MYSQL, REFUSED);
    node.entry("shop", "mysql", &mysql());
    node.api.set_away(false);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
}

#[test]
fn a_definition_may_be_missing_and_come_later_in_another_version() {
    let mut node = Node::shop();
    node.api.set_served(&["egress.filter/v1alpha1"]);
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, REFUSED);
    let (code, status) = node.status();
    let entries = status["kubernetes"]["resources"].as_array().unwrap()[0].clone();
    assert_eq!((code, &entries["installed"]), (Some(0), &json!(false)), "{status:#}");
    node.entry("shop", "mysql", &mysql());
    node.api.set_served(&["networking.istio.io/v1alpha3", "networking.istio.io/v1beta1", "egress.filter/v1alpha1"]);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    assert_eq!(node.status().1["kubernetes"]["resources"][0]["resource"], "serviceentries.networking.istio.io/v1beta1");
    // It is not served any more, and nothing says that the objects are gone.
    node.api.set_served(&["egress.filter/v1alpha1"]);
    node.degraded("serviceentries.networking.istio.io/v1beta1: the API does not serve this any more");
    is(&mut ratings, MYSQL, NOBODY_THERE);
}

#[test]
fn a_server_that_does_not_answer_is_not_waited_for() {
    let mut node = Node::shop();
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, REFUSED);
    node.api.set_fault(Resource::EgressPolicies, Some(Fault::Silence));
    // The other kinds are followed all the same.
    node.entry("shop", "mysql", &mysql());
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    node.degraded("egresspolicies.egress.filter/v1alpha1: the server does not answer");
}

#[test]
fn without_an_api_or_a_cgroup_of_pods_nothing_starts() {
    let node = Node::new();
    let run = |command: &mut Command| {
        node.place.tell(command);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let missing = run(node.command(&[]).env("KUBECONFIG", "/no/such/file"));
    assert!(missing.0 == Some(4) && missing.1.contains("cannot tell where the Kubernetes API is"), "{missing:?}");
    let mut without = Command::new(binary().unwrap());
    let neither = run(without.args(["run", "--default", "Allow"]));
    assert!(
        neither.0 == Some(2) && neither.1.contains("--policies <PATH>") && neither.1.contains("--cgroup <PATH>"),
        "{neither:?}"
    );
}

#[test]
fn what_comes_fast_is_put_in_force_together() {
    let mut node = Node::shop();
    let mut ratings = node.start_with_ratings(&["--default", "Allow"]);
    for index in 0..200 {
        node.entry(
            "shop",
            &format!("e{index}"),
            &json!({
                "hosts": [format!("e{index}.example.com")], "addresses": [format!("198.18.0.{index}")],
                "ports": [{ "number": 80, "name": "tcp", "protocol": "TCP" }],
            }),
        );
    }
    becomes(&mut ratings, "198.18.0.199:80", NOBODY_THERE);
    let generation = node.status().1["policy"]["generation"].as_u64().unwrap();
    assert!(generation < 100, "{generation} generations for 200 objects");
}
