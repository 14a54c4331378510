//! The Kubernetes API as a source: policies, the pods of this node, and the namespaces they are in.
//!
//! It runs on a thread of its own, without a single capability, and keeps what it knows in a [`Store`]. Whoever puts policies
//! in force takes a [`Snapshot`] and is told when there is another. While the API is away, what was known last stays.
//!
//! An object that is invalid leaves its last valid version in force. That version is known as long as the agent runs: after
//! a restart, an invalid object has no effect.

use std::{
    collections::BTreeSet,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::{runtime, sync::watch as channel};

use crate::{
    compile::NodeAction,
    pods::Pods,
    privileges::{self, CapabilitySet},
};

mod answer;
mod client;
mod object;
mod store;
mod tasks;
mod watch;

pub use store::{Selection, Snapshot, Store};

/// The label of a namespace that says what holds of its pods: `enforce` or `audit`.
pub const MODE_LABEL: &str = "egress.filter/mode";

/// What is wanted of the API.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The node whose pods are filtered.
    pub node: String,
    /// The namespace whose policies may select anything.
    pub root_namespace: String,
    /// Namespaces whose `ServiceEntry` objects count; all if there are none.
    pub entries_from: BTreeSet<String>,
    /// Pods of every namespace are filtered, not only those of namespaces with [`MODE_LABEL`].
    pub all_namespaces: bool,
    /// Namespaces whose pods are not filtered by default.
    pub exempt: BTreeSet<String>,
    /// The filtered cgroup, below the mount.
    pub top: PathBuf,
    /// Policies may ask for open connections to be ended.
    pub may_terminate: bool,
}

impl Settings {
    /// What holds of the pods of a namespace where no enforcing policy selects them; `None` leaves it to `--default`.
    fn default_of(&self, namespace: &str, mode: Option<Mode>) -> Option<NodeAction> {
        match mode {
            Some(Mode::Enforce) => Some(NodeAction::Deny),
            Some(Mode::Audit) => Some(NodeAction::Audit),
            None if self.exempt.contains(namespace) => Some(NodeAction::Allow),
            None => self.all_namespaces.then_some(NodeAction::Deny),
        }
    }
}

#[cfg(test)]
impl Settings {
    /// Of a node whose pods lie below `kubepods`.
    fn example() -> Self {
        Self {
            node: "node".to_owned(),
            root_namespace: "egress-system".to_owned(),
            entries_from: BTreeSet::new(),
            all_namespaces: false,
            exempt: BTreeSet::from(["kube-system".to_owned()]),
            top: "kubepods".into(),
            may_terminate: false,
        }
    }
}

/// A value of [`MODE_LABEL`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Enforce,
    Audit,
}

/// Why the API cannot be a source.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// It is not known where it is.
    #[error(
        "cannot tell where the Kubernetes API is: run in a pod with a service account, or name a kubeconfig file in KUBECONFIG"
    )]
    Unknown(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The thread cannot be made.
    #[error("cannot start to watch the Kubernetes API")]
    Thread(#[source] io::Error),
}

/// The API of a cluster, watched.
#[derive(Debug)]
pub struct Cluster {
    shared: Arc<Shared>,
    revisions: channel::Receiver<Revisions>,
    /// What whoever has the handle wants beside the fixed set.
    selections: channel::Sender<BTreeSet<Selection>>,
}

/// Counts changes; that of policies counts those of endpoints, too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Revisions {
    /// Policies, and what their rules depend on.
    pub policies: u64,
    /// Pods and namespaces.
    pub pods: u64,
    /// Everything has been listed once.
    pub is_synced: bool,
}

/// What the thread shares with whoever has the handle.
#[derive(Debug)]
struct Shared {
    store: Mutex<Store>,
    revisions: channel::Sender<Revisions>,
}

impl Shared {
    fn store(&self) -> MutexGuard<'_, Store> {
        // A panic of another thread may have left an object out, and nothing worse.
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the store, and tells of it.
    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let (result, revisions) = {
            let mut store = self.store();
            (change(&mut store), store.revisions())
        };
        self.revisions.send_if_modified(|known| std::mem::replace(known, revisions) != revisions);
        result
    }
}

impl Cluster {
    /// Starts to watch.
    pub fn start(settings: Settings) -> Result<Self, ClusterError> {
        let (revisions, receiver) = channel::channel(Revisions::default());
        let (selections, wanted) = channel::channel(BTreeSet::new());
        let shared = Arc::new(Shared { store: Mutex::new(Store::new(settings)), revisions });
        let of_thread = Arc::clone(&shared);
        let (started, result) = std::sync::mpsc::channel();
        let run = move || {
            // Nothing here takes any, and what it reads comes from afar. Its runtime makes threads, which inherit what is left.
            privileges::keep_only(CapabilitySet::empty());
            let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(started.send(Err(ClusterError::Thread(error)))),
            };
            runtime.block_on(async move {
                match client::connect().await {
                    Ok(connected) => {
                        of_thread.store().set_server(connected.server);
                        // Whoever started this waits for the answer.
                        let _ = started.send(Ok(()));
                        tasks::run(connected.client, of_thread, wanted).await;
                    }
                    Err(error) => drop(started.send(Err(error))),
                }
            });
        };
        thread::Builder::new().name("kubernetes".to_owned()).spawn(run).map_err(ClusterError::Thread)?;
        result.recv().unwrap_or_else(|_| Err(ClusterError::Thread(io::ErrorKind::BrokenPipe.into())))?;
        Ok(Self { shared, revisions: receiver, selections })
    }

    /// Waits until something changed since this was asked last.
    pub async fn changed(&mut self) -> Revisions {
        if self.revisions.changed().await.is_err() {
            // The thread is gone, and what it knew stays.
            std::future::pending::<()>().await;
        }
        *self.revisions.borrow_and_update()
    }

    /// As [`Self::changed`], without waiting.
    pub fn revisions(&mut self) -> Revisions {
        *self.revisions.borrow_and_update()
    }

    /// What is known now.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.store().snapshot()
    }

    /// The pods of this node, as they are known now.
    pub fn pods(&self) -> Pods {
        self.shared.store().members()
    }

    /// From now on, the pods that these select are watched wherever they run.
    pub fn select(&self, selections: BTreeSet<Selection>) {
        self.selections.send_if_modified(|known| {
            let is_new = *known != selections;
            *known = selections;
            is_new
        });
    }

    /// How it is going, for `status`.
    pub fn report(&self) -> Report {
        self.shared.store().report()
    }
}

/// How watching the API is going.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Where the API is.
    pub server: String,
    /// The node whose pods are filtered.
    pub node: String,
    /// Everything has been listed once.
    pub synced: bool,
    /// What is watched.
    pub resources: Vec<ResourceReport>,
    /// Pods of this node.
    pub pods: usize,
    /// Objects that are not in force as they are.
    pub rejected: Vec<Rejection>,
}

impl Report {
    /// What is not as it should be.
    pub fn degraded(&self) -> impl Iterator<Item = String> + '_ {
        let broken = self.resources.iter().filter_map(|resource| {
            let error = resource.error.as_ref()?;
            Some(format!("Kubernetes: {}: {error}; what was known last stays in force", resource.resource))
        });
        let rejected = self.rejected.iter().map(|rejection| format!("Kubernetes: {rejection}"));
        broken.chain(rejected)
    }

    /// What has not been listed yet.
    pub fn missing(&self) -> String {
        let missing = self.resources.iter().filter(|resource| !resource.synced).map(|resource| match &resource.error {
            Some(error) => format!("{}: {error}", resource.resource),
            None => resource.resource.clone(),
        });
        missing.collect::<Vec<_>>().join("; ")
    }
}

/// How watching one kind of object is going.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ResourceReport {
    /// As `pods` or `serviceentries.networking.istio.io/v1`.
    pub resource: String,
    /// The API serves it.
    pub installed: bool,
    /// How many there are.
    pub objects: usize,
    /// They have been listed once.
    pub synced: bool,
    /// Why they cannot be watched now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An object that is not in force as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejection {
    /// As `EgressPolicy/shop/web`.
    pub object: String,
    /// What is wrong with it.
    pub message: String,
    /// Whether an earlier version of it is in force.
    pub earlier_in_force: bool,
}

impl std::fmt::Display for Rejection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { object, message, earlier_in_force } = self;
        let effect = if *earlier_in_force { "its last valid version stays in force" } else { "it has no effect" };
        write!(f, "{object}: {message}; {effect}")
    }
}
