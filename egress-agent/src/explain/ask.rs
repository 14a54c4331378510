//! `egress-agent explain`: from the command line, or from lines of JSON, to answers.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    ffi::OsString,
    io::{self, BufRead, Read as _, Write},
    net::{IpAddr, SocketAddr, ToSocketAddrs},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Destination, Explainer, Explanation, worst};
use crate::{
    cgroup,
    cli::Output,
    compile::{Context, Names},
    policy::{L4, PolicySet},
    text,
    users::Users,
    workload::{Pod, ScopeKey, Workload},
};

/// Most bytes of a line of flows.
const MAX_LINE: usize = 64 << 10;
/// Most scopes whose rules are kept, and about how many rules and prefixes all of them together may have; then all are
/// dropped. Lines of few workloads in any order never come near.
const MOST_SCOPES: usize = 64;
const MOST_HELD: usize = 1 << 20;

/// Why a question cannot be answered.
#[derive(Debug, Error)]
pub enum AskError {
    /// Not `HOST:PORT`.
    #[error("{0:?} is not HOST:PORT, such as 10.0.0.5:3306, [2001:db8::5]:3306 or mysql.example.com:3306")]
    BadDestination(String),
    /// The name is one that no `--resolve` gives.
    #[error("the address of {0} is not known: give it with --resolve {0}=IP")]
    Unknown(String),
    /// The name has no address.
    #[error("{host} does not resolve; give its address with --resolve {host}=IP")]
    Unresolved {
        /// The name.
        host: String,
        /// Why.
        #[source]
        cause: Option<io::Error>,
    },
    /// A line of flows.
    #[error("line {line}: {cause}")]
    BadLine {
        /// From 1.
        line: usize,
        /// What is wrong with it.
        cause: String,
    },
    /// Reading or writing.
    #[error("cannot read flows or write answers")]
    Io(#[from] io::Error),
}

/// `HOST:PORT`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// A name, in lower case and without a trailing dot; `None` for an address.
    pub host: Option<String>,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Port.
    pub port: u16,
}

impl Target {
    /// Reads `HOST:PORT`. A name that `names` does not know is looked up.
    pub fn parse(text: &str, names: &Names) -> Result<Self, AskError> {
        Self::read(text, names, look_up)
    }

    /// Reads `HOST:PORT`. A name that `names` does not know is an error: a million lines would take a million look-ups.
    fn known(text: &str, names: &Names) -> Result<Self, AskError> {
        Self::read(text, names, |host| Err(AskError::Unknown(host.to_owned())))
    }

    fn read(
        text: &str,
        names: &Names,
        unknown: impl Fn(&str) -> Result<Vec<IpAddr>, AskError>,
    ) -> Result<Self, AskError> {
        if let Ok(socket) = text.parse::<SocketAddr>() {
            return Ok(Self { host: None, addresses: vec![socket.ip()], port: socket.port() });
        }
        let bad = || AskError::BadDestination(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = Some(port).filter(|port| port.bytes().all(|byte| byte.is_ascii_digit())).ok_or_else(bad)?;
        let port = port.parse().map_err(|_| bad())?;
        let host = host.trim_end_matches('.').to_lowercase();
        let valid = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if host.is_empty() || !host.chars().all(valid) || ends_in_a_number(&host) {
            return Err(bad());
        }
        let addresses = match names.0.get(&host).filter(|known| !known.is_empty()) {
            Some(known) => known.iter().copied().collect(),
            None => unknown(&host)?,
        };
        Ok(Self { host: Some(host), addresses, port })
    }

    fn destinations(&self, protocol: L4) -> impl Iterator<Item = Destination> {
        let to = move |&address| Destination { address, port: self.port, protocol, host: self.host.clone() };
        self.addresses.iter().map(to)
    }
}

/// What resolvers would take for an IPv4 address, each in its own way: `010.0.0.1`, `0x7f.1`, `3232235777`. No name ends
/// so (<https://url.spec.whatwg.org/#ends-in-a-number-checker>).
fn ends_in_a_number(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or_default();
    let is_hexadecimal = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    last.bytes().all(|byte| byte.is_ascii_digit()) || last.strip_prefix("0x").is_some_and(is_hexadecimal)
}

fn look_up(host: &str) -> Result<Vec<IpAddr>, AskError> {
    let unresolved = |cause| AskError::Unresolved { host: host.to_owned(), cause };
    let found = (host, 0).to_socket_addrs().map_err(|cause| unresolved(Some(cause)))?;
    let mut addresses: Vec<IpAddr> = found.map(|socket| socket.ip()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    if addresses.is_empty() { Err(unresolved(None)) } else { Ok(addresses) }
}

/// Who asks, as the command line and the lines of a file describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(default)]
pub struct Who {
    /// The namespace of its pod.
    pub namespace: Option<String>,
    /// The labels of its pod.
    pub labels: BTreeMap<String, String>,
    /// Its cgroup.
    pub cgroup: Option<String>,
    /// Its systemd unit; where absent, what the cgroup says.
    pub unit: Option<String>,
    /// Its user, by name or number.
    pub user: Option<String>,
}

impl Who {
    /// The workload that is described.
    pub fn workload(&self, users: &Users) -> Workload {
        let cgroup = self.cgroup.as_ref().map(|path| PathBuf::from(path.trim_matches('/')));
        let unit = || cgroup.as_deref().and_then(cgroup::unit).map(ToOwned::to_owned);
        let pod = |namespace: &String| Pod {
            namespace: namespace.clone(),
            labels: self.labels.clone(),
            namespace_labels: BTreeMap::new(),
            default: None,
        };
        Workload {
            unit: self.unit.clone().map(OsString::from).or_else(unit),
            pod: self.namespace.as_ref().map(pod),
            user: self.user.as_deref().map(|user| users.identity(user)),
            cgroup,
        }
    }
}

/// Whether any address of a target is refused.
pub fn is_denied(explainer: &Explainer<'_>, target: &Target, protocol: L4) -> bool {
    target.destinations(protocol).any(|to| super::is_denied(&explainer.answer(&to)))
}

/// Explains every address of a target.
pub fn explain(
    explainer: &Explainer<'_>,
    target: &Target,
    protocol: L4,
    output: Output,
    out: &mut impl Write,
) -> io::Result<()> {
    for (index, to) in target.destinations(protocol).enumerate() {
        let explanation = explainer.explain(&to);
        match output {
            Output::Json => line(out, &explanation)?,
            Output::Text if index == 0 => write!(out, "{explanation}")?,
            Output::Text => write!(out, "\n{explanation}")?,
        }
    }
    Ok(())
}

/// One line of flows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    to: String,
    protocol: Option<String>,
    namespace: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    cgroup: Option<String>,
    unit: Option<String>,
    user: Option<String>,
}

impl Line {
    fn parse(text: &[u8], default: L4) -> Result<(Who, String, L4), String> {
        let line: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let Self { to, protocol, namespace, labels, cgroup, unit, user } = line;
        let named = |text: String| L4::parse(&text).ok_or(format!("{text:?} is neither TCP nor UDP"));
        let l4 = protocol.map_or(Ok(default), named)?;
        Ok((Who { namespace, labels, cgroup, unit, user }, to, l4))
    }
}

/// What stands in the place of an answer that cannot be given.
#[derive(Debug, Serialize)]
struct Unanswered {
    error: String,
    line: usize,
}

/// Answers flows, one a line, in their order: the decision without the story around it. A line that cannot be read is
/// answered with an error, and so is the whole in the end, but the others are answered all the same. `protocol` is that
/// of the lines that name none.
pub fn flows(
    policies: &PolicySet,
    context: &Context,
    users: &Users,
    protocol: L4,
    input: &mut impl BufRead,
    out: &mut impl Write,
) -> Result<(), AskError> {
    let mut scopes = Scopes { policies, context, users, protocol, last: None, compiled: HashMap::new(), held: 0 };
    let mut first_error = None;
    match scopes.answer_all(input, out, &mut first_error) {
        // Whoever stops reading has read enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        result => result?,
    }
    first_error.map_or(Ok(()), Err)
}

/// The next line with its line break; of one that is too long, only the beginning. `false` at the end.
fn next_line(input: &mut impl BufRead, text: &mut Vec<u8>) -> io::Result<bool> {
    text.clear();
    input.take(MAX_LINE as u64 + 1).read_until(b'\n', text)?;
    if is_too_long(text) {
        input.skip_until(b'\n')?;
    }
    Ok(!text.is_empty())
}

fn is_too_long(text: &[u8]) -> bool {
    text.len() > MAX_LINE && !text.ends_with(b"\n")
}

/// The policies compiled once for each distinct set of them that selects a workload, as far as there is room.
struct Scopes<'a> {
    policies: &'a PolicySet,
    context: &'a Context,
    users: &'a Users,
    protocol: L4,
    /// Who asked last: lines of one workload usually come together.
    last: Option<(Who, ScopeKey)>,
    compiled: HashMap<ScopeKey, Explainer<'a>>,
    /// The size of all that is compiled.
    held: usize,
}

impl Scopes<'_> {
    fn answer_all(
        &mut self,
        input: &mut impl BufRead,
        out: &mut impl Write,
        first_error: &mut Option<AskError>,
    ) -> io::Result<()> {
        let mut text = Vec::new();
        let mut number = 0;
        while next_line(input, &mut text)? {
            number += 1;
            if text.trim_ascii().is_empty() && !is_too_long(&text) {
                continue;
            }
            match self.answer(&text) {
                Ok(answer) => line(out, &answer)?,
                Err(cause) => {
                    first_error.get_or_insert_with(|| AskError::BadLine { line: number, cause: cause.clone() });
                    line(out, &Unanswered { error: cause, line: number })?;
                }
            }
        }
        out.flush()
    }

    fn answer(&mut self, text: &[u8]) -> Result<Explanation, String> {
        if is_too_long(text) {
            return Err(format!("the line is longer than {} KiB", MAX_LINE >> 10));
        }
        let (who, to, protocol) = Line::parse(text, self.protocol)?;
        let target = Target::known(&to, &self.context.names).map_err(|error| error.to_string())?;
        let explainer = self.explainer(who)?;
        let answer = worst(target.destinations(protocol).map(|to| explainer.answer(&to)));
        answer.ok_or_else(|| AskError::Unknown(to).to_string())
    }

    fn explainer(&mut self, who: Who) -> Result<&Explainer<'_>, String> {
        let key = match self.last.take() {
            Some((last, key)) if last == who => key,
            _ => ScopeKey::new(self.policies, &who.workload(self.users)),
        };
        if !self.compiled.contains_key(&key) && (self.compiled.len() >= MOST_SCOPES || self.held >= MOST_HELD) {
            self.compiled.clear();
            self.held = 0;
        }
        let (policies, context, users) = (self.policies, self.context, self.users);
        let explainer = match self.compiled.entry(key.clone()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let compiled = Explainer::new(policies, who.workload(users), context);
                let compiled = compiled.map_err(|error| error.to_string())?;
                self.held += compiled.size();
                new.insert(compiled)
            }
        };
        self.last = Some((who, key));
        Ok(explainer)
    }
}

fn line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    text::to_json(&mut *out, value)?;
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compile::{NodeAction, NodeDefault},
        policy::load::load_text,
    };

    fn context() -> Context {
        let node_default = NodeDefault { action: NodeAction::Deny, loopback: true, dns: true };
        let addresses = ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(|address| address.parse().unwrap());
        let names = Names(BTreeMap::from([("db.example.com".to_owned(), addresses.into())]));
        Context { names, ..Context::new(node_default) }
    }

    fn entry(addresses: &str) -> String {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: e }}\nspec: {{ hosts: [h], \
             addresses: [{addresses}], ports: [{{ number: 80, name: t, protocol: TCP }}, {{ number: 53, name: u, protocol: \
             UDP }}] }}\n"
        )
    }

    fn answers(policy: &str, protocol: L4, input: &[u8]) -> (Vec<serde_json::Value>, Result<(), AskError>) {
        let loaded = load_text("policy.yaml", policy);
        assert!(!loaded.has_errors(), "{:#?}", loaded.findings);
        let mut out = Vec::new();
        let input = &mut &*input;
        let result = flows(&loaded.policies, &context(), &Users::default(), protocol, input, &mut out);
        let out = String::from_utf8(out).unwrap();
        (out.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), result)
    }

    #[test]
    fn bad_lines_are_answered_and_the_others_too() {
        let long = vec![b' '; MAX_LINE + 1];
        let good: &[u8] = br#"{"to":"192.0.2.1:80"}"#;
        let bad: [&[u8]; 4] = [b"{\"to\":\"\xff:80\"}", &long, br#"{"to":"1.1.1.1:99999999"}"#, br#"{"to":"x:80"}"#];
        let input = [&[good][..], &bad, &[good]].concat().join(&b'\n');
        let (answers, result) = answers(&entry("192.0.2.1"), L4::Tcp, &input);
        assert_eq!((&answers[0]["verdict"], &answers[5]["verdict"]), (&"allow".into(), &"allow".into()));
        for (index, said) in [(1, "unicode"), (2, "64 KiB"), (3, "HOST:PORT"), (4, "--resolve x=")] {
            assert_eq!(answers[index]["line"], index + 1);
            assert!(answers[index]["error"].as_str().unwrap().contains(said), "{}", answers[index]);
        }
        assert!(matches!(result, Err(AskError::BadLine { line: 2, .. })));
    }

    #[test]
    fn the_longest_line_is_read() {
        let mut line = br#"{"to":"192.0.2.1:80"}"#.to_vec();
        line.resize(MAX_LINE, b' ');
        let (answers, result) = answers(&entry("192.0.2.1"), L4::Tcp, &[&line[..], &line].join(&b'\n'));
        assert!(result.is_ok() && answers.len() == 2, "{answers:?}");
    }

    #[test]
    fn a_name_is_refused_if_one_of_its_addresses_is() {
        let line = br#"{"to":"DB.Example.com.:80"}"#;
        let (answer, _) = answers(&entry("192.0.2.1, 192.0.2.3"), L4::Tcp, line);
        assert_eq!((&answer[0]["verdict"], &answer[0]["to"]["address"]), (&"deny".into(), &"192.0.2.2".into()));
        assert_eq!(answer[0]["to"]["host"], "db.example.com");
        let (answer, _) = answers(&entry("192.0.2.0/24"), L4::Tcp, line);
        assert_eq!((&answer[0]["verdict"], &answer[0]["to"]["address"]), (&"allow".into(), &"192.0.2.1".into()));
    }

    #[test]
    fn lines_without_a_protocol_have_the_one_that_was_given() {
        let lines = b"{\"to\":\"192.0.2.1:53\"}\n{\"to\":\"192.0.2.1:53\",\"protocol\":\"tcp\"}";
        let (answers, _) = answers(&entry("192.0.2.1"), L4::Udp, lines);
        assert_eq!((&answers[0]["verdict"], &answers[1]["verdict"]), (&"allow".into(), &"deny".into()));
    }

    #[test]
    fn scopes_are_dropped_when_there_are_many() {
        let loaded = load_text("policy.yaml", &entry("192.0.2.1"));
        let (policies, context, users) = (&loaded.policies, &context(), &Users::default());
        let compiled = HashMap::new();
        let mut scopes = Scopes { policies, context, users, protocol: L4::Tcp, last: None, compiled, held: 0 };
        for number in 0..3 * MOST_SCOPES {
            let line = format!(r#"{{"to":"192.0.2.1:80","namespace":"n{number}"}}"#);
            assert_eq!(scopes.answer(line.as_bytes()).unwrap().verdict, "allow");
            assert!(scopes.compiled.len() <= MOST_SCOPES);
            assert_eq!(scopes.held, scopes.compiled.values().map(Explainer::size).sum::<usize>());
        }
        scopes.held = MOST_HELD;
        scopes.answer(br#"{"to":"192.0.2.1:80","namespace":"new"}"#).unwrap();
        assert_eq!(scopes.compiled.len(), 1);
    }

    #[test]
    fn what_resolvers_would_guess_at_is_no_destination() {
        let names = context().names;
        for text in [
            "010.0.0.1:80",
            "0x7f.1:80",
            "0X7F:80",
            "3232235777:80",
            "1.1.1.1.:80",
            "a.0x:80",
            "a.1:80",
            "1.1.1.1:99999999",
            "db.example.com:+80",
            "1.1.1.1:+80",
            "db.example.com:",
            "db.example.com",
            ":80",
            ".:80",
            "a b:80",
            "::1:80",
        ] {
            let read = Target::known(text, &names);
            assert!(matches!(read, Err(AskError::BadDestination(_))), "{text}: {read:?}");
        }
        assert_eq!(Target::known("DB.example.com.:080", &names).unwrap().port, 80);
        assert!(matches!(Target::known("1a.0xg:80", &names), Err(AskError::Unknown(_))));
    }

    /// A pipe that nobody reads any more.
    struct Left;

    impl Write for Left {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_left_hides_no_bad_line() {
        let loaded = load_text("policy.yaml", &entry("192.0.2.1"));
        let ask = |input: &str| {
            let input = &mut input.as_bytes();
            flows(&loaded.policies, &context(), &Users::default(), L4::Tcp, input, &mut Left)
        };
        assert!(ask("{\"to\":\"192.0.2.1:80\"}").is_ok());
        assert!(matches!(ask("nonsense"), Err(AskError::BadLine { line: 1, .. })));
    }
}
