//! Asks DNS servers, as resolv.conf(5) has it: in order, the next one if one does not answer.
//!
//! A server that stays silent comes last for a while, so that one that is down does not cost every question a time-out.
//! A single time-out, or an error such as SERVFAIL, is about the name and moves nothing: else one broken name could lead
//! all others to a server that knows less.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{DnsError, NetError, NoRecords, runtime::TokioRuntimeProvider},
    proto::rr::{Name, RData, Record, RecordType},
};
use tokio::time::{Instant, timeout};

use super::{
    ResolverError,
    ask::{Answer, Answers, Ask, Asking, Found},
};

/// So many questions in a row that a server did not answer make it silent: more than one name makes at a time.
const MISSES: u32 = 4;
/// How long a silent server comes last.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a name that does not exist is believed not to, if its zone does not say.
const ABSENCE: u32 = 30;
/// How many CNAME records are followed within a message.
const MOST_ALIASES: usize = 16;
/// Connections over TCP carry at most this many questions at a time.
const MOST_ACTIVE: usize = 256;

/// The servers.
pub(super) struct Dns(Arc<Servers>);

struct Servers {
    servers: Vec<Server>,
    start: Instant,
}

struct Server {
    resolver: TokioResolver,
    /// Questions in a row that it did not answer.
    missed: AtomicU32,
    /// Until when it comes last, in milliseconds since the start.
    silent_until: AtomicU64,
    limit: Duration,
}

/// Why a server did not say what was asked.
enum Failure {
    /// It said nothing.
    Silent(String),
    /// It said that it cannot.
    Said(String),
}

impl Dns {
    /// One query to one server may take `limit`.
    pub(super) fn new(servers: &[SocketAddr], limit: Duration) -> Result<Self, ResolverError> {
        let servers = servers.iter().map(|address| Server::new(*address, limit)).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(Servers { servers, start: Instant::now() })))
    }
}

impl Ask for Dns {
    fn ask(&self, name: Arc<str>) -> Asking {
        let servers = self.0.clone();
        Box::pin(async move {
            let Some(absolute) = absolute(&name) else { return Answers::failed("no name that DNS could know") };
            let ask = |kind| servers.ask(&absolute, kind);
            let (v4, v6) = tokio::join!(ask(RecordType::A), ask(RecordType::AAAA));
            Answers { v4, v6 }
        })
    }
}

/// A name that no search list applies to.
fn absolute(name: &str) -> Option<Name> {
    let mut name = Name::from_ascii(name).ok()?;
    name.set_fqdn(true);
    Some(name)
}

impl Servers {
    async fn ask(&self, name: &Name, kind: RecordType) -> Answer {
        let mut failure = "there is no server to ask".to_owned();
        for server in self.in_order() {
            match server.ask(name, kind).await {
                Ok(found) => {
                    server.heard();
                    return Ok(found);
                }
                Err(Failure::Said(error)) => {
                    server.heard();
                    failure = error;
                }
                Err(Failure::Silent(error)) => {
                    server.missed(self.start.elapsed());
                    failure = error;
                }
            }
        }
        Err(failure)
    }

    fn in_order(&self) -> Vec<&Server> {
        let now = milliseconds(self.start.elapsed());
        let mut servers: Vec<&Server> = self.servers.iter().collect();
        servers.sort_by_key(|server| server.silent_until.load(Ordering::Relaxed) > now);
        servers
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Server {
    fn new(address: SocketAddr, limit: Duration) -> Result<Self, ResolverError> {
        let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
            connection.port = address.port();
            connection
        });
        let server = NameServerConfig::new(address.ip(), true, connections.into());
        let config = ResolverConfig::from_name_servers(vec![server]);
        let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        let resolver = builder.with_options(options(limit)).build();
        let resolver = resolver.map_err(|cause| ResolverError::Server { server: address, cause })?;
        Ok(Self { resolver, missed: AtomicU32::new(0), silent_until: AtomicU64::new(0), limit })
    }

    fn heard(&self) {
        self.missed.store(0, Ordering::Relaxed);
        self.silent_until.store(0, Ordering::Relaxed);
    }

    fn missed(&self, now: Duration) {
        if self.missed.fetch_add(1, Ordering::Relaxed) + 1 >= MISSES {
            self.silent_until.store(milliseconds(now + SILENCE), Ordering::Relaxed);
        }
    }

    /// A question takes more than one query if the answer needs TCP or an alias is followed.
    async fn ask(&self, name: &Name, kind: RecordType) -> Result<Found, Failure> {
        let lookup = timeout(self.limit * 2, self.resolver.lookup(name.clone(), kind));
        match lookup.await.unwrap_or(Err(NetError::Timeout)) {
            Ok(lookup) => Ok(found(name, lookup.answers())),
            Err(NetError::Dns(DnsError::NoRecordsFound(absence))) => Ok(absent(&absence)),
            Err(error @ (NetError::Timeout | NetError::Io(_) | NetError::NoConnections)) => {
                Err(Failure::Silent(error.to_string()))
            }
            Err(error) => Err(Failure::Said(error.to_string())),
        }
    }
}

/// Nothing is kept, tried again or raced behind our back: what is known of a name is up to its entry.
fn options(limit: Duration) -> ResolverOpts {
    let mut options = ResolverOpts::default();
    options.timeout = limit;
    options.attempts = 0;
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.preserve_intermediates = true;
    options.max_active_requests = MOST_ACTIVE;
    options
}

fn absent(absence: &NoRecords) -> Found {
    let ttl = Duration::from_secs(absence.negative_ttl.unwrap_or(ABSENCE).into());
    Found { ttl, ..Found::default() }
}

/// The addresses of a name and of what it is an alias of. Other records of an answer are about other names.
fn found(name: &Name, answers: &[Record]) -> Found {
    let aliases = aliases(name, answers);
    let mut found = Found::default();
    let mut ttl: Option<u32> = None;
    for record in answers.iter().filter(|record| aliases.contains(&&record.name)) {
        let address: Option<IpAddr> = match &record.data {
            RData::A(address) => Some(address.0.into()),
            RData::AAAA(address) => Some(IpAddr::from(address.0).to_canonical()),
            _ => None,
        };
        found.addresses.extend(address);
        ttl = Some(ttl.map_or(record.ttl, |ttl| ttl.min(record.ttl)));
    }
    found.ttl = Duration::from_secs(ttl.unwrap_or(ABSENCE).into());
    found
}

fn aliases<'a>(name: &'a Name, answers: &'a [Record]) -> Vec<&'a Name> {
    let mut aliases = vec![name];
    while aliases.len() < MOST_ALIASES {
        let next = answers.iter().find_map(|record| match &record.data {
            RData::CNAME(target) if aliases.contains(&&record.name) && !aliases.contains(&&target.0) => Some(&target.0),
            _ => None,
        });
        let Some(next) = next else { break };
        aliases.push(next);
    }
    aliases
}

#[cfg(test)]
mod tests {
    use hickory_resolver::proto::rr::rdata::{A, AAAA, CNAME};
    use proptest::prelude::*;

    use super::*;

    fn record(name: &str, ttl: u32, value: &str) -> Record {
        let data = match value.parse() {
            Ok(IpAddr::V4(address)) => RData::A(A(address)),
            Ok(IpAddr::V6(address)) => RData::AAAA(AAAA(address)),
            Err(_) => RData::CNAME(CNAME(absolute(value).unwrap())),
        };
        Record::from_rdata(absolute(name).unwrap(), ttl, data)
    }

    #[track_caller]
    fn check(records: &[(&str, u32, &str)], addresses: &[&str], seconds: u64) {
        let records: Vec<Record> = records.iter().map(|(name, ttl, value)| record(name, *ttl, value)).collect();
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        let expect = Found { addresses, ttl: Duration::from_secs(seconds) };
        assert_eq!(found(&absolute("db.example.com").unwrap(), &records), expect);
    }

    #[test]
    fn every_address_of_the_name_counts() {
        let records = [("db.example.com", 60, "192.0.2.1"), ("DB.example.COM", 20, "192.0.2.2")];
        check(&records, &["192.0.2.1", "192.0.2.2"], 20);
    }

    #[test]
    fn addresses_of_other_names_do_not() {
        check(&[("db.example.com", 60, "192.0.2.1"), ("evil.example.com", 1, "192.0.2.66")], &["192.0.2.1"], 60);
    }

    #[test]
    fn aliases_are_followed_in_any_order_and_have_a_ttl_of_their_own() {
        let mut records = [
            ("c.example.net", 60, "192.0.2.1"),
            ("b.example.net", 5, "c.example.net"),
            ("db.example.com", 60, "b.example.net"),
        ];
        check(&records, &["192.0.2.1"], 5);
        records.reverse();
        check(&records, &["192.0.2.1"], 5);
    }

    #[test]
    fn a_ring_of_aliases_has_no_address() {
        check(&[("db.example.com", 60, "b.example.net"), ("b.example.net", 60, "db.example.com")], &[], 60);
    }

    #[test]
    fn an_ipv4_address_in_ipv6_clothes_is_an_ipv4_address() {
        check(&[("db.example.com", 60, "::ffff:192.0.2.1")], &["192.0.2.1"], 60);
    }

    #[test]
    fn a_few_misses_leave_the_order_as_it_is() {
        let servers = ["192.0.2.1:53", "192.0.2.2:53"].map(|text| text.parse().unwrap());
        let Dns(servers) = Dns::new(&servers, Duration::from_secs(1)).unwrap();
        let first = &servers.servers[0];
        let is_in_order = || std::ptr::eq(servers.in_order()[0], first);
        (1..MISSES).for_each(|_| first.missed(Duration::ZERO));
        assert!(is_in_order());
        first.missed(Duration::ZERO);
        assert!(!is_in_order());
        first.heard();
        assert!(is_in_order());
    }

    #[test]
    fn odd_names_are_names_or_not() {
        for name in ["xn--", "xn--a.example.com", "*.a", "_a._b"] {
            assert!(absolute(name).is_some(), "{name}");
        }
        for name in ["..", "a..b", &"a".repeat(64), &["abcdefgh"; 32].join(".")] {
            assert_eq!(absolute(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_name_at_all_is_a_panic(name in any::<String>()) {
            absolute(&name);
        }
    }
}
