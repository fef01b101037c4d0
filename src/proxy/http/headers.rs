//! What the proxy changes about a message's head: hop-by-hop fields go, and the target takes the form of the next protocol.
//! Everything else passes untouched.

use http::header::{
    CONNECTION, COOKIE, Entry, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING,
    UPGRADE,
};
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme, Uri};
use http::{Method, Request, Version};

use crate::proxy::error::Error;
use crate::proxy::upstream::Wire;

/// Fields about one connection, beside those that `Connection` lists (RFC 9110 section 7.6.1). `Trailer` is none of them.
const HOP_BY_HOP: [HeaderName; 5] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Finds the authority that a request is for: that of the target wins over `Host` (RFC 9112 section 3.2.2).
pub(super) fn authority<B>(request: &Request<B>) -> Result<String, Error> {
    if request.method() == Method::CONNECT {
        return Err(Error::BadRequest("CONNECT is not served on this port"));
    }
    if let Some(authority) = request.uri().authority() {
        return Ok(authority.as_str().to_owned());
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(_), Some(_)) => Err(Error::BadRequest("the request has more than one Host field")),
        (Some(host), None) => {
            let text = host
                .to_str()
                .map_err(|_| Error::BadRequest("the Host field is not text"))?;
            Ok(text.trim().to_owned())
        }
        (None, _) if request.version() == Version::HTTP_10 => Ok(String::new()),
        (None, _) => Err(Error::BadRequest("the request has no Host field")),
    }
}

/// Removes the fields that are about one connection only. `TE: trailers` stays: gRPC needs it, and it is the one value that
/// HTTP/2 allows (RFC 9113 section 8.2.2).
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // A peer must not list these, and dropping them would change what the message says.
        .filter(|name: &HeaderName| {
            !matches!(*name, HOST | TE | TRAILER) && !name.as_str().starts_with("content-")
        })
        .collect();
    for name in HOP_BY_HOP.iter().chain(&listed) {
        headers.remove(name);
    }
    if let Entry::Occupied(entry) = headers.entry(TE) {
        let trailers = entry.iter().any(|value| {
            value.to_str().is_ok_and(|value| {
                value
                    .split(',')
                    .any(|part| part.trim().eq_ignore_ascii_case("trailers"))
            })
        });
        entry.remove_entry_mult();
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
}

/// Gives the request's head the form that `wire` wants.
pub(super) fn prepare(parts: &mut Parts, wire: Wire, authority: &str) {
    match wire {
        Wire::Http1 => {
            parts.version = Version::HTTP_11;
            parts.uri = origin_form(&parts.uri);
            if let Ok(host) = HeaderValue::from_str(authority) {
                parts.headers.insert(HOST, host);
            }
            if parts.headers.contains_key(TE) {
                // RFC 9110 section 10.1.4: a sender of TE must also name it in Connection.
                parts.headers.insert(CONNECTION, HeaderValue::from_static("te"));
            }
            join_cookies(&mut parts.headers);
        }
        Wire::H2c => {
            parts.version = Version::HTTP_2;
            parts.headers.remove(HOST);
            let mut uri = std::mem::take(&mut parts.uri).into_parts();
            uri.scheme = Some(Scheme::HTTP);
            uri.authority = authority.parse().ok();
            uri.path_and_query
                .get_or_insert_with(|| PathAndQuery::from_static("/"));
            parts.uri = Uri::from_parts(uri).unwrap_or_default();
        }
    }
}

/// The target without scheme and authority; `*` stays as it is.
fn origin_form(uri: &Uri) -> Uri {
    uri.path_and_query().cloned().map(Uri::from).unwrap_or_default()
}

/// HTTP/2 clients may split cookies over several fields; HTTP/1.1 knows one only (RFC 9113 section 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let all: Vec<&[u8]> = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(target: &str, version: Version, hosts: &[&str]) -> Request<()> {
        let mut request = Request::builder().uri(target).version(version).body(()).unwrap();
        for host in hosts {
            request
                .headers_mut()
                .append(HOST, HeaderValue::from_str(host).unwrap());
        }
        request
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    #[test]
    fn the_targets_authority_wins_over_host() {
        let absolute = request(
            "http://a.b.svc.cluster.local:9090/x",
            Version::HTTP_11,
            &["other"],
        );
        assert_eq!(authority(&absolute).unwrap(), "a.b.svc.cluster.local:9090");
        assert_eq!(
            authority(&request("/x", Version::HTTP_11, &["a.b"])).unwrap(),
            "a.b"
        );
    }

    #[test]
    fn a_missing_or_repeated_host_is_refused() {
        assert!(authority(&request("/", Version::HTTP_11, &[])).is_err());
        assert!(authority(&request("/", Version::HTTP_11, &["a.b", "c.d"])).is_err());
        assert_eq!(authority(&request("/", Version::HTTP_10, &[])).unwrap(), "");
    }

    #[test]
    fn hop_by_hop_fields_go_and_the_rest_stays() {
        let mut map = headers(&[
            ("connection", "close, x-hop, Content-Length"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("te", "gzip, trailers"),
            ("trailer", "x-sum"),
            ("content-length", "3"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
        ]);
        strip_hop_by_hop(&mut map);
        let left: Vec<_> = map.keys().map(HeaderName::as_str).collect();
        assert_eq!(left.len(), 4, "{left:?}");
        assert_eq!(map.get_all("set-cookie").iter().count(), 2);
        assert_eq!(map["te"], "trailers");
        assert!(map.contains_key("trailer") && map.contains_key("content-length"));
    }

    #[test]
    fn http1_gets_origin_form_one_cookie_and_the_authority_as_host() {
        let mut parts = request("http://a.b:81/x//y%2Fz?q=1", Version::HTTP_2, &[])
            .into_parts()
            .0;
        parts.headers = headers(&[("cookie", "a=1"), ("cookie", "b=2"), ("te", "trailers")]);
        prepare(&mut parts, Wire::Http1, "a.b:81");
        assert_eq!(parts.uri, "/x//y%2Fz?q=1");
        assert_eq!(parts.headers["host"], "a.b:81");
        assert_eq!(parts.headers["cookie"], "a=1; b=2");
        assert_eq!(parts.headers["connection"], "te");
    }

    #[test]
    fn h2c_gets_an_absolute_target_and_no_host() {
        let mut parts = request("/x?q=1", Version::HTTP_11, &["a.b"]).into_parts().0;
        prepare(&mut parts, Wire::H2c, "a.b");
        assert_eq!(parts.uri, "http://a.b/x?q=1");
        assert!(parts.headers.get(HOST).is_none());
    }
}
