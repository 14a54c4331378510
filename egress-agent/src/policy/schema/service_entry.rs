//! The shape of a `ServiceEntry`.

use super::{
    ANY_TEXT, CIDR, LABEL, LABELS, List, Map, Object, PORT, Range, Shape, Text, any, metadata::METADATA, object,
    optional, required, some, text, words,
};
use crate::policy::{Location, Resolution, service_entry::Family};

/// Values of `spec.location`, in the order of their numbers.
pub const LOCATIONS: [(&str, Location); 2] =
    [("MESH_EXTERNAL", Location::MeshExternal), ("MESH_INTERNAL", Location::MeshInternal)];
/// Values of `spec.resolution`, in the order of their numbers.
pub const RESOLUTIONS: [(&str, Resolution); 5] = [
    ("NONE", Resolution::None),
    ("STATIC", Resolution::Static),
    ("DNS", Resolution::Dns),
    ("DNS_ROUND_ROBIN", Resolution::DnsRoundRobin),
    ("DYNAMIC_DNS", Resolution::DynamicDns),
];
/// The protocols that Istio parses: as it spells them, as the model does, and what they are.
pub(in crate::policy) const PROTOCOLS: [(&str, (&str, Family)); 12] = [
    ("TCP", ("TCP", Family::Tcp)),
    ("UDP", ("UDP", Family::Udp)),
    ("TLS", ("TLS", Family::Tls)),
    ("HTTP", ("HTTP", Family::Http)),
    ("HTTP2", ("HTTP2", Family::Http)),
    ("HTTPS", ("HTTPS", Family::Tls)),
    ("HTTP_PROXY", ("HTTP_PROXY", Family::Http)),
    ("GRPC", ("GRPC", Family::Http)),
    ("GRPC-Web", ("GRPC-WEB", Family::Http)),
    ("Mongo", ("MONGO", Family::Tcp)),
    ("MySQL", ("MYSQL", Family::Tcp)),
    ("Redis", ("REDIS", Family::Tcp)),
];

/// The document.
pub static OBJECT: Object = object(
    "Istio ServiceEntry: destinations outside, with their ports. What it names may be reached.",
    &[
        required(
            "apiVersion",
            Shape::Keyword(&["networking.istio.io/v1", "networking.istio.io/v1beta1", "networking.istio.io/v1alpha3"]),
            "Istio's networking group, in one of its three versions.",
        ),
        required("kind", Shape::Keyword(&["ServiceEntry"]), "The kind of document."),
        required("metadata", Shape::Object(&METADATA), "What identifies the document."),
        required("spec", Shape::Object(&SPEC), "The destinations."),
        optional("status", Shape::Opaque, "Written by Istio. `status.addresses` are read as `spec.addresses` are."),
    ],
);

/// `spec`.
pub static SPEC: Object = object(
    "The destinations.",
    &[
        required(
            "hosts",
            Shape::List(&HOSTS),
            "DNS names of the service, `*` at most as the first label. They are looked up for the resolutions by DNS.",
        ),
        optional(
            "addresses",
            Shape::List(&ADDRESSES),
            "IP addresses and CIDR prefixes of the service, open on each port of `ports`. Prefixes go with resolution \
             NONE or STATIC.",
        ),
        optional("ports", Shape::List(&PORTS), "Ports of the service. Without any, nothing is opened."),
        optional(
            "location",
            Shape::Keyword(&words(&LOCATIONS)),
            "Outside of the mesh or part of it. It changes nothing at layer 4. Default: MESH_EXTERNAL.",
        ),
        optional(
            "resolution",
            Shape::Keyword(&words(&RESOLUTIONS)),
            "Where the addresses come from: what the client dials (NONE), endpoints (STATIC), or DNS. Default: NONE.",
        ),
        optional(
            "endpoints",
            Shape::List(&ENDPOINTS),
            "Where the service is served: for resolution STATIC, DNS, DNS_ROUND_ROBIN. Not beside `workloadSelector`.",
        ),
        optional(
            "workloadSelector",
            Shape::Object(&WORKLOAD_SELECTOR),
            "The pods that serve the service. Only the Kubernetes API knows them; files open nothing for it.",
        ),
        optional(
            "exportTo",
            Shape::List(&EXPORT_TO),
            "Namespaces that see the entry: `*` for all, `.` for its own, `~` for none, or names. Default: all.",
        ),
        optional(
            "subjectAltNames",
            Shape::List(&SUBJECT_ALT_NAMES),
            "Names in the certificates of the service. A filter at layer 4 does not verify them.",
        ),
    ],
);

/// `spec.hosts`.
pub static HOSTS: List = some(Shape::Text(&HOST), 256);
static HOST: Text = text(1, 255, r"^\*?[A-Za-z0-9.-]+$");
/// `spec.addresses`.
pub static ADDRESSES: List = any(Shape::Text(&CIDR), 256);
/// `spec.ports`.
pub static PORTS: List = any(Shape::Object(&SERVICE_PORT), 256);
/// `spec.endpoints`.
pub static ENDPOINTS: List = any(Shape::Object(&ENDPOINT), 4096);
static EXPORT_TO: List = any(Shape::Text(&EXPORT), 256);
static EXPORT: Text = text(1, 63, r"^([*.~]|[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)$");
static SUBJECT_ALT_NAMES: List = any(Shape::Text(&ANY_TEXT), 4096);

/// `spec.ports[]`.
pub static SERVICE_PORT: Object = object(
    "A port of the service.",
    &[
        required("number", Shape::Integer(PORT), "The port that clients dial; each number once."),
        optional(
            "protocol",
            Shape::AnyCase(&words(&PROTOCOLS)),
            "UDP opens UDP, everything else opens TCP. Default: TCP.",
        ),
        required(
            "name",
            Shape::Text(&LABEL),
            "A name for the port, unique in its entry, by which endpoints refer to it.",
        ),
        optional(
            "targetPort",
            Shape::Integer(PORT),
            "The port of endpoints that do not map this port themselves. Default: `number`.",
        ),
    ],
);

/// `spec.endpoints[]`.
pub static ENDPOINT: Object = object(
    "Where the service is served.",
    &[
        optional(
            "address",
            Shape::Text(&ENDPOINT_ADDRESS),
            "An IP address, a host name (resolution DNS), or `unix://` and the path of a socket (resolution STATIC).",
        ),
        optional(
            "ports",
            Shape::Map(&ENDPOINT_PORTS),
            "The endpoint's own ports, by the names of the service's ports.",
        ),
        optional("labels", Shape::Map(&LABELS), "Labels of the endpoint. They change nothing at layer 4."),
        optional(
            "network",
            TEXT,
            "The network of the endpoint; with resolution STATIC it can stand in place of an address.",
        ),
        optional("locality", TEXT, "Where the endpoint is. It changes nothing at layer 4."),
        optional("weight", Shape::Integer(WEIGHT), "The share of requests. It changes nothing at layer 4."),
        optional("serviceAccount", TEXT, "The account of the endpoint. It changes nothing at layer 4."),
    ],
);

const TEXT: Shape = Shape::Text(&ANY_TEXT);
const WEIGHT: Range = Range { low: 0, high: u32::MAX as i64 };
static ENDPOINT_ADDRESS: Text = Text { least: 0, most: None, pattern: Some(r"^(unix://.+|[A-Za-z0-9.:-]*)$") };
static ENDPOINT_PORTS: Map = Map { keys: &LABEL, values: Shape::Integer(PORT), api_limit: 128 };

/// `spec.workloadSelector`.
pub static WORKLOAD_SELECTOR: Object = object(
    "Pods by label.",
    &[optional(
        "labels",
        Shape::Map(&SELECTED),
        "Every one of these labels must be there with this value; they are compared literally.",
    )],
);

static SELECTED: Map =
    Map { keys: &text(1, 317, r"^[^*]+$"), values: Shape::Text(&text(0, 63, r"^[^*]*$")), api_limit: 256 };
