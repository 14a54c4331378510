//! What is asked of a name, and what comes back.

use std::{collections::BTreeSet, net::IpAddr, pin::Pin, sync::Arc, time::Duration};

/// Asks for the addresses of names. Each question ends by itself.
pub(super) trait Ask {
    /// Asks for both families. What is returned borrows nothing, so it may outlive whoever asks.
    fn ask(&self, name: Arc<str>) -> Asking;
}

/// A question that is under way.
pub(super) type Asking = Pin<Box<dyn Future<Output = Answers> + Send>>;

/// The answers to one question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answers {
    /// A records.
    pub(super) v4: Answer,
    /// AAAA records.
    pub(super) v6: Answer,
}

/// Of one family: that there are no such addresses is an answer too. What went wrong is for people only.
pub(super) type Answer = Result<Found, String>;

/// What an answer says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) addresses: BTreeSet<IpAddr>,
    /// How long that holds.
    pub(super) ttl: Duration,
}

/// How long the absence of a name is believed, however long its zone asks for it: whoever adds the record waits.
const ABSENCE: Duration = Duration::from_mins(5);

impl Answers {
    /// Nobody answered.
    pub(super) fn failed(error: &str) -> Self {
        Self { v4: Err(error.to_owned()), v6: Err(error.to_owned()) }
    }

    /// The answer that speaks of such an address.
    pub(super) const fn of(&self, address: IpAddr) -> &Answer {
        match address {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        }
    }

    /// The answers there are.
    pub(super) fn found(&self) -> impl Iterator<Item = &Found> {
        [&self.v4, &self.v6].into_iter().flatten()
    }

    /// How long they hold; `None` if there are none. A family without addresses does not shorten the other's time: many
    /// a server says nothing useful about records it does not have.
    pub(super) fn ttl(&self) -> Option<Duration> {
        let with_addresses = self.found().filter(|found| !found.addresses.is_empty()).map(|found| found.ttl).min();
        with_addresses.or_else(|| self.found().map(|found| found.ttl.min(ABSENCE)).min())
    }

    /// What went wrong, if anything did.
    pub(super) fn error(&self) -> Option<String> {
        match (&self.v4, &self.v6) {
            (Ok(_), Ok(_)) => None,
            (Err(a), Err(aaaa)) if a == aaaa => Some(a.clone()),
            (Err(a), Err(aaaa)) => Some(format!("A: {a}; AAAA: {aaaa}")),
            (Err(a), Ok(_)) => Some(format!("A: {a}")),
            (Ok(_), Err(aaaa)) => Some(format!("AAAA: {aaaa}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(addresses: &[&str], seconds: u64) -> Answer {
        let addresses = addresses.iter().map(|text| text.parse());
        let addresses = addresses.collect::<Result<_, _>>().map_err(|error| format!("{error}"))?;
        Ok(Found { addresses, ttl: Duration::from_secs(seconds) })
    }

    #[track_caller]
    fn check(v4: Answer, v6: Answer, expect: Option<u64>) {
        assert_eq!(Answers { v4, v6 }.ttl(), expect.map(Duration::from_secs));
    }

    #[test]
    fn the_smallest_ttl_of_a_family_with_addresses_counts() {
        check(found(&["192.0.2.1"], 60), found(&["2001:db8::1"], 30), Some(30));
        check(found(&["192.0.2.1"], 60), found(&[], 0), Some(60));
        check(found(&["192.0.2.1"], 60), Err("refused".into()), Some(60));
    }

    #[test]
    fn absence_is_believed_for_a_while_only() {
        check(found(&[], 20), found(&[], 86_400), Some(20));
        check(found(&[], 86_400), found(&[], 86_400), Some(300));
        check(Err("refused".into()), Err("refused".into()), None);
    }

    #[test]
    fn an_error_names_the_family_unless_both_failed_alike() {
        let error = |v4, v6| Answers { v4, v6 }.error();
        assert_eq!(error(found(&[], 1), found(&[], 1)), None);
        assert_eq!(Answers::failed("no").error().as_deref(), Some("no"));
        assert_eq!(error(Err("no".into()), found(&[], 1)).as_deref(), Some("A: no"));
        assert_eq!(error(found(&[], 1), Err("no".into())).as_deref(), Some("AAAA: no"));
        assert_eq!(error(Err("a".into()), Err("b".into())).as_deref(), Some("A: a; AAAA: b"));
    }
}
