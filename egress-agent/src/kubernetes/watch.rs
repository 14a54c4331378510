//! One kind of object, listed and then watched for as long as the agent runs.
//!
//! 1. All objects are listed, in pages, and replace what was known.
//! 2. Changes are watched from the version of the list; bookmarks bring the version forward where nothing changes.
//! 3. A watch that ends is begun again where it ended. Where the server has forgotten that version (`410 Gone`), or says what
//!    cannot be read, all is listed again.
//! 4. After an error, what was known stays, and the next attempt waits longer each time.
//!
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes>

use std::{fmt::Debug, pin::pin, time::Duration};

use futures_util::{Stream, StreamExt as _};
use kube::{
    Api, Error, Resource,
    api::{ListParams, WatchEvent, WatchParams},
};
use serde::de::DeserializeOwned;
use thiserror::Error as ThisError;
use tokio::time::{sleep, timeout};

use super::client::{SILENCE, explain, shortened};

/// Objects of one page of a list.
const PAGE: u32 = 500;
/// How long a page of a list may take, and the beginning of a watch.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the server keeps a watch open, in seconds, and how much longer its silence is borne.
const WATCH_SECONDS: u32 = 240;
const GRACE: Duration = Duration::from_secs(10);
/// The shortest and the longest wait after an error.
const WAITS: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A watch that ends sooner, without a single event, is an error: whoever begins it again at once never rests.
const TOO_SOON: Duration = Duration::from_secs(1);

/// What becomes of what is watched.
pub(super) trait Sink<K> {
    /// These are all there are.
    fn replace(&mut self, objects: Vec<K>);
    /// This one is new, or has changed.
    fn apply(&mut self, object: K);
    /// This one is gone.
    fn delete(&mut self, object: K);
    /// Changes are being watched.
    fn connected(&mut self);
    /// They are not, for this reason.
    fn failed(&mut self, error: String);
}

/// Where the server has forgotten a version, or the answer cannot be read.
#[derive(Debug, ThisError)]
enum Failure {
    /// What changed since is not known any more.
    #[error("what changed meanwhile is not known to the server any more")]
    Gone,
    /// The request failed, or its answer.
    #[error("{}", explain(.0))]
    Request(#[from] Error),
    /// There was no answer.
    #[error("{SILENCE}")]
    Silent,
    /// The server ended the watch at once.
    #[error("the server ends every watch at once")]
    Ended,
    /// An object without a version.
    #[error("the server names no version to watch from")]
    NoVersion,
    /// The server told of an error within a watch.
    #[error("{0}")]
    Told(String),
}

/// The kind is not served (any more).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotServed;

/// Lists and watches until the server says that it does not serve this kind.
pub(super) async fn follow<K, S>(api: &Api<K>, selector: &Selector, sink: &mut S) -> NotServed
where
    K: Resource + Clone + DeserializeOwned + Debug,
    S: Sink<K>,
{
    let mut backoff = Backoff::default();
    let mut version = None;
    loop {
        let result = match version.take() {
            None => list(api, selector, sink).await.map(|listed| version = Some(listed)),
            Some(known) => watch(api, selector, sink, known, &mut version, &mut backoff).await,
        };
        match result {
            Ok(()) => {}
            Err(Failure::Gone) => {
                version = None;
                tracing::debug!(resource = api.resource_url(), "{}: listing again", Failure::Gone);
            }
            Err(Failure::Request(Error::Api(status))) if status.code == 404 => {
                sink.failed(explain(&Error::Api(status)));
                return NotServed;
            }
            Err(failure) => {
                if matches!(failure, Failure::Request(Error::SerdeError(_)) | Failure::NoVersion | Failure::Told(_)) {
                    version = None;
                }
                sink.failed(failure.to_string());
                sleep(backoff.next()).await;
            }
        }
    }
}

/// Which objects.
#[derive(Debug, Clone, Default)]
pub(super) struct Selector {
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
}

/// Hands on all there are; the version of the list.
async fn list<K, S>(api: &Api<K>, selector: &Selector, sink: &mut S) -> Result<String, Failure>
where
    K: Resource + Clone + DeserializeOwned + Debug,
    S: Sink<K>,
{
    let mut params = ListParams { limit: Some(PAGE), ..ListParams::default() };
    (params.label_selector, params.field_selector) = (selector.labels.clone(), selector.fields.clone());
    let mut objects = Vec::new();
    loop {
        let page = match timeout(PATIENCE, api.list(&params)).await {
            Ok(Err(Error::Api(status))) if status.code == 410 => return Err(Failure::Gone),
            Ok(page) => page?,
            Err(_) => return Err(Failure::Silent),
        };
        objects.extend(page.items);
        params.continue_token = page.metadata.continue_.filter(|token| !token.is_empty());
        if params.continue_token.is_none() {
            let version = page.metadata.resource_version.filter(|version| !version.is_empty());
            let version = version.ok_or(Failure::NoVersion)?;
            sink.replace(objects);
            return Ok(version);
        }
    }
}

/// Hands on changes from a version on, until the watch ends. The version that was reached is left in `reached`.
async fn watch<K, S>(
    api: &Api<K>,
    selector: &Selector,
    sink: &mut S,
    from: String,
    reached: &mut Option<String>,
    backoff: &mut Backoff,
) -> Result<(), Failure>
where
    K: Resource + Clone + DeserializeOwned + Debug,
    S: Sink<K>,
{
    let params = WatchParams {
        label_selector: selector.labels.clone(),
        field_selector: selector.fields.clone(),
        timeout: Some(WATCH_SECONDS),
        bookmarks: true,
        send_initial_events: false,
    };
    let version = reached.insert(from);
    let events = match timeout(PATIENCE, api.watch(&params, version)).await {
        Ok(Err(Error::Api(status))) if status.code == 410 => return Err(Failure::Gone),
        Ok(events) => events?,
        Err(_) => return Err(Failure::Silent),
    };
    sink.connected();
    let begun = tokio::time::Instant::now();
    let count = hand_on(events, sink, version).await?;
    if count == 0 && begun.elapsed() < TOO_SOON {
        return Err(Failure::Ended);
    }
    backoff.reset();
    Ok(())
}

/// How many events there were.
async fn hand_on<K, S>(
    events: impl Stream<Item = Result<WatchEvent<K>, Error>>,
    sink: &mut S,
    version: &mut String,
) -> Result<usize, Failure>
where
    K: Resource,
    S: Sink<K>,
{
    let mut events = pin!(events);
    let mut count = 0;
    loop {
        let silence = Duration::from_secs(WATCH_SECONDS.into()) + GRACE;
        let Ok(event) = timeout(silence, events.next()).await else { return Err(Failure::Silent) };
        let Some(event) = event else { return Ok(count) };
        count += 1;
        match event? {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                *version = version_of(&object)?;
                sink.apply(object);
            }
            WatchEvent::Deleted(object) => {
                *version = version_of(&object)?;
                sink.delete(object);
            }
            WatchEvent::Bookmark(bookmark) => version.clone_from(&bookmark.metadata.resource_version),
            WatchEvent::Error(status) if status.code == 410 => return Err(Failure::Gone),
            WatchEvent::Error(status) => {
                return Err(Failure::Told(shortened(&format!("{} {}", status.code, status.message))));
            }
        }
    }
}

fn version_of<K: Resource>(object: &K) -> Result<String, Failure> {
    object.meta().resource_version.clone().filter(|version| !version.is_empty()).ok_or(Failure::NoVersion)
}

/// Twice as long after each error, and never the same on two nodes.
#[derive(Debug, Default)]
struct Backoff {
    errors: u32,
}

impl Backoff {
    fn next(&mut self) -> Duration {
        let (shortest, longest) = WAITS;
        let wait = shortest.saturating_mul(1 << self.errors.min(10)).min(longest);
        self.errors += 1;
        // From a half to the whole.
        wait / 2 + wait.mul_f64(chance() / 2.0)
    }

    fn reset(&mut self) {
        self.errors = 0;
    }
}

/// From 0 to 1. It has to differ between nodes, and need not be hard to guess.
fn chance() -> f64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    f64::from((now.subsec_nanos() ^ std::process::id().wrapping_mul(0x9E37_79B9)) % 1_000_000) / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_bound_and_shrink_after_success() {
        let mut backoff = Backoff::default();
        let waits: Vec<Duration> = (0..20).map(|_| backoff.next()).collect();
        assert!(waits[0] >= WAITS.0 / 2 && waits[0] <= WAITS.0, "{waits:?}");
        assert!(waits.iter().all(|&wait| wait <= WAITS.1) && waits[19] >= WAITS.1 / 2, "{waits:?}");
        backoff.reset();
        assert!(backoff.next() <= WAITS.0);
    }
}
