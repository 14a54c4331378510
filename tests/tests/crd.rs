//! What the Kubernetes API refuses of an `EgressPolicy`, and what it leaves to the agent: nobody is told that a policy is fine which
//! the agent refuses, where the definition can tell.
//!
//! By the schema, a real server refuses (`cargo xtask kube`). The one that can be built is older than rules in CEL, which newer ones
//! know: those are evaluated here.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use cel::{Context, Program};
use egress_agent::policy::load::load_text;
use egress_tests::{
    kube::{ADMIN, ApiServer},
    pages,
};
use serde_json::{Value, json};

/// Who refuses a policy first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Nobody,
    /// The server, by the types, limits and patterns of the definition.
    Schema,
    /// The server, by a rule of the definition.
    Rule,
    /// The agent: what it takes to see that is beyond the definition.
    Agent,
}

fn to(destination: &Value) -> Value {
    json!({ "allow": [{ "to": [destination] }] })
}

fn port(port: &Value) -> Value {
    json!({ "allow": [{ "ports": [port] }] })
}

fn by(selector: &Value) -> Value {
    json!({ "workloads": [selector] })
}

fn examples() -> Vec<(By, Value)> {
    use By::{Agent, Nobody, Rule, Schema};
    let expression = |key: &str, operator: &str, values: &[&str]| {
        by(&json!({ "pod": { "matchExpressions": [{ "key": key, "operator": operator, "values": values }] } }))
    };
    vec![
        (Nobody, json!({})),
        (Nobody, json!({ "mode": "Audit", "services": ["./*", "shop/mysql", "*/*"], "defaultAction": "Allow" })),
        (Schema, json!({ "mode": "audit" })),
        (Schema, json!({ "mode": 1 })),
        (Schema, json!({ "defaultAction": "Audit" })),
        (Schema, json!({ "services": ["mysql"] })),
        (Schema, json!({ "services": ["Shop/mysql"] })),
        (Schema, json!({ "services": "./*" })),
        (Schema, json!([])),
        (Schema, json!("everything")),
        // Whom it is for.
        (Nobody, by(&json!({ "cgroup": "system.slice/*.service" }))),
        (Nobody, by(&json!({ "unit": "nginx.service" }))),
        (Nobody, by(&json!({ "user": 33 }))),
        (Nobody, by(&json!({ "user": "www-data" }))),
        (Nobody, by(&json!({ "pod": { "matchLabels": { "app": "web" }, "namespaces": ["shop"] } }))),
        (Nobody, expression("app", "In", &["a", "b"])),
        (Nobody, by(&json!({ "pod": {} }))),
        (Schema, json!({ "workloads": [] })),
        (Schema, by(&json!({ "cgroup": "" }))),
        (Schema, by(&json!({ "unit": "nginx" }))),
        (Schema, by(&json!({ "user": -1 }))),
        (Schema, by(&json!({ "user": 4_294_967_295_u32 }))),
        (Schema, by(&json!({ "user": "-u" }))),
        (Schema, by(&json!({ "pod": { "namespaces": [] } }))),
        (Schema, by(&json!({ "pod": { "namespaces": ["Shop"] } }))),
        (Schema, by(&json!({ "pod": { "matchLabels": { "app": "a b" } } }))),
        (Schema, expression("app", "Is", &["a"])),
        (Schema, expression("-app", "Exists", &[])),
        (Rule, by(&json!({}))),
        (Rule, by(&json!({ "cgroup": "a", "unit": "b.service" }))),
        (Rule, by(&json!({ "pod": {}, "user": 0 }))),
        (Agent, expression("app", "In", &[])),
        (Agent, expression("app", "Exists", &["a"])),
        // Where to.
        (Nobody, to(&json!({ "cidr": "203.0.113.0/24", "except": ["203.0.113.9"] }))),
        (Nobody, to(&json!({ "cidr": "2001:db8::/32" }))),
        (Nobody, to(&json!({ "host": "*.example.com" }))),
        (Schema, to(&json!({ "cidr": "example.com" }))),
        (Schema, to(&json!({ "cidr": "10.0.0.0/8 " }))),
        (Schema, to(&json!({ "cidr": 10 }))),
        (Schema, to(&json!({ "host": "a b" }))),
        (Schema, to(&json!({ "host": "*" }))),
        (Schema, json!({ "allow": [{ "to": [] }] })),
        (Rule, to(&json!({}))),
        (Rule, to(&json!({ "cidr": "10.0.0.0/8", "host": "a.example.com" }))),
        (Rule, to(&json!({ "host": "a.example.com", "except": ["10.0.0.1"] }))),
        (Rule, json!({ "deny": [{ "to": [{ "host": "a.example.com" }] }] })),
        (Agent, to(&json!({ "cidr": "10.0.0.0/33" }))),
        (Agent, to(&json!({ "cidr": "10.0.0" }))),
        (Agent, to(&json!({ "cidr": "10.0.0.0/8", "except": ["192.0.2.0/24"] }))),
        (Agent, to(&json!({ "host": "a..example.com" }))),
        // Ports.
        (Nobody, port(&json!({ "port": 443 }))),
        (Nobody, port(&json!({ "port": 8000, "endPort": 8100, "protocol": "Any" }))),
        (Schema, port(&json!({ "port": 0 }))),
        (Schema, port(&json!({ "port": 65_536 }))),
        (Schema, port(&json!({ "port": "https" }))),
        (Schema, port(&json!({ "protocol": "tcp" }))),
        (Schema, port(&json!({}))),
        (Rule, port(&json!({ "endPort": 80, "protocol": "TCP" }))),
        (Rule, port(&json!({ "port": 81, "endPort": 80 }))),
        // The rest.
        (Nobody, json!({ "dns": { "servers": "System" }, "loopback": "None", "replies": "Deny" })),
        (Nobody, json!({ "dns": { "servers": ["192.0.2.53", "2001:db8::53"] } })),
        (Nobody, json!({ "protocols": ["ICMP", "VSOCK"], "existing": "Terminate", "refuseWith": "ECONNREFUSED" })),
        (Schema, json!({ "dns": { "queries": "Some" } })),
        (Schema, json!({ "protocols": ["TCP"] })),
        (Schema, json!({ "protocols": ["ICMP", "ICMP"] })),
        (Schema, json!({ "existing": "Kill" })),
        (Schema, json!({ "refuseWith": "EACCES" })),
        (Agent, json!({ "dns": { "servers": "Systemd" } })),
        (Agent, json!({ "dns": { "servers": ["resolver.example.com"] } })),
    ]
}

fn policy(spec: &Value) -> Value {
    json!({
        "apiVersion": "egress.filter/v1alpha1", "kind": "EgressPolicy",
        "metadata": { "name": "example", "namespace": "default" }, "spec": spec,
    })
}

/// The schema of the definition.
fn schema() -> Value {
    let definition: Value = serde_json::from_str(&pages::definition()).unwrap();
    definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// What the rules of a schema say of a value, and of all in it.
fn complaints(schema: &Value, value: &Value) -> Vec<String> {
    let broken = |rule: &&Value| {
        let program = Program::compile(rule["rule"].as_str().unwrap()).unwrap();
        let mut context = Context::default();
        context.add_variable("self", value).unwrap();
        program.execute(&context).unwrap() == false.into()
    };
    let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    let mut found: Vec<String> = rules.filter(broken).map(|rule| rule["message"].to_string()).collect();
    for (name, inner) in value.as_object().into_iter().flatten() {
        let of_name = &schema["properties"][name];
        found.extend(complaints(if of_name.is_null() { &schema["additionalProperties"] } else { of_name }, inner));
    }
    for item in value.as_array().into_iter().flatten() {
        found.extend(complaints(&schema["items"], item));
    }
    found
}

#[test]
fn the_rules_of_the_definition_and_the_agent_agree() {
    let schema = schema();
    for (who, spec) in examples() {
        let policy = policy(&spec);
        let loaded = load_text("example.yaml", &policy.to_string());
        assert_eq!(loaded.has_errors(), who != By::Nobody, "{spec}: {:#?}", loaded.findings);
        // Servers ask the rules only about what fits the schema.
        if who != By::Schema {
            let complaints = complaints(&schema, &policy);
            assert_eq!(!complaints.is_empty(), who == By::Rule, "{spec}: {complaints:#?}");
        }
    }
}

#[test]
#[ignore = "needs what `cargo xtask kube` builds"]
fn a_real_server_refuses_what_does_not_fit_the_schema_and_nothing_else() {
    let api = ApiServer::start().unwrap();
    api.define().unwrap();
    for (who, spec) in examples() {
        // What kubectl itself would notice is not asked for.
        let args = ["create", "--dry-run=server", "--validate=false", "--filename", "-"];
        let output = api.with(ADMIN, &args, &policy(&spec)).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), who != By::Schema, "{spec}: {said}");
        if who == By::Schema {
            assert!(said.contains("spec"), "{spec}: {said}");
        }
    }
}
