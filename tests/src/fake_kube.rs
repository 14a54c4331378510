//! A small Kubernetes API server: it lists, watches, and does on demand what a real one does only when it is unwell.
//!
//! Enough of the protocol for the agent, over plain HTTP on the loopback. What a real server does with it is tested with a
//! real one.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    /// Of Istio.
    ServiceEntries,
    /// Of ours.
    EgressPolicies,
    /// Of the core.
    Namespaces,
    /// Of the core.
    Pods,
}

impl Resource {
    const ALL: [Self; 4] = [Self::ServiceEntries, Self::EgressPolicies, Self::Namespaces, Self::Pods];

    const fn plural(self) -> &'static str {
        match self {
            Self::ServiceEntries => "serviceentries",
            Self::EgressPolicies => "egresspolicies",
            Self::Namespaces => "namespaces",
            Self::Pods => "pods",
        }
    }

    const fn kind(self) -> &'static str {
        match self {
            Self::ServiceEntries => "ServiceEntry",
            Self::EgressPolicies => "EgressPolicy",
            Self::Namespaces => "Namespace",
            Self::Pods => "Pod",
        }
    }
}

/// What is wrong with the answers about a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `403`: the role does not allow it.
    Forbidden,
    /// `401`: the token has expired.
    Unauthorized,
    /// A page for people, with status 200.
    Html,
    /// Nothing for ever.
    Silence,
    /// Watches end at once.
    EndsAtOnce,
    /// Watches hold what is no JSON.
    Garbage,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    objects: BTreeMap<Resource, BTreeMap<(String, String), Value>>,
    history: Vec<(u64, Resource, &'static str, Value)>,
    /// Versions before are forgotten.
    oldest: u64,
    faults: BTreeMap<Resource, Fault>,
    /// Group and version of the custom resources that are served.
    served: Vec<&'static str>,
    /// Answers nothing at all.
    is_away: bool,
    /// Streams of another number end.
    epoch: u64,
    lists: BTreeMap<Resource, usize>,
    patches: Vec<(String, Value)>,
    events: Vec<Value>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server.
#[derive(Debug)]
pub struct FakeKube {
    shared: Arc<Shared>,
    address: SocketAddr,
    directory: TempDir,
}

impl FakeKube {
    /// Serves all four resources, and has no objects.
    pub fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let (address, directory) = (listener.local_addr()?, tempfile::tempdir()?);
        let shared = Arc::new(Shared::default());
        shared.state().served = vec!["networking.istio.io/v1", "egress.filter/v1alpha1"];
        let of_thread = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&of_thread);
                // A client that leaves is no failure of the server.
                thread::spawn(move || drop(serve(stream, &shared)));
            }
        });
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{ "name": "x", "cluster": { "server": format!("http://{address}") } }],
            "users": [{ "name": "x", "user": {} }],
            "contexts": [{ "name": "x", "context": { "cluster": "x", "user": "x" } }],
        });
        std::fs::write(directory.path().join("config"), kubeconfig.to_string())?;
        Ok(Self { shared, address, directory })
    }

    /// The file that says where it is.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("config")
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state());
        self.shared.changed.notify_all();
    }

    /// Makes an object or changes it. Its namespace is `metadata.namespace`.
    pub fn apply(&self, resource: Resource, mut object: Value) {
        self.change(|state| {
            state.version += 1;
            let (version, key) = (state.version, key(&object));
            let before = state.objects.entry(resource).or_default().get(&key).cloned();
            let metadata = object["metadata"].as_object_mut().expect("an object has metadata");
            metadata.insert("resourceVersion".to_owned(), json!(version.to_string()));
            let generation = before.as_ref().and_then(|before| before["metadata"]["generation"].as_u64()).unwrap_or(0);
            metadata.insert("generation".to_owned(), json!(generation + 1));
            let uid = before
                .as_ref()
                .map_or_else(|| json!(format!("uid-{version}")), |before| before["metadata"]["uid"].clone());
            metadata.entry("uid").or_insert(uid);
            state.objects.entry(resource).or_default().insert(key, object.clone());
            let kind = if before.is_some() { "MODIFIED" } else { "ADDED" };
            state.history.push((version, resource, kind, object));
        });
    }

    /// Deletes an object; that of a namespace has none.
    pub fn delete(&self, resource: Resource, namespace: &str, name: &str) {
        self.change(|state| {
            let key = (namespace.to_owned(), name.to_owned());
            let Some(mut object) = state.objects.entry(resource).or_default().remove(&key) else { return };
            state.version += 1;
            object["metadata"]["resourceVersion"] = json!(state.version.to_string());
            state.history.push((state.version, resource, "DELETED", object));
        });
    }

    /// From now on, something is wrong with a resource, or nothing. Streams end.
    pub fn set_fault(&self, resource: Resource, fault: Option<Fault>) {
        self.change(|state| {
            match fault {
                Some(fault) => drop(state.faults.insert(resource, fault)),
                None => drop(state.faults.remove(&resource)),
            }
            state.epoch += 1;
        });
    }

    /// Which custom resources are served, by group and version.
    pub fn set_served(&self, served: &[&'static str]) {
        self.change(|state| {
            state.served = served.to_vec();
            state.epoch += 1;
        });
    }

    /// Is away, or comes back: connections end without an answer.
    pub fn set_away(&self, is_away: bool) {
        self.change(|state| {
            state.is_away = is_away;
            state.epoch += 1;
        });
    }

    /// Forgets what changed until now, so that it must be listed again, and ends all streams.
    pub fn forget(&self) {
        self.change(|state| {
            state.oldest = state.version;
            state.epoch += 1;
        });
    }

    /// How often a resource was listed.
    pub fn lists(&self, resource: Resource) -> usize {
        self.shared.state().lists.get(&resource).copied().unwrap_or(0)
    }

    /// What was patched: the path, and with what.
    pub fn patches(&self) -> Vec<(String, Value)> {
        self.shared.state().patches.clone()
    }

    /// The Events that were created.
    pub fn events(&self) -> Vec<Value> {
        self.shared.state().events.clone()
    }
}

fn key(object: &Value) -> (String, String) {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

struct Request {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    fn read(stream: &TcpStream) -> Result<Self> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let mut words = line.split_ascii_whitespace();
        let (method, target) = (words.next().context("a method")?, words.next().context("a target")?);
        let mut length = 0;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pair = |pair: &str| pair.split_once('=').map(|(name, value)| (name.to_owned(), decoded(value)));
        let query = query.split('&').filter_map(pair).collect();
        Ok(Self { method: method.to_owned(), path: path.to_owned(), query, body })
    }
}

/// Percent-encoding, as far as selectors need it.
fn decoded(text: &str) -> String {
    let escapes = [("%3D", "="), ("%2C", ","), ("%2F", "/"), ("%3A", ":"), ("+", " ")];
    escapes.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

fn serve(mut stream: TcpStream, shared: &Shared) -> Result<()> {
    let request = Request::read(&stream)?;
    if shared.state().is_away {
        return Ok(());
    }
    let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
    if let ["apis", group, version, _, ..] = parts.as_slice()
        && *group != "events.k8s.io"
        && !shared.state().served.contains(&format!("{group}/{version}").as_str())
    {
        return answer(&mut stream, 404, &status(404, "the server could not find the requested resource"));
    }
    let found = Resource::ALL.into_iter().find(|resource| parts.contains(&resource.plural()));
    match (request.method.as_str(), parts.as_slice()) {
        ("GET", ["apis"]) => answer(&mut stream, 200, &groups(shared)),
        ("GET", ["apis", group, version]) => answer(&mut stream, 200, &resources(&format!("{group}/{version}"))),
        ("PATCH", _) => {
            let patch: Value = serde_json::from_slice(&request.body)?;
            shared.state().patches.push((request.path.clone(), patch.clone()));
            answer(&mut stream, 200, &json!({ "metadata": { "name": "x" } }))
        }
        ("POST", [.., "events"]) => {
            let event: Value = serde_json::from_slice(&request.body)?;
            shared.state().events.push(event.clone());
            answer(&mut stream, 201, &event)
        }
        ("GET", _) if let Some(resource) = found => objects(&mut stream, shared, &request, resource, &parts),
        _ => answer(&mut stream, 404, &status(404, "the server could not find the requested resource")),
    }
}

fn objects(
    stream: &mut TcpStream,
    shared: &Shared,
    request: &Request,
    resource: Resource,
    parts: &[&str],
) -> Result<()> {
    let fault = shared.state().faults.get(&resource).copied();
    match fault {
        Some(Fault::Forbidden) => {
            let message = format!("{} is forbidden: User \"x\" cannot list resource", resource.plural());
            return answer(stream, 403, &status(403, &message));
        }
        Some(Fault::Unauthorized) => return answer(stream, 401, &status(401, "Unauthorized")),
        Some(Fault::Html) => {
            let page = "<html><body>\u{7}please log in</body></html>";
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\n\r\n", page.len());
            return Ok(stream.write_all(format!("{head}{page}").as_bytes())?);
        }
        Some(Fault::Silence) => {
            wait_for_another_epoch(shared);
            return Ok(());
        }
        Some(Fault::EndsAtOnce | Fault::Garbage) | None => {}
    }
    let namespace = parts.iter().position(|&part| part == "namespaces").and_then(|index| parts.get(index + 1));
    let view = View {
        resource,
        namespace: namespace.filter(|_| resource != Resource::Namespaces).map(|&name| name.to_owned()),
        node: request
            .query
            .get("fieldSelector")
            .and_then(|text| text.strip_prefix("spec.nodeName="))
            .map(str::to_owned),
        labels: request.query.get("labelSelector").cloned(),
    };
    if request.query.get("watch").is_some_and(|watch| watch == "true" || watch == "1") {
        let from = request.query.get("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or(0);
        watch(stream, shared, &view, from, fault)
    } else {
        list(stream, shared, &view)
    }
}

/// Which objects are meant.
struct View {
    resource: Resource,
    namespace: Option<String>,
    node: Option<String>,
    labels: Option<String>,
}

impl View {
    /// Whether an object is in its place, whatever its labels.
    fn is_here(&self, object: &Value) -> bool {
        self.namespace.as_ref().is_none_or(|namespace| object["metadata"]["namespace"] == **namespace)
            && self.node.as_ref().is_none_or(|node| object["spec"]["nodeName"] == **node)
    }

    fn is_labelled(&self, object: &Value) -> bool {
        self.labels.iter().flat_map(|labels| labels.split(',')).all(|label| {
            let (name, value) = label.split_once('=').unwrap_or((label, ""));
            object["metadata"]["labels"][name] == value
        })
    }
}

fn list(stream: &mut TcpStream, shared: &Shared, view: &View) -> Result<()> {
    let list = {
        let mut state = shared.state();
        *state.lists.entry(view.resource).or_default() += 1;
        let all = state.objects.get(&view.resource);
        let items: Vec<&Value> = all
            .into_iter()
            .flat_map(BTreeMap::values)
            .filter(|object| view.is_here(object) && view.is_labelled(object))
            .collect();
        json!({
            "kind": format!("{}List", view.resource.kind()), "apiVersion": "v1",
            "metadata": { "resourceVersion": state.version.max(1).to_string() }, "items": items,
        })
    };
    answer(stream, 200, &list)
}

fn watch(stream: &mut TcpStream, shared: &Shared, view: &View, from: u64, fault: Option<Fault>) -> Result<()> {
    let epoch = shared.state().epoch;
    if from < shared.state().oldest {
        return answer(stream, 410, &status(410, "too old resource version"));
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n")?;
    match fault {
        Some(Fault::EndsAtOnce) => return Ok(()),
        Some(Fault::Garbage) => return Ok(stream.write_all(b"this is no event\n")?),
        _ => {}
    }
    let mut reached = from;
    loop {
        let lines: Vec<Value> = {
            let mut state = shared.state();
            loop {
                if state.epoch != epoch {
                    return Ok(());
                }
                let is_new = |(version, resource, _, object): &&(u64, Resource, &str, Value)| {
                    *version > reached && *resource == view.resource && view.is_here(object)
                };
                let new: Vec<Value> = state
                    .history
                    .iter()
                    .filter(is_new)
                    .map(|(_, _, kind, object)| {
                        let kind = if view.is_labelled(object) { kind } else { "DELETED" };
                        json!({ "type": kind, "object": object })
                    })
                    .collect();
                reached = state.version.max(reached);
                if !new.is_empty() {
                    break new;
                }
                state = wait(shared, state);
            }
        };
        for line in lines {
            stream.write_all(format!("{line}\n").as_bytes())?;
        }
        stream.flush()?;
    }
}

fn wait<'a>(shared: &'a Shared, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
}

fn wait_for_another_epoch(shared: &Shared) {
    let (mut state, deadline) = (shared.state(), Instant::now() + Duration::from_mins(10));
    let epoch = state.epoch;
    while state.epoch == epoch && Instant::now() < deadline {
        state = wait(shared, state);
    }
}

fn groups(shared: &Shared) -> Value {
    let mut groups: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for served in &shared.state().served {
        let (group, version) = served.split_once('/').expect("group and version");
        groups.entry(group).or_default().push(json!({ "groupVersion": served, "version": version }));
    }
    let groups: Vec<Value> = groups
        .into_iter()
        .map(|(name, versions)| json!({ "name": name, "versions": versions, "preferredVersion": versions[0] }))
        .collect();
    json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
}

fn resources(group_version: &str) -> Value {
    let resource =
        if group_version.starts_with("egress") { Resource::EgressPolicies } else { Resource::ServiceEntries };
    json!({
        "kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version,
        "resources": [{
            "name": resource.plural(), "singularName": "", "namespaced": true, "kind": resource.kind(), "verbs": ["list", "watch"],
        }],
    })
}

fn status(code: u16, message: &str) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message, "reason": "Test" })
}

fn answer(stream: &mut TcpStream, code: u16, body: &Value) -> Result<()> {
    let body = body.to_string();
    let head = format!(
        "HTTP/1.1 {code} X\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    Ok(stream.write_all(body.as_bytes())?)
}
