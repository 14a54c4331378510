//! Generated files are fresh, and schemas and loader agree about what a document is.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{fs, path::Path};

use egress_agent::policy::{
    code::Code,
    load::load_text,
    schema::{Object, Shape, egress_policy, service_entry},
    yaml::{Node, Scalar, ScalarKind, Value as YamlValue, documents},
};
use egress_tests::{
    generate::{self, file},
    pages,
};
use jsonschema::{Registry, Validator};
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

#[test]
fn no_generated_file_is_stale() {
    let stale: Vec<&str> = pages::all().iter().filter(|page| page.is_stale()).map(|page| page.path).collect();
    assert!(stale.is_empty(), "`cargo xtask docs` writes {stale:?}");
}

/// `policies.json`, which asks the schema of each kind.
fn schema() -> Validator {
    let page = |name: &str| -> Value {
        let page = pages::all().into_iter().find(|page| page.path == format!("docs/schemas/{name}")).unwrap();
        serde_json::from_str(&page.text).unwrap()
    };
    let (policies, entries) = (page("egresspolicy.json"), page("serviceentry.json"));
    let registry = Registry::new().add("json-schema:///egresspolicy.json", &policies).unwrap();
    let registry = registry.add("json-schema:///serviceentry.json", &entries).unwrap().prepare().unwrap();
    jsonschema::options().with_registry(&registry).build(&page("policies.json")).unwrap()
}

/// What an editor would say of a document.
fn complaints(schema: &Validator, document: &Value) -> Vec<String> {
    schema.iter_errors(document).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

/// The codes of what the loader finds, without notes.
fn findings(document: &Value) -> Vec<Code> {
    let found = load_text("document.yaml", &file(std::slice::from_ref(document))).findings;
    found.into_iter().map(|finding| finding.code).filter(|code| !code.as_str().starts_with('N')).collect()
}

fn is_read(document: &Value) -> bool {
    findings(document).iter().all(|code| !code.as_str().starts_with('E'))
}

/// The documents of a file, as an editor sees them.
fn values(text: &str) -> Vec<Value> {
    documents(text).filter_map(|document| document.root.as_ref().map(value)).collect()
}

fn value(node: &Node<'_>) -> Value {
    match &node.value {
        YamlValue::Scalar(text) => scalar(text),
        YamlValue::Sequence(items) => items.iter().map(value).collect(),
        YamlValue::Mapping(entries) => {
            entries.iter().map(|entry| (entry.key.to_string(), value(&entry.value))).collect()
        }
    }
}

fn scalar(scalar: &Scalar<'_>) -> Value {
    match scalar.kind() {
        ScalarKind::Null => Value::Null,
        ScalarKind::Bool => Value::Bool(true),
        ScalarKind::Integer => scalar.text.trim_start_matches('+').parse::<i64>().map_or(Value::Null, Value::from),
        ScalarKind::OddNumber => json!(0.5),
        ScalarKind::Text => Value::from(&*scalar.text),
    }
}

#[test]
fn every_example_fits_its_schema() {
    let schema = schema();
    let mut seen = 0;
    for entry in fs::read_dir(workspace().join("policies")).unwrap() {
        let path = entry.unwrap().path();
        for document in values(&fs::read_to_string(&path).unwrap()) {
            assert_eq!(complaints(&schema, &document), [""; 0], "{}", path.display());
            seen += 1;
        }
    }
    assert!(seen >= 8, "{seen} documents");
}

#[test]
fn generated_documents_fit_their_schema() {
    let schema = schema();
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(256) });
    let check = |documents: Vec<Value>| {
        for document in documents {
            assert!(is_read(&document), "{document}");
            assert_eq!(complaints(&schema, &document), [""; 0], "{document}");
        }
        Ok(())
    };
    runner.run(&generate::documents(true), check).unwrap();
}

/// The documents of the loader's own tests. Istio reads numbers of enums and numbers in quotes; the schemas do not.
#[test]
fn what_is_read_without_a_warning_fits_its_schema() {
    const AS_PROTOCOL_BUFFERS: [&str; 2] = ["enum-numbers", "quoted-numbers"];
    let schema = schema();
    let mut seen = 0;
    for name in ["errors/object.yaml", "errors/service_entry.yaml", "errors/egress_policy.yaml", "lint.yaml"] {
        let path = workspace().join("egress-agent/tests/policy").join(name);
        for document in values(&fs::read_to_string(&path).unwrap()) {
            let is_odd = AS_PROTOCOL_BUFFERS.iter().any(|odd| document["metadata"]["name"] == *odd);
            if findings(&document).is_empty() && !is_odd {
                assert_eq!(complaints(&schema, &document), [""; 0], "{document}");
                seen += 1;
            }
        }
    }
    assert!(seen > 10, "{seen} documents");
}

fn entry() -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": { "name": "db", "namespace": "shop", "labels": { "a": "b" }, "annotations": { "c": "d e" } },
        "spec": {
            "hosts": ["db.example.com", "*.example.org"],
            "addresses": ["192.0.2.1", "2001:db8::/32"],
            "ports": [{ "number": 3306, "name": "tls-db", "protocol": "tls", "targetPort": 13306 }],
            "location": "MESH_EXTERNAL",
            "resolution": "STATIC",
            "endpoints": [
                { "address": "192.0.2.2", "ports": { "tls-db": 3307 }, "labels": { "x.y/z": "" }, "locality": "a/b" },
                { "address": "2001:db8::2", "network": "n", "weight": 5, "serviceAccount": "s" },
                { "address": "unix:///run/db.sock" },
            ],
            "exportTo": [".", "web"],
            "subjectAltNames": ["spiffe://db"],
        },
        "status": { "addresses": [{ "value": "240.0.0.1" }] },
    })
}

fn selecting_entry() -> Value {
    let mut entry = entry();
    entry["spec"].as_object_mut().unwrap().remove("endpoints");
    entry["spec"]["workloadSelector"] = json!({ "labels": { "app": "db" } });
    entry
}

fn policy() -> Value {
    json!({
        "apiVersion": "egress.filter/v1alpha1",
        "kind": "EgressPolicy",
        "metadata": { "name": "web", "namespace": "shop", "labels": {}, "annotations": {} },
        "spec": {
            "workloads": [
                { "cgroup": "system.slice/**/nginx-*.service" },
                { "unit": "nginx@?.service" },
                { "user": "www-data" },
                { "user": 33 },
                { "pod": {
                    "matchLabels": { "app": "web" },
                    "matchExpressions": [{ "key": "tier", "operator": "In", "values": ["a", "b"] }],
                    "namespaces": ["shop"],
                    "namespaceLabels": { "team": "a" },
                } },
            ],
            "mode": "Audit",
            "services": ["./*", "shared/db", "*/*"],
            "allow": [
                {
                    "to": [{ "cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"] }, { "host": "*.example.org" }],
                    "ports": [{ "port": 8000, "endPort": 8100, "protocol": "UDP" }],
                },
                {},
            ],
            "deny": [{
                "to": [{ "cidr": "fd00:ec2::254", "except": [] }],
                "ports": [{ "port": 1, "endPort": 2, "protocol": "Any" }],
            }],
            "defaultAction": "Deny",
            "loopback": "None",
            "dns": { "servers": ["10.0.0.53"], "queries": "Named" },
            "replies": "Deny",
            "protocols": ["ICMP", "RAW"],
            "existing": "Terminate",
            "refuseWith": "ECONNREFUSED",
        },
        "status": { "conditions": [] },
    })
}

/// Described fields that are in none of some values.
fn missing(object: &Object, values: &[&Value], path: &str, found: &mut Vec<String>) {
    for field in object.fields.iter().filter(|field| field.shape != Shape::Opaque) {
        let path = format!("{path}.{}", field.name);
        let values: Vec<&Value> = values.iter().filter_map(|value| value.get(field.name)).collect();
        match &field.shape {
            _ if values.is_empty() => found.push(path),
            Shape::Object(object) => missing(object, &values, &path, found),
            Shape::List(list) => {
                let items: Vec<&Value> = values.iter().filter_map(|value| value.as_array()).flatten().collect();
                if let Shape::Object(object) = &list.items {
                    missing(object, &items, &path, found);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn every_described_field_is_read() {
    let schema = schema();
    let (entry, selecting, policy) = (entry(), selecting_entry(), policy());
    for document in [&entry, &selecting, &policy] {
        assert!(is_read(document), "{:?}", findings(document));
        assert_eq!(complaints(&schema, document), [""; 0], "{document}");
    }
    let mut found = Vec::new();
    missing(&service_entry::OBJECT, &[&entry, &selecting], "ServiceEntry", &mut found);
    missing(&egress_policy::OBJECT, &[&policy], "EgressPolicy", &mut found);
    // A deny knows the field to say why it is refused.
    assert_eq!(found, ["EgressPolicy.spec.deny.to.host"]);
}

/// A document with another value in one place; `null` takes the field away.
fn with(mut document: Value, pointer: &str, value: Value) -> Value {
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    match document.pointer_mut(parent).unwrap() {
        Value::Array(items) => items[name.parse::<usize>().unwrap()] = value,
        Value::Object(fields) if value.is_null() => drop(fields.remove(name)),
        parent => parent[name] = value,
    }
    document
}

fn refused(document: fn() -> Value, broken: &[(&str, Value, Code)]) {
    let schema = schema();
    for (pointer, value, code) in broken {
        let document = with(document(), pointer, value.clone());
        assert!(findings(&document).contains(code), "{pointer} {value}: {:?}", findings(&document));
        assert!(!complaints(&schema, &document).is_empty(), "the schema takes {pointer} {value}");
    }
}

#[test]
fn a_broken_service_entry_fits_neither_schema_nor_loader() {
    refused(
        entry,
        &[
            ("/apiVersion", json!("networking.istio.io/v2"), Code::UnknownVersion),
            ("/metadata", json!(null), Code::BadName),
            ("/metadata/name", json!("Db"), Code::BadName),
            ("/metadata/namespace", json!("a.b"), Code::BadNamespace),
            ("/metadata/surplus", json!(1), Code::UnknownField),
            ("/spec", json!(null), Code::MissingField),
            ("/surplus", json!({}), Code::UnknownField),
            ("/spec/surplus", json!({}), Code::UnknownField),
            ("/spec/hosts", json!(null), Code::NoHosts),
            ("/spec/hosts", json!([]), Code::NoHosts),
            ("/spec/hosts", json!("db.example.com"), Code::WrongType),
            ("/spec/hosts/0", json!("https://db.example.com"), Code::BadHost),
            ("/spec/addresses/0", json!("db.example.com"), Code::BadAddress),
            ("/spec/ports/0/number", json!(null), Code::BadPortNumber),
            ("/spec/ports/0/number", json!(0), Code::BadPortNumber),
            ("/spec/ports/0/number", json!(65_536), Code::BadPortNumber),
            ("/spec/ports/0/name", json!(null), Code::BadPortName),
            ("/spec/ports/0/name", json!("a_b"), Code::BadPortName),
            ("/spec/ports/0/protocol", json!("FTP"), Code::UnknownProtocol),
            ("/spec/ports/0/targetPort", json!(70_000), Code::BadTargetPort),
            ("/spec/ports/0/surplus", json!(1), Code::UnknownField),
            ("/spec/location", json!("OUTSIDE"), Code::UnknownServiceEnum),
            ("/spec/resolution", json!("dns"), Code::UnknownServiceEnum),
            ("/spec/endpoints/0/address", json!("a_b"), Code::BadEndpointAddress),
            ("/spec/endpoints/0/ports/tls-db", json!(0), Code::BadEndpointPort),
            ("/spec/endpoints/0/labels/app", json!("a b"), Code::BadEndpointLabel),
            ("/spec/endpoints/0/weight", json!(-1), Code::WrongType),
            ("/spec/endpoints/0/surplus", json!(1), Code::UnknownField),
            ("/spec/exportTo/0", json!("a b"), Code::BadExportTo),
            ("/spec/subjectAltNames/0", json!(1), Code::WrongType),
        ],
    );
    refused(
        selecting_entry,
        &[
            ("/spec/workloadSelector/surplus", json!({}), Code::UnknownField),
            ("/spec/workloadSelector/labels/app", json!("*"), Code::BadWorkloadSelector),
        ],
    );
}

#[test]
fn a_broken_egress_policy_fits_neither_schema_nor_loader() {
    refused(
        policy,
        &[
            ("/apiVersion", json!("egress.filter/v1"), Code::UnknownVersion),
            ("/spec", json!(null), Code::MissingField),
            ("/surplus", json!({}), Code::UnknownField),
            ("/spec/surplus", json!({}), Code::UnknownField),
            ("/spec/workloads", json!([]), Code::AmbiguousEmptyList),
            ("/spec/workloads/0", json!({}), Code::BadSelector),
            ("/spec/workloads/0/unit", json!("a.service"), Code::BadSelector),
            ("/spec/workloads/0/surplus", json!("a"), Code::UnknownField),
            ("/spec/workloads/0/cgroup", json!("a/[bc]"), Code::BadCgroup),
            ("/spec/workloads/1/unit", json!("nginx"), Code::BadUnit),
            ("/spec/workloads/1/unit", json!(".service"), Code::BadUnit),
            ("/spec/workloads/2/user", json!("*"), Code::BadUser),
            ("/spec/workloads/3/user", json!(-1), Code::BadUser),
            ("/spec/workloads/3/user", json!(u32::MAX), Code::BadUser),
            ("/spec/workloads/4/pod/matchLabels/app", json!("a b"), Code::BadLabelSelector),
            ("/spec/workloads/4/pod/matchLabels/a b", json!(""), Code::BadLabelSelector),
            ("/spec/workloads/4/pod/matchExpressions/0/key", json!(null), Code::BadLabelSelector),
            ("/spec/workloads/4/pod/matchExpressions/0/operator", json!("in"), Code::BadLabelSelector),
            ("/spec/workloads/4/pod/matchExpressions/0/surplus", json!(1), Code::UnknownField),
            ("/spec/workloads/4/pod/namespaces", json!([]), Code::AmbiguousEmptyList),
            ("/spec/workloads/4/pod/namespaces/0", json!("Shop"), Code::BadLabelSelector),
            ("/spec/workloads/4/pod/surplus", json!(1), Code::UnknownField),
            ("/spec/mode", json!("audit"), Code::UnknownValue),
            ("/spec/services/0", json!("db"), Code::BadServiceRef),
            ("/spec/services/0", json!("*/db"), Code::BadServiceRef),
            ("/spec/allow/0/surplus", json!(1), Code::UnknownField),
            ("/spec/allow/0/to", json!([]), Code::AmbiguousEmptyList),
            ("/spec/allow/0/to/0", json!({}), Code::BadPeer),
            ("/spec/allow/0/to/0/host", json!("a.example"), Code::BadPeer),
            ("/spec/allow/0/to/0/cidr", json!("db.example.com"), Code::BadCidr),
            ("/spec/allow/0/to/0/except/0", json!("db.example.com"), Code::BadCidr),
            ("/spec/allow/0/to/1/except", json!(["10.0.0.0/8"]), Code::ExceptOutside),
            ("/spec/allow/0/to/1/host", json!("*bar.example"), Code::BadPeerHost),
            ("/spec/allow/0/ports", json!([]), Code::AmbiguousEmptyList),
            ("/spec/allow/0/ports/0", json!({}), Code::BadPortRange),
            ("/spec/allow/0/ports/0/port", json!(0), Code::BadPortRange),
            ("/spec/allow/0/ports/0/port", json!(null), Code::BadPortRange),
            ("/spec/allow/0/ports/0/endPort", json!(65_536), Code::BadPortRange),
            ("/spec/allow/0/ports/0/protocol", json!("SCTP"), Code::UnknownL4),
            ("/spec/allow/0/ports/0/surplus", json!(1), Code::UnknownField),
            ("/spec/deny/0/to/0", json!({ "host": "a.example" }), Code::HostInDeny),
            ("/spec/deny/0/to/0/surplus", json!(1), Code::UnknownField),
            ("/spec/deny/0/surplus", json!(1), Code::UnknownField),
            ("/spec/defaultAction", json!("Drop"), Code::UnknownValue),
            ("/spec/loopback", json!("Deny"), Code::UnknownValue),
            ("/spec/dns/servers", json!("system"), Code::BadDnsServers),
            ("/spec/dns/servers", json!([]), Code::BadDnsServers),
            ("/spec/dns/servers/0", json!("dns.example.com"), Code::BadDnsServers),
            ("/spec/dns/queries", json!("any"), Code::UnknownValue),
            ("/spec/dns/surplus", json!(1), Code::UnknownField),
            ("/spec/replies", json!(true), Code::UnknownValue),
            ("/spec/protocols/1", json!("ICMP"), Code::BadSocketProtocol),
            ("/spec/protocols/1", json!("GRE"), Code::BadSocketProtocol),
            ("/spec/existing", json!("Kill"), Code::UnknownValue),
            ("/spec/refuseWith", json!("EACCES"), Code::UnknownValue),
        ],
    );
}

/// JSON Schema does not compare values; the loader and the CRD do.
#[test]
fn a_range_that_ends_before_it_begins_is_beyond_the_schema() {
    let document = with(policy(), "/spec/allow/0/ports/0/endPort", json!(7999));
    assert!(findings(&document).contains(&Code::BadPortRange));
    assert_eq!(complaints(&schema(), &document), [""; 0]);
}
