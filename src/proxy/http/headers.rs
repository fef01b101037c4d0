//! What the proxy changes about a message's head: hop-by-hop fields go, and the target takes the form of the next protocol.
//! Everything else passes untouched.

use std::net::IpAddr;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue, TE,
    TRAILER, TRANSFER_ENCODING, UPGRADE, VIA,
};
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme, Uri};
use http::{Method, Request, Response, Version};
use http_body::Body;

use crate::proxy::error::Error;
use crate::proxy::http::upgrade::is_extended_connect;
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
pub(in crate::proxy) fn authority<B>(request: &Request<B>) -> Result<String, Error> {
    if request.method() == Method::CONNECT && !is_extended_connect(request) {
        return Err(Error::BadRequest("CONNECT is not served on this port"));
    }
    if request.version() <= Version::HTTP_11
        && request.uri().authority().is_some()
        && request.uri().scheme().is_none()
    {
        // RFC 9112 section 3.2.3: only CONNECT names its target so.
        return Err(Error::BadRequest("the target is neither a path nor a URL"));
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Error::BadRequest("there is more than one Host field"));
    }
    let authority = match (request.uri().authority(), host) {
        // RFC 9112 section 3.2 wants it whatever the form of the target.
        (_, None) if request.version() == Version::HTTP_11 => {
            return Err(Error::BadRequest("there is no Host field"));
        }
        (Some(authority), _) => authority.as_str(),
        (None, Some(host)) => host
            .to_str()
            .map_err(|_| Error::BadRequest("the Host field is not text"))?
            .trim(),
        (None, None) if request.version() == Version::HTTP_10 => "",
        (None, None) => return Err(Error::BadRequest("there is no :authority")),
    };
    if authority.contains('@') {
        // It may hold a password, which must reach neither log nor pod (RFC 9110 section 4.2.4).
        return Err(Error::BadRequest("the target may not name a user"));
    }
    Ok(authority.to_owned())
}

/// Reports whether the client waits to be told to send its body. HTTP/1.0 knows no such wait (RFC 9110 section 10.1.1).
pub(super) fn expects_continue(version: Version, headers: &HeaderMap) -> bool {
    version != Version::HTTP_10 && lists(headers, EXPECT, "100-continue")
}

/// Refuses a request whose body is coded in a way that the HTTP library does not undo: without the field that says so, it
/// would be another body (RFC 9112 section 6.1).
pub(super) fn check_request_coding(headers: &HeaderMap) -> Result<(), Error> {
    match foreign_coding(headers) {
        None => Ok(()),
        Some(_) => Err(Error::UnknownCoding),
    }
}

/// The same for a response with a body; fails with the codings.
pub(super) fn check_coding<B: Body>(response: &Response<B>) -> Result<(), String> {
    match foreign_coding(response.headers()) {
        Some(coding) if !response.body().is_end_stream() => Err(coding),
        _ => Ok(()),
    }
}

/// Returns the transfer codings of a message unless they are `chunked` alone.
fn foreign_coding(headers: &HeaderMap) -> Option<String> {
    let all = headers.get_all(TRANSFER_ENCODING).iter();
    let codings: Vec<_> = all
        .map(|value| String::from_utf8_lossy(value.as_bytes()))
        .collect();
    let codings = codings.join(", ");
    (!codings.is_empty() && !codings.trim().eq_ignore_ascii_case("chunked")).then_some(codings)
}

/// Reports whether a list-valued field has this member, in any case.
pub(in crate::proxy) fn lists(headers: &HeaderMap, field: HeaderName, member: &str) -> bool {
    headers
        .get_all(field)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|part| part.trim().eq_ignore_ascii_case(member))
}

/// Removes the fields that are about one connection only. `TE: trailers` stays: gRPC needs it, and it is the one value that
/// HTTP/2 allows (RFC 9113 section 8.2.2).
pub(in crate::proxy) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(TRANSFER_ENCODING) {
        // The length of the body is what the coding says, never the other field (RFC 9112 section 6.3).
        headers.remove(CONTENT_LENGTH);
    }
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
    remove(headers, |name| HOP_BY_HOP.contains(name) || listed.contains(name));
    if headers.contains_key(TE) {
        if lists(headers, TE, "trailers") {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        } else {
            remove(headers, |name| name == TE);
        }
    }
}

/// Announces the trailers of a gRPC answer to an HTTP/1.1 client: servers of HTTP/2 rarely do, and the HTTP library writes no
/// others.
pub(super) fn announce_grpc_trailers(headers: &mut HeaderMap) {
    let names = HeaderValue::from_static("grpc-status, grpc-message, grpc-status-details-bin");
    headers.entry(TRAILER).or_insert(names);
}

/// Removes fields without changing the order of the others, as `HeaderMap::remove` would.
pub(in crate::proxy) fn remove(headers: &mut HeaderMap, goes: impl Fn(&HeaderName) -> bool) {
    if !headers.keys().any(&goes) {
        return;
    }
    let mut kept = HeaderMap::with_capacity(headers.len());
    let mut current = None;
    for (name, value) in std::mem::take(headers) {
        // A repeated field has its name with the first value only.
        current = name.or(current);
        if let Some(name) = current.as_ref().filter(|name| !goes(name)) {
            kept.append(name, value);
        }
    }
    *headers = kept;
}

/// Tells the pod about the client and its way here. What the client said in fields of that kind has no meaning: those of ours
/// take their place, and the others go, since a pod may believe them.
pub(super) fn add_forwarded(parts: &mut Parts, client: IpAddr, authority: &str, secure: bool) {
    let version = match parts.version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2.0",
        _ => "1.1",
    };
    let fields = [
        ("x-forwarded-for", client.to_string()),
        ("x-forwarded-host", authority.to_owned()),
        (
            "x-forwarded-proto",
            if secure { "https" } else { "http" }.to_owned(),
        ),
    ];
    remove(&mut parts.headers, |name| {
        name == FORWARDED || name.as_str().starts_with("x-forwarded-")
    });
    for (name, value) in fields {
        if let Ok(value) = HeaderValue::try_from(value) {
            parts.headers.insert(name, value);
        }
    }
    if let Ok(via) = HeaderValue::try_from(format!("{version} kube-tunnel")) {
        parts.headers.append(VIA, via); // each proxy on the way adds its own (RFC 9110 section 7.6.3)
    }
}

/// Gives the request's head the form that `wire` wants. `body`: whether one follows.
pub(super) fn prepare(parts: &mut Parts, wire: Wire, authority: &str, body: bool) {
    match wire {
        Wire::Http1 | Wire::Http1Tls => {
            if parts.version == Version::HTTP_2 {
                join_cookies(&mut parts.headers);
            }
            parts.version = Version::HTTP_11;
            parts.uri = path_and_query(&parts.uri).into();
            let told = parts.headers.get(HOST);
            if told.is_none_or(|told| told != authority)
                && let Ok(host) = HeaderValue::from_str(authority)
            {
                parts.headers.insert(HOST, host);
            }
            if parts.headers.contains_key(TE) {
                // RFC 9110 section 10.1.4: a sender of TE must also name it in Connection.
                parts.headers.insert(CONNECTION, HeaderValue::from_static("te"));
            }
            if body && !parts.headers.contains_key(CONTENT_LENGTH) {
                // Without it hyper sends no body with the methods that rarely have one, such as GET.
                parts
                    .headers
                    .insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
        }
        Wire::H2c | Wire::H2 => {
            parts.version = Version::HTTP_2;
            remove(&mut parts.headers, |name| name == HOST);
            let path_and_query = path_and_query(&parts.uri);
            let mut uri = std::mem::take(&mut parts.uri).into_parts();
            uri.scheme = Some(if wire == Wire::H2 {
                Scheme::HTTPS
            } else {
                Scheme::HTTP
            });
            uri.authority = authority.parse().ok();
            uri.path_and_query = Some(path_and_query);
            parts.uri = Uri::from_parts(uri).unwrap_or_default();
        }
    }
}

/// The target without scheme and authority; `*` stays as it is. A path that is left out is written as `/` (RFC 9112 section
/// 3.2.1).
pub(in crate::proxy) fn path_and_query(uri: &Uri) -> PathAndQuery {
    let root = || PathAndQuery::from_static("/");
    match uri.path_and_query().map(|target| (target, target.as_str())) {
        // An empty path reads as "/" too, but would be written as nothing.
        None | Some((_, "/")) => root(),
        Some((_, query)) if query.starts_with('?') => format!("/{query}").parse().unwrap_or_else(|_| root()),
        Some((target, _)) => target.clone(),
    }
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
        // Nothing, with a separator around it, may end in a space, which no field does (RFC 9110 section 5.5).
        .filter(|cookie| !cookie.is_empty())
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
    fn a_target_that_is_an_authority_alone_is_refused() {
        for target in ["admin.shop:80", "foo"] {
            assert!(authority(&request(target, Version::HTTP_11, &["web.shop"])).is_err());
        }
        let http2 = request("https://a.b/x", Version::HTTP_2, &[]);
        assert_eq!(authority(&http2).unwrap(), "a.b");
    }

    #[test]
    fn a_missing_or_repeated_host_is_refused() {
        assert!(authority(&request("/", Version::HTTP_11, &[])).is_err());
        assert!(authority(&request("/", Version::HTTP_11, &["a.b", "c.d"])).is_err());
        assert_eq!(authority(&request("/", Version::HTTP_10, &[])).unwrap(), "");
    }

    #[test]
    fn a_target_with_a_user_is_refused_and_not_repeated() {
        for (target, host) in [("http://user:secret@a.b/x", "a.b"), ("/x", "user:secret@a.b")] {
            let error = authority(&request(target, Version::HTTP_11, &[host])).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains("may not name a user") && !text.contains("secret"),
                "{text}"
            );
        }
    }

    #[test]
    fn the_order_of_what_stays_is_kept() {
        let mut map = headers(&[
            ("connection", "close"),
            ("a", "1"),
            ("b", "2"),
            ("a", "3"),
            ("c", "4"),
        ]);
        strip_hop_by_hop(&mut map);
        let left: Vec<_> = map
            .iter()
            .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
            .collect();
        assert_eq!(left, [("a", "1"), ("a", "3"), ("b", "2"), ("c", "4")]);
    }

    #[test]
    fn a_transfer_coding_wins_over_a_length() {
        let mut map = headers(&[("transfer-encoding", "chunked"), ("content-length", "3")]);
        strip_hop_by_hop(&mut map);
        assert!(map.is_empty(), "{map:?}");
    }

    #[test]
    fn only_chunked_alone_is_a_coding_that_passes() {
        for coding in ["chunked", "Chunked "] {
            assert_eq!(
                foreign_coding(&headers(&[("transfer-encoding", coding)])),
                None,
                "{coding}"
            );
        }
        assert_eq!(foreign_coding(&headers(&[])), None);
        for coding in [
            "gzip, chunked",
            "gzip",
            "identity",
            "chunked, chunked",
            "chunked;q=1",
        ] {
            assert!(foreign_coding(&headers(&[("transfer-encoding", coding)])).is_some());
        }
        let split = headers(&[("transfer-encoding", "gzip"), ("transfer-encoding", "chunked")]);
        assert_eq!(foreign_coding(&split).as_deref(), Some("gzip, chunked"));
    }

    #[test]
    fn a_body_of_unknown_length_is_chunked_whatever_the_method() {
        let mut parts = request("/_search", Version::HTTP_11, &["a.b"]).into_parts().0;
        prepare(&mut parts, Wire::Http1, "a.b", true);
        assert_eq!(parts.headers["transfer-encoding"], "chunked");
    }

    #[test]
    fn hop_by_hop_fields_go_and_the_rest_stays() {
        let mut map = headers(&[
            ("connection", "close, x-hop, Content-Length"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
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
        let cookies = [
            ("cookie", "a=1"),
            ("cookie", ""),
            ("cookie", "b=2"),
            ("cookie", ""),
        ];
        parts.headers = headers(&[&cookies[..], &[("te", "trailers")]].concat());
        prepare(&mut parts, Wire::Http1, "a.b:81", false);
        assert_eq!(parts.uri, "/x//y%2Fz?q=1");
        assert_eq!(parts.headers["host"], "a.b:81");
        assert_eq!(parts.headers["cookie"], "a=1; b=2");
        assert_eq!(parts.headers["connection"], "te");
    }

    #[test]
    fn a_path_that_is_left_out_is_written() {
        for (target, written) in [
            ("http://a.b?q=1", "/?q=1"),
            ("http://a.b#f", "/"),
            ("http://a.b", "/"),
        ] {
            for wire in [Wire::Http1, Wire::H2c] {
                let mut parts = request(target, Version::HTTP_11, &["a.b"]).into_parts().0;
                prepare(&mut parts, wire, "a.b", false);
                let path_and_query = parts.uri.path_and_query().unwrap().as_str();
                assert_eq!(path_and_query, written, "{target} for {wire:?}");
                assert!(parts.uri.to_string().ends_with(written), "{target} for {wire:?}");
            }
        }
    }

    #[test]
    fn forwarded_fields_replace_what_the_client_claims() {
        let mut parts = request("/", Version::HTTP_11, &["a.b"]).into_parts().0;
        parts
            .headers
            .insert("x-forwarded-for", HeaderValue::from_static("10.0.0.1"));
        for name in ["forwarded", "x-forwarded-port"] {
            parts.headers.insert(name, HeaderValue::from_static("x"));
        }
        parts.headers.insert("via", HeaderValue::from_static("1.0 other"));
        add_forwarded(&mut parts, IpAddr::from([127, 0, 0, 1]), "a.b", true);
        assert_eq!(parts.headers["x-forwarded-for"], "127.0.0.1");
        assert!(!parts.headers.contains_key("forwarded") && !parts.headers.contains_key("x-forwarded-port"));
        assert_eq!(
            (
                &parts.headers["x-forwarded-host"],
                &parts.headers["x-forwarded-proto"]
            ),
            (&"a.b".parse().unwrap(), &"https".parse().unwrap())
        );
        let via: Vec<_> = parts.headers.get_all("via").iter().collect();
        assert_eq!(via, ["1.0 other", "1.1 kube-tunnel"]);
    }

    #[test]
    fn h2c_gets_an_absolute_target_and_no_host() {
        let mut parts = request("/x?q=1", Version::HTTP_11, &["a.b"]).into_parts().0;
        prepare(&mut parts, Wire::H2c, "a.b", false);
        assert_eq!(parts.uri, "http://a.b/x?q=1");
        assert!(parts.headers.get(HOST).is_none());
    }
}
