//! Who a request comes from, and whether that user may do what it asks.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::resource::Target;

/// The user every new cluster knows, allowed to do everything.
pub(super) const ADMIN: &str = "kubernetes-admin";

/// How a kubeconfig proves who its user is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// A bearer token, known to the cluster through [`FakeCluster::add_token`](super::FakeCluster::add_token) or not.
    Token(String),
    /// A client certificate issued by the cluster's authority.
    ClientCertificate {
        /// User name: the certificate's common name.
        name: String,
        /// Group: the certificate's organization.
        group: Option<String>,
    },
}

/// A permission, in the terms of an RBAC rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Verbs such as `get`, or `*`.
    verbs: Vec<String>,
    /// Resources such as `pods/portforward`, or `*`.
    resources: Vec<String>,
    /// The only namespace it holds in; absent for the whole cluster.
    namespace: Option<String>,
}

impl Rule {
    /// Permits `verbs` on `resources` in the whole cluster.
    #[must_use]
    pub fn new(verbs: &[&str], resources: &[&str]) -> Self {
        let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        Self {
            verbs: owned(verbs),
            resources: owned(resources),
            namespace: None,
        }
    }

    /// Limits the rule to one namespace, as a RoleBinding does.
    #[must_use]
    pub fn in_namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    fn covers(&self, action: &Action) -> bool {
        let has = |words: &[String], word: &str| words.iter().any(|w| w == "*" || w == word);
        has(&self.verbs, &action.verb)
            && has(&self.resources, &action.resource)
            // A rule of one namespace never answers for all of them.
            && self.namespace.as_ref().is_none_or(|ns| Some(ns) == action.namespace.as_ref())
    }
}

/// What somebody wants to do, as far as rules look at it.
#[derive(Clone, Debug)]
pub(super) struct Action {
    /// RBAC verb.
    pub(super) verb: String,
    /// `pods`, `pods/portforward`.
    pub(super) resource: String,
    /// Absent for all namespaces.
    pub(super) namespace: Option<String>,
}

impl From<&Target> for Action {
    fn from(target: &Target) -> Self {
        let verb = target.verb.to_owned();
        Self {
            verb,
            resource: target.rbac_resource(),
            namespace: target.namespace.clone(),
        }
    }
}

/// Tokens, certificates and rules.
#[derive(Debug, Default)]
pub(super) struct Access {
    /// Everything a lock protects.
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Live bearer tokens and their users.
    tokens: HashMap<String, String>,
    /// Issued client certificates (DER) and their users. Issuing and looking up saves an X.509 parser: the TLS layer
    /// has already checked that the certificate comes from our authority.
    certificates: HashMap<Vec<u8>, String>,
    /// Denied requests; the first part is the user, absent for everybody.
    denied: Vec<(Option<String>, Rule)>,
    /// Users who may do only what their rules say.
    limited: BTreeMap<String, Vec<Rule>>,
    /// WebSocket upgrades of pods need `create` too.
    websockets_need_create: bool,
}

impl Access {
    /// Makes a token known.
    pub(super) fn add_token(&self, user: &str, token: &str) {
        self.lock().tokens.insert(token.to_owned(), user.to_owned());
    }

    /// Makes the certificates of a user old.
    pub(super) fn expire_certificates(&self, user: &str) {
        self.lock().certificates.retain(|_, owner| owner != user);
    }

    /// Forgets a token.
    pub(super) fn expire_token(&self, token: &str) {
        self.lock().tokens.remove(token);
    }

    /// Makes an issued certificate known.
    pub(super) fn add_certificate(&self, user: &str, der: &[u8]) {
        self.lock().certificates.insert(der.to_owned(), user.to_owned());
    }

    /// Denies what `rule` covers, to one user or everybody.
    pub(super) fn deny(&self, user: Option<&str>, rule: Rule) {
        self.lock().denied.push((user.map(str::to_owned), rule));
    }

    /// Limits a user to `rules`.
    pub(super) fn allow_only(&self, user: &str, rules: &[Rule]) {
        self.lock().limited.insert(user.to_owned(), rules.to_vec());
    }

    /// Demands `create` for WebSocket upgrades, or no longer.
    pub(super) fn require_create_for_websockets(&self, required: bool) {
        self.lock().websockets_need_create = required;
    }

    /// Whether WebSocket upgrades of pods need `create` too.
    pub(super) fn websockets_need_create(&self) -> bool {
        self.lock().websockets_need_create
    }

    /// Lifts every denial and limit.
    pub(super) fn allow_all(&self) {
        let mut inner = self.lock();
        inner.denied.clear();
        inner.limited.clear();
    }

    /// Names the user of a request; the error means credentials that do not count.
    ///
    /// As in a real server the certificate is asked before the token, and a bad token, or a certificate that has expired, is
    /// refused even if the path is open to anonymous users.
    pub(super) fn authenticate(
        &self,
        certificate: Option<&[u8]>,
        authorization: Option<&str>,
    ) -> Result<Option<String>, ()> {
        let inner = self.lock();
        if let Some(user) = certificate.and_then(|der| inner.certificates.get(der)) {
            return Ok(Some(user.clone()));
        }
        let Some(token) = authorization.and_then(|value| value.strip_prefix("Bearer ")) else {
            // The TLS layer lets no strangers' through.
            return certificate.map_or(Ok(None), |_| Err(()));
        };
        inner.tokens.get(token.trim()).cloned().map(Some).ok_or(())
    }

    /// Tells whether `user` may do what `action` says.
    pub(super) fn allows(&self, user: &str, action: &Action) -> bool {
        let inner = self.lock();
        let denied = inner
            .denied
            .iter()
            .any(|(who, rule)| who.as_ref().is_none_or(|who| who == user) && rule.covers(action));
        let limits = inner.limited.get(user);
        !denied && limits.is_none_or(|rules| rules.iter().any(|rule| rule.covers(action)))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Method;

    fn target(path: &str) -> Action {
        Action::from(&Target::parse(&Method::GET, path, false).unwrap())
    }

    #[test]
    fn a_rule_of_one_namespace_does_not_answer_for_the_cluster() {
        let access = Access::default();
        access.allow_only("dev", &[Rule::new(&["list"], &["pods"]).in_namespace("shop")]);
        assert!(access.allows("dev", &target("/api/v1/namespaces/shop/pods")));
        assert!(!access.allows("dev", &target("/api/v1/namespaces/bank/pods")));
        assert!(!access.allows("dev", &target("/api/v1/pods")));
        assert!(access.allows("other", &target("/api/v1/pods")));
    }

    #[test]
    fn a_denial_wins_over_everything() {
        let access = Access::default();
        access.deny(None, Rule::new(&["get"], &["services"]));
        assert!(!access.allows(ADMIN, &target("/api/v1/namespaces/shop/services/web")));
        assert!(access.allows(ADMIN, &target("/api/v1/namespaces/shop/services")));
    }
}
