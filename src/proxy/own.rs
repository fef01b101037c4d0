//! The pages of the proxy's own hosts (`localhost`, IP literals). On a Service's host every path belongs to the backend.
//!
//! They are for whoever sits at this machine, not for the web pages that such a person visits: see [`admit`].

mod services;

use std::net::IpAddr;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderMap, Method, Response, StatusCode, Version};
use serde_json::{Value, json};

use crate::proxy::Context;
use crate::proxy::body::ResponseBody;
use crate::proxy::connection::{Downstream, Security};
use crate::proxy::cors::Cors;
use crate::proxy::error::Error;
use crate::proxy::reply::respond;
use crate::traffic::OpenRecord;

const JSON: HeaderValue = HeaderValue::from_static("application/json");
const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// The protocols that the one port takes.
const FEATURES: [&str; 4] = ["http/1.1", "h2c", "h2", "grpc"];

/// One page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Page {
    /// `/health`: the proxy is alive, and this is how you reached it.
    Health,
    /// `/livez`: the proxy is alive.
    Live,
    /// `/readyz`: it takes requests, and goes on doing so.
    Ready,
    /// `/services`: what of the cluster is in use.
    Services,
}

/// How a page was asked for.
pub(super) struct Asked<'a> {
    pub(super) downstream: &'a Downstream,
    pub(super) version: Version,
    pub(super) grpc: bool,
}

/// Refuses what a web page of another site may have asked for: by its own name, which it lets point at this machine (DNS
/// rebinding; such names are no own hosts in the first place), by an address that leads here on a way that browsers do not
/// guard, such as `0.0.0.0`, or openly, with its origin.
///
/// # Errors
/// [`Error::ForeignHost`] for an address that is neither a loopback one nor `local`, ours on this connection;
/// [`Error::ForeignOrigin`] for a page that may not read the answer.
pub(super) fn admit(literal: Option<IpAddr>, local: IpAddr, cors: &Cors) -> Result<(), Error> {
    if let Some(host) = literal {
        let address = host.to_canonical();
        if !address.is_loopback() && address != local.to_canonical() {
            return Err(Error::ForeignHost(host));
        }
    }
    if cors.is_foreign() {
        return Err(Error::ForeignOrigin);
    }
    Ok(())
}

/// Finds a page by its path.
///
/// # Errors
/// [`Error::NoSuchPage`], which tells the cluster's `zone`, and [`Error::NotReadOnly`] for a method that does not just read.
pub(super) fn find(method: &Method, path: &str, zone: impl Fn() -> String) -> Result<Page, Error> {
    let page = match path {
        "/health" => Page::Health,
        "/livez" => Page::Live,
        "/readyz" => Page::Ready,
        "/services" => Page::Services,
        _ => return Err(Error::NoSuchPage(path.to_owned(), zone())),
    };
    match *method {
        Method::GET | Method::HEAD => Ok(page),
        _ => Err(Error::NotReadOnly(method.clone())),
    }
}

/// Answers with a page.
pub(super) fn show(
    page: Page,
    context: &Context,
    asked: &Asked<'_>,
    record: OpenRecord,
) -> Response<ResponseBody> {
    let draining = context.clients.is_started();
    let (status, kind, body) = match page {
        Page::Health => (StatusCode::OK, JSON, health(asked).to_string()),
        Page::Services => (StatusCode::OK, JSON, services::list(context).to_string()),
        Page::Ready if draining => (StatusCode::SERVICE_UNAVAILABLE, TEXT, "shutting down".to_owned()),
        Page::Live | Page::Ready => (StatusCode::OK, TEXT, "ok".to_owned()),
    };
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, kind);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    respond(status, headers, Bytes::from(format!("{body}\n")), record)
}

fn health(asked: &Asked<'_>) -> Value {
    json!({
        "status": "healthy",
        "protocol": describe(asked.version, &asked.downstream.security, asked.grpc),
        "version": env!("CARGO_PKG_VERSION"),
        "features": FEATURES,
    })
}

/// Words the protocol as the seed's `/health` does, e.g. `HTTP/2.0 (TLS) ALPN:h2 gRPC`.
fn describe(version: Version, security: &Security, grpc: bool) -> String {
    let security = match security {
        Security::Cleartext => "(cleartext)".to_owned(),
        Security::Tls { alpn: None } => "(TLS)".to_owned(),
        Security::Tls { alpn: Some(alpn) } => format!("(TLS) ALPN:{alpn}"),
    };
    format!("{version:?} {security}{}", if grpc { " gRPC" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_lead_here_for_certain_are_answered_for() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (host, local, admitted) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.9.9.9", "127.0.0.1", true),
            ("::1", "::1", true),
            ("::ffff:127.0.0.1", "::1", true),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3", "::ffff:10.1.2.3", true),
            ("10.1.2.3", "10.1.2.4", false),
            ("0.0.0.0", "127.0.0.1", false),
            ("::", "::1", false),
        ] {
            let answer = admit(Some(ip(host)), ip(local), &Cors::default());
            assert_eq!(answer.is_ok(), admitted, "{host} over {local}: {answer:?}");
        }
    }

    #[test]
    fn the_protocol_is_worded_as_the_seed_does() {
        let tls = |alpn: Option<&str>| Security::Tls {
            alpn: alpn.map(str::to_owned),
        };
        assert_eq!(
            describe(Version::HTTP_11, &Security::Cleartext, false),
            "HTTP/1.1 (cleartext)"
        );
        assert_eq!(
            describe(Version::HTTP_2, &Security::Cleartext, true),
            "HTTP/2.0 (cleartext) gRPC"
        );
        assert_eq!(
            describe(Version::HTTP_2, &tls(Some("h2")), false),
            "HTTP/2.0 (TLS) ALPN:h2"
        );
        assert_eq!(describe(Version::HTTP_11, &tls(None), false), "HTTP/1.1 (TLS)");
    }
}
