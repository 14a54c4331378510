//! The pods of this node, and which cgroup belongs to which. Pure: who the pods are is for whoever asks the Kubernetes API.
//!
//! The kubelet names the cgroup of a pod after its uid, below one of a few directories of its own. Only those names count,
//! in those places: what a container makes below its own cgroup may be called anything.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use serde::Serialize;

use crate::{cgroup, workload};

/// Where kubelets keep the cgroups of pods: with the systemd driver and with cgroupfs, and the same of a node that is itself
/// a container.
pub const ROOTS: [&str; 4] = ["kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubelet/kubepods"];

/// Classes of pods that have a directory of their own; those of class Guaranteed have none.
const CLASSES: [&str; 2] = ["burstable", "besteffort"];

/// A pod, for those who tell of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodInfo {
    /// What the cgroups of the kubelet are named after. A static pod has that of its file, not that of its mirror.
    pub uid: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What made it.
    pub owner: Option<Owner>,
    /// The names of its containers, by the ids that their runtime gave them.
    pub containers: BTreeMap<String, String>,
    /// Seconds since 1970 when it was created. Of two pods that claim one uid, the older has it.
    pub created: i64,
}

/// The controller of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Owner {
    /// As `ReplicaSet`.
    pub kind: String,
    /// Its name.
    pub name: String,
}

/// A pod as policies see it, and for those who tell of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// For those who tell of it.
    pub info: PodInfo,
    /// As policies see it.
    pub pod: workload::Pod,
}

/// The pods of this node.
#[derive(Debug, Clone, Default)]
pub struct Pods {
    roots: Arc<[PathBuf]>,
    /// By uid.
    members: HashMap<String, Arc<Member>>,
    is_any_refused: bool,
}

/// What a cgroup is.
#[derive(Debug)]
pub enum Place<'a> {
    /// It has to do with no pod.
    Elsewhere,
    /// Cgroups of pods lie directly below it.
    Parent,
    /// It belongs to a pod that is not known.
    Unknown,
    /// It belongs to this pod.
    Pod(&'a Arc<Member>),
}

/// The parts of a path, as the kubelet makes it.
#[derive(Debug, PartialEq, Eq)]
enum Parts<'a> {
    Elsewhere,
    Parent,
    /// A cgroup of a pod, and what lies directly below the pod's.
    Pod {
        uid: &'a str,
        container: Option<&'a str>,
    },
}

impl Pods {
    /// Nobody yet. `top` is the cgroup that is filtered: pods lie directly below it if it has the name of one of [`ROOTS`],
    /// wherever it is, else below these.
    pub fn below(top: &Path) -> Self {
        let top = cgroup::below(top);
        let name = top.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let is_root = name == "kubepods" || name == "kubepods.slice" || name.ends_with("-kubepods.slice");
        let roots = if is_root { vec![top.to_owned()] } else { ROOTS.map(PathBuf::from).to_vec() };
        Self { roots: roots.into(), ..Self::default() }
    }

    /// These instead. `is_any_refused` tells whether the namespace of some pod may refuse by default.
    #[must_use]
    pub fn with(&self, members: impl IntoIterator<Item = Member>, is_any_refused: bool) -> Self {
        let mut by_uid: HashMap<String, Arc<Member>> = HashMap::new();
        for member in members {
            match by_uid.get(&member.info.uid) {
                Some(other) if other.info.created <= member.info.created => {}
                _ => drop(by_uid.insert(member.info.uid.clone(), Arc::new(member))),
            }
        }
        Self { roots: Arc::clone(&self.roots), members: by_uid, is_any_refused }
    }

    /// Keeps those of `before` that the API has forgotten, and whose cgroups are still there: a pod may be deleted by force while
    /// its containers run on.
    pub fn keep<'p>(&mut self, before: &Self, paths: impl IntoIterator<Item = &'p Path>) {
        for path in paths {
            if let (Place::Unknown, Place::Pod(member)) = (self.place(path), before.place(path)) {
                self.members.insert(member.info.uid.clone(), Arc::clone(member));
            }
        }
    }

    /// Whether some namespace refuses by default.
    pub const fn is_any_refused(&self) -> bool {
        self.is_any_refused
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// What the cgroup of a path below the mount is.
    pub fn place(&self, path: &Path) -> Place<'_> {
        match self.parse(path) {
            Parts::Elsewhere => Place::Elsewhere,
            Parts::Parent => Place::Parent,
            Parts::Pod { uid, .. } => self.member(uid).map_or(Place::Unknown, Place::Pod),
        }
    }

    /// The uid of the pod that a cgroup belongs to, as the API writes it.
    pub fn uid(&self, path: &Path) -> Option<String> {
        match self.parse(path) {
            Parts::Pod { uid, .. } => Some(uid.replace('_', "-")),
            Parts::Elsewhere | Parts::Parent => None,
        }
    }

    /// The pod that a cgroup belongs to, and the container's name in it.
    pub fn describe(&self, path: &Path) -> Option<PodName> {
        let Parts::Pod { uid, container } = self.parse(path) else { return None };
        let info = &self.member(uid)?.info;
        let id = container.and_then(|name| cgroup::container_id(name.as_ref()));
        Some(PodName {
            namespace: info.namespace.clone(),
            name: info.name.clone(),
            container: id.and_then(|id| info.containers.get(id)).cloned(),
            owner: info.owner.clone(),
        })
    }

    /// systemd takes `-` for a level of slices, so its driver writes `_` in a uid.
    fn member(&self, uid: &str) -> Option<&Arc<Member>> {
        self.members.get(&*uid.replace('_', "-"))
    }

    fn parse<'p>(&self, path: &'p Path) -> Parts<'p> {
        let path = cgroup::below(path);
        self.roots
            .iter()
            .map(|root| parse(root, path))
            .find(|found| *found != Parts::Elsewhere)
            .unwrap_or(Parts::Elsewhere)
    }
}

/// The kubelet writes text; a name that is none is not its.
fn parse<'p>(root: &Path, path: &'p Path) -> Parts<'p> {
    let Ok(below) = path.strip_prefix(root) else { return Parts::Elsewhere };
    let slice = root.file_name().and_then(OsStr::to_str).and_then(|name| name.strip_suffix(".slice"));
    let mut names = below.iter().map(|name| name.to_str().unwrap_or_default());
    let Some(first) = names.next() else { return Parts::Parent };
    let class = CLASSES.into_iter().find(|&class| match slice {
        Some(slice) => unfix(first, slice, ".slice") == Some(class),
        None => first == class,
    });
    let (name, class) = match class {
        Some(class) => match names.next() {
            Some(name) => (name, Some(class)),
            None => return Parts::Parent,
        },
        None => (first, None),
    };
    let pod = match slice {
        Some(slice) => unfix(name, slice, ".slice").and_then(|name| match class {
            Some(class) => name.strip_prefix(class)?.strip_prefix('-'),
            None => Some(name),
        }),
        None => Some(name),
    };
    match pod.and_then(|pod| pod.strip_prefix("pod")).filter(|uid| is_uid(uid)) {
        Some(uid) => Parts::Pod { uid, container: names.next() },
        None => Parts::Elsewhere,
    }
}

/// What stands between `prefix-` and `suffix`.
fn unfix<'n>(name: &'n str, prefix: &str, suffix: &str) -> Option<&'n str> {
    name.strip_prefix(prefix)?.strip_prefix('-')?.strip_suffix(suffix)
}

fn is_uid(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

/// A container of a pod, in reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PodName {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The container's name; absent for what the kubelet has not told of yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// What made the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<Owner>,
}

/// The pods there are now, for those who tell of denials. All copies are one.
#[derive(Debug, Clone, Default)]
pub struct PodNames(Arc<RwLock<Pods>>);

impl PodNames {
    /// From now on these.
    pub fn set(&self, pods: Pods) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = pods;
    }

    /// The pod that a cgroup belongs to.
    pub fn describe(&self, path: &Path) -> Option<PodName> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).describe(path)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    const UID: &str = "8f14e45f-ceea-467f-a8b5-6f1e2d3c4b5a";

    fn pods(top: &str) -> Pods {
        let member = |uid: &str, name: &str, created| Member {
            info: PodInfo {
                uid: uid.to_owned(),
                namespace: "shop".to_owned(),
                name: name.to_owned(),
                containers: BTreeMap::from([("ab".repeat(32), "app".to_owned())]),
                created,
                ..PodInfo::default()
            },
            pod: workload::Pod { namespace: "shop".to_owned(), ..workload::Pod::default() },
        };
        let members = [member(UID, "ratings", 7), member(&"0f".repeat(16), "static", 7), member(UID, "impostor", 8)];
        Pods::below(top.as_ref()).with(members, false)
    }

    fn name_at(pods: &Pods, path: &str) -> String {
        match pods.place(path.as_ref()) {
            Place::Elsewhere => "elsewhere".to_owned(),
            Place::Parent => "parent".to_owned(),
            Place::Unknown => "unknown".to_owned(),
            Place::Pod(member) => member.info.name.clone(),
        }
    }

    #[test]
    fn a_pod_is_known_by_the_paths_of_both_drivers() {
        let (pods, with_underscores, container) = (pods("/"), UID.replace('-', "_"), "ab".repeat(32));
        let check = |path: String, expected: &str| assert_eq!(name_at(&pods, &path), expected, "{path}");
        for path in [
            format!("kubepods/pod{UID}"),
            format!("kubepods/burstable/pod{UID}/{container}"),
            format!("kubepods/besteffort/pod{UID}"),
            format!("kubepods.slice/kubepods-pod{with_underscores}.slice"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{with_underscores}.slice/cri-containerd-{container}.scope"
            ),
            format!("kubelet/kubepods/burstable/pod{UID}"),
            format!(
                "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{with_underscores}.slice"
            ),
        ] {
            check(path, "ratings");
        }
        check(format!("kubepods/burstable/pod{}", "0f".repeat(16)), "static");
        for path in ["kubepods", "kubepods/burstable", "kubepods.slice", "kubepods.slice/kubepods-besteffort.slice"] {
            check(path.to_owned(), "parent");
        }
        check("kubepods/pod123".to_owned(), "unknown");
    }

    #[test]
    fn a_cgroup_elsewhere_cannot_pose_as_a_pod() {
        let pods = pods("/");
        for path in [
            format!("user.slice/user-1000.slice/kubepods/pod{UID}"),
            format!("kubepods/other/pod{UID}"),
            format!("kubepods.slice/pod{UID}"),
            format!("kubepods.slice/kubepods-burstable.slice/kubepods-pod{UID}.slice"),
            format!("kubepodsX/pod{UID}"),
            format!("pod{UID}"),
            String::new(),
        ] {
            assert_eq!(name_at(&pods, &path), "elsewhere", "{path}");
        }
        // What a container makes below itself belongs to its own pod.
        assert_eq!(name_at(&pods, &format!("kubepods/podother/x/kubepods/pod{UID}")), "unknown");
    }

    #[test]
    fn the_filtered_cgroup_may_be_the_one_of_the_pods_wherever_it_is() {
        let pods = pods("/nested/kubepods");
        assert_eq!(name_at(&pods, &format!("nested/kubepods/burstable/pod{UID}")), "ratings");
        assert_eq!(name_at(&pods, &format!("kubepods/burstable/pod{UID}")), "elsewhere");
    }

    #[test]
    fn a_pod_that_was_deleted_by_force_stays_as_long_as_its_cgroup() {
        let (before, path) = (pods("/"), format!("kubepods/pod{UID}"));
        let kept = |paths: &[&str]| {
            let mut pods = Pods::below("/".as_ref()).with([], false);
            pods.keep(&before, paths.iter().map(AsRef::as_ref));
            name_at(&pods, &path)
        };
        assert_eq!(kept(&[&path, "kubepods", "kubepods/pod123"]), "ratings");
        assert_eq!(kept(&["kubepods"]), "unknown");
    }

    #[test]
    fn reports_name_the_container_directly_below_the_pod() {
        let (pods, id) = (pods("/"), "ab".repeat(32));
        let container = |path: String| pods.describe(path.as_ref()).unwrap().container;
        assert_eq!(container(format!("kubepods/pod{UID}/{id}/deeper")).as_deref(), Some("app"));
        assert_eq!(container(format!("kubepods/pod{UID}/crio-{id}.scope")).as_deref(), Some("app"));
        assert_eq!(container(format!("kubepods/pod{UID}/x/{id}")), None);
        // What a container makes below itself may have any name.
        let path = [format!("kubepods/pod{UID}/{id}/").as_bytes(), b"\xff\n"].concat();
        assert_eq!(pods.describe(Path::new(OsStr::from_bytes(&path))).unwrap().container.as_deref(), Some("app"));
        assert_eq!(pods.describe("kubepods".as_ref()), None);
    }
}
