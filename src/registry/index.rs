//! The index of Services in use: one writer, any number of readers, and the interests that flow the other way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::name::ServiceName;
use crate::registry::View;

/// How often a waiting reader repeats its interest. It matters only when the writer dropped the entry at the very moment
/// the reader asked for it, so it need not be quick.
const REPEAT: Duration = Duration::from_secs(1);

/// What readers ask of whoever writes the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interest {
    /// Look the Service up and follow it.
    Follow(ServiceName),
    /// Look again soon: what is known of the Service proved wrong.
    Recheck(ServiceName),
}

/// What kept a lookup from an answer, and so what the user can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LookupErrorKind {
    /// There is no such Service.
    NotFound,
    /// The user may not see it (RBAC).
    Forbidden,
    /// The credentials are missing, wrong or expired.
    Unauthorized,
    /// The API server does not answer, or answers with an error of its own.
    Unavailable,
    /// No answer came in time.
    Timeout,
}

/// A lookup that failed, in words for the user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LookupError {
    /// What kind of failure it is.
    pub kind: LookupErrorKind,
    /// The API server's own words where there are any.
    pub message: String,
}

/// One Service in the index.
#[derive(Debug)]
struct Entry {
    /// The last answer; nothing before the first.
    answer: Option<Result<Arc<View>, LookupError>>,
    /// The last passing failure since then, to explain a wait that ran out.
    trouble: Option<LookupError>,
    /// When somebody last asked, in milliseconds since the index was made.
    used: AtomicU64,
}

/// What is known of one Service, for whoever wants to see it all.
#[derive(Debug, Clone)]
pub struct Known {
    /// The Service.
    pub service: ServiceName,
    /// The last answer; nothing before the first.
    pub answer: Option<Result<Arc<View>, LookupError>>,
    /// For how long nobody asked for it.
    pub idle: Duration,
}

type Entries = BTreeMap<ServiceName, Entry>;

/// Reads the index and registers interests. Clones share one index.
#[derive(Debug, Clone)]
pub struct Registry {
    /// The index as last written.
    entries: watch::Receiver<Entries>,
    /// Where interests go.
    interests: mpsc::UnboundedSender<Interest>,
    /// The zero of [`Entry::used`].
    epoch: Instant,
    /// How long a reader waits for a first answer.
    patience: Duration,
}

/// Writes the index; there is exactly one.
#[derive(Debug)]
pub struct Writer {
    /// The index.
    entries: watch::Sender<Entries>,
    /// The zero of [`Entry::used`].
    epoch: Instant,
}

/// Makes an empty index. `patience` bounds how long [`Registry::resolve`] waits.
#[must_use]
pub fn channel(patience: Duration) -> (Registry, Writer, mpsc::UnboundedReceiver<Interest>) {
    let (sender, receiver) = watch::channel(Entries::new());
    let (interests, served) = mpsc::unbounded_channel();
    let epoch = Instant::now();
    let registry = Registry {
        entries: receiver,
        interests,
        epoch,
        patience,
    };
    (
        registry,
        Writer {
            entries: sender,
            epoch,
        },
        served,
    )
}

impl Registry {
    /// Returns what is known of `service`, after a lookup if nobody asked before. Readers that ask at the same time share
    /// one lookup. Cancel-safe.
    ///
    /// # Errors
    /// The [`LookupError`] of the lookup, or one of kind `Timeout` when the first answer does not come in time; it then
    /// carries the reason of the last try.
    pub async fn resolve(&self, service: &ServiceName) -> Result<Arc<View>, LookupError> {
        if let Some(answer) = self.answer(service) {
            return answer;
        }
        match tokio::time::timeout(self.patience, self.first_answer(service)).await {
            Ok(answer) => answer,
            Err(_) => Err(self.timed_out(service)),
        }
    }

    /// Says that what is known of `service` proved wrong, a pod that is gone for instance. It matters where changes are not
    /// watched but polled.
    pub fn recheck(&self, service: &ServiceName) {
        // Nobody serves interests any more during shutdown.
        let _ = self.interests.send(Interest::Recheck(service.clone()));
    }

    /// Waits until what is known of a Service is no longer `seen`. Cancel-safe.
    pub async fn changed(&self, seen: &Arc<View>) {
        let mut entries = self.entries.clone();
        let same = |answer: &Option<Result<Arc<View>, LookupError>>| matches!(answer, Some(Ok(view)) if Arc::ptr_eq(view, seen));
        let changed = entries.wait_for(|entries| {
            entries
                .get(&seen.service.name)
                .is_none_or(|entry| !same(&entry.answer))
        });
        let nobody_writes = changed.await.is_err();
        if nobody_writes {
            std::future::pending().await // shutdown; the caller has a deadline
        }
    }

    /// Lists what is known, without counting that as a use.
    #[must_use]
    pub fn known(&self) -> Vec<Known> {
        let entries = self.entries.borrow();
        let known = entries.iter().map(|(service, entry)| Known {
            service: service.clone(),
            answer: entry.answer.clone(),
            idle: since(self.epoch, entry.used.load(Ordering::Relaxed)),
        });
        known.collect()
    }

    /// Returns the answer that is there already, and notes that it was used.
    fn answer(&self, service: &ServiceName) -> Option<Result<Arc<View>, LookupError>> {
        let entries = self.entries.borrow();
        let entry = entries.get(service)?;
        entry.used.store(elapsed(self.epoch), Ordering::Relaxed);
        entry.answer.clone()
    }

    async fn first_answer(&self, service: &ServiceName) -> Result<Arc<View>, LookupError> {
        let mut entries = self.entries.clone();
        loop {
            // Nobody serves interests any more during shutdown; the wait then ends with the caller's deadline.
            let _ = self.interests.send(Interest::Follow(service.clone()));
            let answered =
                entries.wait_for(|entries| entries.get(service).is_some_and(|entry| entry.answer.is_some()));
            if let Ok(Err(_)) = tokio::time::timeout(REPEAT, answered).await {
                return Err(LookupError {
                    kind: LookupErrorKind::Unavailable,
                    message: "kube-tunnel is shutting down".into(),
                });
            }
            if let Some(answer) = self.answer(service) {
                return answer;
            }
        }
    }

    fn timed_out(&self, service: &ServiceName) -> LookupError {
        let trouble = self
            .entries
            .borrow()
            .get(service)
            .and_then(|entry| entry.trouble.clone());
        trouble.unwrap_or_else(|| LookupError {
            kind: LookupErrorKind::Timeout,
            message: format!(
                "the API server gave no answer about service {service} within {:?}",
                self.patience
            ),
        })
    }
}

impl Writer {
    /// Makes an entry without an answer, so that its use is counted from now on.
    pub fn begin(&self, service: &ServiceName) {
        let used = AtomicU64::new(elapsed(self.epoch));
        let entry = Entry {
            answer: None,
            trouble: None,
            used,
        };
        self.entries
            .send_modify(|entries| drop(entries.insert(service.clone(), entry)));
    }

    /// Sets the answer that readers get from now on.
    pub fn answer(&self, service: &ServiceName, answer: Result<View, LookupError>) {
        self.entries.send_modify(|entries| {
            if let Some(entry) = entries.get_mut(service) {
                let served = matches!(&entry.answer, Some(Ok(before)) if before.served);
                entry.answer = Some(answer.map(|mut view| {
                    view.served = served || view.endpoints.iter().any(|endpoint| view.serves(endpoint));
                    Arc::new(view)
                }));
                entry.trouble = None;
            }
        });
    }

    /// Notes a passing failure. Readers that have an answer keep it; the others learn the reason if their wait runs out.
    pub fn trouble(&self, service: &ServiceName, error: LookupError) {
        self.entries.send_modify(|entries| {
            if let Some(entry) = entries.get_mut(service) {
                entry.trouble = Some(error);
            }
        });
    }

    /// Forgets a Service.
    pub fn remove(&self, service: &ServiceName) {
        self.entries.send_modify(|entries| drop(entries.remove(service)));
    }

    /// Reports whether there is an entry for `service`, answered or not.
    #[must_use]
    pub fn has(&self, service: &ServiceName) -> bool {
        self.entries.borrow().contains_key(service)
    }

    /// Finds among the Services that `eligible` accepts the one whose answer is an error and that nobody asked for in the
    /// longest time.
    #[must_use]
    pub fn idlest_error(&self, eligible: impl Fn(&ServiceName) -> bool) -> Option<ServiceName> {
        let entries = self.entries.borrow();
        let errors = entries
            .iter()
            .filter(|(service, entry)| matches!(entry.answer, Some(Err(_))) && eligible(service));
        let idlest = errors.min_by_key(|(_, entry)| entry.used.load(Ordering::Relaxed))?;
        Some(idlest.0.clone())
    }

    /// Returns for how long nobody asked for `service`.
    #[must_use]
    pub fn idle(&self, service: &ServiceName) -> Duration {
        let entries = self.entries.borrow();
        let used = entries
            .get(service)
            .map_or(0, |entry| entry.used.load(Ordering::Relaxed));
        since(self.epoch, used)
    }
}

/// For how long nothing happened since `used`, in milliseconds since `epoch`.
fn since(epoch: Instant, used: u64) -> Duration {
    Duration::from_millis(elapsed(epoch).saturating_sub(used))
}

fn elapsed(epoch: Instant) -> u64 {
    u64::try_from(epoch.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "the runtime of a test ends with it, and every task too"
)]
mod tests {
    use super::*;
    use crate::registry::{Service, ServiceKind};

    fn name() -> ServiceName {
        ServiceName::new("default", "web").unwrap()
    }

    fn view() -> View {
        let service = Service {
            name: name(),
            kind: ServiceKind::Virtual,
            ports: vec![],
            has_selector: true,
            publish_not_ready: false,
            affinity: None,
        };
        View {
            service,
            endpoints: vec![],
            podless: vec![],
            served: false,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn readers_that_wait_get_the_first_answer() {
        let (registry, writer, mut interests) = channel(Duration::from_secs(5));
        let reader = registry.clone();
        let waiting = tokio::spawn(async move { reader.resolve(&name()).await });
        assert_eq!(interests.recv().await, Some(Interest::Follow(name())));
        writer.begin(&name());
        writer.answer(&name(), Ok(view()));
        assert_eq!(waiting.await.unwrap().unwrap().service.name, name());
        registry.resolve(&name()).await.unwrap();
        assert!(
            interests.try_recv().is_err(),
            "a known service was asked for again"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_that_runs_out_tells_the_last_trouble() {
        let (registry, writer, _interests) = channel(Duration::from_secs(5));
        writer.begin(&name());
        let down = LookupError {
            kind: LookupErrorKind::Unavailable,
            message: "connection refused".into(),
        };
        writer.trouble(&name(), down.clone());
        assert_eq!(registry.resolve(&name()).await.unwrap_err(), down);
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_dropped_while_a_reader_waits_is_asked_for_again() {
        let (registry, writer, mut interests) = channel(Duration::from_secs(5));
        let waiting = tokio::spawn(async move { registry.resolve(&name()).await });
        interests.recv().await.unwrap();
        writer.begin(&name());
        writer.remove(&name());
        assert_eq!(interests.recv().await, Some(Interest::Follow(name())));
        writer.begin(&name());
        writer.answer(&name(), Ok(view()));
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn use_resets_the_idle_time() {
        let (registry, writer, _interests) = channel(Duration::from_secs(5));
        writer.begin(&name());
        writer.answer(&name(), Ok(view()));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(writer.idle(&name()).as_secs(), 60);
        registry.resolve(&name()).await.unwrap();
        assert_eq!(writer.idle(&name()).as_secs(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_idlest_error_is_no_view_and_no_lookup_under_way() {
        let (registry, writer, _interests) = channel(Duration::from_secs(5));
        let names =
            ["view", "waits", "used", "idle", "other"].map(|n| ServiceName::new("default", n).unwrap());
        let [view_, _, used, idle, other] = &names;
        for name in &names {
            writer.begin(name);
        }
        let error = LookupError {
            kind: LookupErrorKind::NotFound,
            message: "not found".into(),
        };
        writer.answer(view_, Ok(view()));
        for name in [used, idle, other] {
            writer.answer(name, Err(error.clone()));
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        drop(registry.resolve(used).await);
        assert_eq!(writer.idlest_error(|name| name != other).as_ref(), Some(idle));
        assert_eq!(writer.idlest_error(|name| name == view_), None);
    }
}
