//! The Helm chart, rendered by Helm itself: what each value changes, and that nothing else changes with it; what the agent may do
//! by default; which values are refused. Whatever is rendered is checked by the schemas of every version of Kubernetes that there
//! is one for, and its arguments by the agent.
//!
//! No cluster is reached: what objects do there is for other tests.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs::{self, Permissions},
    io::{BufRead as _, BufReader, Write as _},
    net::IpAddr,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result};
use egress_agent::{
    cli::{self, LogLevel, RunArgs},
    compile::NodeAction,
    dataplane::PacketGuard,
    policy::load::{LoadOptions, load},
    privileges::{CapabilitySet, START, TERMINATE},
    scopes::UnknownWorkloads,
    settings,
};
use serde_json::{Map, Value, json};

/// Helm, which `cargo xtask test` installs.
fn helm() -> Result<Command> {
    let program = std::env::var_os("EGRESS_HELM")
        .context("EGRESS_HELM is not set: run `cargo xtask test`, which installs Helm")?;
    Ok(Command::new(program))
}

/// Renders the chart as long as it lives.
struct Chart {
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Drop for Chart {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Chart {
    fn start() -> Self {
        let mut command = helm().unwrap();
        let mut process = command.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (questions, answers) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self { process, questions, answers: BufReader::new(answers) }
    }

    fn ask(&mut self, question: &Value) -> Value {
        writeln!(self.questions, "{question}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap_or_else(|_| panic!("no answer to {question}"))
    }

    /// The objects as Helm renders them.
    fn objects(&mut self, values: &Value) -> Vec<Value> {
        let mut answer = self.ask(&json!({ "values": values }));
        assert_eq!(answer["error"], Value::Null, "{values}");
        let Value::Array(objects) = answer["objects"].take() else { panic!("no objects: {answer}") };
        objects
    }

    /// The objects by kind, of which there is one each; lists of what has names by these, and the arguments by flag.
    fn render(&mut self, values: &Value) -> Value {
        let by_kind = self.objects(values).into_iter().map(|object| (text(&object["kind"]), by_name(object)));
        Value::Object(by_kind.collect())
    }

    /// What the schemas of Kubernetes find.
    fn complaints(&mut self, objects: &[Value]) -> Vec<String> {
        let answer = self.ask(&json!({ "validate": objects }));
        answer["complaints"].as_array().unwrap().iter().map(text).collect()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

fn by_name(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields.into_iter().map(|(key, value)| match key.as_str() {
                "args" => (key, by_flag(&value)),
                _ => (key, by_name(value)),
            });
            Value::Object(fields.collect())
        }
        Value::Array(items) if !items.is_empty() && items.iter().all(|item| item["name"].is_string()) => {
            Value::Object(items.into_iter().map(|item| (text(&item["name"]), by_name(item))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(by_name).collect()),
        plain => plain,
    }
}

fn by_flag(args: &Value) -> Value {
    let args: Vec<String> = args.as_array().unwrap().iter().map(text).collect();
    let pair = |arg: &String| match arg.split_once('=') {
        Some((flag, value)) => (flag.to_owned(), value.into()),
        None => (arg.clone(), true.into()),
    };
    let by_flag: Map<String, Value> = args.iter().map(pair).collect();
    assert_eq!(by_flag.len(), args.len(), "a flag is there twice: {args:?}");
    Value::Object(by_flag)
}

/// With another value at a path; `null` takes it away. What is above it is made if need be.
fn set(document: &mut Value, path: &str, value: &Value) {
    let (first, rest) = path.split_once('/').unwrap_or((path, ""));
    let key = first.replace("~1", "/");
    match document {
        Value::Array(items) => set(&mut items[key.parse::<usize>().unwrap()], rest, value),
        Value::Object(fields) if !rest.is_empty() => set(fields.entry(key).or_insert_with(|| json!({})), rest, value),
        Value::Object(fields) if value.is_null() => drop(fields.remove(&key).unwrap_or_else(|| panic!("no {path}"))),
        Value::Object(fields) => drop(fields.insert(key, value.clone())),
        plain => panic!("{path} in {plain}"),
    }
}

const POD: &str = "DaemonSet/spec/template/spec";

/// Paths that begin with a name below are within the container, its arguments, its security context, or the pod.
fn full(path: &str) -> String {
    let container = format!("{POD}/containers/agent");
    if path.starts_with("--") {
        return format!("{container}/args/{path}");
    }
    match path.split_once('/') {
        Some(("container", rest)) => format!("{container}/{rest}"),
        Some(("security", rest)) => format!("{container}/securityContext/{rest}"),
        Some(("pod", rest)) => format!("{POD}/{rest}"),
        _ => path.to_owned(),
    }
}

/// A value, and every place that it changes with what is there then.
struct Row {
    values: Value,
    changes: Vec<(&'static str, Value)>,
}

fn row<const N: usize>(values: Value, changes: [(&'static str, Value); N]) -> Row {
    Row { values, changes: changes.into() }
}

const POLICY: &str = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: node }\nspec:\n  deny:\n    \
    - to: [{ cidr: 169.254.169.254/32 }]\n";

fn rows() -> Vec<Row> {
    let rows = [rows_of_arguments(), rows_of_files(), rows_of_the_image(), rows_of_the_pod()];
    rows.into_iter().flatten().collect()
}

fn rows_of_arguments() -> Vec<Row> {
    vec![
        row(json!({ "default": "Deny" }), [("--default", json!("Deny"))]),
        row(json!({ "default": "Allow" }), [("--default", json!("Allow"))]),
        row(json!({ "allNamespaces": true }), [("--all-namespaces", json!(true))]),
        row(json!({ "exemptNamespaces": ["a", "b"] }), [("--exempt-namespaces", json!("a,b"))]),
        row(json!({ "exemptNamespaces": [] }), [("--exempt-namespaces", json!(""))]),
        row(json!({ "rootNamespace": "platform" }), [("--root-namespace", json!("platform"))]),
        row(json!({ "serviceEntriesFrom": ["a", "b"] }), [("--service-entries-from", json!("a,b"))]),
        row(
            json!({ "internalCidrs": ["10.0.0.0/8", "fd00::/8"] }),
            [("--internal-cidrs", json!("10.0.0.0/8,fd00::/8"))],
        ),
        row(json!({ "clusterDns": ["10.96.0.10", "fd00::a"] }), [("--cluster-dns", json!("10.96.0.10,fd00::a"))]),
        row(json!({ "unknownWorkloads": "Inherit" }), [("--unknown-workloads", json!("Inherit"))]),
        row(json!({ "packetGuard": false }), [("--packet-guard", json!("Off"))]),
        row(json!({ "memoryLimit": 4_000_000 }), [("--memory-limit", json!("4000000"))]),
        row(json!({ "log": "debug" }), [("--log", json!("debug"))]),
        row(json!({ "detachOnExit": true }), [("--detach-on-exit", json!(true))]),
        row(
            json!({ "extraArgs": ["--name-grace=60", "--no-dns"] }),
            [("--name-grace", json!("60")), ("--no-dns", json!(true))],
        ),
    ]
}

fn rows_of_files() -> Vec<Row> {
    let metadata = json!({
        "name": "egress-agent-policies",
        "namespace": "egress-system",
        "labels": { "app.kubernetes.io/name": "egress-agent", "app.kubernetes.io/version": VERSION },
    });
    let volume = json!({
        "name": "policies",
        "projected": { "sources": [{ "configMap": { "name": "egress-agent-policies" } }] },
    });
    let mount = json!({ "name": "policies", "mountPath": "/etc/egress/policies", "readOnly": true });
    vec![row(
        json!({ "policies": { "node.yaml": POLICY } }),
        [
            (
                "ConfigMap",
                json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": { "node.yaml": POLICY } }),
            ),
            ("pod/volumes/policies", volume),
            ("container/volumeMounts/policies", mount),
            ("--policies", json!("/etc/egress/policies")),
        ],
    )]
}

fn rows_of_the_image() -> Vec<Row> {
    let image = "container/image";
    vec![
        row(
            json!({ "image": { "repository": "example.com/agent" } }),
            [(image, json!(format!("example.com/agent:{VERSION}")))],
        ),
        row(json!({ "image": { "tag": "2@sha256:ab" } }), [(image, json!("egress-agent:2@sha256:ab"))]),
        row(json!({ "image": { "pullPolicy": "Always" } }), [("container/imagePullPolicy", json!("Always"))]),
        row(
            json!({ "imagePullSecrets": [{ "name": "a" }] }),
            [("pod/imagePullSecrets", json!({ "a": { "name": "a" } }))],
        ),
    ]
}

fn rows_of_the_pod() -> Vec<Row> {
    let add = "security/capabilities/add";
    let affinity = json!({ "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [
        { "matchExpressions": [{ "key": "filter", "operator": "In", "values": ["yes"] }] },
    ] } } });
    vec![
        row(json!({ "terminate": true }), [(add, json!(["BPF", "PERFMON", "NET_ADMIN", "SYS_PTRACE", "SYS_ADMIN"]))]),
        row(json!({ "learnNames": true }), [(add, json!(["BPF", "PERFMON", "NET_ADMIN", "SYS_PTRACE", "SYS_ADMIN"]))]),
        row(
            json!({ "lockedMemory": true }),
            [(add, json!(["BPF", "PERFMON", "NET_ADMIN", "SYS_PTRACE", "SYS_RESOURCE"]))],
        ),
        row(
            json!({ "seccompProfile": { "type": "Unconfined" } }),
            [("security/seccompProfile/type", json!("Unconfined"))],
        ),
        row(
            json!({ "seccompProfile": { "type": "Localhost", "localhostProfile": "a.json" } }),
            [("security/seccompProfile", json!({ "type": "Localhost", "localhostProfile": "a.json" }))],
        ),
        row(
            json!({ "seLinuxOptions": { "type": "spc_t" } }),
            [("security/seLinuxOptions", json!({ "type": "spc_t" }))],
        ),
        row(
            json!({ "resources": { "limits": { "memory": "1Gi" } } }),
            [("container/resources/limits/memory", json!("1Gi"))],
        ),
        row(json!({ "resources": null }), [("container/resources", json!(null))]),
        row(json!({ "priorityClassName": "high" }), [("pod/priorityClassName", json!("high"))]),
        row(json!({ "nodeSelector": { "pool": "a" } }), [("pod/nodeSelector/pool", json!("a"))]),
        row(json!({ "tolerations": [] }), [("pod/tolerations", json!(null))]),
        row(
            json!({ "tolerations": [{ "key": "a", "operator": "Exists", "effect": "NoSchedule" }] }),
            [("pod/tolerations", json!([{ "key": "a", "operator": "Exists", "effect": "NoSchedule" }]))],
        ),
        row(json!({ "affinity": affinity }), [("pod/affinity", affinity.clone())]),
        row(
            json!({ "podAnnotations": { "a/b": "c" } }),
            [("DaemonSet/spec/template/metadata/annotations", json!({ "a/b": "c" }))],
        ),
        row(json!({ "maxUnavailable": 3 }), [("DaemonSet/spec/updateStrategy/rollingUpdate/maxUnavailable", json!(3))]),
        row(
            json!({ "maxUnavailable": "100%" }),
            [("DaemonSet/spec/updateStrategy/rollingUpdate/maxUnavailable", json!("100%"))],
        ),
        row(
            json!({ "appArmorProfile": { "type": "Unconfined" } }),
            [("security/appArmorProfile", json!({ "type": "Unconfined" }))],
        ),
    ]
}

/// Of the workspace, and so of the chart and of its image.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The settings of `run` that rendered objects lead to. Parsing fails on a flag that the agent does not know.
fn settings_of(objects: &[Value]) -> RunArgs {
    let pod = &objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap()["spec"]["template"]["spec"];
    let args = pod["containers"][0]["args"].as_array().unwrap();
    let line: Vec<OsString> =
        ["egress-agent".to_owned()].into_iter().chain(args.iter().map(text)).map(OsString::from).collect();
    let command = settings::command(&line, |_| None).unwrap();
    match settings::parse(command, line).unwrap().command {
        cli::Command::Run(args) => args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_value_changes_its_places_and_no_other() {
    let mut chart = Chart::start();
    let default = chart.render(&json!({}));
    for Row { values, changes } in rows() {
        let mut expected = default.clone();
        for (path, value) in changes {
            set(&mut expected, &full(path), &value);
        }
        let rendered = chart.render(&values);
        assert_ne!(rendered, default, "{values} changes nothing");
        assert_eq!(rendered, expected, "{values}");
        let objects = chart.objects(&values);
        settings_of(&objects);
        let complaints = chart.complaints(&objects);
        if values.get("appArmorProfile").is_some() {
            let before = ["1.25.0", "1.26.0", "1.27.0", "1.28.0", "1.29.0"];
            let expected = before.map(|version| format!("Kubernetes {version}: DaemonSet/egress-agent: "));
            assert_eq!(complaints.len(), expected.len(), "{complaints:#?}");
            assert!(complaints.iter().zip(expected).all(|(found, expected)| found.starts_with(&expected)));
        } else {
            assert_eq!(complaints, [""; 0], "{values}");
        }
    }
}

#[test]
fn every_value_is_in_the_table_and_in_the_schema() {
    let mut chart = Chart::start();
    let answer = chart.ask(&json!({ "defaults": true }));
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    let values = names(&answer["values"]);
    let in_table: BTreeSet<String> = rows().iter().flat_map(|row| names(&row.values)).collect();
    assert_eq!(in_table, values);
    let of_image = rows().iter().filter_map(|row| Some(names(row.values.get("image")?))).flatten().collect();
    assert_eq!(names(&answer["values"]["image"]), of_image);
    let mut in_schema = names(&answer["schema"]["properties"]);
    assert!(in_schema.remove("global"));
    assert_eq!(in_schema, values);
}

#[test]
fn what_is_committed_is_what_is_rendered_and_fits_every_kubernetes() {
    let output = helm().unwrap().arg("check").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("Kubernetes 1.25.0 to 1.37.0"), "{said}");
}

fn names(capabilities: CapabilitySet) -> BTreeSet<String> {
    capabilities.iter_names().map(|(name, _)| name.to_owned()).collect()
}

fn strings(value: &Value) -> BTreeSet<String> {
    value.as_array().unwrap().iter().map(text).collect()
}

#[test]
fn by_default_the_agent_may_do_what_it_must_and_no_more() {
    let objects = Chart::start().render(&json!({}));
    let pod = &objects["DaemonSet"]["spec"]["template"]["spec"];
    assert_eq!((&pod["hostPID"], &pod["serviceAccountName"]), (&json!(true), &json!("egress-agent")));
    for absent in ["hostNetwork", "hostIPC", "initContainers", "ephemeralContainers", "securityContext"] {
        assert_eq!(pod[absent], Value::Null, "{absent}");
    }
    assert_eq!(pod["containers"].as_object().unwrap().len(), 1);
    let container = &pod["containers"]["agent"];
    let mut security = container["securityContext"].clone();
    let added = security["capabilities"]["add"].take();
    assert_eq!(strings(&added), names(START));
    let expected = json!({
        "runAsUser": 0, "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"], "add": null }, "seccompProfile": { "type": "RuntimeDefault" },
    });
    assert_eq!(security, expected);
    let volumes = json!({
        "cgroup": { "name": "cgroup", "hostPath": { "path": "/sys/fs/cgroup", "type": "Directory" } },
        "bpf": { "name": "bpf", "hostPath": { "path": "/sys/fs/bpf", "type": "Directory" } },
        "security": { "name": "security", "hostPath": { "path": "/sys/kernel/security", "type": "Directory" } },
        "run": { "name": "run", "emptyDir": {} },
    });
    assert_eq!(pod["volumes"], volumes);
    let mounts = json!({
        "cgroup": { "name": "cgroup", "mountPath": "/host/cgroup", "readOnly": true },
        "bpf": { "name": "bpf", "mountPath": "/host/bpf" },
        "security": { "name": "security", "mountPath": "/host/security", "readOnly": true },
        "run": { "name": "run", "mountPath": "/run/egress" },
    });
    assert_eq!(container["volumeMounts"], mounts);
    for (probe, state) in [("startupProbe", "Ready"), ("readinessProbe", "Ready"), ("livenessProbe", "Live")] {
        let command = json!(["/egress-agent", "status", "--probe", state]);
        assert_eq!(container[probe]["exec"]["command"], command, "{probe}");
    }
    let variables = json!({
        "EGRESS_NODE_NAME": { "name": "EGRESS_NODE_NAME", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } },
        "EGRESS_PIN_DIR": { "name": "EGRESS_PIN_DIR", "value": "/host/bpf/egress" },
    });
    assert_eq!(container["env"], variables);
    assert_eq!(
        (&pod["priorityClassName"], &pod["tolerations"]),
        (&json!("system-node-critical"), &json!([{ "operator": "Exists" }]))
    );
    assert_eq!(container["image"], format!("egress-agent:{VERSION}"));
}

#[test]
fn what_ends_connections_has_the_capability_that_takes() {
    let objects = Chart::start().render(&json!({ "terminate": true }));
    let security = &objects["DaemonSet"]["spec"]["template"]["spec"]["containers"]["agent"]["securityContext"];
    assert_eq!(strings(&security["capabilities"]["add"]), names(START | TERMINATE));
}

#[test]
fn the_agent_may_ask_the_api_for_what_it_watches_and_tell_authors() {
    let objects = Chart::start().render(&json!({}));
    let watch = json!(["get", "list", "watch"]);
    let rules = json!([
        { "apiGroups": ["networking.istio.io"], "resources": ["serviceentries"], "verbs": watch },
        { "apiGroups": ["egress.filter"], "resources": ["egresspolicies"], "verbs": watch },
        { "apiGroups": [""], "resources": ["pods", "namespaces"], "verbs": watch },
        { "apiGroups": ["egress.filter"], "resources": ["egresspolicies/status"], "verbs": ["patch"] },
        { "apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"] },
    ]);
    assert_eq!(objects["ClusterRole"]["rules"], rules);
    let role = json!({ "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "egress-agent" });
    assert_eq!(objects["ClusterRoleBinding"]["roleRef"], role);
    let kinds: Vec<&String> = objects.as_object().unwrap().keys().collect();
    assert_eq!(kinds, ["ClusterRole", "ClusterRoleBinding", "DaemonSet", "ServiceAccount"]);
}

#[test]
fn the_agent_reads_from_its_arguments_what_the_values_say() {
    let mut chart = Chart::start();
    let run = settings_of(&chart.objects(&json!({})));
    assert!(run.cluster.kubernetes && run.cgroup.is_none() && run.policies.is_empty());
    assert!(!run.detach_on_exit && !run.cluster.all_namespaces && !run.allow_writable_policies);
    assert_eq!((run.default, run.unknown_workloads), (NodeAction::Audit, UnknownWorkloads::Deny));
    assert_eq!(
        (run.cluster.exempt_namespaces, run.cluster.root_namespace),
        (vec!["kube-system".into()], "egress-system".into())
    );
    let run = settings_of(&chart.objects(&json!({
        "default": "Deny", "allNamespaces": true, "exemptNamespaces": [], "rootNamespace": "r",
        "serviceEntriesFrom": ["a", "b"], "internalCidrs": ["10.0.0.0/8"], "clusterDns": ["fd00::a"],
        "unknownWorkloads": "Inherit", "packetGuard": false, "memoryLimit": 7, "detachOnExit": true,
        "extraArgs": ["--name-grace=60"], "policies": { "a.yaml": POLICY },
    })));
    assert_eq!((run.default, run.unknown_workloads), (NodeAction::Deny, UnknownWorkloads::Inherit));
    assert_eq!((run.packet_guard, run.memory_limit, run.name_grace), (PacketGuard::Off, 7, 60));
    assert!(run.detach_on_exit && run.cluster.all_namespaces);
    assert_eq!(run.policies, [Path::new("/etc/egress/policies")]);
    assert_eq!(
        (run.cluster.root_namespace.as_str(), run.cluster.service_entries_from),
        ("r", vec!["a".into(), "b".into()])
    );
    assert!(run.cluster.exempt_namespaces.iter().all(String::is_empty), "{:?}", run.cluster.exempt_namespaces);
    assert_eq!(run.cluster.networks.internal_cidrs, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(run.cluster.networks.cluster_dns, ["fd00::a".parse::<IpAddr>().unwrap()]);
}

#[test]
fn objects_lie_in_the_namespace_of_the_release() {
    let answer = Chart::start().ask(&json!({ "values": { "policies": { "a.yaml": POLICY } }, "namespace": "other" }));
    let objects = answer["objects"].as_array().unwrap();
    let namespace =
        |kind: &str| &objects.iter().find(|object| object["kind"] == kind).unwrap()["metadata"]["namespace"];
    for kind in ["DaemonSet", "ServiceAccount", "ConfigMap"] {
        assert_eq!(namespace(kind), "other", "{kind}");
    }
    for kind in ["ClusterRole", "ClusterRoleBinding"] {
        assert_eq!(namespace(kind), &Value::Null, "{kind}");
    }
    let binding = objects.iter().find(|object| object["kind"] == "ClusterRoleBinding").unwrap();
    assert_eq!(binding["subjects"][0]["namespace"], "other");
}

#[test]
fn values_that_mean_nothing_are_refused_with_their_place() {
    let mut chart = Chart::start();
    for (values, place) in [
        (json!({ "defualt": "Deny" }), "'defualt' not allowed"),
        (json!({ "image": { "tga": "1" } }), "at '/image': additional properties 'tga'"),
        (json!({ "image": { "pullPolicy": "Sometimes" } }), "/image/pullPolicy"),
        (json!({ "imagePullSecrets": ["registry"] }), "/imagePullSecrets/0"),
        (json!({ "default": "deny" }), "at '/default'"),
        (json!({ "allNamespaces": "yes" }), "/allNamespaces"),
        (json!({ "exemptNamespaces": "kube-system" }), "/exemptNamespaces"),
        (json!({ "exemptNamespaces": ["a,b"] }), "/exemptNamespaces/0"),
        (json!({ "rootNamespace": "" }), "/rootNamespace"),
        (json!({ "serviceEntriesFrom": ["Shop"] }), "/serviceEntriesFrom/0"),
        (json!({ "internalCidrs": ["cluster.local"] }), "/internalCidrs/0"),
        (json!({ "internalCidrs": ["bad"] }), "/internalCidrs/0"),
        (json!({ "clusterDns": ["10.96.0.10:53"] }), "/clusterDns/0"),
        (json!({ "clusterDns": ["bad"] }), "/clusterDns/0"),
        (json!({ "unknownWorkloads": "Allow" }), "/unknownWorkloads"),
        (json!({ "packetGuard": "On" }), "/packetGuard"),
        (json!({ "memoryLimit": "1Gi" }), "/memoryLimit"),
        (json!({ "memoryLimit": 0 }), "/memoryLimit"),
        (json!({ "log": "trace" }), "/log"),
        (json!({ "extraArgs": ["run"] }), "/extraArgs/0"),
        (json!({ "extraArgs": "--no-dns" }), "/extraArgs"),
        (json!({ "policies": { "mysql.txt": "a" } }), "invalid propertyName 'mysql.txt'"),
        (json!({ "policies": { "mysql.yaml": { "kind": "ServiceEntry" } } }), "/policies/mysql.yaml"),
        (json!({ "seccompProfile": { "type": "Off" } }), "/seccompProfile/type"),
        (json!({ "seccompProfile": { "typ": "Unconfined" } }), "'typ' not allowed"),
        (json!({ "appArmorProfile": { "profile": "a" } }), "'profile' not allowed"),
        (json!({ "seLinuxOptions": { "label": "a" } }), "'label' not allowed"),
        (json!({ "resources": { "limit": {} } }), "'limit' not allowed"),
        (json!({ "resources": { "limits": { "memory": "512 MB" } } }), "/resources/limits/memory"),
        (json!({ "nodeSelector": { "gpu": true } }), "/nodeSelector/gpu"),
        (json!({ "tolerations": [{ "effects": "NoSchedule" }] }), "'effects' not allowed"),
        (json!({ "affinity": { "nodeafinity": {} } }), "'nodeafinity' not allowed"),
        (json!({ "podAnnotations": { "a": 1 } }), "/podAnnotations/a"),
        (json!({ "maxUnavailable": 0 }), "/maxUnavailable"),
        (json!({ "maxUnavailable": "0%" }), "/maxUnavailable"),
    ] {
        let answer = chart.ask(&json!({ "values": values }));
        let error = answer["error"].as_str().unwrap_or_else(|| panic!("{values} is taken"));
        assert!(error.contains(place), "{values}: {error}");
    }
}

#[test]
fn who_installs_is_told_how_to_look_and_how_to_leave() {
    let mut chart = Chart::start();
    let mut notes = |values: Value| text(&chart.ask(&json!({ "values": values, "namespace": "here" }))["notes"]);
    let said = notes(json!({ "default": "Deny" }));
    for words in [
        "by default in Deny",
        "--namespace here exec daemonset/egress-agent -- /egress-agent status",
        "set detachOnExit",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(notes(json!({ "detachOnExit": true })).contains("detachOnExit is set"));
}

/// As the kubelet writes a `ConfigMap`: files behind two links, in a directory of its own kind.
fn volume(mode: u32) -> tempfile::TempDir {
    let volume = tempfile::tempdir().unwrap();
    let (data, name) = ("..2026_11_27_12_00_00.1", "node.yaml");
    fs::create_dir(volume.path().join(data)).unwrap();
    let file = volume.path().join(data).join(name);
    fs::write(&file, POLICY).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    symlink(data, volume.path().join("..data")).unwrap();
    symlink(PathBuf::from("..data").join(name), volume.path().join(name)).unwrap();
    fs::set_permissions(volume.path(), Permissions::from_mode(mode)).unwrap();
    volume
}

/// The kubelet makes the directory of a volume of type configMap with mode 777, and that of a projected one as a file system in
/// memory, with mode 1777.
#[test]
fn the_agent_reads_policies_from_a_projected_volume_and_not_from_a_plain_one() {
    let options = LoadOptions { require_root_owned: true, follow: true };
    let read = |mode| {
        let volume = volume(mode);
        let loaded = load(&[volume.path().to_owned()], &options).unwrap();
        (loaded.has_errors(), loaded.policies.egress_policies.len())
    };
    assert_eq!(read(0o1777), (false, 1));
    assert_eq!(read(0o777), (true, 0));
}

#[test]
fn the_schema_offers_what_the_agent_takes() {
    let answer = Chart::start().ask(&json!({ "defaults": true }));
    let offered = |name: &str| strings(&answer["schema"]["properties"][name]["enum"]);
    assert_eq!(offered("log"), taken::<LogLevel>());
    assert_eq!(offered("default"), taken::<NodeAction>());
    assert_eq!(offered("unknownWorkloads"), taken::<UnknownWorkloads>());
}

fn taken<T: clap::ValueEnum>() -> BTreeSet<String> {
    T::value_variants().iter().filter_map(|value| Some(value.to_possible_value()?.get_name().to_owned())).collect()
}
