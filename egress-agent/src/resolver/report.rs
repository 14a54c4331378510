//! What is known of names, for people and for `status`.

use std::{net::IpAddr, time::SystemTime};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::entry::{Entry, Phase};

/// What is known of a name: fields are only ever added to the shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameReport {
    /// The name.
    pub name: String,
    /// Its addresses, those included that left the answer a short while ago.
    pub addresses: Vec<IpAddr>,
    /// Where they are from.
    pub source: Source,
    /// When it is asked for again (RFC 3339); absent while it is asked for, and for names in the hosts file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// What went wrong the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Whether addresses are kept that nobody confirms any more.
    pub stale: bool,
}

/// Who says what addresses a name has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// The hosts file.
    Hosts,
    /// The DNS servers.
    Dns,
}

impl NameReport {
    /// Of one name, at a time that two clocks show.
    pub(super) fn new(entry: &Entry, now: Instant, clock: SystemTime) -> Self {
        let next = match entry.phase {
            Phase::Idle(at) => Some(clock + at.saturating_duration_since(now)),
            Phase::Hosts | Phase::Waiting | Phase::Asking => None,
        };
        Self {
            name: entry.name.to_string(),
            addresses: entry.addresses().into_iter().collect(),
            source: if entry.phase == Phase::Hosts { Source::Hosts } else { Source::Dns },
            next: next.map(|next| humantime::format_rfc3339_nanos(next).to_string()),
            error: entry.error.clone(),
            stale: entry.is_stale(),
        }
    }
}
