//! The agent and a real Kubernetes API server: what people do with kubectl is what the sockets of pods feel.
//!
//! `cargo xtask kube` builds the server. The agent has the account and the role that the chart gives it.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{mem::ManuallyDrop, net::SocketAddr, process::Command, time::Instant};

use egress_tests::{
    actor::{Actor, Outcome},
    agent::{Agent, Place, binary},
    cgroup::Cgroup,
    companion,
    container::{Container, Spec},
    eventually,
    kube::{ADMIN, AGENT, ApiServer, TENANT, User},
    mariadb::{Answer, Server, answer, client},
    netns::{Netns, connect},
    scenario::{SERVER, mysql_external},
};
use rustix::io::Errno;
use serde_json::{Value, json};

const REFUSED: Outcome = Err(Errno::PERM);
/// How TCP ends that no filter stopped: every address is local, and nobody listens.
const NOBODY_THERE: Outcome = Err(Errno::CONNREFUSED);
const MYSQL: &str = "203.0.113.10:3306";
const CONTAINER: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// Of the node that the agent is for.
const NODE: &str = "node";

/// A cluster of one node.
struct Cluster {
    // In the order in which they are to go.
    agent: Option<Agent>,
    api: ApiServer,
    pods: Cgroup,
    _top: Cgroup,
    place: Place,
}

/// A pod that the API knows.
struct Pod {
    object: Value,
    path: String,
}

impl Pod {
    fn uid(&self) -> &str {
        self.object["metadata"]["uid"].as_str().unwrap()
    }
}

impl Cluster {
    /// With the definitions, the role of the agent, and nothing else.
    fn new() -> Self {
        let cluster = Self::without_role();
        cluster.api.install().unwrap();
        cluster
    }

    fn without_role() -> Self {
        let (api, top) = (ApiServer::start().unwrap(), Cgroup::new().unwrap());
        api.define().unwrap();
        Self { agent: None, api, pods: top.child("kubepods").unwrap(), _top: top, place: Place::new().unwrap() }
    }

    /// Starts the agent, which the API knows by the account of the chart.
    fn spawn(&mut self, more: &[&str]) -> &mut Agent {
        let mut command = self.api.network.command(binary().unwrap(), None).unwrap();
        command
            .args(["run", "--kubernetes", "--node-name", NODE, "--output", "json", "--cgroup"])
            .arg(self.pods.path());
        command.args(more).env("KUBECONFIG", self.api.kubeconfig(AGENT));
        let agent = Agent::spawn_in(Some(&self.place), command).unwrap();
        self.agent.insert(agent)
    }

    fn start(&mut self, more: &[&str]) {
        self.spawn(more).wait_for("policy applied generation=1 ").unwrap();
    }

    fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().unwrap()
    }

    fn namespace(&self, name: &str, labels: &Value) {
        let object = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } });
        self.api.apply(ADMIN, &object).unwrap();
    }

    fn pod(&self, namespace: &str, name: &str) -> Pod {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": name, "namespace": namespace, "labels": { "app": name },
                "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "1", "controller": true }],
            },
            "spec": { "nodeName": NODE, "containers": [{ "name": "app", "image": "app" }] },
        });
        Pod {
            object: self.api.apply(ADMIN, &object).unwrap(),
            path: format!("/api/v1/namespaces/{namespace}/pods/{name}"),
        }
    }

    /// As the kubelet tells, when it has started a container.
    fn runs(&self, pod: &Pod, container: &str) {
        let mut object = pod.object.clone();
        object["metadata"].as_object_mut().unwrap().remove("resourceVersion");
        object["status"] = json!({
            "phase": "Running", "podIP": "10.0.0.1",
            "containerStatuses": [{
                "name": "app", "image": "app", "imageID": "", "ready": true, "restartCount": 0,
                "containerID": format!("containerd://{container}"),
            }],
        });
        self.api.set_status(&pod.path, &object).unwrap();
    }

    /// The cgroup of a pod, which the kubelet makes.
    fn cgroup(&self, pod: &Pod) -> ManuallyDrop<Cgroup> {
        // It goes with the one of all pods.
        ManuallyDrop::new(self.pods.descendant(&format!("burstable/pod{}", pod.uid())).unwrap())
    }

    /// A process in a container of a pod.
    fn process(&self, pod: &Pod) -> Actor {
        let cgroup = ManuallyDrop::new(self.cgroup(pod).descendant(CONTAINER).unwrap());
        Actor::start(&self.api.network, &cgroup, None).unwrap()
    }

    /// An enforced namespace with a pod, and a process in that.
    fn shop(&self) -> Actor {
        self.namespace("shop", &json!({ "egress.filter/mode": "enforce" }));
        let pod = self.pod("shop", "ratings");
        self.runs(&pod, CONTAINER);
        self.process(&pod)
    }

    /// Waits until the status says something.
    fn tells(&self, words: &str) -> Value {
        let look =
            || Some(self.place.status().unwrap().1).filter(|status| status["degraded"].to_string().contains(words));
        eventually(&format!("{words:?} in the status"), look).unwrap()
    }

    fn is_healthy(&self) {
        eventually("a healthy status", || (self.place.status().unwrap().0 == Some(0)).then_some(())).unwrap();
    }

    /// Waits until the condition of a policy says something.
    fn condition(&self, namespace: &str, name: &str, status: &str) -> Value {
        let get = ["get", "egresspolicy", name, "--namespace", namespace, "--output", "json"];
        let look = || {
            let policy: Value = serde_json::from_str(&self.api.must(ADMIN, &get).unwrap()).unwrap();
            let condition = policy["status"]["conditions"][0].clone();
            (condition["status"] == status && condition["observedGeneration"] == policy["metadata"]["generation"])
                .then_some(condition)
        };
        eventually(&format!("{name} to be accepted: {status}"), look).unwrap()
    }
}

fn to(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

#[track_caller]
fn becomes(actor: &mut Actor, address: &str, outcome: Outcome) {
    let dial = || (actor.dial_tcp(to(address)).unwrap() == outcome).then_some(());
    eventually(&format!("{address} to end with {outcome:?}"), dial).unwrap();
}

#[track_caller]
fn is(actor: &mut Actor, address: &str, outcome: Outcome) {
    assert_eq!(actor.dial_tcp(to(address)).unwrap(), outcome, "{address}");
}

fn entry(namespace: &str, name: &str, address: &str, port: u16) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "hosts": [format!("{name}.example.com")], "addresses": [address], "location": "MESH_EXTERNAL",
            "ports": [{ "number": port, "name": "tcp", "protocol": "TCP" }],
        },
    })
}

fn policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "egress.filter/v1alpha1", "kind": "EgressPolicy", "metadata": { "name": name, "namespace": namespace },
        "spec": spec,
    })
}

/// Lets a user do something in a namespace.
fn allow(cluster: &Cluster, namespace: &str, user: &str, rules: &Value) {
    let metadata = json!({ "name": user, "namespace": namespace });
    let api = "rbac.authorization.k8s.io";
    let role = json!({ "apiVersion": format!("{api}/v1"), "kind": "Role", "metadata": metadata, "rules": rules });
    let binding = json!({
        "apiVersion": format!("{api}/v1"), "kind": "RoleBinding", "metadata": metadata,
        "roleRef": { "apiGroup": api, "kind": "Role", "name": user },
        "subjects": [{ "apiGroup": api, "kind": "User", "name": user }],
    });
    cluster.api.apply(ADMIN, &role).unwrap();
    cluster.api.apply(ADMIN, &binding).unwrap();
}

#[test]
#[ignore = "needs what `cargo xtask kube` builds"]
fn a_service_entry_opens_the_database_to_a_running_pod_and_its_deletion_closes_it() {
    let mut cluster = Cluster::new();
    let (workload, outside) = (Netns::new().unwrap(), Netns::new().unwrap());
    connect((&workload, "workload", "203.0.113.1/24"), (&outside, "outside", "203.0.113.10/24")).unwrap();
    let _server = Server::start(&outside, SERVER).unwrap();
    cluster.namespace("shop", &json!({ "egress.filter/mode": "enforce" }));
    let pod = cluster.pod("shop", "ratings");
    cluster.start(&["--default", "Allow"]);

    let cgroup = cluster.cgroup(&pod);
    let mysql = client(Command::new(companion("mariadb/bin/mariadb").unwrap()), SERVER);
    let spec = Spec::of_this_host(&mysql, &companion("mariadb").unwrap(), &workload).unwrap();
    let ask = || {
        let container = Container::new(&spec, &cgroup).unwrap();
        cluster.runs(&pod, container.id());
        answer(&container.command().unwrap().output().unwrap())
    };
    let Answer::Error(said) = ask() else { panic!("no policy opens the database") };
    assert!(said.contains("Operation not permitted") || said.contains("(1)"), "{said}");

    let mysql_external = mysql_external();
    let mysql_external = ["--namespace", "shop", "--filename", mysql_external.to_str().unwrap()];
    cluster.api.must(ADMIN, &[&["apply"], &mysql_external[..]].concat()).unwrap();
    let applied = Instant::now();
    let ratings = eventually("the ratings", || match ask() {
        Answer::Ratings(ratings) => Some(ratings),
        Answer::Error(_) => None,
    });
    println!("the first answer came {:?} after kubectl apply", applied.elapsed());
    assert_eq!(ratings.unwrap(), "5\n4");

    cluster.api.must(ADMIN, &[&["delete"], &mysql_external[..]].concat()).unwrap();
    eventually("the database to be closed", || matches!(ask(), Answer::Error(_)).then_some(())).unwrap();

    let denial = cluster.agent().denial().unwrap();
    assert_eq!((&denial["verdict"], &denial["reason"]), (&json!("deny"), &json!("no_rule")));
    assert_eq!((&denial["destination"]["address"], &denial["destination"]["port"]), (&json!(SERVER), &json!(3306)));
    assert_eq!(
        (&denial["pod"]["namespace"], &denial["pod"]["name"]),
        (&json!("shop"), &json!("ratings")),
        "{denial:#}"
    );
}

#[test]
#[ignore = "needs what `cargo xtask kube` builds"]
fn while_the_server_is_away_everything_stays_and_what_it_forgot_is_listed_anew() {
    let mut cluster = Cluster::new();
    let mut ratings = cluster.shop();
    cluster.api.apply(ADMIN, &entry("shop", "mysql", "203.0.113.10", 3306)).unwrap();
    cluster.api.apply(ADMIN, &entry("shop", "short-lived", "203.0.113.11", 80)).unwrap();
    cluster.start(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    cluster.is_healthy();

    cluster.api.kill();
    cluster.tells("serviceentries");
    is(&mut ratings, MYSQL, NOBODY_THERE);
    is(&mut ratings, "203.0.113.11:80", NOBODY_THERE);
    is(&mut ratings, "203.0.113.9:80", REFUSED);

    // The agent cannot hear of what happens now: it is stopped until etcd has forgotten it.
    cluster.agent().signal(rustix::process::Signal::STOP).unwrap();
    cluster.api.restart().unwrap();
    cluster.api.must(ADMIN, &["delete", "serviceentry", "short-lived", "--namespace", "shop"]).unwrap();
    cluster.api.apply(ADMIN, &entry("shop", "late", "203.0.113.12", 80)).unwrap();
    cluster.api.compact().unwrap();
    cluster.api.restart().unwrap();
    cluster.agent().signal(rustix::process::Signal::CONT).unwrap();
    becomes(&mut ratings, "203.0.113.12:80", NOBODY_THERE);
    becomes(&mut ratings, "203.0.113.11:80", REFUSED);
    is(&mut ratings, MYSQL, NOBODY_THERE);
    cluster.is_healthy();
    // It goes on to be heard.
    cluster.api.apply(ADMIN, &entry("shop", "later", "203.0.113.13", 80)).unwrap();
    becomes(&mut ratings, "203.0.113.13:80", NOBODY_THERE);
}

#[test]
#[ignore = "needs what `cargo xtask kube` builds"]
fn a_role_that_is_too_narrow_shows_and_the_right_one_is_noticed() {
    let mut cluster = Cluster::without_role();
    let mut ratings = cluster.shop();
    cluster.api.apply(ADMIN, &entry("shop", "mysql", "203.0.113.10", 3306)).unwrap();
    let line = cluster.spawn(&["--default", "Allow"]).wait_for("403").unwrap();
    assert!(line.contains("forbidden"), "{line}");
    // Nothing was ever listed: nothing is enforced, and a probe says so.
    assert!(!cluster.place.probe("Ready").unwrap().0);
    cluster.api.install().unwrap();
    cluster.agent().wait_for("policy applied generation=1 ").unwrap();
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    is(&mut ratings, "203.0.113.9:80", REFUSED);
    cluster.is_healthy();
    assert!(cluster.place.probe("Ready").unwrap().0);
}

#[test]
#[ignore = "needs what `cargo xtask kube` builds"]
fn what_was_revoked_while_the_agent_runs_opens_and_closes_nothing() {
    let mut cluster = Cluster::new();
    let mut ratings = cluster.shop();
    cluster.api.apply(ADMIN, &entry("shop", "mysql", "203.0.113.10", 3306)).unwrap();
    cluster.start(&["--default", "Allow"]);
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    cluster.api.must(ADMIN, &["delete", "clusterrolebinding", "egress-agent"]).unwrap();
    // Watches that are open may stay so.
    cluster.api.restart().unwrap();
    let status = cluster.tells("403");
    assert_eq!(status["enforcing"], true);
    assert!(cluster.place.probe("Ready").unwrap().0, "a restart would not give the role back");
    is(&mut ratings, MYSQL, NOBODY_THERE);
    is(&mut ratings, "203.0.113.9:80", REFUSED);
    cluster.api.install().unwrap();
    cluster.is_healthy();
}

#[test]
#[ignore = "needs what `cargo xtask kube` builds"]
fn authors_are_told_what_became_of_their_policies() {
    let mut cluster = Cluster::new();
    let mut ratings = cluster.shop();
    cluster.start(&["--default", "Allow"]);
    let open = |cidr: &str| policy("shop", "web", &json!({ "allow": [{ "to": [{ "cidr": cidr }] }] }));
    cluster.api.apply(ADMIN, &open("203.0.113.10/32")).unwrap();
    becomes(&mut ratings, MYSQL, NOBODY_THERE);
    let accepted = cluster.condition("shop", "web", "True");
    assert_eq!(accepted["type"], "Accepted", "{accepted:#}");

    // The server takes it: how long a prefix may be is known to the agent alone.
    cluster.api.apply(ADMIN, &open("203.0.113.10/33")).unwrap();
    let rejected = cluster.condition("shop", "web", "False");
    assert!(rejected["message"].as_str().unwrap().contains("cidr"), "{rejected:#}");
    is(&mut ratings, MYSQL, NOBODY_THERE);
    let events = || {
        let printed = cluster.api.must(ADMIN, &["get", "events", "--namespace", "shop", "--output", "json"]).unwrap();
        let events: Value = serde_json::from_str(&printed).unwrap();
        let mut events = events["items"].as_array().unwrap().clone().into_iter();
        events.find(|event| event["involvedObject"]["kind"] == "EgressPolicy")
    };
    let event = eventually("an event", events).unwrap();
    assert_eq!((&event["type"], &event["reason"]), (&json!("Warning"), &json!("Invalid")));
    assert_eq!(event["involvedObject"]["name"], "web");
    let described = cluster.api.must(ADMIN, &["describe", "egresspolicy", "web", "--namespace", "shop"]).unwrap();
    assert!(described.contains("Invalid") && described.contains("Warning"), "{described}");
    let listed = cluster.api.must(ADMIN, &["get", "egresspolicies", "--namespace", "shop"]).unwrap();
    assert!(listed.contains("False"), "{listed}");

    cluster.api.apply(ADMIN, &open("203.0.113.11/32")).unwrap();
    becomes(&mut ratings, MYSQL, REFUSED);
    cluster.condition("shop", "web", "True");
}

#[test]
#[ignore = "needs what `cargo xtask kube` builds"]
fn a_tenant_decides_for_pods_of_its_own_and_for_nobody_else() {
    let mut cluster = Cluster::new();
    let mut processes = ["mine", "theirs"].map(|name| {
        cluster.namespace(name, &json!({ "egress.filter/mode": "enforce" }));
        cluster.process(&cluster.pod(name, "web"))
    });
    let rules = json!([
        { "apiGroups": ["networking.istio.io"], "resources": ["serviceentries"], "verbs": ["*"] },
        { "apiGroups": ["egress.filter"], "resources": ["egresspolicies"], "verbs": ["*"] },
    ]);
    allow(&cluster, "mine", "tenant", &rules);
    cluster.start(&["--default", "Allow"]);
    let [mine, theirs] = &mut processes;
    becomes(mine, MYSQL, REFUSED);
    becomes(theirs, MYSQL, REFUSED);

    let everything = json!([{ "to": [{ "cidr": "0.0.0.0/0" }] }]);
    let refused_by_the_server = |object: &Value| {
        let output = cluster.api.with(TENANT, &["apply", "--filename", "-"], object).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("forbidden"), "{said}");
    };
    for namespace in ["theirs", "egress-system"] {
        refused_by_the_server(&policy(namespace, "open", &json!({ "allow": everything })));
        refused_by_the_server(&entry(namespace, "open", "203.0.113.10", 3306));
    }
    let label = ["label", "namespace", "mine", "egress.filter/mode=audit", "--overwrite"];
    assert!(!cluster.api.kubectl(TENANT, &label).unwrap().status.success(), "the label is not the tenant's");

    for (name, workloads) in [
        ("by-cgroup", json!([{ "cgroup": "**" }])),
        ("by-unit", json!([{ "unit": "*" }])),
        ("by-user", json!([{ "user": 0 }])),
        ("by-namespace", json!([{ "pod": { "namespaces": ["theirs"] } }])),
        ("by-namespace-labels", json!([{ "pod": { "namespaceLabels": { "egress.filter/mode": "enforce" } } }])),
    ] {
        let object = policy("mine", name, &json!({ "workloads": workloads, "allow": everything }));
        cluster.api.apply(TENANT, &object).unwrap();
        let rejected = cluster.condition("mine", name, "False");
        assert!(rejected["message"].as_str().unwrap().contains("spec.workloads"), "{rejected:#}");
        is(theirs, MYSQL, REFUSED);
        is(mine, MYSQL, REFUSED);
    }
    cluster.api.apply(TENANT, &policy("mine", "all", &json!({ "allow": everything }))).unwrap();
    becomes(mine, MYSQL, NOBODY_THERE);
    is(theirs, MYSQL, REFUSED);
    // To the namespaces that `exportTo` names, an entry is open by Istio's rules: who may write one is trusted with that.
    cluster.api.apply(TENANT, &entry("mine", "shared", "203.0.113.20", 80)).unwrap();
    becomes(theirs, "203.0.113.20:80", NOBODY_THERE);
    is(theirs, MYSQL, REFUSED);
}

#[test]
#[ignore = "needs what `cargo xtask kube` builds"]
fn the_role_of_the_chart_allows_what_the_agent_does_and_no_more() {
    let cluster = Cluster::new();
    let can = |user: User, what: &str| {
        let args: Vec<&str> =
            ["auth", "can-i"].into_iter().chain(what.split(' ')).chain(["--all-namespaces"]).collect();
        cluster.api.kubectl(user, &args).unwrap().status.success()
    };
    for what in ["list pods", "watch serviceentries.networking.istio.io", "create events.events.k8s.io"] {
        assert!(can(AGENT, what), "{what}");
    }
    for what in [
        "create pods",
        "get secrets",
        "list configmaps",
        "patch nodes",
        "update egresspolicies.egress.filter",
        "delete egresspolicies.egress.filter",
        "create serviceentries.networking.istio.io",
        "patch namespaces",
        "list events",
    ] {
        assert!(can(ADMIN, what) && !can(AGENT, what), "{what}");
    }
}
