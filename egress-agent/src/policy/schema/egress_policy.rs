//! The shape of an `EgressPolicy`.

use super::{
    ADDRESS, CIDR, Field, LABEL_KEY, LABEL_VALUE, LABELS, List, NAMESPACE, Object, PORT, Range, Rule, Shape, Text, any,
    metadata::METADATA, object, optional, required, some, text, words,
};
use crate::policy::{DefaultAction, DnsQueries, Existing, L4, LabelOperator, Mode, RefuseWith, SocketProtocol, Toggle};

/// Values of `spec.mode`.
pub const MODES: [(&str, Mode); 2] = [("Enforce", Mode::Enforce), ("Audit", Mode::Audit)];
/// Values of `spec.defaultAction` and `spec.replies`.
pub const ACTIONS: [(&str, DefaultAction); 2] = [("Deny", DefaultAction::Deny), ("Allow", DefaultAction::Allow)];
/// Values of `spec.loopback`.
pub const TOGGLES: [(&str, Toggle); 2] = [("Allow", Toggle::Allow), ("None", Toggle::None)];
/// Values of `spec.dns.queries`.
pub const QUERIES: [(&str, DnsQueries); 2] = [("Any", DnsQueries::Any), ("Named", DnsQueries::Named)];
/// Values of `spec.existing`.
pub const EXISTING: [(&str, Existing); 2] = [("Keep", Existing::Keep), ("Terminate", Existing::Terminate)];
/// Values of `spec.refuseWith`.
pub const REFUSALS: [(&str, RefuseWith); 3] = [
    ("EPERM", RefuseWith::Eperm),
    ("ECONNREFUSED", RefuseWith::Econnrefused),
    ("EHOSTUNREACH", RefuseWith::Ehostunreach),
];
/// Values of `spec.protocols`.
pub const SOCKETS: [(&str, SocketProtocol); 6] = [
    ("ICMP", SocketProtocol::Icmp),
    ("SCTP", SocketProtocol::Sctp),
    ("UDPLite", SocketProtocol::UdpLite),
    ("RAW", SocketProtocol::Raw),
    ("PACKET", SocketProtocol::Packet),
    ("VSOCK", SocketProtocol::Vsock),
];
/// Values of `protocol` of a port; `None` is TCP and UDP.
pub const PROTOCOLS: [(&str, Option<L4>); 3] = [("TCP", Some(L4::Tcp)), ("UDP", Some(L4::Udp)), ("Any", None)];
/// Values of `operator` of a label requirement.
pub const OPERATORS: [(&str, LabelOperator); 4] = [
    ("In", LabelOperator::In),
    ("NotIn", LabelOperator::NotIn),
    ("Exists", LabelOperator::Exists),
    ("DoesNotExist", LabelOperator::DoesNotExist),
];

/// The document.
pub static OBJECT: Object = object(
    "EgressPolicy: which workloads may open connections, and to where. An absent field says nothing: the default holds \
     only where no policy of a workload speaks.",
    &[
        required("apiVersion", Shape::Keyword(&["egress.filter/v1alpha1"]), "The group and its version."),
        required("kind", Shape::Keyword(&["EgressPolicy"]), "The kind of document."),
        required("metadata", Shape::Object(&METADATA), "What identifies the document."),
        required("spec", Shape::Object(&SPEC), "What the policy says."),
        optional("status", Shape::Opaque, "Written by the agent; not read."),
    ],
);

/// `spec`.
pub static SPEC: Object = object(
    "What the policy says.",
    &[
        optional(
            "workloads",
            Shape::List(&WORKLOADS),
            "Whom the policy is for: each workload that any item selects. Default: every workload; from the Kubernetes \
             API, every pod of the policy's namespace.",
        ),
        optional(
            "mode",
            Shape::Keyword(&words(&MODES)),
            "Enforce refuses what is not allowed. Audit only reports what it would refuse. Default: Enforce.",
        ),
        optional(
            "services",
            Shape::List(&SERVICES),
            "ServiceEntries that the workloads may use, of those they see: `./name`, `./*`, `namespace/name`, \
             `namespace/*`, `*/*`. An empty list is none. Default: `*/*`.",
        ),
        optional(
            "allow",
            Shape::List(&ALLOW),
            "Destinations that are allowed, beside the services. Items are alternatives.",
        ),
        optional("deny", Shape::List(&DENY), "Destinations that are refused, whatever allows them."),
        optional("defaultAction", Shape::Keyword(&words(&ACTIONS)), "What holds where no rule does. Default: Deny."),
        optional(
            "loopback",
            Shape::Keyword(&words(&TOGGLES)),
            "Whether the host itself can be reached: 127.0.0.0/8, ::1, 0.0.0.0 and ::. Default: Allow.",
        ),
        optional("dns", Shape::Object(&DNS), "Which DNS servers can be asked, and for what."),
        optional(
            "replies",
            Shape::Keyword(&words(&ACTIONS)),
            "Whether a socket may send UDP datagrams back to a peer it has received from. Default: Allow.",
        ),
        optional(
            "protocols",
            Shape::List(&SOCKET_PROTOCOLS),
            "Sockets beyond TCP and UDP that may be made, each once. Default: none.",
        ),
        optional(
            "existing",
            Shape::Keyword(&words(&EXISTING)),
            "What becomes of live connections that the policy forbids. Default: Keep.",
        ),
        optional("refuseWith", Shape::Keyword(&words(&REFUSALS)), "The error of a refused call. Default: EPERM."),
    ],
);

static WORKLOADS: List = some(Shape::Object(&SELECTOR), 256);
static SERVICES: List = any(Shape::Text(&SERVICE_REF), 1024);
static SERVICE_REF: Text =
    text(3, 317, r"^(\*/\*|(\.|[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)/(\*|[a-z0-9]([a-z0-9.-]*[a-z0-9])?))$");
static ALLOW: List = any(Shape::Object(&ALLOW_RULE), 256);
static DENY: List = any(Shape::Object(&DENY_RULE), 256);
static SOCKET_PROTOCOLS: List =
    List { items: Shape::Keyword(&words(&SOCKETS)), least: 0, api_limit: 4, distinct: true };

/// `spec.workloads[]`.
pub static SELECTOR: Object = Object {
    doc: "A selection of workloads, by exactly one thing.",
    fields: &[
        optional(
            "cgroup",
            Shape::Text(&CGROUP),
            "Path below the cgroup2 mount; covers its children. `*` and `?` stay within a part, `**` is any number of \
             parts, `/` alone means the tasks of the root cgroup itself.",
        ),
        optional(
            "unit",
            Shape::Text(&UNIT),
            "Full name of a systemd service, scope or slice; `*` and `?` are wildcards.",
        ),
        optional("pod", Shape::Object(&POD), "Pods by label."),
        optional("user", Shape::IntegerOrText(UID, &USER), "A user by name of /etc/passwd, or by uid."),
    ],
    rules: &[Rule::ExactlyOne(&["cgroup", "unit", "pod", "user"])],
};

/// No path of the kernel is longer.
static CGROUP: Text = text(1, 4096, r"^[^\[\]{}]+$");
static UNIT: Text = text(1, 255, r"^[A-Za-z0-9:_.\\@*?-]*([A-Za-z0-9:_.\\@*?-](\.service|\.scope|\.slice)|\*)$");
static USER: Text = text(1, 256, r"^[A-Za-z0-9._$@+][A-Za-z0-9._$@+-]*$");
/// 4294967295 is -1, which no process can have.
const UID: Range = Range { low: 0, high: u32::MAX as i64 - 1 };

/// `spec.workloads[].pod`.
pub static POD: Object = object(
    "Pods for which all of this holds. Without fields: every pod.",
    &[
        optional("matchLabels", Shape::Map(&LABELS), "Every label must be there with this value."),
        optional("matchExpressions", Shape::List(&REQUIREMENTS), "Every requirement must hold."),
        optional(
            "namespaces",
            Shape::List(&NAMESPACES),
            "Only pods of these namespaces. Only for files and the root namespace. Default: every namespace.",
        ),
        optional(
            "namespaceLabels",
            Shape::Map(&LABELS),
            "Only pods of namespaces with these labels. Only for files and the root namespace.",
        ),
    ],
);

static REQUIREMENTS: List = any(Shape::Object(&REQUIREMENT), 64);
static NAMESPACES: List = some(Shape::Text(&NAMESPACE), 256);

/// `spec.workloads[].pod.matchExpressions[]`.
pub static REQUIREMENT: Object = object(
    "A requirement on one label.",
    &[
        required("key", Shape::Text(&LABEL_KEY), "The label."),
        required("operator", Shape::Keyword(&words(&OPERATORS)), "What must hold of it."),
        optional("values", Shape::List(&VALUES), "What In and NotIn compare with; the other operators have none."),
    ],
);

static VALUES: List = any(Shape::Text(&LABEL_VALUE), 256);

/// `spec.allow[]`.
pub static ALLOW_RULE: Object = object(
    "A destination and its ports.",
    &[
        optional("to", Shape::List(&ALLOW_TO), "Where to; items are alternatives. Default: every address."),
        optional(
            "ports",
            Shape::List(&PORTS),
            "Which ports; items are alternatives. Default: every port of TCP and UDP.",
        ),
    ],
);

/// `spec.deny[]`.
pub static DENY_RULE: Object = object(
    "A destination and its ports.",
    &[
        optional("to", Shape::List(&DENY_TO), "Where to; items are alternatives. Default: every address."),
        optional(
            "ports",
            Shape::List(&PORTS),
            "Which ports; items are alternatives. Default: every port of TCP and UDP.",
        ),
    ],
);

static ALLOW_TO: List = some(Shape::Object(&ALLOW_PEER), 1024);
static DENY_TO: List = some(Shape::Object(&DENY_PEER), 1024);
static PORTS: List = some(Shape::Object(&PORT_RANGE), 256);

/// `spec.allow[].to[]`.
pub static ALLOW_PEER: Object = Object {
    doc: "A destination: exactly one of a prefix and a name.",
    fields: PEER,
    rules: &[Rule::ExactlyOne(&["cidr", "host"]), Rule::Needs("except", "cidr")],
};

/// `spec.deny[].to[]`.
pub static DENY_PEER: Object = Object {
    doc: "A destination: a prefix.",
    fields: PEER,
    rules: &[
        Rule::Without("host", "an address is shared by many names, so a deny by name would not do what it says"),
        Rule::ExactlyOne(&["cidr", "host"]),
    ],
};

const PEER: &[Field] = &[
    optional("cidr", Shape::Text(&CIDR), "An IPv4 or IPv6 prefix, or an address. Host bits are masked."),
    optional("except", Shape::List(&EXCEPT), "Prefixes within `cidr` that this item does not name."),
    optional("host", Shape::Text(&HOST), "A DNS name, or `*.` and a name for all names below it. Only in `allow`."),
];

static EXCEPT: List = any(Shape::Text(&CIDR), 1024);
static HOST: Text = text(1, 255, r"^(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\.?$");

/// `spec.allow[].ports[]` and `spec.deny[].ports[]`.
pub static PORT_RANGE: Object = Object {
    doc: "A port or a range of ports.",
    fields: &[
        optional("port", Shape::Integer(PORT), "A port, or the first of a range. Default: every port of `protocol`."),
        optional("endPort", Shape::Integer(PORT), "The last port of a range, not below `port`. Default: `port`."),
        optional("protocol", Shape::Keyword(&words(&PROTOCOLS)), "Any is TCP and UDP. Default: TCP."),
    ],
    rules: &[Rule::NotEmpty, Rule::Needs("endPort", "port"), Rule::NotBelow("endPort", "port")],
};

/// `spec.dns`.
pub static DNS: Object = object(
    "Which DNS servers can be asked, and for what.",
    &[
        optional(
            "servers",
            Shape::KeywordOrList(&SERVER_SETS, &SERVERS),
            "System for the resolvers of the system, None, or IP addresses. Their port is 53. Default: System.",
        ),
        optional(
            "queries",
            Shape::Keyword(&words(&QUERIES)),
            "Named refuses questions for names that no policy allows. Default: Any.",
        ),
    ],
);

/// Values of `spec.dns.servers` that are words.
pub const SERVER_SETS: [&str; 2] = ["System", "None"];
static SERVERS: List = some(Shape::Text(&ADDRESS), 64);
