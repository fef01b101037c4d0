//! The objects of the cluster: one resource version counter, and the history that watches replay.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::InvalidObject;
use super::resource::Kind;

/// Changes remembered before the oldest is forgotten; more than any test or bench makes between two watches.
const HISTORY: usize = 100_000;

/// Shared, ordered storage of JSON objects.
#[derive(Debug)]
pub(super) struct Store {
    /// Everything a lock protects.
    inner: Mutex<Inner>,
    /// The latest version; watches wait on it.
    version: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The last resource version given out.
    version: u64,
    /// Current objects.
    objects: BTreeMap<Key, Arc<Value>>,
    /// Changes in version order.
    history: VecDeque<Change>,
    /// A new watch from before this version is answered with 410.
    oldest: u64,
    /// What ends with an object, by its uid; of those somebody has asked for.
    lifetimes: BTreeMap<String, CancellationToken>,
}

/// The identity of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// Kind of the object.
    pub(super) kind: Kind,
    /// Empty for cluster-scoped kinds.
    pub(super) namespace: String,
    /// Object name.
    pub(super) name: String,
}

/// One write.
#[derive(Clone, Debug)]
pub(super) struct Change {
    /// Resource version the write got.
    pub(super) version: u64,
    /// What was written.
    pub(super) key: Key,
    /// The object before, absent for a creation.
    pub(super) before: Option<Arc<Value>>,
    /// The object after, absent for a deletion.
    pub(super) after: Option<Arc<Value>>,
}

impl Store {
    /// An empty store. Versions start above 1 so that "older than everything" can be expressed.
    pub(super) fn new() -> Self {
        Self {
            inner: Mutex::new(Inner {
                version: 1,
                ..Inner::default()
            }),
            version: watch::Sender::new(1),
        }
    }

    /// Creates or replaces an object; fills in what a server fills in.
    pub(super) fn apply(&self, mut object: Value) -> Result<Arc<Value>, InvalidObject> {
        let key = Key::of(&object)?;
        let mut inner = self.lock();
        if key.kind.namespaced() {
            inner.ensure_namespace(&key.namespace);
            object["metadata"]["namespace"] = key.namespace.as_str().into();
        }
        let stored = inner.write(key, object);
        self.announce(&inner);
        Ok(stored)
    }

    /// Changes an existing object in place; false when there is none.
    pub(super) fn update(&self, key: &Key, change: impl FnOnce(&mut Value)) -> bool {
        let mut inner = self.lock();
        let Some(current) = inner.objects.get(key) else {
            return false;
        };
        let mut object = Value::clone(current);
        change(&mut object);
        if object != **current {
            inner.write(key.clone(), object);
            self.announce(&inner);
        }
        true
    }

    /// Removes an object and returns its last state.
    pub(super) fn delete(&self, key: &Key) -> Option<Arc<Value>> {
        let mut inner = self.lock();
        let before = inner.objects.remove(key)?;
        inner.version += 1;
        let change = Change {
            version: inner.version,
            key: key.clone(),
            before: Some(before.clone()),
            after: None,
        };
        inner.remember(change);
        self.announce(&inner);
        Some(before)
    }

    /// The current object.
    pub(super) fn get(&self, key: &Key) -> Option<Arc<Value>> {
        self.lock().objects.get(key).cloned()
    }

    /// What is cancelled when the object that has this name now goes: it is removed, or another takes its name.
    pub(super) fn lifetime(&self, key: &Key) -> Option<CancellationToken> {
        let mut inner = self.lock();
        let uid = uid(inner.objects.get(key)?)?.to_owned();
        Some(inner.lifetimes.entry(uid).or_default().clone())
    }

    /// All objects of a kind, in one or all namespaces, with the version they are valid at.
    pub(super) fn list(&self, kind: Kind, namespace: Option<&str>) -> (Vec<Arc<Value>>, u64) {
        let inner = self.lock();
        let wanted = |key: &Key| key.kind == kind && namespace.is_none_or(|ns| key.namespace == ns);
        let items = inner
            .objects
            .iter()
            .filter(|(key, _)| wanted(key))
            .map(|(_, object)| object.clone());
        (items.collect(), inner.version)
    }

    /// Changes after `version`, and the version they reach.
    pub(super) fn since(&self, version: u64) -> (Vec<Change>, u64) {
        let inner = self.lock();
        let start = inner.history.partition_point(|change| change.version <= version);
        (inner.history.range(start..).cloned().collect(), inner.version)
    }

    /// Tells whether a watch may start at `version`; the error is the oldest version that may.
    pub(super) fn can_watch_from(&self, version: u64) -> Result<(), u64> {
        let oldest = self.lock().oldest;
        if version < oldest { Err(oldest) } else { Ok(()) }
    }

    /// Forgets history for watches that start from now on; running ones have read it already.
    pub(super) fn compact(&self) {
        let mut inner = self.lock();
        // A write of its own, as etcd's compaction is never at the newest revision a client can have seen.
        inner.version += 1;
        inner.oldest = inner.version;
        self.announce(&inner);
    }

    /// Wakes on every write.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    fn announce(&self, inner: &MutexGuard<'_, Inner>) {
        self.version.send_replace(inner.version);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn write(&mut self, key: Key, mut object: Value) -> Arc<Value> {
        self.version += 1;
        let before = self.objects.get(&key).cloned();
        object["kind"] = key.kind.name().into();
        object["apiVersion"] = key.kind.api_version().into();
        let kept = |field: &str| before.as_ref().map(|old| old["metadata"][field].clone());
        let meta = &mut object["metadata"];
        if meta["uid"].is_null() {
            meta["uid"] = kept("uid").unwrap_or_else(|| new_uid().into());
        }
        if meta["creationTimestamp"].is_null() {
            meta["creationTimestamp"] = kept("creationTimestamp").unwrap_or_else(|| now().into());
        }
        meta["resourceVersion"] = self.version.to_string().into();
        let stored = Arc::new(object);
        self.objects.insert(key.clone(), stored.clone());
        self.remember(Change {
            version: self.version,
            key,
            before,
            after: Some(stored.clone()),
        });
        stored
    }

    fn ensure_namespace(&mut self, name: &str) {
        let key = Key {
            kind: Kind::Namespace,
            namespace: String::new(),
            name: name.to_owned(),
        };
        if !self.objects.contains_key(&key) {
            let labels = json!({"kubernetes.io/metadata.name": name});
            let object = json!({"metadata": {"name": name, "labels": labels}, "status": {"phase": "Active"}});
            self.write(key, object);
        }
    }

    fn remember(&mut self, change: Change) {
        let before = change.before.as_deref().and_then(uid);
        if before != change.after.as_deref().and_then(uid)
            && let Some(lifetime) = before.and_then(|uid| self.lifetimes.remove(uid))
        {
            lifetime.cancel();
        }
        self.history.push_back(change);
        if self.history.len() > HISTORY
            && let Some(forgotten) = self.history.pop_front()
        {
            self.oldest = self.oldest.max(forgotten.version);
        }
    }
}

impl Key {
    /// Names an object; the namespace is dropped for cluster-scoped kinds.
    pub(super) fn new(kind: Kind, namespace: &str, name: &str) -> Self {
        let namespace = if kind.namespaced() { namespace } else { "" };
        Self {
            kind,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    fn of(object: &Value) -> Result<Self, InvalidObject> {
        let kind = object["kind"].as_str().unwrap_or_default();
        let kind = Kind::from_name(kind).ok_or_else(|| InvalidObject::UnknownKind(kind.to_owned()))?;
        let meta = &object["metadata"];
        let name = meta["name"]
            .as_str()
            .filter(|name| !name.is_empty())
            .ok_or(InvalidObject::NoName)?;
        Ok(Self::new(
            kind,
            meta["namespace"].as_str().unwrap_or("default"),
            name,
        ))
    }
}

fn uid(object: &Value) -> Option<&str> {
    object["metadata"]["uid"].as_str()
}

/// A random identifier in the form of a version 4 UUID.
pub(super) fn new_uid() -> String {
    let bits = fastrand::u128(..) & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

/// The present, to the second, as `metadata.creationTimestamp` has it.
pub(super) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str) -> Value {
        json!({"kind": "Service", "metadata": {"name": name, "namespace": "shop"}})
    }

    #[test]
    fn a_replaced_object_keeps_uid_and_creation_time() {
        let store = Store::new();
        let first = store.apply(service("web")).unwrap();
        let second = store.apply(service("web")).unwrap();
        assert_eq!(first["metadata"]["uid"], second["metadata"]["uid"]);
        assert_eq!(
            first["metadata"]["creationTimestamp"],
            second["metadata"]["creationTimestamp"]
        );
        assert_ne!(
            first["metadata"]["resourceVersion"],
            second["metadata"]["resourceVersion"]
        );
    }

    #[test]
    fn history_after_a_version_is_replayed_in_order() {
        let store = Store::new();
        store.apply(service("a")).unwrap();
        let (_, version) = store.list(Kind::Service, None);
        store.apply(service("b")).unwrap();
        store.delete(&Key::new(Kind::Service, "shop", "a"));
        let (changes, reached) = store.since(version);
        let names: Vec<_> = changes.iter().map(|change| change.key.name.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(reached, version + 2);
    }

    #[test]
    fn compaction_ends_watching_from_the_past() {
        let store = Store::new();
        store.apply(service("a")).unwrap();
        let (_, version) = store.list(Kind::Service, None);
        store.compact();
        assert!(store.can_watch_from(version).is_err());
        let (_, version) = store.list(Kind::Service, None);
        assert!(store.can_watch_from(version).is_ok());
    }

    #[test]
    fn an_object_lives_until_it_is_removed_or_another_has_its_name() {
        let store = Store::new();
        let key = Key::new(Kind::Service, "shop", "web");
        assert!(store.lifetime(&key).is_none());
        store.apply(service("web")).unwrap();
        let first = store.lifetime(&key).unwrap();
        store.apply(service("web")).unwrap();
        assert!(!first.is_cancelled());

        let mut other = service("web");
        other["metadata"]["uid"] = "another".into();
        store.apply(other).unwrap();
        assert!(first.is_cancelled());
        let second = store.lifetime(&key).unwrap();
        assert!(!second.is_cancelled());
        store.delete(&key);
        assert!(second.is_cancelled());
    }

    #[test]
    fn objects_of_unknown_kind_are_refused() {
        assert!(
            Store::new()
                .apply(json!({"kind": "Gizmo", "metadata": {"name": "x"}}))
                .is_err()
        );
        assert!(
            Store::new()
                .apply(json!({"kind": "Pod", "metadata": {}}))
                .is_err()
        );
    }
}
