//! The policy model: what the documents mean.
//!
//! A value of these types is valid: whoever holds a [`PolicySet`] need not check it again. The model does not know how
//! documents are written; reading them is the business of [`load`] and the modules below it. It decides nothing
//! either: [`crate::compile`] turns it into rules.

use std::{collections::BTreeMap, fmt, net::IpAddr, path::Path, sync::Arc};

use egress_common::{NameEnd, NameKey};
use ipnet::IpNet;
use serde::{Serialize, Serializer};

pub mod address;
pub mod code;
pub mod decode;
pub mod diagnostic;
pub mod egress_policy;
pub mod lint;
pub mod load;
pub mod names;
pub mod object;
pub mod path;
pub mod schema;
pub mod service_entry;
pub mod suggest;
pub mod write;
pub mod yaml;

/// Every valid policy document of one load, each kind sorted by namespace and name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PolicySet {
    /// The allow list, as Istio's `ServiceEntry` objects.
    pub service_entries: Vec<ServiceEntry>,
    /// What a `ServiceEntry` cannot say: who, deny, defaults, audit.
    pub egress_policies: Vec<EgressPolicy>,
}

/// A place in a policy file; line and column count from 1.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// The file as the user named it, or as found below the directory the user named. Empty for an object of the Kubernetes
    /// API.
    pub file: Arc<Path>,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
}

impl Position {
    /// That of an object of the Kubernetes API.
    pub fn nowhere() -> Self {
        Self { file: Arc::from(Path::new("")), line: 0, column: 0 }
    }

    /// Whether it is in a file.
    pub fn is_somewhere(&self) -> bool {
        !self.file.as_os_str().is_empty()
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.is_somewhere() {
            return f.write_str("the Kubernetes API");
        }
        write!(f, "{}:{}:{}", self.file.display(), self.line, self.column)
    }
}

/// The kinds of document that carry rules, in the order in which their rules are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Kind {
    /// `egress.filter/v1alpha1`.
    EgressPolicy,
    /// `networking.istio.io/v1`, `v1beta1` or `v1alpha3`.
    ServiceEntry,
}

impl Kind {
    /// The group, and the version in which it is written.
    pub const fn api_version(self) -> &'static str {
        match self {
            Self::EgressPolicy => "egress.filter/v1alpha1",
            Self::ServiceEntry => "networking.istio.io/v1",
        }
    }

    /// The kind as documents spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EgressPolicy => "EgressPolicy",
            Self::ServiceEntry => "ServiceEntry",
        }
    }
}

/// What identifies a document: unique within a [`PolicySet`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// The document's kind.
    pub kind: Kind,
    /// `metadata.namespace`, `default` when absent.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind.as_str(), self.namespace, self.name)
    }
}

/// Layer 4 protocol of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum L4 {
    /// TCP, MPTCP included.
    Tcp,
    /// UDP.
    Udp,
}

impl L4 {
    /// As documents and reports spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        }
    }

    /// The inverse of [`L4::as_str`], in any case.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Tcp, Self::Udp].into_iter().find(|l4| text.eq_ignore_ascii_case(l4.as_str()))
    }
}

/// `*.example.com` or `db.example.com`; lower case, without a trailing dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostPattern {
    /// This name only.
    Exact(String),
    /// Any depth below this suffix, and not the suffix itself: `*.example.com` holds `example.com`.
    Below(String),
    /// Names that end in this, itself included: `*bar.com` holds `bar.com`. Only in a `ServiceEntry`.
    Ending(String),
}

impl HostPattern {
    /// Whether a name, in lower case and without a trailing dot, is one of these.
    pub fn covers(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => name == exact,
            Self::Below(suffix) => name.strip_suffix(suffix.as_str()).is_some_and(|rest| rest.ends_with('.')),
            Self::Ending(end) => name.ends_with(end.as_str()),
        }
    }

    /// As the key of a longest-prefix match; `None` if no name that DNS can ask for is covered.
    pub fn key(&self) -> Option<NameKey> {
        match self {
            Self::Exact(name) => NameKey::of(name, NameEnd::Exact),
            Self::Below(suffix) => NameKey::of(suffix, NameEnd::Below),
            Self::Ending(end) => NameKey::of(end, NameEnd::Ending),
        }
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Below(suffix) => write!(f, "*.{suffix}"),
            Self::Ending(end) => write!(f, "*{end}"),
        }
    }
}

/// Istio `ServiceEntry`.
///
/// <https://istio.io/latest/docs/reference/config/networking/service-entry/>
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Namespace and name.
    pub object: ObjectName,
    /// Where the document begins.
    pub at: Position,
    /// `spec.hosts`, never empty.
    pub hosts: Vec<HostPattern>,
    /// `spec.addresses` and `status.addresses`: host bits masked, IPv4-mapped and NAT64 forms turned into IPv4.
    pub addresses: Vec<IpNet>,
    /// `spec.ports`, in document order.
    pub ports: Vec<ServicePort>,
    /// `spec.location`.
    pub location: Location,
    /// `spec.resolution`.
    pub resolution: Resolution,
    /// `spec.endpoints`, in document order.
    pub endpoints: Vec<Endpoint>,
    /// `spec.workloadSelector.labels`; the endpoints are then pods.
    pub workload_selector: Option<BTreeMap<String, String>>,
    /// `spec.exportTo`.
    pub export_to: ExportTo,
    /// `spec.subjectAltNames`: carried, never enforced at layer 4.
    pub subject_alt_names: Vec<String>,
}

/// `spec.ports[]` of a `ServiceEntry`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Unique within its entry.
    pub name: String,
    /// The port that clients dial.
    pub number: u16,
    /// What the kernel sees of `protocol`.
    pub l4: L4,
    /// `protocol` as Istio spells it in upper case (`HTTP`, `TLS`, `MONGO`, …); `None` when absent.
    pub app_protocol: Option<&'static str>,
    /// The port of endpoints that do not map this port's name themselves.
    pub target_port: Option<u16>,
    /// Where the list item begins.
    pub at: Position,
}

/// `spec.location` of a `ServiceEntry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Location {
    /// `MESH_EXTERNAL`, the default.
    MeshExternal,
    /// `MESH_INTERNAL`.
    MeshInternal,
}

/// `spec.resolution` of a `ServiceEntry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// `NONE`, the default: whatever the client resolved.
    None,
    /// `STATIC`: the addresses of the endpoints.
    Static,
    /// `DNS`.
    Dns,
    /// `DNS_ROUND_ROBIN`.
    DnsRoundRobin,
    /// `DYNAMIC_DNS`.
    DynamicDns,
}

/// `spec.endpoints[]` of a `ServiceEntry`, an Istio `WorkloadEntry`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it is.
    pub address: EndpointAddress,
    /// Port by the name of the service's port.
    pub ports: BTreeMap<String, u16>,
    /// Carried for lint and selectors.
    pub labels: BTreeMap<String, String>,
    /// Where the list item begins.
    pub at: Position,
}

/// `endpoints[].address`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointAddress {
    /// An address; IPv4-mapped and NAT64 forms turned into IPv4.
    Ip(IpAddr),
    /// A fully qualified name, lower case, without a trailing dot.
    Host(String),
    /// `unix://…`: never leaves the host.
    Unix(String),
    /// Absent: the endpoint is reached through its `network`'s gateway.
    Gateway,
}

/// `spec.exportTo`: the namespaces that see an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportTo {
    /// `*`, or absent.
    All,
    /// `.` and names; the entry's own namespace is spelled out.
    Namespaces(Vec<String>),
    /// `~`: nobody.
    Nobody,
}

/// `egress.filter/v1alpha1` `EgressPolicy`. An absent field (`None`) says nothing; see [`crate::compile`] for how
/// several policies combine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressPolicy {
    /// Namespace and name.
    pub object: ObjectName,
    /// Where the document begins.
    pub at: Position,
    /// Whom it can select at all.
    pub reach: Reach,
    /// `spec.workloads`: any of these; `None` selects every workload.
    pub workloads: Option<Vec<Selector>>,
    /// `spec.mode`.
    pub mode: Mode,
    /// `spec.services`: visible `ServiceEntry` objects the workloads may use.
    pub services: Option<Vec<ServiceRef>>,
    /// `spec.allow`.
    pub allow: Vec<Rule>,
    /// `spec.deny`; its peers are never hosts.
    pub deny: Vec<Rule>,
    /// `spec.defaultAction`.
    pub default_action: Option<DefaultAction>,
    /// `spec.loopback`.
    pub loopback: Option<Toggle>,
    /// `spec.dns.servers`.
    pub dns_servers: Option<DnsServers>,
    /// `spec.dns.queries`.
    pub dns_queries: Option<DnsQueries>,
    /// `spec.replies`.
    pub replies: Option<DefaultAction>,
    /// `spec.protocols`: sockets beyond TCP and UDP.
    pub protocols: Option<Vec<SocketProtocol>>,
    /// `spec.existing`.
    pub existing: Option<Existing>,
    /// `spec.refuseWith`.
    pub refuse_with: Option<RefuseWith>,
}

/// Whom a policy can select, whatever its selectors say. It depends on where the policy comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reach {
    /// Whomever its selectors select: it is a file, or an object of the root namespace.
    Anything,
    /// Pods of its own namespace: any other object of the Kubernetes API.
    Namespace,
}

/// `spec.mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Refuse what is not allowed.
    Enforce,
    /// Report what would be refused, refuse nothing.
    Audit,
}

/// One item of `spec.workloads`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Selector {
    /// Glob on the path below the cgroup2 mount, without a leading slash; `/` alone means the root cgroup's own
    /// tasks. Covers the children of what it matches.
    Cgroup(String),
    /// A systemd unit by name (globs allowed, as in `systemctl`).
    Unit(String),
    /// Pods by label.
    Pod(PodSelector),
    /// A user of the initial user namespace.
    User(User),
}

/// `pod: …` of a selector.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct PodSelector {
    /// Every label must be there with this value.
    pub match_labels: BTreeMap<String, String>,
    /// `matchExpressions`, every one must hold.
    pub match_expressions: Vec<LabelRequirement>,
    /// `namespaces`: only of these, when given.
    pub namespaces: Option<Vec<String>>,
    /// `namespaceLabels`: only of namespaces with these labels.
    pub namespace_labels: Option<BTreeMap<String, String>>,
}

/// `matchExpressions[]`, as Kubernetes reads them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LabelRequirement {
    /// The label.
    pub key: String,
    /// What must hold of it.
    pub operator: LabelOperator,
    /// For `In` and `NotIn`.
    pub values: Vec<String>,
}

/// Operators of Kubernetes label selectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LabelOperator {
    /// The value is one of these.
    In,
    /// The label is absent or its value none of these.
    NotIn,
    /// The label is there.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

/// `user: …` of a selector.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum User {
    /// By number.
    Uid(u32),
    /// By name, looked up in `/etc/passwd`.
    Name(String),
}

/// `./*`, `./name`, `namespace/*`, `namespace/name`, `*/*` of `spec.services`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRef {
    /// Whose entries.
    pub namespace: NamespaceRef,
    /// One entry, or all (`*`).
    pub name: Option<String>,
    /// Where the list item is.
    pub at: Position,
}

/// The namespace part of a [`ServiceRef`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamespaceRef {
    /// `.`: the workload's namespace.
    Own,
    /// `*`: every namespace.
    Any,
    /// This one.
    Named(String),
}

/// One item of `spec.allow` or `spec.deny`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// `to`; `None` means every address.
    pub to: Option<Vec<Peer>>,
    /// `ports`; `None` means every TCP and UDP port.
    pub ports: Option<Vec<PortRange>>,
    /// Where the list item begins.
    pub at: Position,
}

/// One item of `to`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Addresses of `cidr` that are in none of `except`.
    Cidr {
        /// Host bits masked, IPv4-mapped and NAT64 forms turned into IPv4.
        cidr: IpNet,
        /// Each within `cidr`.
        except: Vec<IpNet>,
    },
    /// Addresses of a name.
    Host(HostPattern),
}

/// One item of `ports`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    /// `None` is `Any`: TCP and UDP.
    pub l4: Option<L4>,
    /// First port; `0..=65535` when the document names none.
    pub low: u16,
    /// Last port, inclusive.
    pub high: u16,
}

/// `spec.defaultAction`, and `spec.replies`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefaultAction {
    /// Refuse.
    Deny,
    /// Let through.
    Allow,
}

/// `spec.loopback`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toggle {
    /// Reachable.
    Allow,
    /// Not reachable by this rule.
    None,
}

/// `spec.dns.servers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DnsServers {
    /// The resolvers of the system.
    System,
    /// None.
    None,
    /// These.
    List(Vec<IpAddr>),
}

/// `spec.dns.queries`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsQueries {
    /// Any name may be asked.
    Any,
    /// Only names that a policy allows.
    Named,
}

/// `spec.protocols[]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SocketProtocol {
    /// Ping sockets.
    Icmp,
    /// SCTP.
    Sctp,
    /// UDP-Lite.
    UdpLite,
    /// Raw sockets of any protocol of IP.
    Raw,
    /// Sockets of `AF_PACKET`.
    Packet,
    /// Sockets of `AF_VSOCK`.
    Vsock,
}

/// `spec.existing`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Leave live connections alone.
    Keep,
    /// End those the policy forbids.
    Terminate,
}

/// `spec.refuseWith`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefuseWith {
    /// `EPERM`.
    Eperm,
    /// `ECONNREFUSED`.
    Econnrefused,
    /// `EHOSTUNREACH`.
    Ehostunreach,
}

/// A rule's identity: the same object in every event, verdict, log line and document.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleName {
    /// A statement of a document.
    Document {
        /// The document.
        object: ObjectName,
        /// Path of the statement below `spec`: `ports[0]`, `allow[2]`.
        path: Arc<str>,
        /// Where the statement begins.
        at: Position,
    },
    /// `loopback`, `dns`, `internal`, `replies`, `agent`, `default`.
    Builtin(&'static str),
}

impl Serialize for RuleName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shape<'a> {
            kind: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            namespace: Option<&'a str>,
            name: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            path: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            file: Option<std::borrow::Cow<'a, str>>,
            #[serde(skip_serializing_if = "Option::is_none")]
            line: Option<u32>,
        }
        match self {
            Self::Document { object, path, at } => Shape {
                kind: object.kind.as_str(),
                namespace: Some(&object.namespace),
                name: &object.name,
                path: Some(path),
                // JSON has no other bytes than text; a file name may.
                file: at.is_somewhere().then(|| at.file.to_string_lossy()),
                line: at.is_somewhere().then_some(at.line),
            },
            Self::Builtin(name) => Shape { kind: "builtin", namespace: None, name, path: None, file: None, line: None },
        }
        .serialize(serializer)
    }
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Document { object, path, .. } => write!(f, "{object} {path}"),
            Self::Builtin(name) => write!(f, "builtin/{name}"),
        }
    }
}
