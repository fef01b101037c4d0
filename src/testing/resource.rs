//! Which resources the double serves, and what a request path asks of them.

use http::Method;

/// A served kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// `v1` Namespace
    Namespace,
    /// `v1` Service
    Service,
    /// `v1` Pod
    Pod,
    /// `discovery.k8s.io/v1` EndpointSlice
    EndpointSlice,
}

impl Kind {
    /// Every served kind.
    pub(super) const ALL: [Self; 4] = [Self::Namespace, Self::Service, Self::Pod, Self::EndpointSlice];

    /// The `kind` field of an object.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Service => "Service",
            Self::Pod => "Pod",
            Self::EndpointSlice => "EndpointSlice",
        }
    }

    /// The lower-case plural of paths and RBAC rules.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Service => "services",
            Self::Pod => "pods",
            Self::EndpointSlice => "endpointslices",
        }
    }

    /// The API group; empty for the core group.
    pub(super) fn group(self) -> &'static str {
        match self {
            Self::EndpointSlice => "discovery.k8s.io",
            Self::Namespace | Self::Service | Self::Pod => "",
        }
    }

    /// The `apiVersion` field of an object.
    pub(super) fn api_version(self) -> &'static str {
        match self {
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::Namespace | Self::Service | Self::Pod => "v1",
        }
    }

    /// Whether objects of this kind live in a namespace.
    pub(super) fn namespaced(self) -> bool {
        self != Self::Namespace
    }

    /// `services`, or `endpointslices.discovery.k8s.io` as messages name a resource of a group.
    pub(super) fn qualified(self) -> String {
        match self.group() {
            "" => self.plural().to_owned(),
            group => format!("{}.{group}", self.plural()),
        }
    }

    /// Finds the kind by its name as objects spell it.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    fn from_plural(group: &str, plural: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.group() == group && kind.plural() == plural)
    }
}

/// What a resource request addresses, as the API server derives it from method and path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// The RBAC verb.
    pub(super) verb: &'static str,
    /// The addressed kind.
    pub(super) kind: Kind,
    /// `portforward`, `status`, …
    pub(super) subresource: Option<String>,
    /// Absent for all namespaces and for cluster-scoped kinds.
    pub(super) namespace: Option<String>,
    /// Absent for collections.
    pub(super) name: Option<String>,
}

impl Target {
    /// Reads a resource path; `None` when it is not the path of a served resource.
    ///
    /// The rules are those of `apiserver:pkg/endpoints/request/requestinfo.go`; a namespace object is inside itself
    /// for authorization.
    pub(super) fn parse(method: &Method, path: &str, watch: bool) -> Option<Self> {
        let steps: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, rest) = match steps.as_slice() {
            ["api", "v1", rest @ ..] => ("", rest),
            ["apis", "discovery.k8s.io", "v1", rest @ ..] => ("discovery.k8s.io", rest),
            _ => return None,
        };
        let (namespace, plural, name, subresource) = match rest {
            ["namespaces"] => (None, "namespaces", None, None),
            ["namespaces", name] => (Some(*name), "namespaces", Some(*name), None),
            ["namespaces", ns, plural] => (Some(*ns), *plural, None, None),
            ["namespaces", ns, plural, name] => (Some(*ns), *plural, Some(*name), None),
            ["namespaces", ns, plural, name, sub] => (Some(*ns), *plural, Some(*name), Some(*sub)),
            [plural] => (None, *plural, None, None),
            _ => return None,
        };
        let kind = Kind::from_plural(group, plural)?;
        let verb = match *method {
            Method::GET | Method::HEAD if name.is_some() => "get",
            Method::GET | Method::HEAD if watch => "watch",
            Method::GET | Method::HEAD => "list",
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if name.is_none() => "deletecollection",
            Method::DELETE => "delete",
            _ => return None,
        };
        Some(Self {
            verb,
            kind,
            subresource: subresource.map(str::to_owned),
            namespace: namespace.map(str::to_owned),
            name: name.map(str::to_owned),
        })
    }

    /// `pods` or `pods/portforward`, as RBAC rules name it.
    pub(super) fn rbac_resource(&self) -> String {
        match &self.subresource {
            Some(sub) => format!("{}/{sub}", self.kind.plural()),
            None => self.kind.plural().to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(method: &Method, path: &str, watch: bool) -> Option<(&'static str, String, Option<String>)> {
        Target::parse(method, path, watch).map(|t| (t.verb, t.rbac_resource(), t.namespace))
    }

    #[test]
    fn verbs_and_resources_are_those_of_rbac() {
        let shop = || Some("shop".to_owned());
        let pf = "/api/v1/namespaces/shop/pods/web/portforward";
        assert_eq!(
            parse(&Method::POST, pf, false),
            Some(("create", "pods/portforward".into(), shop()))
        );
        assert_eq!(
            parse(&Method::GET, pf, false),
            Some(("get", "pods/portforward".into(), shop()))
        );
        assert_eq!(
            parse(&Method::GET, "/api/v1/services", true),
            Some(("watch", "services".into(), None))
        );
        assert_eq!(
            parse(
                &Method::GET,
                "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices",
                false
            ),
            Some(("list", "endpointslices".into(), shop()))
        );
        assert_eq!(
            parse(&Method::GET, "/api/v1/namespaces/shop", false),
            Some(("get", "namespaces".into(), shop()))
        );
    }

    #[test]
    fn unknown_resources_have_no_target() {
        assert_eq!(parse(&Method::GET, "/api/v1/secrets", false), None);
        assert_eq!(parse(&Method::GET, "/apis/apps/v1/deployments", false), None);
        assert_eq!(parse(&Method::GET, "/version", false), None);
    }
}
