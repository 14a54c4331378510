//! What is watched, and how each object gets into the store.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use kube::{
    Api, Client, ResourceExt as _,
    api::{DynamicObject, ObjectMeta},
    core::{ApiResource, GroupVersionKind},
};
use serde::Deserialize;
use tokio::{
    sync::watch as channel,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    Selection, Settings, Shared,
    answer::{Answers, Verdict},
    client::answered,
    object::{self, Read},
    store::{Document, Key, Kinds, Namespace, Version},
    watch::{Selector, Sink, follow},
};
use crate::{
    pods::{Owner, PodInfo},
    policy::{
        EgressPolicy, Kind, ServiceEntry,
        object::{EGRESS_GROUP, EGRESS_VERSIONS, ISTIO_GROUP, ISTIO_VERSIONS},
    },
};

/// How long a kind must be absent before it counts as not installed: an API server that starts does not serve all it will.
const ABSENT: Duration = Duration::from_secs(5);
/// How often it is looked for: before that, and afterwards.
const LOOK: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// How long the API may take to say what it serves.
const PATIENCE: Duration = Duration::from_secs(30);

/// Watches everything, for ever.
pub(super) async fn run(client: Client, shared: Arc<Shared>, wanted: channel::Receiver<BTreeSet<Selection>>) {
    let answers = Answers::start(client.clone(), shared.store().settings.node.clone());
    let node = format!("spec.nodeName={}", shared.store().settings.node);
    tokio::join!(
        custom(&client, Documents::entries(&shared, &answers)),
        custom(&client, Documents::policies(&shared, &answers)),
        core(&client, "Namespace", Selector::default(), Namespaces(&shared)),
        core(&client, "Pod", Selector { fields: Some(node), labels: None }, Pods(&shared)),
        endpoints(&client, &shared, wanted),
    );
}

/// A kind of object that is served only if its definition is installed.
struct Custom {
    kind: Kind,
    kinds: Kinds,
    group: &'static str,
    /// The best first.
    versions: &'static [&'static str],
    plural: &'static str,
}

const ENTRIES: Custom = Custom {
    kind: Kind::ServiceEntry,
    kinds: Kinds::Entries,
    group: ISTIO_GROUP,
    versions: &ISTIO_VERSIONS,
    plural: "serviceentries",
};

const POLICIES: Custom = Custom {
    kind: Kind::EgressPolicy,
    kinds: Kinds::Policies,
    group: EGRESS_GROUP,
    versions: &EGRESS_VERSIONS,
    plural: "egresspolicies",
};

impl Custom {
    /// The first of the versions that the API serves.
    async fn served(&self, client: &Client) -> Result<Option<ApiResource>, String> {
        let groups = answered(PATIENCE, client.list_api_groups()).await?;
        let Some(group) = groups.groups.iter().find(|group| group.name == self.group) else { return Ok(None) };
        for &version in self.versions {
            let group_version = format!("{}/{version}", self.group);
            if !group.versions.iter().any(|served| served.group_version == group_version) {
                continue;
            }
            let resources = answered(PATIENCE, client.list_api_group_resources(&group_version)).await?;
            if resources.resources.iter().any(|resource| resource.name == self.plural) {
                let kind = GroupVersionKind::gvk(self.group, version, self.kind.as_str());
                return Ok(Some(ApiResource::from_gvk_with_plural(&kind, self.plural)));
            }
        }
        Ok(None)
    }
}

async fn custom<T: Document>(client: &Client, mut sink: Documents<'_, T>) {
    let (shared, custom) = (sink.shared, sink.custom);
    let start = Instant::now();
    loop {
        let is_synced = shared.store().is_synced(custom.kinds);
        match custom.served(client).await {
            Ok(Some(resource)) => {
                let name = format!("{}.{}", custom.plural, resource.api_version);
                shared.store().set_served(custom.kinds, Some(name));
                let api = Api::all_with(client.clone(), &resource);
                follow(&api, &Selector::default(), &mut sink).await;
            }
            // What was served once stays: its objects may have been read before, and are deleted one by one if they are.
            Ok(None) if is_synced && !shared.store().is_absent(custom.kinds) => {
                sink.failed("the API does not serve this any more".to_owned());
            }
            Ok(None) if !is_synced && start.elapsed() >= ABSENT => {
                tracing::info!(resource = custom.plural, "not installed in this cluster: there are none");
                shared.store().set_served(custom.kinds, None);
                sink.connected();
                sink.replace(Vec::new());
            }
            Ok(None) => {}
            Err(error) => sink.failed(error),
        }
        let is_synced = shared.store().is_synced(custom.kinds);
        sleep(if is_synced { LOOK.1 } else { LOOK.0 }).await;
    }
}

/// A kind of object that is always served.
async fn core(client: &Client, kind: &str, selector: Selector, mut sink: impl Sink<DynamicObject>) {
    let api = Api::all_with(client.clone(), &core_resource(kind));
    loop {
        follow(&api, &selector, &mut sink).await;
        sleep(LOOK.1).await;
    }
}

fn core_resource(kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", kind))
}

fn key(metadata: &ObjectMeta) -> Key {
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

fn failed(shared: &Shared, kind: Kinds, error: &str) {
    let name = format!("{kind:?}").to_lowercase();
    if shared.store().failed(kind, error.to_owned()) {
        tracing::warn!(what = name, %error, "cannot watch the Kubernetes API; what was known last stays in force");
    }
}

fn connected(shared: &Shared, kind: Kinds) {
    if shared.store().connected(kind) {
        tracing::info!(what = format!("{kind:?}").to_lowercase(), "the Kubernetes API is watched again");
    }
}

/// Objects that are read as policy documents.
struct Documents<'a, T> {
    shared: &'a Shared,
    settings: Settings,
    custom: &'static Custom,
    /// By key, the uid and the stamp of the version that was read last.
    seen: HashMap<Key, (String, Option<String>)>,
    answers: &'a Answers,
    /// What is another wherever an object says something else; `None` if nobody can tell.
    stamp: fn(&DynamicObject) -> Option<String>,
    read: fn(&DynamicObject, &Settings) -> Read<T>,
}

impl<'a> Documents<'a, ServiceEntry> {
    fn entries(shared: &'a Shared, answers: &'a Answers) -> Self {
        Self {
            shared,
            settings: shared.store().settings.clone(),
            custom: &ENTRIES,
            seen: HashMap::new(),
            answers,
            stamp: |object| Some(object.resource_version().unwrap_or_default()),
            read: |object, _| object::service_entry(object),
        }
    }
}

impl<'a> Documents<'a, EgressPolicy> {
    fn policies(shared: &'a Shared, answers: &'a Answers) -> Self {
        Self {
            shared,
            settings: shared.store().settings.clone(),
            custom: &POLICIES,
            seen: HashMap::new(),
            answers,
            // A new status is no new policy.
            stamp: |object| object.metadata.generation.map(|generation| generation.to_string()),
            read: object::egress_policy,
        }
    }
}

impl<T> Documents<'_, T> {
    /// `None` if this version was read already.
    fn read(&mut self, object: &DynamicObject) -> Option<Version<T>> {
        let (key, uid) = (key(&object.metadata), object.uid().unwrap_or_default());
        let seen = (uid.clone(), (self.stamp)(object));
        let is_known = seen.1.is_some() && self.seen.get(&key) == Some(&seen);
        self.seen.insert(key.clone(), seen);
        self.answers.saw(object);
        if is_known {
            return None;
        }
        let (kind, read) = (self.custom.kind, (self.read)(object, &self.settings));
        tell(kind, &key, read.valid.as_ref().err(), &read.warnings);
        self.answers.answer(object, Verdict::of(kind, read.valid.as_ref()));
        Some(Version { key, uid, read: read.valid })
    }
}

impl<T: Document> Sink<DynamicObject> for Documents<'_, T> {
    fn replace(&mut self, objects: Vec<DynamicObject>) {
        let there: BTreeSet<Key> = objects.iter().map(|object| key(&object.metadata)).collect();
        let versions = objects.iter().filter_map(|object| self.read(object)).collect();
        self.seen.retain(|key, _| there.contains(key));
        self.shared.change(|store| store.replace_documents(&there, versions));
    }

    fn apply(&mut self, object: DynamicObject) {
        if let Some(version) = self.read(&object) {
            self.shared.change(|store| store.apply_document(version));
        }
    }

    fn delete(&mut self, object: DynamicObject) {
        let key = key(&object.metadata);
        self.seen.remove(&key);
        self.answers.forget(&object);
        self.shared.change(|store| store.delete_document::<T>(&key));
    }

    fn connected(&mut self) {
        connected(self.shared, self.custom.kinds);
    }

    fn failed(&mut self, error: String) {
        failed(self.shared, self.custom.kinds, &error);
    }
}

/// Tells of what is wrong with a version of an object, once.
fn tell(kind: Kind, (namespace, name): &Key, error: Option<&String>, warnings: &[String]) {
    let object = format!("{}/{namespace}/{name}", kind.as_str());
    for warning in warnings {
        tracing::warn!(%object, "{warning}");
    }
    if let Some(error) = error {
        tracing::error!(%object, %error, "an object of the Kubernetes API is invalid: its last valid version stays, if there was one");
    }
}

struct Namespaces<'a>(&'a Shared);

fn namespace(object: &DynamicObject) -> Namespace {
    let labels = object.metadata.labels.clone().unwrap_or_default();
    Namespace { name: object.metadata.name.clone().unwrap_or_default(), labels }
}

impl Sink<DynamicObject> for Namespaces<'_> {
    fn replace(&mut self, objects: Vec<DynamicObject>) {
        let namespaces = objects.iter().map(namespace).collect();
        self.0.change(|store| store.replace_namespaces(namespaces));
    }

    fn apply(&mut self, object: DynamicObject) {
        self.0.change(|store| store.apply_namespace(&namespace(&object)));
    }

    fn delete(&mut self, object: DynamicObject) {
        self.0.change(|store| store.delete_namespace(&namespace(&object).name));
    }

    fn connected(&mut self) {
        connected(self.0, Kinds::Namespaces);
    }

    fn failed(&mut self, error: String) {
        failed(self.0, Kinds::Namespaces, &error);
    }
}

/// What is wanted of the status of a pod.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct PodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<PodIp>>,
    container_statuses: Option<Vec<ContainerStatus>>,
    init_container_statuses: Option<Vec<ContainerStatus>>,
    ephemeral_container_statuses: Option<Vec<ContainerStatus>>,
}

impl PodStatus {
    /// One that cannot be read is as good as none: the pod is known all the same.
    fn of(pod: &DynamicObject) -> Self {
        Self::deserialize(&pod.data["status"]).unwrap_or_default()
    }
}

#[derive(Debug, Clone, Deserialize)]
struct PodIp {
    ip: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ContainerStatus {
    name: String,
    #[serde(rename = "containerID")]
    container_id: Option<String>,
}

/// Where the kubelet keeps the uid of a static pod, in the mirror that it makes of it.
const MIRROR: &str = "kubernetes.io/config.mirror";
const STATIC_UID: &str = "kubernetes.io/config.hash";

fn pod(object: &DynamicObject) -> PodInfo {
    let metadata = &object.metadata;
    let status = PodStatus::of(object);
    let statuses = [status.container_statuses, status.init_container_statuses, status.ephemeral_container_statuses];
    // As `containerd://` and the id.
    let container = |status: ContainerStatus| Some((status.container_id?.split_once("://")?.1.to_owned(), status.name));
    let owner = metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
    PodInfo {
        uid: static_uid(metadata).unwrap_or_else(|| metadata.uid.clone().unwrap_or_default()),
        namespace: metadata.namespace.clone().unwrap_or_default(),
        name: metadata.name.clone().unwrap_or_default(),
        labels: metadata.labels.clone().unwrap_or_default(),
        owner: owner.map(|owner| Owner { kind: owner.kind.clone(), name: owner.name.clone() }),
        containers: statuses.into_iter().flatten().flatten().filter_map(container).collect(),
        created: metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
    }
}

/// A static pod's uid is a digest, without the dashes that the API gives to every other: who writes the annotations cannot
/// claim the cgroup of a pod of the API.
fn static_uid(metadata: &ObjectMeta) -> Option<String> {
    let annotations = metadata.annotations.as_ref()?;
    let uid = annotations.contains_key(MIRROR).then(|| annotations.get(STATIC_UID)).flatten()?;
    (uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| uid.clone())
}

struct Pods<'a>(&'a Shared);

impl Sink<DynamicObject> for Pods<'_> {
    fn replace(&mut self, objects: Vec<DynamicObject>) {
        let pods = objects.iter().map(pod).collect();
        self.0.change(|store| store.replace_pods(pods));
    }

    fn apply(&mut self, object: DynamicObject) {
        self.0.change(|store| store.apply_pod(&pod(&object)));
    }

    fn delete(&mut self, object: DynamicObject) {
        self.0.change(|store| store.delete_pod(&key(&object.metadata)));
    }

    fn connected(&mut self) {
        connected(self.0, Kinds::Pods);
    }

    fn failed(&mut self, error: String) {
        failed(self.0, Kinds::Pods, &error);
    }
}

/// Watches the pods of each selection as long as some entry selects them.
async fn endpoints(client: &Client, shared: &Arc<Shared>, mut wanted: channel::Receiver<BTreeSet<Selection>>) {
    let mut watching: BTreeMap<Selection, JoinSet<()>> = BTreeMap::new();
    loop {
        let selections = wanted.borrow_and_update().clone();
        watching.retain(|selection, _| {
            let is_wanted = selections.contains(selection);
            if !is_wanted {
                shared.store().forget_endpoints(selection);
            }
            is_wanted
        });
        for selection in selections {
            let (client, shared) = (client.clone(), Arc::clone(shared));
            watching.entry(selection.clone()).or_insert_with(|| {
                // Dropped, it ends.
                let mut task = JoinSet::new();
                task.spawn(selected(client, shared, selection));
                task
            });
        }
        if wanted.changed().await.is_err() {
            return;
        }
    }
}

async fn selected(client: Client, shared: Arc<Shared>, selection: Selection) {
    let (namespace, labels) = &selection;
    let labels = labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",");
    let selector = Selector { labels: Some(labels).filter(|labels| !labels.is_empty()), fields: None };
    let api = Api::namespaced_with(client, namespace, &core_resource("Pod"));
    let mut sink = Endpoints { shared: &shared, selection: &selection };
    loop {
        follow(&api, &selector, &mut sink).await;
        sleep(LOOK.1).await;
    }
}

struct Endpoints<'a> {
    shared: &'a Shared,
    selection: &'a Selection,
}

/// Where a pod is reached; nowhere once it has ended.
fn addresses(object: &DynamicObject) -> BTreeSet<IpAddr> {
    let status = PodStatus::of(object);
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return BTreeSet::new();
    }
    let several = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.as_ref());
    several.chain(&status.pod_ip).filter_map(|ip| ip.parse().ok()).collect()
}

impl Sink<DynamicObject> for Endpoints<'_> {
    fn replace(&mut self, objects: Vec<DynamicObject>) {
        let pods = objects.iter().map(|object| (key(&object.metadata), addresses(object))).collect();
        self.shared.change(|store| store.replace_endpoints(self.selection, pods));
    }

    fn apply(&mut self, object: DynamicObject) {
        let key = key(&object.metadata);
        self.shared.change(|store| store.apply_endpoint(self.selection, key, &addresses(&object)));
    }

    fn delete(&mut self, object: DynamicObject) {
        self.shared.change(|store| store.delete_endpoint(self.selection, &key(&object.metadata)));
    }

    fn connected(&mut self) {}

    fn failed(&mut self, error: String) {
        let (namespace, labels) = self.selection;
        tracing::warn!(%namespace, ?labels, %error, "cannot watch the pods that a ServiceEntry selects");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: Value) -> DynamicObject {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn all_containers_of_a_pod_are_known_and_its_owner() {
        let status = |name: &str| json!([{ "name": name, "containerID": format!("containerd://{name}-id") }]);
        let object = read(json!({
            "metadata": {
                "name": "a", "namespace": "shop", "uid": "u-1", "labels": { "app": "a" },
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "ownerReferences": [
                    { "apiVersion": "x", "kind": "Other", "name": "o", "uid": "1" },
                    { "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "a-5", "uid": "2", "controller": true },
                ],
            },
            "spec": { "nodeName": "n", "containers": [{ "name": "app", "image": "x" }] },
            "status": {
                "phase": "Running", "podIP": "10.0.0.1", "podIPs": [{ "ip": "10.0.0.1" }, { "ip": "fd00::1" }],
                "containerStatuses": status("app"), "initContainerStatuses": status("init"),
                "ephemeralContainerStatuses": status("debug"),
            },
        }));
        let info = pod(&object);
        assert_eq!(info.containers.len(), 3);
        assert_eq!(
            (info.containers["debug-id"].as_str(), info.uid.as_str(), info.created),
            ("debug", "u-1", 1_767_225_600)
        );
        assert_eq!(info.owner.unwrap().name, "a-5");
        assert_eq!(addresses(&object).len(), 2);
    }

    #[test]
    fn a_pod_whose_containers_did_not_start_is_known() {
        let object = read(json!({
            "metadata": { "name": "a", "namespace": "shop", "uid": "u" }, "spec": {},
            "status": { "containerStatuses": [{ "name": "app" }], "initContainerStatuses": null },
        }));
        assert!(pod(&object).containers.is_empty() && addresses(&object).is_empty());
        for status in [Value::Null, json!([]), json!({ "containerStatuses": 7 }), json!("x")] {
            assert_eq!(pod(&read(json!({ "metadata": { "name": "a" }, "status": status }))).name, "a");
        }
    }

    #[test]
    fn what_has_ended_has_no_address() {
        let object = |phase: &str| {
            read(json!({ "metadata": { "name": "a" }, "spec": {}, "status": { "phase": phase, "podIP": "10.0.0.1" } }))
        };
        assert_eq!([addresses(&object("Running")).len(), addresses(&object("Succeeded")).len()], [1, 0]);
    }

    #[test]
    fn only_a_mirror_has_the_uid_of_a_static_pod() {
        let digest = "0123456789abcdef0123456789abcdef";
        let uid = |annotations: Value| {
            pod(&read(json!({ "metadata": { "name": "a", "uid": "u-1", "annotations": annotations }, "spec": {} }))).uid
        };
        assert_eq!(uid(json!({ MIRROR: digest, STATIC_UID: digest })), digest);
        assert_eq!(uid(json!({ STATIC_UID: digest })), "u-1");
        assert_eq!(uid(json!({ MIRROR: "x", STATIC_UID: "8f14e45f-ceea-467f-a8b5-6f1e2d3c4b5a" })), "u-1");
    }
}
