//! One object of the API, read as a policy document. Pure.

use std::{collections::BTreeSet, fmt::Write as _};

use kube::api::DynamicObject;
use serde_json::json;

use super::Settings;
use crate::{
    existing::terminates,
    policy::{
        EgressPolicy, Kind, PolicySet, Reach, Selector, ServiceEntry,
        code::Code,
        diagnostic::{Finding, Severity, printable},
        load::read_object,
    },
};

/// Most bytes of an object. `etcd` takes 1.5 MiB by default.
const LARGEST: usize = 2 << 20;
/// Most findings that are told of one object.
const MOST_FINDINGS: usize = 5;

/// What an object says, or what is wrong with it.
pub(super) struct Read<T> {
    pub(super) valid: Result<T, String>,
    /// Fields that are ignored, and the like.
    pub(super) warnings: Vec<String>,
}

/// Reads a `ServiceEntry`.
pub(super) fn service_entry(object: &DynamicObject) -> Read<ServiceEntry> {
    let (findings, valid) = read(Kind::ServiceEntry, object, |policies| policies.service_entries.pop());
    finish(findings, valid)
}

/// Reads an `EgressPolicy`. Only the root namespace may select others than pods of its own. What this agent cannot carry out
/// is refused here, where it concerns one object, not all.
pub(super) fn egress_policy(object: &DynamicObject, settings: &Settings) -> Read<EgressPolicy> {
    let (findings, valid) = read(Kind::EgressPolicy, object, |policies| policies.egress_policies.pop());
    let Read { valid, warnings } = finish(findings, valid);
    let valid = valid.and_then(|policy| confine(policy, &settings.root_namespace)).and_then(|policy| {
        if terminates(&policy) && !settings.may_terminate {
            return Err("spec.existing: `Terminate` takes CAP_SYS_ADMIN, which the agents were not given".to_owned());
        }
        Ok(policy)
    });
    Read { valid, warnings }
}

fn confine(policy: EgressPolicy, root_namespace: &str) -> Result<EgressPolicy, String> {
    let is_root = *policy.object.namespace == *root_namespace;
    if is_root && policy.workloads.is_some() {
        return Ok(policy);
    }
    let beyond: BTreeSet<&str> = policy
        .workloads
        .iter()
        .flatten()
        .filter_map(|selector| match selector {
            Selector::Cgroup(_) => Some("cgroup"),
            Selector::Unit(_) => Some("unit"),
            Selector::User(_) => Some("user"),
            Selector::Pod(pod) if pod.namespaces.is_some() => Some("pod.namespaces"),
            Selector::Pod(pod) if pod.namespace_labels.is_some() => Some("pod.namespaceLabels"),
            Selector::Pod(_) => None,
        })
        .collect();
    if let Some(field) = beyond.first() {
        return Err(format!(
            "spec.workloads: selecting by `{field}` is for policies of namespace {root_namespace} and for files; here `pod` \
             selects pods of the policy's own namespace"
        ));
    }
    Ok(EgressPolicy { reach: Reach::Namespace, ..policy })
}

/// Only what is read is handed on: what Kubernetes keeps beside it may be larger than the policy.
fn read<T>(
    kind: Kind,
    object: &DynamicObject,
    take: impl FnOnce(&mut PolicySet) -> Option<T>,
) -> (Vec<Finding>, Option<T>) {
    let metadata = &object.metadata;
    let mut document = json!({
        "apiVersion": kind.api_version(),
        "kind": kind.as_str(),
        "metadata": { "name": metadata.name, "namespace": metadata.namespace, "labels": metadata.labels },
    });
    for field in ["spec", "status"] {
        if let (Some(value), true) = (object.data.get(field), kind == Kind::ServiceEntry || field == "spec") {
            document[field] = value.clone();
        }
    }
    let text = document.to_string();
    if text.len() > LARGEST {
        return (
            vec![Finding::about_object(Code::FileTooLarge, format!("the object has more than {LARGEST} bytes"))],
            None,
        );
    }
    let mut loaded = read_object(&text);
    let taken = take(&mut loaded.policies);
    (loaded.findings, taken)
}

fn finish<T>(findings: Vec<Finding>, valid: Option<T>) -> Read<T> {
    let (errors, others): (Vec<Finding>, Vec<Finding>) =
        findings.into_iter().partition(|finding| finding.severity == Severity::Error);
    let warnings = others.iter().filter(|finding| finding.severity == Severity::Warning).map(line).collect();
    let valid = match valid {
        Some(valid) if errors.is_empty() => Ok(valid),
        _ if errors.is_empty() => Err("it is not an object of its kind".to_owned()),
        _ => Err(list(&errors)),
    };
    Read { valid, warnings }
}

fn list(errors: &[Finding]) -> String {
    let mut text = errors.iter().take(MOST_FINDINGS).map(line).collect::<Vec<_>>().join("; ");
    if errors.len() > MOST_FINDINGS {
        // Writing to a string cannot fail.
        let _ = write!(text, "; and {} more", errors.len() - MOST_FINDINGS);
    }
    text
}

/// What the author needs: which field, what is wrong, what to write. Lines mean nothing where there is no file.
fn line(finding: &Finding) -> String {
    let mut text = String::new();
    if !finding.path.is_empty() {
        text = format!("{}: ", printable(&finding.path));
    }
    text.push_str(&printable(&finding.message));
    if let Some(help) = &finding.help {
        // Writing to a string cannot fail.
        let _ = write!(text, " ({})", printable(help));
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn object(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    fn policy(namespace: &str, spec: &Value) -> DynamicObject {
        object(
            json!({ "metadata": { "name": "web", "namespace": namespace, "managedFields": [{ "x": 1 }] }, "spec": spec }),
        )
    }

    #[test]
    fn unknown_fields_are_ignored_and_told_of() {
        let entry = object(json!({
            "metadata": { "name": "db", "namespace": "shop", "annotations": { "a": "\u{1}" } },
            "spec": {
                "hosts": ["db.example.com"], "addresses": ["192.0.2.7"], "later": { "x": [1] },
                "ports": [{ "number": 3306, "name": "tcp", "protocol": "TCP", "since": 2030 }],
            },
        }));
        let read = service_entry(&entry);
        let valid = read.valid.unwrap();
        assert_eq!((valid.ports[0].number, valid.addresses.len(), &*valid.object.namespace), (3306, 1, "shop"));
        assert_eq!(read.warnings.len(), 2, "{:?}", read.warnings);
        assert!(read.warnings[0].starts_with("spec.later: "), "{:?}", read.warnings);
    }

    #[test]
    fn what_is_wrong_is_told_by_field() {
        let entry = object(json!({
            "metadata": { "name": "db", "namespace": "shop" },
            "spec": { "hosts": ["db.example.com"], "ports": [{ "number": 99999, "name": "tcp" }] },
        }));
        let error = service_entry(&entry).valid.unwrap_err();
        assert!(error.starts_with("spec.ports[0].number: port 99999 is out of range"), "{error}");
        for broken in [json!({}), json!({ "spec": null }), json!({ "spec": [] }), json!({ "spec": "x" })] {
            let mut value = json!({ "metadata": { "name": "x", "namespace": "shop" } });
            value.as_object_mut().unwrap().extend(broken.as_object().unwrap().clone());
            assert!(service_entry(&object(value.clone())).valid.is_err(), "{value}");
            assert!(egress_policy(&object(value), &Settings::example()).valid.is_err());
        }
    }

    #[test]
    fn an_object_that_is_too_large_is_refused() {
        let hosts: Vec<String> = (0..200_000).map(|index| format!("h{index}.example.com")).collect();
        let entry = object(json!({ "metadata": { "name": "x", "namespace": "shop" }, "spec": { "hosts": hosts } }));
        let error = service_entry(&entry).valid.unwrap_err();
        assert!(error.contains("more than 2097152 bytes"), "{error}");
    }

    #[test]
    fn a_namespace_selects_its_own_pods_and_nothing_else() {
        let read = |namespace: &str, workloads: Value| {
            egress_policy(&policy(namespace, &json!({ "workloads": workloads })), &Settings::example()).valid
        };
        for beyond in [
            json!([{ "cgroup": "system.slice" }]),
            json!([{ "unit": "nginx.service" }]),
            json!([{ "user": 0 }]),
            json!([{ "pod": { "namespaces": ["other"] } }]),
            json!([{ "pod": { "matchLabels": {} } }, { "pod": { "namespaceLabels": { "a": "b" } } }]),
        ] {
            assert!(read("shop", beyond.clone()).unwrap_err().contains("namespace egress-system"), "{beyond}");
            assert_eq!(read("egress-system", beyond).unwrap().reach, Reach::Anything);
        }
        let own = read("shop", json!([{ "pod": { "matchLabels": { "app": "web" } } }])).unwrap();
        assert_eq!(own.reach, Reach::Namespace);
        let everybody = egress_policy(&policy("egress-system", &json!({})), &Settings::example()).valid.unwrap();
        assert_eq!(everybody.reach, Reach::Namespace);
    }

    #[test]
    fn a_policy_that_cannot_be_carried_out_is_refused_alone() {
        let read = |spec: Value, may_terminate| {
            egress_policy(&policy("shop", &spec), &Settings { may_terminate, ..Settings::example() }).valid
        };
        assert!(read(json!({ "existing": "Terminate" }), false).unwrap_err().contains("CAP_SYS_ADMIN"));
        assert!(read(json!({ "existing": "Terminate" }), true).is_ok());
    }
}
