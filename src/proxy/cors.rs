//! Cross-origin requests of browsers (the Fetch standard's CORS protocol): a pure policy over the heads of messages.
//!
//! A backend's own answer wins. Where it has none, origins of an allow-list may read responses; a preflight is answered in
//! the backend's place only if the backend itself does not. Credentials are never allowed on a backend's behalf.

use std::fmt;
use std::str::FromStr;

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HeaderMap, HeaderValue, ORIGIN, VARY,
};
use http::{Method, Request, Response, Uri};

use crate::name::{ClusterDomain, Host, Naming};
use crate::proxy::http::headers as fields;

/// How long a browser may remember a preflight, in seconds: short, because the backend may begin to answer for itself.
const MAX_AGE: HeaderValue = HeaderValue::from_static("60");

/// Which origins may read the responses of backends that say nothing themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowOrigin {
    /// Pages of this machine and of the cluster: hosts that are `localhost`, loopback addresses or within the zone.
    Local,
    /// Every page of every site.
    Any,
    /// Exactly these origins (`https://app.example.com`); none at all if empty.
    List(Vec<String>),
}

impl FromStr for AllowOrigin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "local" => Ok(Self::Local),
            "*" => Ok(Self::Any),
            "none" => Ok(Self::List(Vec::new())),
            list => list
                .split(',')
                .map(|part| origin(part.trim()))
                .collect::<Result<_, _>>()
                .map(Self::List),
        }
    }
}

impl fmt::Display for AllowOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local"),
            Self::Any => f.write_str("*"),
            Self::List(list) if list.is_empty() => f.write_str("none"),
            Self::List(list) => f.write_str(&list.join(",")),
        }
    }
}

/// Accepts the serialization of an origin: a scheme and an authority, nothing behind it.
fn origin(text: &str) -> Result<String, String> {
    let wrong = || format!("{text:?} is no origin such as https://app.example.com");
    let uri: Uri = text.parse().map_err(|_| wrong())?;
    let bare = !text.ends_with('/') && uri.path() == "/" && uri.query().is_none();
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(wrong());
    };
    if !bare || authority.as_str().contains('@') {
        return Err(wrong());
    }
    // Browsers leave the usual port out (RFC 6454 section 6.2).
    let usual = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => "",
    };
    let text = text.to_ascii_lowercase();
    Ok(text.strip_suffix(usual).unwrap_or(&text).to_owned())
}

impl AllowOrigin {
    fn allows(&self, origin: &str, zone: &ClusterDomain) -> bool {
        match self {
            Self::Any => true,
            Self::List(list) => list.iter().any(|listed| listed.eq_ignore_ascii_case(origin)),
            Self::Local => is_local(origin, zone),
        }
    }
}

/// Reports whether an origin is a page of this machine or of the cluster. `null` (sandboxed frames, files) is neither.
fn is_local(origin: &str, zone: &ClusterDomain) -> bool {
    let Some(host) = origin
        .parse::<Uri>()
        .ok()
        .and_then(|uri| uri.host().map(str::to_ascii_lowercase))
    else {
        return false;
    };
    let loopback = host
        .trim_matches(['[', ']'])
        .parse::<std::net::IpAddr>()
        .map(|address| address.is_loopback());
    let naming = Naming {
        zone: zone.clone(),
        namespace: None,
    };
    match loopback {
        Ok(loopback) => loopback,
        // Of the short forms of a Service's name any could be a site of the Internet.
        Err(_) => match naming.parse(&host).map(|authority| authority.host) {
            Ok(Host::Own { .. }) => true,
            Ok(Host::Service { .. }) => host
                .trim_end_matches('.')
                .strip_suffix(zone.as_str())
                .is_some_and(|name| name.ends_with('.')),
            _ => false,
        },
    }
}

/// What a request's head says of CORS, and what that allows.
#[derive(Debug, Default)]
pub(super) struct Cors {
    /// The origin, if it may read the response.
    origin: Option<HeaderValue>,
    /// Whether the request has an origin at all: then the response depends on it.
    varies: bool,
    /// Whether every origin may.
    any: bool,
    /// What a preflight asks for.
    preflight: Option<Preflight>,
}

#[derive(Debug)]
struct Preflight {
    method: HeaderValue,
    headers: Option<HeaderValue>,
}

impl Cors {
    /// Reads a request's head.
    pub(super) fn of<B>(request: &Request<B>, policy: &AllowOrigin, zone: &ClusterDomain) -> Self {
        let Some(origin) = request.headers().get(ORIGIN) else {
            return Self::default();
        };
        let allowed = origin.to_str().is_ok_and(|origin| policy.allows(origin, zone));
        let asked = request
            .headers()
            .get(ACCESS_CONTROL_REQUEST_METHOD)
            .filter(|_| request.method() == Method::OPTIONS);
        Self {
            origin: Some(origin.clone()).filter(|_| allowed),
            varies: true,
            any: *policy == AllowOrigin::Any,
            preflight: asked.map(|method| Preflight {
                method: method.clone(),
                headers: request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS).cloned(),
            }),
        }
    }

    /// Reports whether the request comes from a page that may not read the response.
    pub(super) fn is_foreign(&self) -> bool {
        self.varies && self.origin.is_none()
    }

    /// Returns the fields of the answer to a preflight that the backend has no answer to, whatever else it said: an answer
    /// names an origin.
    pub(super) fn preflight(&self, backend: &HeaderMap) -> Option<HeaderMap> {
        let preflight = self.preflight.as_ref()?;
        if self.origin.is_none() || backend.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            return None;
        }
        let mut headers = HeaderMap::new();
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, preflight.method.clone());
        if let Some(asked) = &preflight.headers {
            headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, asked.clone());
        }
        headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
        Some(headers)
    }

    /// Completes a response that is about to go to the client.
    pub(super) fn complete<B>(self, mut response: Response<B>) -> Response<B> {
        if !self.varies || response.headers().contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            return response;
        }
        self.allow(response.headers_mut());
        response
    }

    fn allow(self, headers: &mut HeaderMap) {
        if self.any {
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        } else {
            // A cache must not give one origin's response to another.
            headers.append(VARY, HeaderValue::from_static("Origin"));
            let Some(origin) = self.origin else { return };
            headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        }
        // Where the backend lets no page read, it lets none read with credentials; our leave is not meant for those.
        fields::remove(headers, |name| name == ACCESS_CONTROL_ALLOW_CREDENTIALS);
        if self.preflight.is_none() {
            // gRPC-Web reads its status from headers, which scripts see only if they are exposed.
            headers
                .entry(ACCESS_CONTROL_EXPOSE_HEADERS)
                .or_insert(HeaderValue::from_static("*"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APP: &str = "https://app.example.com";

    fn request(method: &Method, origin: Option<&str>) -> Request<()> {
        let mut builder = Request::builder().method(method);
        if let Some(origin) = origin {
            builder = builder.header(ORIGIN, origin);
        }
        if *method == Method::OPTIONS {
            builder = builder
                .header(ACCESS_CONTROL_REQUEST_METHOD, "PUT")
                .header(ACCESS_CONTROL_REQUEST_HEADERS, "x-a, x-b");
        }
        builder.body(()).unwrap()
    }

    fn answer(
        policy: &str,
        request: &Request<()>,
        status: u16,
        headers: &[(&'static str, &'static str)],
    ) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = status.try_into().unwrap();
        for (name, value) in headers {
            response
                .headers_mut()
                .insert(*name, HeaderValue::from_static(value));
        }
        let policy = policy.parse().unwrap();
        Cors::of(request, &policy, &ClusterDomain::default()).complete(response)
    }

    #[test]
    fn pages_of_this_machine_and_of_the_cluster_are_local() {
        let zone = ClusterDomain::default();
        for origin in [
            "http://localhost:3000",
            "https://127.0.0.1",
            "http://[::1]:8080",
            "https://web.shop.svc.cluster.local",
        ] {
            assert!(is_local(origin, &zone), "{origin}");
        }
        for origin in [
            APP,
            "null",
            "http://web.shop",
            "https://evilcluster.local",
            "https://a.svc.cluster.local.evil.com",
            "http://10.0.0.1",
        ] {
            assert!(!is_local(origin, &zone), "{origin}");
        }
    }

    #[test]
    fn an_allowed_origin_may_read_what_the_backend_left_open() {
        let response = answer(APP, &request(&Method::GET, Some(APP)), 200, &[]);
        assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_ORIGIN], APP);
        assert_eq!(response.headers()[VARY], "Origin");
        assert!(
            !response
                .headers()
                .contains_key("access-control-allow-credentials")
        );
    }

    #[test]
    fn a_foreign_origin_gets_the_response_without_leave_to_read_it() {
        let response = answer("local", &request(&Method::GET, Some(APP)), 200, &[]);
        assert!(!response.headers().contains_key(ACCESS_CONTROL_ALLOW_ORIGIN));
        assert_eq!(response.headers()[VARY], "Origin");
    }

    #[test]
    fn the_backends_own_headers_win() {
        let own = [
            ("access-control-allow-origin", "https://other.example"),
            ("access-control-allow-credentials", "true"),
        ];
        for policy in ["*", "local", APP] {
            let response = answer(policy, &request(&Method::GET, Some(APP)), 200, &own);
            assert_eq!(
                response.headers()[ACCESS_CONTROL_ALLOW_ORIGIN],
                "https://other.example"
            );
            assert_eq!(response.headers().len(), 2, "{policy}: {:?}", response.headers());
        }
    }

    #[test]
    fn a_preflight_is_answered_for_allowed_origins_where_the_backend_does_not() {
        let preflight = |policy: &str, method: &Method, backend: &HeaderMap| {
            let policy = policy.parse().unwrap();
            Cors::of(&request(method, Some(APP)), &policy, &ClusterDomain::default()).preflight(backend)
        };
        let none = HeaderMap::new();
        let answer = preflight(APP, &Method::OPTIONS, &none).unwrap();
        assert_eq!(answer[ACCESS_CONTROL_ALLOW_METHODS], "PUT");
        assert_eq!(answer[ACCESS_CONTROL_ALLOW_HEADERS], "x-a, x-b");
        assert_eq!(preflight("local", &Method::OPTIONS, &none), None);
        assert_eq!(preflight(APP, &Method::GET, &none), None);
        let own = HeaderMap::from_iter([(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static(APP))]);
        assert_eq!(preflight(APP, &Method::OPTIONS, &own), None);
    }

    #[test]
    fn leave_to_read_never_comes_with_the_backends_credentials() {
        let own = [("access-control-allow-credentials", "true")];
        for policy in ["*", APP] {
            let response = answer(policy, &request(&Method::GET, Some(APP)), 200, &own);
            assert!(response.headers().contains_key(ACCESS_CONTROL_ALLOW_ORIGIN));
            assert!(
                !response.headers().contains_key(ACCESS_CONTROL_ALLOW_CREDENTIALS),
                "{policy}"
            );
        }
        let foreign = answer("local", &request(&Method::GET, Some(APP)), 200, &own);
        assert_eq!(
            foreign.headers()[ACCESS_CONTROL_ALLOW_CREDENTIALS],
            "true",
            "it allows nothing by itself"
        );
    }

    #[test]
    fn requests_without_an_origin_are_left_alone() {
        assert!(
            answer("*", &request(&Method::GET, None), 200, &[])
                .headers()
                .is_empty()
        );
    }

    #[test]
    fn the_open_policy_never_comes_with_credentials() {
        let response = answer("*", &request(&Method::GET, Some(APP)), 200, &[]);
        assert_eq!(response.headers()[ACCESS_CONTROL_ALLOW_ORIGIN], "*");
        assert!(
            !response
                .headers()
                .contains_key("access-control-allow-credentials")
        );
    }

    #[test]
    fn the_policy_prints_as_it_is_read() {
        for text in [
            "local",
            "*",
            "none",
            "https://a.example",
            "https://a.example,http://b.example:81",
        ] {
            assert_eq!(text.parse::<AllowOrigin>().unwrap().to_string(), text);
        }
        for bad in ["app.example.com", "https://a.example/", "https://a.example/x", ""] {
            assert!(bad.parse::<AllowOrigin>().is_err(), "{bad}");
        }
    }
}
