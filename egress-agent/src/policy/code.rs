//! The stable codes of findings: what each is about, in a sentence and in a paragraph.
//!
//! A code that was published is never given another meaning. `E00` is about files, YAML and objects, `E01` about
//! `ServiceEntry`, `E02` about `EgressPolicy`; `W` codes are warnings and `N` codes notes, numbered the same way.

use std::fmt;

use serde::{Serialize, Serializer};

use super::diagnostic::Severity;

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $title:literal;)+) => {
        /// What a finding is about.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Code {
            /// Every code, in the order of the reference.
            pub const ALL: &[Self] = &[$(Self::$name,)+];

            /// The code itself, as `E0107`.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $code,)+ }
            }

            /// What it is about, in a few words.
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)+ }
            }

            /// What it means and what to do, for the reference.
            pub const fn explanation(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc, "\n",)+),)+ }
            }
        }
    };
}

codes! {
    /// Files of up to 64 MiB are read, up to 256 MiB in one load. Split what is larger into several files.
    FileTooLarge = "E0001", "a file is larger than what is read";
    /// Policy files are UTF-8 text, with or without a byte order mark. Convert the file, for example with `iconv -t utf-8`.
    NotUtf8 = "E0002", "a file is not UTF-8 text";
    /// The text is not YAML, or not JSON in a `.json` file. The documents of the file before and after the broken one
    /// are read all the same.
    Syntax = "E0003", "a file is not YAML or JSON";
    /// A mapping names the same key twice. Which of the two wins differs from reader to reader, so neither is taken.
    DuplicateKey = "E0004", "a key is given twice";
    /// Documents are bounded: 64 levels of nesting, 8,000,000 values, 250,000 values by way of aliases, and 2 MiB for
    /// a single value, comment or flow collection (`[…]`, `{…}`) in YAML.
    TooComplex = "E0005", "a document is beyond the bounds of what is read";
    /// An alias (`*name`) may only point back at a complete value with that anchor (`&name`).
    BadAlias = "E0006", "an alias points at nothing, or into itself";
    /// Tags (`!name`) change what a value means. Only `!!str`, `!!seq` and `!!map` are read; leave out the others.
    UnsupportedTag = "E0007", "a tag that is not read";
    /// Keys of policy documents are plain names. A key that is a list, a mapping, or `true` is most often an unrendered
    /// template (`{{ … }}`) or a word that YAML 1.1 takes for a boolean.
    BadKey = "E0008", "a key that is not a name";
    /// A document is a mapping with `apiVersion`, `kind`, `metadata` and `spec`.
    NotAnObject = "E0010", "a document is not an object";
    /// `apiVersion` and `kind` say what a document is. Without both it is not known how to read it.
    NoKind = "E0011", "apiVersion or kind is missing";
    /// The groups `networking.istio.io` and `egress.filter` are read strictly: an unknown kind there is a spelling
    /// mistake, and what it was meant to say would be missing. The same holds for `ServiceEntry` and `EgressPolicy` in
    /// another group.
    UnknownKind = "E0012", "an unknown kind";
    /// `ServiceEntry` is read in the versions `v1`, `v1beta1` and `v1alpha3`, `EgressPolicy` in `v1alpha1`.
    UnknownVersion = "E0013", "an unknown version";
    /// `metadata.name` identifies a document in verdicts, logs and metrics. Kubernetes' rules hold: at most 253 lower
    /// case letters, digits, `-` and `.`, starting and ending with a letter or digit.
    BadName = "E0014", "metadata.name is missing or not a name";
    /// `metadata.namespace` follows Kubernetes' rules: at most 63 lower case letters, digits and `-`, starting and
    /// ending with a letter or digit. A missing namespace means `default`.
    BadNamespace = "E0015", "metadata.namespace is not a name";
    /// Kind, namespace and name identify a document. Two with the same three would each claim to be the rule that a
    /// verdict names.
    DuplicateObject = "E0016", "two documents with the same name";
    /// A field that does not exist would be ignored, and the policy would not say what its author meant.
    UnknownField = "E0017", "an unknown field";
    /// A value has the wrong type. YAML reads `yes`, `on`, `1.0`, `0x50` and `001:db8::` as something else than text:
    /// put such values in quotes where text is meant.
    WrongType = "E0018", "a value of the wrong type";
    /// A field that the document cannot do without.
    MissingField = "E0019", "a required field is missing";
    /// The daemon reads only files that nobody but root can change, in directories of which the same holds: whoever
    /// can write a policy can open any destination.
    UnsafeOwner = "E0020", "others than root can change a policy file";
    /// A file below a policy directory cannot be read. The other files are read all the same.
    Unreadable = "E0021", "a file cannot be read";
    /// Numbers are written in decimal digits. `0777`, `0x50`, `3_306` and `33e2` mean different numbers to different
    /// readers of YAML.
    OddNumber = "E0022", "a number in a notation that readers disagree about";
    /// Only the first 1,000 errors of a file are listed.
    TooManyErrors = "E0023", "too many errors";

    /// `spec.hosts` names the service and is required.
    NoHosts = "E0101", "a ServiceEntry without hosts";
    /// Hosts are DNS names, at most 255 characters, with `*` at most as the whole first label. IP addresses belong in
    /// `addresses`, and a bare `*` is not a service.
    BadHost = "E0102", "a host that is not a DNS name";
    /// Addresses are IPv4 or IPv6 addresses or CIDR prefixes, without a zone.
    BadAddress = "E0103", "an address that is neither an IP address nor a CIDR";
    /// A prefix is not one server: Istio takes CIDR addresses only with resolution `NONE` or `STATIC`.
    CidrNeedsNoneOrStatic = "E0104", "a CIDR address with a resolution by DNS";
    /// Port names are DNS labels (letters, digits and `-`, at most 63 characters) and unique in their entry.
    BadPortName = "E0105", "a port name that is missing, malformed or taken";
    /// An entry names each port number once.
    DuplicatePortNumber = "E0106", "a port number is given twice";
    /// Port numbers are 1 to 65535.
    BadPortNumber = "E0107", "a port number out of range";
    /// Istio knows TCP, UDP, TLS, HTTP, HTTP2, HTTPS, `HTTP_PROXY`, GRPC, GRPC-Web, Mongo, MySQL and Redis, in any case.
    UnknownProtocol = "E0108", "an unknown protocol";
    /// `targetPort` is the port of the endpoints, 1 to 65535.
    BadTargetPort = "E0109", "a targetPort out of range";
    /// With resolution `NONE` a connection goes where the client dialled, so endpoints have no meaning.
    EndpointsWithNone = "E0110", "endpoints with resolution NONE";
    /// An endpoint is an IP address, a fully qualified name (resolution `DNS`), a `unix://` path (resolution `STATIC`),
    /// or has a `network` in place of an address (resolution `STATIC`).
    BadEndpointAddress = "E0111", "an endpoint without a usable address";
    /// With resolution `STATIC` nothing is looked up, so every endpoint is an IP address.
    StaticEndpointHost = "E0112", "a host name as endpoint of resolution STATIC";
    /// A `unix://` endpoint has an absolute path to a file or an abstract `@name`, no ports of its own, and is only
    /// possible for an entry with exactly one port.
    BadUnixEndpoint = "E0113", "a malformed unix endpoint";
    /// The keys of an endpoint's `ports` are names of the entry's ports, the values are 1 to 65535.
    BadEndpointPort = "E0114", "an endpoint port that fits no service port";
    /// Either the endpoints are listed, or they are selected.
    EndpointsAndSelector = "E0115", "endpoints beside a workloadSelector";
    /// The labels of `workloadSelector` are compared literally: no wildcards, no empty keys.
    BadWorkloadSelector = "E0116", "a workloadSelector that can select nothing";
    /// Without endpoints, resolution `DNS` and `DNS_ROUND_ROBIN` look the hosts up, so each must be a full name.
    DnsNeedsFullHost = "E0117", "a wildcard host that would have to be looked up";
    /// `DNS_ROUND_ROBIN` takes the first address of one name.
    RoundRobinEndpoints = "E0118", "several endpoints with DNS_ROUND_ROBIN";
    /// `DYNAMIC_DNS` takes the name from each request: its hosts are wildcards, it has neither addresses nor
    /// endpoints, its ports are HTTP, HTTP2, GRPC or TLS, and `MESH_INTERNAL` excludes a waypoint.
    BadDynamicDns = "E0119", "a field that DYNAMIC_DNS does not allow";
    /// Only HTTP and TLS tell several hosts of one entry apart. For other protocols write one entry for each host, or
    /// use resolution `NONE`.
    HostsIndistinguishable = "E0120", "several hosts on a port that cannot tell them apart";
    /// `exportTo` is `*`, or `~`, or a list of namespaces in which `.` stands for the entry's own, each once.
    BadExportTo = "E0121", "an exportTo that contradicts itself";
    /// `location` is `MESH_EXTERNAL` or `MESH_INTERNAL`; `resolution` is `NONE`, `STATIC`, `DNS`, `DNS_ROUND_ROBIN` or
    /// `DYNAMIC_DNS`.
    UnknownServiceEnum = "E0122", "an unknown value of location or resolution";
    /// Labels follow Kubernetes' rules.
    BadEndpointLabel = "E0123", "a malformed endpoint label";

    /// A field of an `EgressPolicy` has one of a few values.
    UnknownValue = "E0201", "an unknown value";
    /// Each item of `workloads` is exactly one of `cgroup`, `unit`, `pod` and `user`.
    BadSelector = "E0202", "a workload selector that is not exactly one thing";
    /// `cgroup` is a path below the cgroup2 mount; `*` and `?` stay within a component, `**` is any number of components.
    BadCgroup = "E0203", "a malformed cgroup path";
    /// `unit` is the full name of a systemd unit, as `nginx.service`; `*` and `?` are wildcards.
    BadUnit = "E0204", "a malformed unit name";
    /// `user` is a name of `/etc/passwd` or a uid below 4294967295.
    BadUser = "E0205", "neither a user name nor a uid";
    /// Label selectors follow Kubernetes' rules.
    BadLabelSelector = "E0206", "a malformed label selector";
    /// `services` holds `namespace/name`, `namespace/*`, `./name`, `./*` and `*/*`.
    BadServiceRef = "E0207", "a malformed service reference";
    /// An absent list means everything, an empty one could be read as everything or as nothing. Leave the field out,
    /// or the rule.
    AmbiguousEmptyList = "E0208", "an empty list that could mean all or nothing";
    /// Each item of `to` is either a `cidr` or a `host`.
    BadPeer = "E0209", "a destination that is not exactly one thing";
    /// A `cidr` is an IPv4 or IPv6 prefix, or an address.
    BadCidr = "E0210", "a malformed cidr";
    /// `except` takes addresses out of its own `cidr`, so each of its prefixes lies within that.
    ExceptOutside = "E0211", "an except outside of its cidr";
    /// An address is shared by many names, so a deny by name would not do what it says.
    HostInDeny = "E0212", "a deny by host name";
    /// A `host` is a DNS name, or `*.` and a DNS name.
    BadPeerHost = "E0213", "a host that is not a DNS name";
    /// `port` and `endPort` are 1 to 65535, `endPort` is not below `port` and not without it.
    BadPortRange = "E0214", "a malformed port range";
    /// `protocol` of a port is `TCP`, `UDP` or `Any`.
    UnknownL4 = "E0215", "a protocol without ports";
    /// `dns.servers` is `System`, `None`, or a list of IP addresses.
    BadDnsServers = "E0216", "malformed dns.servers";
    /// `protocols` lists `ICMP`, `SCTP`, `UDPLite`, `RAW`, `PACKET` and `VSOCK`, each once.
    BadSocketProtocol = "E0217", "a socket protocol that is unknown or given twice";
    /// `null` is what YAML makes of a field without a value. Leave the field out, or give it one.
    NullField = "E0218", "a field without a value";
    /// Who the pods of this node are is told by the Kubernetes API. Without `--kubernetes` a policy that selects pods is refused
    /// rather than enforced by half.
    UnknownPods = "E0290", "pods, and nobody who knows them";

    /// Host bits are masked: `10.0.0.5/8` is `10.0.0.0/8`, sixteen million addresses.
    HostBits = "W0001", "a prefix with host bits";
    /// Istio's file readers take `export_to` for `exportTo`, the Kubernetes API server drops it.
    SnakeCase = "W0002", "a field in the spelling of protocol buffers";
    /// Istio and Kubernetes read `field:` without a value as if it were absent.
    NullIsAbsent = "W0003", "a field without a value";
    /// A field of an object of the Kubernetes API that this version does not know. The definition in the cluster may be newer
    /// than the agent. In files, this is an error.
    IgnoredField = "W0004", "an unknown field is ignored";

    /// Istio warns of a host such as `*bar.com`: only `*.bar.com` is a wildcard everywhere.
    PartialWildcard = "W0101", "a wildcard that is part of a label";
    /// Istio warns: a `workloadSelector` without labels selects every workload of the namespace.
    EmptyWorkloadSelector = "W0102", "a workloadSelector without labels";
    /// Istio warns: with resolution `NONE` a `workloadSelector` is not looked at.
    SelectorWithNone = "W0103", "a workloadSelector with resolution NONE";
    /// Istio warns: without an address a TCP port is told from others by its number alone.
    TcpWithoutAddress = "W0104", "a TCP port without addresses";
    /// Istio warns: several hosts that share an address and a TCP port cannot be told apart.
    HostsShareAddress = "W0105", "several hosts share an address and a TCP port";
    /// Istio warns: an endpoint without an address is reached through the gateway of its network, which the policy
    /// does not name. Nothing is opened for it.
    EndpointWithoutAddress = "W0106", "an endpoint without an address";

    /// `0.0.0.0/0` and `::/0` open every address of their family, for the ports of the entry.
    EntryOpensAny = "W0107", "a ServiceEntry that opens every address";
    /// `subjectAltNames` are checked by a proxy that terminates TLS. A filter at layer 4 sees addresses and ports only.
    SanNotVerified = "W0108", "subjectAltNames that nothing verifies";
    /// The entry has no port.
    OpensNothing = "W0109", "a ServiceEntry that opens nothing";
    /// Two entries describe the same host in different ways. What the host's clients may reach is the union of both.
    EntriesDisagree = "W0110", "two entries disagree about a host";
    /// A policy limits its workloads to some services, so it is expected that namespaces are kept apart; this entry is
    /// exported to all of them and usable by every workload that no such policy selects.
    ExportedToAll = "W0111", "an entry is exported to all while policies keep namespaces apart";
    /// With `check --resolve`: the names of the entry were looked up, and none of them has an address now.
    DoesNotResolve = "W0112", "no name of an entry resolves";

    /// A rule without `to`, with `0.0.0.0/0` or `::/0`, or `defaultAction: Allow`.
    AllowsAnyAddress = "W0201", "a rule that opens every address";
    /// A deny wins over every allow, so an allow that lies within a deny allows nothing.
    ShadowedRule = "W0202", "an allow within a deny";
    /// Another rule of the same list says all that this one says.
    RedundantRule = "W0203", "a rule within another";
    /// `services` names a `ServiceEntry` that is not there or that is not exported to the policy's namespace.
    DanglingService = "W0204", "a service reference to nothing";
    /// The metadata service of clouds (169.254.169.254, `fd00:ec2::254`) hands out credentials to whoever asks.
    MetadataReachable = "W0205", "the cloud's metadata service is reachable";
    /// Audit policies report and refuse nothing. Where no policy enforces, the node's default alone decides.
    AuditOnly = "W0206", "no policy enforces";
    /// A raw socket can send any packet, UDP and TCP to any destination included (`IP_HDRINCL`), and no hook sees where to.
    RawSockets = "W0208", "raw sockets, which go around every rule";

    /// Objects of other kinds carry no egress rules.
    Skipped = "N0001", "a document of another kind is skipped";
    /// Only the first 1,000 warnings and notes of a file are listed.
    TooManyNotes = "N0002", "too many warnings and notes";

    /// The endpoints are pods or `WorkloadEntry` objects, which only the Kubernetes API knows.
    SelectorNeedsApi = "N0101", "the endpoints of a workloadSelector are not in files";
    /// The Kubernetes API server refuses a `ServiceEntry` with more than 256 hosts, addresses or ports, or more than
    /// 4,096 endpoints. Files have no such limit here.
    BeyondApiLimit = "N0102", "more items than the Kubernetes API server accepts";
    /// The port speaks HTTP or TLS, so Istio tells hosts apart by the Host header or SNI. A filter at layer 4 opens the
    /// addresses of the host, and with them every other name that is served there.
    NameNotVerified = "N0103", "a host name that layer 4 cannot verify";
    /// What the entry opens are the addresses of its hosts, which are not looked up while documents are checked.
    NeedsLookup = "N0104", "an entry whose addresses come from DNS";
}

impl Code {
    /// How severe findings with this code are.
    pub const fn severity(self) -> Severity {
        match self.as_str().as_bytes()[0] {
            b'E' => Severity::Error,
            b'W' => Severity::Warning,
            _ => Severity::Note,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Code;

    #[test]
    fn codes_are_unique_well_formed_and_explained() {
        let mut seen = BTreeSet::new();
        for code in Code::ALL {
            let text = code.as_str();
            assert!(text.len() == 5 && text[1..].bytes().all(|b| b.is_ascii_digit()), "{text}");
            assert!("EWN".contains(&text[..1]), "{text}");
            assert!(seen.insert(text), "{text} is used twice");
            assert!(!code.title().is_empty() && code.explanation().trim().ends_with('.'), "{text}");
        }
    }
}
