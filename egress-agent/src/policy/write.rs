//! Writes policy documents: the one place that turns a wish into YAML.
//!
//! What is written here is read back by [`super::load`]; tests hold the two together.

use std::{fmt::Write as _, net::IpAddr};

use super::{EgressPolicy, L4, LabelOperator, LabelRequirement, PodSelector, Selector, User, names::fqdn};

/// A destination that a document is to allow.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Where to.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// TCP or UDP.
    pub l4: L4,
    /// Its name, if it has one.
    pub host: Option<&'a str>,
    /// Whether servers of DNS may not be asked for the name yet.
    pub is_unaskable: bool,
}

impl Wanted<'_> {
    /// `allow-tcp-203-0-113-9-3306`: a name that Kubernetes accepts, and that no other destination has.
    fn name(&self) -> String {
        let address = match self.address {
            IpAddr::V4(v4) => v4.octets().map(|byte| byte.to_string()).join("-"),
            IpAddr::V6(v6) => v6.segments().map(|segment| format!("{segment:x}")).join("-"),
        };
        format!("allow-{}-{address}-{}", self.l4.as_str().to_lowercase(), self.port)
    }

    /// `hosts` must not be empty, an address is not a host name, and resolvers know names that documents may not have.
    fn host(&self) -> String {
        let named = self.host.and_then(|host| fqdn(host).ok());
        named.unwrap_or_else(|| format!("{}.external", self.name()))
    }

    fn cidr(&self) -> String {
        let length = if self.address.is_ipv4() { 32 } else { 128 };
        format!("{}/{length}", self.address)
    }
}

/// A `ServiceEntry` for one destination.
pub fn service_entry(wanted: &Wanted<'_>, namespace: &str) -> String {
    let protocol = wanted.l4.as_str();
    format!(
        "apiVersion: networking.istio.io/v1\n\
         kind: ServiceEntry\n\
         metadata:\n\
         \x20 name: {}\n\
         \x20 namespace: {}\n\
         spec:\n\
         \x20 hosts:\n\
         \x20   - {}\n\
         \x20 addresses:\n\
         \x20   - {}\n\
         \x20 ports:\n\
         \x20   - name: {}-{}\n\
         \x20     number: {}\n\
         \x20     protocol: {protocol}\n\
         \x20 location: MESH_EXTERNAL\n",
        quoted(&wanted.name()),
        quoted(namespace),
        quoted(&wanted.host()),
        quoted(&wanted.cidr()),
        protocol.to_lowercase(),
        wanted.port,
        wanted.port,
    )
}

/// An `EgressPolicy` for one destination and the workloads of another policy, to stand beside it.
pub fn egress_policy(wanted: &Wanted<'_>, beside: &EgressPolicy) -> String {
    let mut text = format!(
        "apiVersion: egress.filter/v1alpha1\n\
         kind: EgressPolicy\n\
         metadata:\n\
         \x20 name: {}\n\
         \x20 namespace: {}\n\
         spec:\n",
        quoted(&wanted.name()),
        quoted(&beside.object.namespace),
    );
    if let Some(workloads) = &beside.workloads {
        text.push_str("  workloads:\n");
        for selector in workloads {
            write_selector(&mut text, selector);
        }
    }
    let (cidr, port, protocol) = (quoted(&wanted.cidr()), wanted.port, wanted.l4.as_str());
    let named = wanted.host.filter(|_| wanted.is_unaskable).and_then(|host| fqdn(host).ok());
    let host = named.map(|host| format!("        - host: {}\n", quoted(&host))).unwrap_or_default();
    let allow = format!(
        "  allow:\n    - to:\n        - cidr: {cidr}\n{host}      ports:\n        - port: {port}\n          protocol: {protocol}\n"
    );
    text.push_str(&allow);
    text
}

fn write_selector(text: &mut String, selector: &Selector) {
    let line = match selector {
        Selector::Cgroup(glob) => format!("    - cgroup: {}\n", quoted(glob)),
        Selector::Unit(glob) => format!("    - unit: {}\n", quoted(glob)),
        Selector::User(User::Uid(uid)) => format!("    - user: {uid}\n"),
        Selector::User(User::Name(name)) => format!("    - user: {}\n", quoted(name)),
        Selector::Pod(pod) => format!("    - pod: {}\n", pod_selector(pod)),
    };
    text.push_str(&line);
}

/// In flow style: `{ matchLabels: { … } }`.
fn pod_selector(pod: &PodSelector) -> String {
    let labels = |labels: &std::collections::BTreeMap<String, String>| {
        let pairs: Vec<String> =
            labels.iter().map(|(key, value)| format!("{}: {}", quoted(key), quoted(value))).collect();
        format!("{{ {} }}", pairs.join(", "))
    };
    let mut fields = Vec::new();
    if !pod.match_labels.is_empty() {
        fields.push(format!("matchLabels: {}", labels(&pod.match_labels)));
    }
    if !pod.match_expressions.is_empty() {
        let expressions: Vec<String> = pod.match_expressions.iter().map(requirement).collect();
        fields.push(format!("matchExpressions: [{}]", expressions.join(", ")));
    }
    fields.extend(pod.namespaces.as_ref().map(|names| format!("namespaces: {}", list(names))));
    fields.extend(pod.namespace_labels.as_ref().map(|wanted| format!("namespaceLabels: {}", labels(wanted))));
    format!("{{ {} }}", fields.join(", "))
}

fn requirement(requirement: &LabelRequirement) -> String {
    let operator = match requirement.operator {
        LabelOperator::In => "In",
        LabelOperator::NotIn => "NotIn",
        LabelOperator::Exists => "Exists",
        LabelOperator::DoesNotExist => "DoesNotExist",
    };
    let mut text = format!("{{ key: {}, operator: {operator}", quoted(&requirement.key));
    if !requirement.values.is_empty() {
        let _ = write!(text, ", values: {}", list(&requirement.values));
    }
    text + " }"
}

fn list(items: &[String]) -> String {
    let items: Vec<String> = items.iter().map(|item| quoted(item)).collect();
    format!("[{}]", items.join(", "))
}

/// A string as a YAML scalar: plain where no reader can take it for anything else, quoted as in JSON otherwise.
fn quoted(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-./".contains(&byte);
    let is_word = text.bytes().any(|byte| byte.is_ascii_lowercase()) && text.bytes().all(plain);
    let is_number = text.starts_with(|c: char| c.is_ascii_digit()) && !text.contains('.');
    let is_cidr = text.parse::<ipnet::Ipv4Net>().is_ok();
    let is_keyword = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"].contains(&text);
    if (is_word || is_cidr) && !is_number && !is_keyword && !text.starts_with(['-', '.', '/']) {
        return text.to_owned();
    }
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::load::load_text;

    fn wanted(address: &str) -> Wanted<'static> {
        Wanted { address: address.parse().unwrap(), port: 3306, l4: L4::Udp, host: None, is_unaskable: false }
    }

    #[test]
    fn what_is_written_can_be_read() {
        for address in ["203.0.113.9", "::1", "2001:db8::", "::", "64:ff9b::1.2.3.4", "2001:db8:1:2:3:4:5:6"] {
            let text = service_entry(&wanted(address), "shop");
            let loaded = load_text("written.yaml", &text);
            assert!(!loaded.has_errors(), "{text}\n{:#?}", loaded.findings);
            assert_eq!(loaded.policies.service_entries.len(), 1);
        }
    }

    #[test]
    fn a_host_that_no_document_may_have_is_left_out() {
        for host in ["my_db.example.com", "db-.example.com", "a..b", "123", "1.2.3.4", "-", "*.example.com"] {
            let text = service_entry(&Wanted { host: Some(host), ..wanted("203.0.113.9") }, "shop");
            let loaded = load_text("written.yaml", &text);
            assert!(!loaded.has_errors(), "{text}\n{:#?}", loaded.findings);
            assert!(text.contains("- allow-udp-203-0-113-9-3306.external\n"), "{text}");
        }
        let text = service_entry(&Wanted { host: Some("db.example.com"), ..wanted("203.0.113.9") }, "shop");
        assert!(text.contains("- db.example.com\n"), "{text}");
    }

    #[test]
    fn every_destination_has_a_name_of_its_own() {
        let mut names: Vec<String> = ["203.0.113.9", "::1", "1::", "1::2:0:3", "1:0:2::3"]
            .map(wanted)
            .into_iter()
            .flat_map(|udp| [udp.name(), Wanted { l4: L4::Tcp, ..udp }.name(), Wanted { port: 53, ..udp }.name()])
            .collect();
        assert_eq!(names[1], "allow-tcp-203-0-113-9-3306");
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    }

    #[test]
    fn a_policy_beside_another_selects_the_same_workloads() {
        let selectors = "[{ cgroup: \"a/*\" }, { unit: nginx.service }, { user: 33 }, { user: www-data }, { pod: { \
                         matchLabels: { app: \"true\", tier: \"0\" }, matchExpressions: [{ key: k, operator: In, values: \
                         [\"a\", \"b-c\"] }, { key: x, operator: Exists }], namespaces: [shop], namespaceLabels: { a: b } \
                         } }]";
        let text = format!(
            "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p, namespace: shop }}\nspec: {{ \
             workloads: {selectors} }}\n"
        );
        let loaded = load_text("policy.yaml", &text);
        assert!(!loaded.has_errors(), "{:#?}", loaded.findings);
        let policy = &loaded.policies.egress_policies[0];
        let written = egress_policy(&wanted("2001:db8::1"), policy);
        let read = load_text("written.yaml", &written);
        assert!(!read.has_errors(), "{written}\n{:#?}", read.findings);
        assert_eq!(read.policies.egress_policies[0].workloads, policy.workloads, "{written}");
    }
}
