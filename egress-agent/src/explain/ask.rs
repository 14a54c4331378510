//! `egress-agent explain`: from the command line, or from lines of JSON, to answers.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, BufRead, Write},
    net::{IpAddr, SocketAddr, ToSocketAddrs},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Destination, Explainer, Explanation, is_denied};
use crate::{
    cgroup,
    cli::Output,
    compile::{Context, Names},
    policy::{L4, PolicySet},
    users::Users,
    workload::{Pod, ScopeKey, Workload},
};

/// Why a question cannot be answered.
#[derive(Debug, Error)]
pub enum AskError {
    /// Not `HOST:PORT`.
    #[error("{0:?} is not HOST:PORT, such as 10.0.0.5:3306, [2001:db8::5]:3306 or mysql.example.com:3306")]
    BadDestination(String),
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
        if let Ok(socket) = text.parse::<SocketAddr>() {
            return Ok(Self { host: None, addresses: vec![socket.ip()], port: socket.port() });
        }
        let bad = || AskError::BadDestination(text.to_owned());
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let port = port.parse().map_err(|_| bad())?;
        let host = host.trim_end_matches('.').to_lowercase();
        let valid = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if host.is_empty() || !host.chars().all(valid) {
            return Err(bad());
        }
        let addresses = match names.0.get(&host) {
            Some(known) => known.iter().copied().collect(),
            None => look_up(&host)?,
        };
        Ok(Self { host: Some(host), addresses, port })
    }
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
        let cgroup = self.cgroup.as_ref().map(|path| path.trim_matches('/').to_owned());
        let unit = || cgroup.as_deref().and_then(|path| cgroup::unit(path.as_ref())).map(str::to_owned);
        let pod = |namespace: &String| Pod {
            namespace: namespace.clone(),
            labels: self.labels.clone(),
            namespace_labels: BTreeMap::new(),
        };
        Workload {
            unit: self.unit.clone().or_else(unit),
            pod: self.namespace.as_ref().map(pod),
            user: self.user.as_deref().map(|user| users.identity(user)),
            cgroup,
        }
    }
}

/// Explains every address of a target. Whether any of them is refused.
pub fn explain(
    explainer: &Explainer<'_>,
    target: &Target,
    protocol: L4,
    output: Output,
    out: &mut impl Write,
) -> io::Result<bool> {
    let mut denied = false;
    for (index, &address) in target.addresses.iter().enumerate() {
        let to = Destination { address, port: target.port, protocol, host: target.host.clone() };
        let explanation = explainer.explain(&to);
        denied |= is_denied(&explanation);
        match output {
            Output::Json => line(out, &explanation)?,
            Output::Text if index == 0 => write!(out, "{explanation}")?,
            Output::Text => write!(out, "\n{explanation}")?,
        }
    }
    Ok(denied)
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
    fn parse(text: &str) -> Result<(Who, String, L4), String> {
        let line: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let Self { to, protocol, namespace, labels, cgroup, unit, user } = line;
        let l4 =
            protocol.map_or(Ok(L4::Tcp), |text| L4::parse(&text).ok_or(format!("{text:?} is neither TCP nor UDP")))?;
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
/// answered with an error, and so is the whole in the end, but the others are answered all the same.
pub fn flows(
    policies: &PolicySet,
    context: &Context,
    users: &Users,
    input: &mut impl BufRead,
    out: &mut impl Write,
) -> Result<(), AskError> {
    let mut scopes = Scopes { policies, context, users, last: None, compiled: HashMap::new() };
    let mut text = String::new();
    let mut first_error = None;
    for number in 1.. {
        text.clear();
        if input.read_line(&mut text)? == 0 {
            break;
        }
        if text.trim().is_empty() {
            continue;
        }
        match scopes.answer(&text) {
            Ok(answer) => line(out, &answer)?,
            Err(cause) => {
                line(out, &Unanswered { error: cause.clone(), line: number })?;
                first_error.get_or_insert(AskError::BadLine { line: number, cause });
            }
        }
    }
    out.flush()?;
    first_error.map_or(Ok(()), Err)
}

/// The policies compiled once for each distinct set of them that selects a workload.
struct Scopes<'a> {
    policies: &'a PolicySet,
    context: &'a Context,
    users: &'a Users,
    /// Who asked last: lines of one workload usually come together.
    last: Option<(Who, ScopeKey)>,
    compiled: HashMap<ScopeKey, Explainer<'a>>,
}

impl Scopes<'_> {
    fn answer(&mut self, text: &str) -> Result<Explanation, String> {
        let (who, to, protocol) = Line::parse(text)?;
        let to = self.destination(&to, protocol)?;
        Ok(self.explainer(who).answer(&to))
    }

    /// Nothing is looked up here: a million names would take a million questions.
    fn destination(&self, to: &str, protocol: L4) -> Result<Destination, String> {
        let bad = || AskError::BadDestination(to.to_owned()).to_string();
        if let Ok(socket) = to.parse::<SocketAddr>() {
            return Ok(Destination { address: socket.ip(), port: socket.port(), protocol, host: None });
        }
        let (host, port) = to.rsplit_once(':').ok_or_else(bad)?;
        let known = self.context.names.0.get(host).and_then(|addresses| addresses.first());
        let address = *known.ok_or_else(|| format!("the address of {host:?} is not known: give it with --resolve"))?;
        Ok(Destination { address, port: port.parse().map_err(|_| bad())?, protocol, host: Some(host.to_owned()) })
    }

    fn explainer(&mut self, who: Who) -> &Explainer<'_> {
        let key = match self.last.take() {
            Some((last, key)) if last == who => key,
            _ => ScopeKey::new(self.policies, &who.workload(self.users)),
        };
        let (policies, context, users) = (self.policies, self.context, self.users);
        let compile = || Explainer::new(policies, who.workload(users), context);
        let explainer = self.compiled.entry(key.clone()).or_insert_with(compile);
        self.last = Some((who, key));
        explainer
    }
}

fn line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}
