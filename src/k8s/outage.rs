//! What keeps a Service from being followed, from the first failure to the next success: so that it is told once, and that a
//! view does not stand for ever when the user has lost the right to see it.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::registry::{LookupError, LookupErrorKind};

/// How long the last view stands when the API server refuses to tell more. Credentials that are being renewed, or a role that
/// is being replaced, take less.
const GRACE: Duration = Duration::from_secs(30);

/// What is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    /// The Service itself.
    Service,
    /// Where its endpoints are read.
    Endpoints,
}

/// The sources that fail now.
#[derive(Debug, Default)]
pub(super) struct Outage(BTreeMap<Source, Failing>);

#[derive(Debug)]
struct Failing {
    error: LookupError,
    /// Since when the failure is a refusal, which no waiting ends; nothing while the server is in trouble itself.
    refused: Option<Instant>,
}

impl Outage {
    /// Notes a failure. Returns whether it begins the outage.
    pub(super) fn failed(&mut self, source: Source, error: LookupError, now: Instant) -> bool {
        let begins = self.0.is_empty();
        let passing = matches!(
            error.kind,
            LookupErrorKind::Unavailable | LookupErrorKind::Timeout
        );
        let before = self.0.get(&source).and_then(|failing| failing.refused);
        let refused = (!passing).then(|| before.unwrap_or(now));
        self.0.insert(source, Failing { error, refused });
        begins
    }

    /// Notes a success. Returns whether it ends the outage.
    pub(super) fn recovered(&mut self, source: Source) -> bool {
        self.0.remove(&source).is_some() && self.0.is_empty()
    }

    /// Returns when the last view stops to stand, and the error that takes its place.
    pub(super) fn verdict(&self) -> Option<(Instant, &LookupError)> {
        self.0
            .values()
            .filter_map(|failing| Some((failing.refused? + GRACE, &failing.error)))
            .min_by_key(|(time, _)| *time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(kind: LookupErrorKind) -> LookupError {
        LookupError {
            kind,
            message: format!("{kind:?}"),
        }
    }

    #[test]
    fn only_the_first_failure_begins_and_only_the_last_success_ends_an_outage() {
        let now = Instant::now();
        let mut outage = Outage::default();
        assert!(!outage.recovered(Source::Service));
        let down = || error(LookupErrorKind::Unavailable);
        assert!(outage.failed(Source::Service, down(), now));
        assert!(!outage.failed(Source::Endpoints, down(), now));
        assert!(!outage.failed(Source::Service, down(), now));
        assert!(!outage.recovered(Source::Service));
        assert!(outage.recovered(Source::Endpoints));
        assert!(outage.failed(Source::Service, down(), now));
    }

    #[test]
    fn a_refusal_counts_from_its_first_time_and_a_server_in_trouble_never() {
        let now = Instant::now();
        let later = |seconds| now + Duration::from_secs(seconds);
        let mut outage = Outage::default();
        outage.failed(Source::Service, error(LookupErrorKind::Unavailable), now);
        assert_eq!(outage.verdict(), None);
        let forbidden = error(LookupErrorKind::Forbidden);
        outage.failed(Source::Service, forbidden.clone(), later(1));
        outage.failed(Source::Service, forbidden.clone(), later(5));
        outage.failed(Source::Endpoints, error(LookupErrorKind::Unauthorized), later(6));
        assert_eq!(outage.verdict(), Some((later(1) + GRACE, &forbidden)));
        outage.failed(Source::Service, error(LookupErrorKind::Unavailable), later(7));
        outage.recovered(Source::Endpoints);
        assert_eq!(outage.verdict(), None);
    }
}
