//! What authors are told in the cluster: conditions of an `EgressPolicy`, and an Event for an object that is rejected.
//!
//! Every node comes to the same answer, so the first that gives it is enough: the others see it and say nothing. Where an
//! answer cannot be given, nothing else changes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use kube::{
    Api, Client, Error, ResourceExt as _,
    api::{DynamicObject, Patch, PatchParams, PostParams},
    core::{ApiResource, GroupVersionKind, TypeMeta},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{sync::mpsc, time::sleep};

use super::client::answered;
use crate::{control::hexadecimal, policy::Kind};

/// The condition of an `EgressPolicy` that this is about.
const ACCEPTED: &str = "Accepted";
/// Who says it.
const REPORTER: &str = "egress.filter/agent";
/// Answers that wait. More are not given: authors can ask `status`.
const MOST_WAITING: usize = 10_000;
/// How long each waits, at most, for another node to give it.
const MODESTY: Duration = Duration::from_millis(400);
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What came of a version of an object.
#[derive(Debug, Clone)]
pub(super) struct Verdict {
    kind: Kind,
    error: Option<String>,
}

impl Verdict {
    pub(super) fn of<T>(kind: Kind, read: Result<&T, &String>) -> Self {
        Self { kind, error: read.err().cloned() }
    }
}

/// Gives answers, one after the other.
#[derive(Debug)]
pub(super) struct Answers {
    queue: mpsc::Sender<Answer>,
    answered: Answered,
}

/// By uid of an `EgressPolicy`, the generation for which it has an answer.
#[derive(Debug, Clone, Default)]
struct Answered(Arc<Mutex<HashMap<String, i64>>>);

impl Answered {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, i64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Answer {
    verdict: Verdict,
    namespace: String,
    name: String,
    uid: String,
    generation: i64,
    /// What the answer is about, among all versions of all objects.
    stamp: String,
    conditions: Vec<Value>,
}

impl Answers {
    /// Must be called in a tokio runtime. `node` is the name of this one.
    pub(super) fn start(client: Client, node: String) -> Self {
        let (queue, waiting) = mpsc::channel(MOST_WAITING);
        let answered = Answered::default();
        tokio::spawn(give(client, node, waiting, answered.clone()));
        Self { queue, answered }
    }

    /// Notes which answer an `EgressPolicy` has.
    pub(super) fn saw(&self, object: &DynamicObject) {
        let conditions = conditions(object);
        let accepted = conditions.iter().find(|condition| condition["type"] == ACCEPTED);
        if let Some(generation) = accepted.and_then(|accepted| accepted["observedGeneration"].as_i64()) {
            self.answered.lock().insert(object.uid().unwrap_or_default(), generation);
        }
    }

    /// An `EgressPolicy` is gone.
    pub(super) fn forget(&self, object: &DynamicObject) {
        self.answered.lock().remove(&object.uid().unwrap_or_default());
    }

    /// Answers a version of an object, if there is something to say.
    pub(super) fn answer(&self, object: &DynamicObject, verdict: Verdict) {
        if verdict.error.is_none() && verdict.kind == Kind::ServiceEntry {
            return;
        }
        let generation = object.metadata.generation.unwrap_or_default();
        let uid = object.uid().unwrap_or_default();
        let is_answered = self.answered.lock().get(&uid).is_some_and(|&answered| answered >= generation);
        if verdict.error.is_none() && is_answered {
            return;
        }
        let answer = Answer {
            verdict,
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
            stamp: format!("{uid} {generation}"),
            uid,
            generation,
            conditions: conditions(object),
        };
        if self.queue.try_send(answer).is_err() {
            tracing::debug!("too many answers wait: one is not given");
        }
    }
}

fn conditions(object: &DynamicObject) -> Vec<Value> {
    object.data["status"]["conditions"].as_array().cloned().unwrap_or_default()
}

async fn give(client: Client, node: String, mut waiting: mpsc::Receiver<Answer>, answered: Answered) {
    let mut last_error = None;
    while let Some(answer) = waiting.recv().await {
        let is_policy = answer.verdict.kind == Kind::EgressPolicy;
        if is_policy {
            sleep(modesty(&node, &answer.stamp)).await;
        }
        let is_answered =
            |answer: &Answer| answered.lock().get(&answer.uid).is_some_and(|&known| known >= answer.generation);
        let mut results = Vec::new();
        if is_policy && !is_answered(&answer) {
            results.push(patch(&client, &answer).await);
        }
        if answer.verdict.error.is_some() {
            results.push(create_event(&client, &node, &answer).await);
        }
        for error in results.into_iter().filter_map(Result::err) {
            if last_error.as_ref() != Some(&error) {
                tracing::warn!(%error, "cannot tell authors in the cluster what became of their objects");
                last_error = Some(error);
            }
        }
    }
}

/// Another wait on each node.
fn modesty(node: &str, stamp: &str) -> Duration {
    let digest = Sha256::digest(format!("{node} {stamp}"));
    MODESTY.mul_f64(f64::from(digest[0]) / 255.0)
}

/// Where the object is gone, or another node was first, there is nothing left to do.
async fn request<T>(request: impl Future<Output = Result<T, Error>>) -> Result<(), String> {
    let request = async {
        match request.await {
            Err(Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            answer => answer.map(drop),
        }
    };
    answered(PATIENCE, request).await
}

async fn patch(client: &Client, answer: &Answer) -> Result<(), String> {
    let kind = GroupVersionKind::gvk("egress.filter", "v1alpha1", "EgressPolicy");
    let resource = ApiResource::from_gvk_with_plural(&kind, "egresspolicies");
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &answer.namespace, &resource);
    let patch = json!({ "status": { "conditions": with_accepted(answer, SystemTime::now()) } });
    let params = PatchParams { field_manager: Some(REPORTER.to_owned()), ..PatchParams::default() };
    request(api.patch_status(&answer.name, &params, &Patch::Merge(&patch))).await
}

/// The conditions that were there, and ours. Its time is that of the last change of its status.
fn with_accepted(answer: &Answer, now: SystemTime) -> Vec<Value> {
    let (status, reason) = if answer.verdict.error.is_none() { ("True", "Valid") } else { ("False", "Invalid") };
    let before = answer.conditions.iter().find(|condition| condition["type"] == ACCEPTED);
    let since =
        before.filter(|before| before["status"] == status).and_then(|before| before["lastTransitionTime"].as_str());
    let since = since.map_or_else(|| humantime::format_rfc3339_seconds(now).to_string(), str::to_owned);
    let message =
        answer.verdict.error.as_deref().unwrap_or("the policy is in force on the nodes whose agents have read it");
    let others = answer.conditions.iter().filter(|condition| condition["type"] != ACCEPTED).cloned();
    let accepted = json!({
        "type": ACCEPTED, "status": status, "reason": reason, "message": message,
        "observedGeneration": answer.generation, "lastTransitionTime": since,
    });
    others.chain([accepted]).collect()
}

async fn create_event(client: &Client, node: &str, answer: &Answer) -> Result<(), String> {
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("events.k8s.io", "v1", "Event"));
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &answer.namespace, &resource);
    request(api.create(&PostParams::default(), &event(node, answer, SystemTime::now()))).await
}

/// Of the same name on every node, so that there is one.
fn event(node: &str, answer: &Answer, now: SystemTime) -> DynamicObject {
    const LONGEST_NOTE: usize = 1000;
    let Answer { verdict, namespace, name, uid, stamp, .. } = answer;
    let error = verdict.error.as_deref().unwrap_or_default();
    let digest = hexadecimal(&Sha256::digest(format!("{stamp} {error}"))[..8]);
    // Names have at most 253 characters.
    let shortened: String = name.chars().take(200).collect();
    let mut note: String = error.to_owned();
    while note.len() > LONGEST_NOTE {
        note.pop();
    }
    let data = json!({
        "eventTime": humantime::format_rfc3339_micros(now).to_string(),
        "reportingController": REPORTER, "reportingInstance": node,
        "action": "Validate", "reason": "Invalid", "type": "Warning", "note": note,
        "regarding": {
            "apiVersion": verdict.kind.api_version(), "kind": verdict.kind.as_str(), "namespace": namespace, "name": name, "uid": uid,
        },
    });
    let mut event = DynamicObject {
        types: Some(TypeMeta { api_version: "events.k8s.io/v1".to_owned(), kind: "Event".to_owned() }),
        metadata: kube::api::ObjectMeta::default(),
        data,
    };
    (event.metadata.name, event.metadata.namespace) = (Some(format!("{shortened}.{digest}")), Some(namespace.clone()));
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(error: Option<&str>, conditions: Vec<Value>) -> Answer {
        Answer {
            verdict: Verdict { kind: Kind::EgressPolicy, error: error.map(str::to_owned) },
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            uid: "u".to_owned(),
            generation: 3,
            stamp: "u 3".to_owned(),
            conditions,
        }
    }

    #[test]
    fn conditions_of_others_stay_and_the_time_is_that_of_the_last_change() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let others = json!({ "type": "Other", "status": "True" });
        let first = with_accepted(&answer(None, vec![others.clone()]), at(0));
        assert_eq!((first.len(), &first[0], &first[1]["status"]), (2, &others, &json!("True")));
        let same = with_accepted(&answer(None, first.clone()), at(99));
        assert_eq!((same.len(), &same[1]["lastTransitionTime"]), (2, &json!("1970-01-01T00:00:00Z")));
        let changed = with_accepted(&answer(Some("spec: bad"), same), at(99));
        assert_eq!(changed[1]["lastTransitionTime"], "1970-01-01T00:01:39Z");
        assert_eq!((&changed[1]["message"], &changed[1]["observedGeneration"]), (&json!("spec: bad"), &json!(3)));
    }

    #[test]
    fn every_node_names_an_event_alike() {
        let now = SystemTime::UNIX_EPOCH;
        let (one, other) = (answer(Some("bad"), Vec::new()), answer(Some("worse"), Vec::new()));
        assert_eq!(event("a", &one, now).name_any(), event("b", &one, now).name_any());
        assert_ne!(event("a", &one, now).name_any(), event("a", &other, now).name_any());
        let long = Answer { name: "x".repeat(253), ..answer(Some(&"é".repeat(5000)), Vec::new()) };
        let event = event("a", &long, now);
        assert!(event.name_any().len() <= 253 && event.data["note"].as_str().unwrap().len() <= 1000);
    }
}
