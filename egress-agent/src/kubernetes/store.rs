//! What is known of the cluster. Pure: objects come in, and a [`Snapshot`] comes out.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{MODE_LABEL, Mode, Rejection, Report, ResourceReport, Revisions, Settings};
use crate::{
    compile::NodeAction,
    pods::{Member, PodInfo, Pods},
    policy::{EgressPolicy, Kind, ServiceEntry},
    workload::Pod,
};

/// Namespace and name.
pub(super) type Key = (String, String);

/// Pods of a namespace that have these labels.
pub type Selection = (String, BTreeMap<String, String>);

/// What is known at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Counts changes.
    pub revisions: Revisions,
    /// The last valid version of each.
    pub service_entries: Vec<Arc<ServiceEntry>>,
    /// The last valid version of each.
    pub egress_policies: Vec<Arc<EgressPolicy>>,
    /// Addresses of the pods of each selection, wherever they run.
    pub endpoints: BTreeMap<Selection, BTreeSet<IpAddr>>,
    /// The pods of this node.
    pub pods: Pods,
}

/// What is known.
#[derive(Debug)]
pub struct Store {
    pub(super) settings: Settings,
    server: String,
    entries: Objects<ServiceEntry>,
    policies: Objects<EgressPolicy>,
    namespaces: BTreeMap<String, Namespace>,
    pods: BTreeMap<Key, PodInfo>,
    endpoints: BTreeMap<Selection, BTreeMap<Key, BTreeSet<IpAddr>>>,
    resources: BTreeMap<Kinds, Resource>,
    revisions: Revisions,
}

/// What is watched. All must have been listed before anything is put in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kinds {
    Entries,
    Policies,
    Namespaces,
    Pods,
}

/// How watching one kind is going.
#[derive(Debug, Default)]
struct Resource {
    name: String,
    /// The API does not serve it, and did not from the start.
    is_absent: bool,
    is_synced: bool,
    error: Option<String>,
}

/// An object of one of the two kinds of policies.
#[derive(Debug)]
struct Object<T> {
    uid: String,
    valid: Option<Arc<T>>,
    complaint: Option<String>,
}

#[derive(Debug)]
pub(super) struct Objects<T>(BTreeMap<Key, Object<T>>);

impl<T> Default for Objects<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

/// A version of an object, as it was read.
#[derive(Debug)]
pub(super) struct Version<T> {
    pub(super) key: Key,
    pub(super) uid: String,
    pub(super) read: Result<T, String>,
}

impl<T: PartialEq> Objects<T> {
    /// Whether what is in force changes.
    fn apply(&mut self, version: Version<T>) -> bool {
        let Version { key, uid, read } = version;
        // A namesake is another object: what its predecessor said is gone with it.
        let before = self.0.get(&key).filter(|object| object.uid == uid).and_then(|object| object.valid.clone());
        let had = self.0.get(&key).and_then(|object| object.valid.clone());
        let (valid, complaint) = match read {
            Ok(valid) => (Some(Arc::new(valid)), None),
            Err(complaint) => (before, Some(complaint)),
        };
        let is_changed = had != valid;
        self.0.insert(key, Object { uid, valid, complaint });
        is_changed
    }

    fn remove(&mut self, key: &Key) -> bool {
        self.0.remove(key).is_some_and(|object| object.valid.is_some())
    }

    /// `there` is all there are, `versions` what is new of them.
    fn replace(&mut self, there: &BTreeSet<Key>, versions: Vec<Version<T>>) -> bool {
        let gone: Vec<Key> = self.0.keys().filter(|key| !there.contains(key)).cloned().collect();
        let mut is_changed = false;
        for key in gone {
            is_changed |= self.remove(&key);
        }
        for version in versions {
            is_changed |= self.apply(version);
        }
        is_changed
    }

    fn valid(&self) -> impl Iterator<Item = &Arc<T>> {
        self.0.values().filter_map(|object| object.valid.as_ref())
    }

    fn rejections(&self, kind: Kind) -> impl Iterator<Item = Rejection> + '_ {
        self.0.iter().filter_map(move |((namespace, name), object)| {
            Some(Rejection {
                object: format!("{}/{namespace}/{name}", kind.as_str()),
                message: object.complaint.clone()?,
                earlier_in_force: object.valid.is_some(),
            })
        })
    }
}

/// One of the two kinds of policies.
pub(super) trait Document: PartialEq + Sized {
    /// What it is watched as.
    const KINDS: Kinds;

    /// Where they are kept.
    fn objects(store: &mut Store) -> &mut Objects<Self>;

    /// Whether those of a namespace count.
    fn counts(settings: &Settings, namespace: &str) -> bool;
}

impl Document for ServiceEntry {
    const KINDS: Kinds = Kinds::Entries;

    fn objects(store: &mut Store) -> &mut Objects<Self> {
        &mut store.entries
    }

    fn counts(settings: &Settings, namespace: &str) -> bool {
        settings.entries_from.is_empty() || settings.entries_from.contains(namespace)
    }
}

impl Document for EgressPolicy {
    const KINDS: Kinds = Kinds::Policies;

    fn objects(store: &mut Store) -> &mut Objects<Self> {
        &mut store.policies
    }

    fn counts(_: &Settings, _: &str) -> bool {
        true
    }
}

/// A namespace, as far as it matters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Namespace {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
}

impl Namespace {
    /// What its label says; an error if nobody can tell.
    fn mode(&self) -> Result<Option<Mode>, String> {
        let Some(value) = self.labels.get(MODE_LABEL) else { return Ok(None) };
        match value.to_ascii_lowercase().as_str() {
            "enforce" => Ok(Some(Mode::Enforce)),
            "audit" => Ok(Some(Mode::Audit)),
            _ => Err(format!("label {MODE_LABEL}: `{value}` is neither `enforce` nor `audit`")),
        }
    }
}

impl Store {
    /// Nothing is known yet.
    pub fn new(settings: Settings) -> Self {
        let resource = |kind, name: &str| (kind, Resource { name: name.to_owned(), ..Resource::default() });
        Self {
            settings,
            server: String::new(),
            entries: Objects::default(),
            policies: Objects::default(),
            namespaces: BTreeMap::new(),
            pods: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            resources: BTreeMap::from([
                resource(Kinds::Entries, "serviceentries.networking.istio.io"),
                resource(Kinds::Policies, "egresspolicies.egress.filter"),
                resource(Kinds::Namespaces, "namespaces"),
                resource(Kinds::Pods, "pods"),
            ]),
            revisions: Revisions::default(),
        }
    }

    pub(super) const fn revisions(&self) -> Revisions {
        self.revisions
    }

    pub(super) fn set_server(&mut self, server: String) {
        self.server = server;
    }

    /// A kind is served, under this name; or it is not.
    pub(super) fn set_served(&mut self, kind: Kinds, name: Option<String>) {
        let resource = self.resource(kind);
        resource.is_absent = name.is_none();
        resource.name = name.unwrap_or_else(|| std::mem::take(&mut resource.name));
    }

    /// Changes of a kind are being watched. Whether that is news.
    pub(super) fn connected(&mut self, kind: Kinds) -> bool {
        self.resource(kind).error.take().is_some()
    }

    /// They are not. Whether that is news.
    pub(super) fn failed(&mut self, kind: Kinds, error: String) -> bool {
        let resource = self.resource(kind);
        let is_news = resource.error.as_ref() != Some(&error);
        resource.error = Some(error);
        is_news
    }

    pub(super) fn is_synced(&self, kind: Kinds) -> bool {
        self.resources.get(&kind).is_some_and(|resource| resource.is_synced)
    }

    pub(super) fn is_absent(&self, kind: Kinds) -> bool {
        self.resources.get(&kind).is_some_and(|resource| resource.is_absent)
    }

    fn resource(&mut self, kind: Kinds) -> &mut Resource {
        self.resources.entry(kind).or_default()
    }

    /// All objects of a kind have been listed.
    fn listed(&mut self, kind: Kinds) {
        self.resource(kind).is_synced = true;
        self.revisions.is_synced = self.resources.values().all(|resource| resource.is_synced);
    }

    /// `there` is all there are, `versions` what is new of them.
    pub(super) fn replace_documents<T: Document>(&mut self, there: &BTreeSet<Key>, versions: Vec<Version<T>>) {
        let versions = versions.into_iter().filter(|version| T::counts(&self.settings, &version.key.0)).collect();
        let is_changed = T::objects(self).replace(there, versions);
        self.policies_changed(is_changed);
        self.listed(T::KINDS);
    }

    pub(super) fn apply_document<T: Document>(&mut self, version: Version<T>) {
        let is_changed = T::counts(&self.settings, &version.key.0) && T::objects(self).apply(version);
        self.policies_changed(is_changed);
    }

    pub(super) fn delete_document<T: Document>(&mut self, key: &Key) {
        let is_changed = T::objects(self).remove(key);
        self.policies_changed(is_changed);
    }

    pub(super) fn replace_namespaces(&mut self, namespaces: Vec<Namespace>) {
        let namespaces = namespaces.into_iter().map(|namespace| (namespace.name.clone(), namespace)).collect();
        let is_changed = self.namespaces != namespaces;
        self.namespaces = namespaces;
        self.pods_changed(is_changed);
        self.listed(Kinds::Namespaces);
    }

    pub(super) fn apply_namespace(&mut self, namespace: &Namespace) {
        let before = self.namespaces.insert(namespace.name.clone(), namespace.clone());
        self.pods_changed(before.as_ref() != Some(namespace));
    }

    pub(super) fn delete_namespace(&mut self, name: &str) {
        let is_changed = self.namespaces.remove(name).is_some();
        self.pods_changed(is_changed);
    }

    pub(super) fn replace_pods(&mut self, pods: Vec<PodInfo>) {
        let pods = pods.into_iter().map(|pod| ((pod.namespace.clone(), pod.name.clone()), pod)).collect();
        let is_changed = self.pods != pods;
        self.pods = pods;
        self.pods_changed(is_changed);
        self.listed(Kinds::Pods);
    }

    pub(super) fn apply_pod(&mut self, pod: &PodInfo) {
        let before = self.pods.insert((pod.namespace.clone(), pod.name.clone()), pod.clone());
        self.pods_changed(before.as_ref() != Some(pod));
    }

    pub(super) fn delete_pod(&mut self, key: &Key) {
        let is_changed = self.pods.remove(key).is_some();
        self.pods_changed(is_changed);
    }

    pub(super) fn replace_endpoints(&mut self, selection: &Selection, addresses: BTreeMap<Key, BTreeSet<IpAddr>>) {
        let before = self.endpoints.insert(selection.clone(), addresses);
        let is_changed = before.as_ref() != self.endpoints.get(selection);
        self.policies_changed(is_changed);
    }

    pub(super) fn apply_endpoint(&mut self, selection: &Selection, key: Key, addresses: &BTreeSet<IpAddr>) {
        let before = self.endpoints.entry(selection.clone()).or_default().insert(key, addresses.clone());
        self.policies_changed(before.as_ref() != Some(addresses));
    }

    pub(super) fn delete_endpoint(&mut self, selection: &Selection, key: &Key) {
        let is_changed = self.endpoints.get_mut(selection).is_some_and(|pods| pods.remove(key).is_some());
        self.policies_changed(is_changed);
    }

    /// Nobody selects these any more.
    pub(super) fn forget_endpoints(&mut self, selection: &Selection) {
        self.endpoints.remove(selection);
    }

    const fn policies_changed(&mut self, is_changed: bool) {
        if is_changed {
            self.revisions.policies += 1;
        }
    }

    const fn pods_changed(&mut self, is_changed: bool) {
        if is_changed {
            self.revisions.pods += 1;
        }
    }

    /// What is known now.
    pub fn snapshot(&self) -> Snapshot {
        let endpoints = self.endpoints.iter().map(|(selection, pods)| {
            (selection.clone(), pods.values().flatten().copied().collect::<BTreeSet<IpAddr>>())
        });
        Snapshot {
            revisions: self.revisions,
            service_entries: self.entries.valid().cloned().collect(),
            egress_policies: self.policies.valid().cloned().collect(),
            endpoints: endpoints.collect(),
            pods: self.members(),
        }
    }

    /// The pods of this node. One of a namespace that is not known is not known either: what holds of it is not.
    pub(super) fn members(&self) -> Pods {
        let member = |info: &PodInfo| {
            let namespace = self.namespaces.get(&info.namespace)?;
            let pod = Pod {
                namespace: info.namespace.clone(),
                labels: info.labels.clone(),
                namespace_labels: namespace.labels.clone(),
                default: self.default_of(namespace),
            };
            Some(Member { info: info.clone(), pod })
        };
        let refuses = |namespace: &Namespace| self.default_of(namespace) == Some(NodeAction::Deny);
        let is_any_refused = self.settings.all_namespaces || self.namespaces.values().any(refuses);
        Pods::below(&self.settings.top).with(self.pods.values().filter_map(member), is_any_refused)
    }

    /// A label that nobody can read is as good as none, and told of.
    fn default_of(&self, namespace: &Namespace) -> Option<NodeAction> {
        self.settings.default_of(&namespace.name, namespace.mode().ok().flatten())
    }

    /// How it is going.
    pub(super) fn report(&self) -> Report {
        let count = |kind| match kind {
            Kinds::Entries => self.entries.0.len(),
            Kinds::Policies => self.policies.0.len(),
            Kinds::Namespaces => self.namespaces.len(),
            Kinds::Pods => self.pods.len(),
        };
        let resource = |(&kind, resource): (&Kinds, &Resource)| ResourceReport {
            resource: resource.name.clone(),
            objects: count(kind),
            installed: !resource.is_absent,
            synced: resource.is_synced,
            error: resource.error.clone(),
        };
        let of_namespace = |namespace: &Namespace| {
            let message = namespace.mode().err()?;
            Some(Rejection { object: format!("Namespace/{}", namespace.name), message, earlier_in_force: false })
        };
        let rejected = self.policies.rejections(Kind::EgressPolicy);
        let rejected = rejected.chain(self.entries.rejections(Kind::ServiceEntry));
        Report {
            server: self.server.clone(),
            node: self.settings.node.clone(),
            synced: self.revisions.is_synced,
            resources: self.resources.iter().map(resource).collect(),
            pods: self.pods.len(),
            rejected: rejected.chain(self.namespaces.values().filter_map(of_namespace)).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pods::Place,
        policy::{Reach, load::load_text},
    };

    fn entry(namespace: &str, address: &str) -> ServiceEntry {
        let text = format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: db, namespace: {namespace} }}\n\
             spec: {{ hosts: [db.example.com], addresses: [{address}], ports: [{{ number: 3306, name: tcp }}] }}\n"
        );
        load_text("x.yaml", &text).policies.service_entries.pop().unwrap()
    }

    fn version(uid: &str, read: Result<ServiceEntry, &str>) -> Version<ServiceEntry> {
        Version { key: ("shop".into(), "db".into()), uid: uid.into(), read: read.map_err(str::to_owned) }
    }

    fn there() -> BTreeSet<Key> {
        BTreeSet::from([("shop".to_owned(), "db".to_owned())])
    }

    fn addresses(store: &Store) -> Vec<String> {
        store.snapshot().service_entries.iter().map(|entry| entry.addresses[0].to_string()).collect()
    }

    #[test]
    fn an_invalid_version_leaves_the_last_valid_one_in_force() {
        let mut store = Store::new(Settings::example());
        store.apply_document(version("1", Ok(entry("shop", "192.0.2.1"))));
        let before = store.revisions();
        store.apply_document(version("1", Err("bad")));
        assert_eq!((addresses(&store), store.revisions()), (vec!["192.0.2.1/32".to_owned()], before));
        let rejected = store.report().rejected;
        assert_eq!(rejected[0].to_string(), "ServiceEntry/shop/db: bad; its last valid version stays in force");
        store.replace_documents(&there(), vec![version("1", Err("worse"))]);
        assert_eq!(addresses(&store).len(), 1);
        store.apply_document(version("1", Ok(entry("shop", "192.0.2.2"))));
        assert!(addresses(&store) == ["192.0.2.2/32"] && store.report().rejected.is_empty());
    }

    #[test]
    fn a_namesake_does_not_inherit_what_its_predecessor_said() {
        let mut store = Store::new(Settings::example());
        store.apply_document(version("1", Ok(entry("shop", "192.0.2.1"))));
        let before = store.revisions().policies;
        store.replace_documents(&there(), vec![version("2", Err("bad"))]);
        assert!(addresses(&store).is_empty() && store.revisions().policies > before);
        assert_eq!(store.report().rejected[0].to_string(), "ServiceEntry/shop/db: bad; it has no effect");
    }

    #[test]
    fn what_is_not_listed_any_more_is_gone_and_what_is_the_same_is_no_change() {
        let mut store = Store::new(Settings::example());
        store.replace_documents(&there(), vec![version("1", Ok(entry("shop", "192.0.2.1")))]);
        let before = store.revisions();
        store.replace_documents(&there(), vec![version("1", Ok(entry("shop", "192.0.2.1")))]);
        store.replace_documents::<ServiceEntry>(&there(), Vec::new());
        assert_eq!(store.revisions(), before);
        store.replace_documents::<ServiceEntry>(&BTreeSet::new(), Vec::new());
        assert!(addresses(&store).is_empty() && store.revisions() != before);
    }

    #[test]
    fn entries_count_where_they_are_meant_to() {
        let mut store =
            Store::new(Settings { entries_from: BTreeSet::from(["infra".to_owned()]), ..Settings::example() });
        store.apply_document(version("1", Ok(entry("shop", "192.0.2.1"))));
        store.replace_documents(&there(), vec![version("1", Ok(entry("shop", "192.0.2.1")))]);
        assert!(addresses(&store).is_empty());
        store.delete_document::<ServiceEntry>(&("shop".into(), "db".into()));
    }

    fn namespace(name: &str, mode: Option<&str>) -> Namespace {
        let labels = mode.map(|mode| (MODE_LABEL.to_owned(), mode.to_owned())).into_iter().collect();
        Namespace { name: name.to_owned(), labels }
    }

    fn pod(namespace: &str) -> PodInfo {
        let name = "a".to_owned();
        PodInfo { uid: format!("{namespace}-uid"), namespace: namespace.to_owned(), name, ..PodInfo::default() }
    }

    #[test]
    fn the_label_of_a_namespace_says_what_holds_of_its_pods() {
        use NodeAction::{Allow, Audit, Deny};
        let defaults = |all_namespaces: bool| {
            let mut store = Store::new(Settings { all_namespaces, ..Settings::example() });
            let namespaces = [
                ("strict", Some("enforce")),
                ("watched", Some("Audit")),
                ("plain", None),
                ("kube-system", None),
                ("typo", Some("enforced")),
            ];
            store.replace_namespaces(namespaces.iter().map(|(name, mode)| namespace(name, *mode)).collect());
            store.replace_pods(namespaces.iter().map(|(name, _)| pod(name)).collect());
            let pods = store.snapshot().pods;
            assert!(pods.is_any_refused());
            assert_eq!(store.report().rejected.len(), 1);
            namespaces.map(|(name, _)| match pods.place(format!("kubepods/pod{name}-uid").as_ref()) {
                Place::Pod(member) => member.pod.default,
                _ => panic!("{name} is not known"),
            })
        };
        assert_eq!(defaults(false), [Some(Deny), Some(Audit), None, Some(Allow), None]);
        assert_eq!(defaults(true), [Some(Deny), Some(Audit), Some(Deny), Some(Allow), Some(Deny)]);
    }

    #[test]
    fn a_pod_is_known_once_its_namespace_is() {
        let mut store = Store::new(Settings::example());
        store.apply_pod(&pod("new"));
        let is_known =
            |store: &Store| matches!(store.snapshot().pods.place("kubepods/podnew-uid".as_ref()), Place::Pod(_));
        assert!(!is_known(&store));
        let before = store.revisions().pods;
        store.apply_namespace(&namespace("new", None));
        assert!(is_known(&store) && store.revisions().pods > before);
        let before = store.revisions();
        store.apply_namespace(&namespace("new", None));
        store.apply_pod(&pod("new"));
        assert_eq!(store.revisions(), before);
        store.delete_pod(&("new".into(), "a".into()));
        assert!(!is_known(&store));
    }

    #[test]
    fn all_four_kinds_must_have_been_listed() {
        let mut store = Store::new(Settings::example());
        store.replace_documents::<ServiceEntry>(&BTreeSet::new(), Vec::new());
        store.replace_documents::<EgressPolicy>(&BTreeSet::new(), Vec::new());
        store.replace_namespaces(Vec::new());
        assert!(store.failed(Kinds::Pods, "403".to_owned()) && !store.failed(Kinds::Pods, "403".to_owned()));
        assert_eq!((store.revisions().is_synced, store.report().missing().as_str()), (false, "pods: 403"));
        store.replace_pods(Vec::new());
        assert!(store.revisions().is_synced);
        store.connected(Kinds::Pods);
        assert_eq!(store.report().degraded().count(), 0);
    }

    #[test]
    fn the_reach_of_a_policy_is_kept() {
        let text = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: a }\nspec: {}\n";
        let policy = load_text("x.yaml", text).policies.egress_policies.pop().unwrap();
        assert_eq!(policy.reach, Reach::Anything);
        let mut store = Store::new(Settings::example());
        let read = Ok(EgressPolicy { reach: Reach::Namespace, ..policy });
        store.apply_document(Version { key: ("default".into(), "a".into()), uid: "1".into(), read });
        assert_eq!(store.snapshot().egress_policies[0].reach, Reach::Namespace);
    }
}
