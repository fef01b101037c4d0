//! Answers the requests of one connection: authentication, authorization, get, list, watch, upgrades.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::access::Action;
use super::cluster::{Cluster, pause};
use super::resource::{Kind, Target};
use super::selector::Selector;
use super::status::Failure;
use super::store::Key;
use super::table::Include;
use super::watch::Watch;
use super::{discovery, portforward, review, table};

/// Every answer's body.
pub(super) type Body = BoxBody<Bytes, Infallible>;

/// One client connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// The cluster it talks to.
    pub(super) cluster: Arc<Cluster>,
    /// The verified client certificate, DER.
    pub(super) certificate: Option<Vec<u8>>,
    /// Ends the connection and everything it was upgraded to.
    pub(super) token: CancellationToken,
}

/// Answers one request.
pub(super) async fn answer(connection: Arc<Connection>, request: Request<Incoming>) -> Response<Body> {
    pause(connection.cluster.faults.api_latency()).await;
    route(&connection, request).await.unwrap_or_else(|failure| {
        let mut response = json_response(failure.code, &failure.body);
        if let Some(seconds) = failure.retry_after() {
            response.headers_mut().insert(RETRY_AFTER, seconds.into());
        }
        response
    })
}

async fn route(connection: &Connection, request: Request<Incoming>) -> Result<Response<Body>, Failure> {
    let cluster = &connection.cluster;
    let authorization = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|value| value.to_str().ok());
    let user = cluster
        .access
        .authenticate(connection.certificate.as_deref(), authorization)
        .map_err(|()| Failure::unauthorized())?;
    let path = request.uri().path().to_owned();
    if let "/healthz" | "/livez" | "/readyz" = path.as_str() {
        return Ok(text_response(StatusCode::OK, "ok".to_owned()));
    }
    let discovered = discovery::answer(&path);
    if let ("/version", Some(version)) = (path.as_str(), &discovered) {
        return Ok(json_response(StatusCode::OK, version));
    }
    let user = user.ok_or_else(Failure::unauthorized)?;
    if let Some(document) = discovered {
        return Ok(json_response(StatusCode::OK, &document));
    }
    if path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews" && request.method() == Method::POST {
        return review::answer(cluster, &user, request).await;
    }
    let query = Query::of(request.uri());
    let watch = matches!(query.get("watch"), Some("true" | "1"));
    let target = Target::parse(request.method(), &path, watch).ok_or_else(Failure::no_such_path)?;
    cluster.record(&user, &target);
    if !cluster.access.allows(&user, &Action::from(&target)) {
        return Err(Failure::forbidden(&user, &target));
    }
    match (target.verb, target.subresource.as_deref()) {
        ("get" | "create", Some("portforward")) if target.kind == Kind::Pod => {
            let create = Target {
                verb: "create",
                ..target.clone()
            };
            if target.verb == "get"
                && cluster.access.websockets_need_create()
                && portforward::is_websocket(request.headers())
                && !cluster.access.allows(&user, &Action::from(&create))
            {
                return Err(Failure::forbidden(&user, &create));
            }
            portforward::upgrade(connection, &target, &query, request).await
        }
        (_, Some(_)) => Err(Failure::no_such_path()),
        ("get", None) => get(cluster, &target, &query, request.headers()),
        ("list", None) => list(cluster, &target, &query, request.headers()),
        ("watch", None) => start_watch(cluster, &target, &query, request.headers()),
        _ => Err(Failure::method_not_allowed()),
    }
}

fn get(
    cluster: &Cluster,
    target: &Target,
    query: &Query,
    headers: &HeaderMap,
) -> Result<Response<Body>, Failure> {
    let name = target.name.as_deref().unwrap_or_default();
    let key = Key::new(target.kind, target.namespace.as_deref().unwrap_or_default(), name);
    let object = cluster
        .store
        .get(&key)
        .ok_or_else(|| Failure::not_found(target.kind, name))?;
    if let Some(include) = wants_table(headers, query)? {
        return Ok(json_response(
            StatusCode::OK,
            &table::of(target.kind, &[&object], "", include),
        ));
    }
    Ok(json_response(StatusCode::OK, &object))
}

fn list(
    cluster: &Cluster,
    target: &Target,
    query: &Query,
    headers: &HeaderMap,
) -> Result<Response<Body>, Failure> {
    let selector = query.selector()?;
    let (objects, version) = cluster.store.list(target.kind, target.namespace.as_deref());
    let items: Vec<&Value> = objects
        .iter()
        .map(AsRef::as_ref)
        .filter(|object| selector.matches(object))
        .collect();
    let version = version.to_string();
    if let Some(include) = wants_table(headers, query)? {
        return Ok(json_response(
            StatusCode::OK,
            &table::of(target.kind, &items, &version, include),
        ));
    }
    let body = json!({
        "kind": format!("{}List", target.kind.name()),
        "apiVersion": target.kind.api_version(),
        "metadata": {"resourceVersion": version},
        "items": items,
    });
    Ok(json_response(StatusCode::OK, &body))
}

fn start_watch(
    cluster: &Arc<Cluster>,
    target: &Target,
    query: &Query,
    headers: &HeaderMap,
) -> Result<Response<Body>, Failure> {
    if query.get("sendInitialEvents") == Some("true") {
        return Err(Failure::no_watch_list());
    }
    let from =
        match query.get("resourceVersion") {
            None | Some("" | "0") => None,
            Some(version) => Some(version.parse().map_err(|_| {
                Failure::bad_request(&format!("resourceVersion: Invalid value: \"{version}\""))
            })?),
        };
    let watch = Watch {
        kind: target.kind,
        namespace: target.namespace.clone(),
        selector: query.selector()?,
        from,
        bookmarks: query.get("allowWatchBookmarks") == Some("true"),
        timeout: query.timeout()?,
        table: wants_table(headers, query)?,
    };
    let (body, chunks) = mpsc::channel(16);
    cluster.tasks.spawn(watch.run(cluster.clone(), body));
    let body = StreamBody::new(ReceiverStream::new(chunks));
    let mut response = Response::new(BodyExt::boxed(body));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Tells whether a table is wanted, and what of the objects in it. kubectl asks for tables first and takes plain objects as
/// well; `-o json` asks for plain objects only.
fn wants_table(headers: &HeaderMap, query: &Query) -> Result<Option<Include>, Failure> {
    let accept = headers
        .get(ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let table = accept
        .split(',')
        .any(|form| form.trim().starts_with("application/json;as=Table") && form.contains("v=v1;"));
    table.then(|| query.include()).transpose()
}

/// A JSON answer.
pub(super) fn json_response(code: StatusCode, body: &Value) -> Response<Body> {
    response(code, "application/json", Bytes::from(body.to_string()))
}

/// An answer in plain text.
pub(super) fn text_response(code: StatusCode, text: String) -> Response<Body> {
    response(code, "text/plain; charset=utf-8", Bytes::from(text))
}

fn response(code: StatusCode, content_type: &'static str, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Full::new(body).boxed());
    *response.status_mut() = code;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

/// Decoded query parameters.
#[derive(Debug)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    fn of(uri: &Uri) -> Self {
        let decode = |text: &str| {
            let spaced = text.replace('+', " ");
            percent_decode_str(&spaced).decode_utf8_lossy().into_owned()
        };
        let pairs = uri
            .query()
            .unwrap_or_default()
            .split('&')
            .filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(key, value)| (decode(key), decode(value)))
                .collect(),
        )
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// Every value of a repeated parameter.
    pub(super) fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .iter()
            .filter(move |(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// When a watch is to end; 0 leaves it to the server.
    fn timeout(&self) -> Result<Option<Duration>, Failure> {
        let Some(text) = self.get("timeoutSeconds").filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let seconds: u32 = text
            .parse()
            .map_err(|_| Failure::bad_request(&format!("timeoutSeconds: Invalid value: \"{text}\"")))?;
        Ok((seconds > 0).then(|| Duration::from_secs(seconds.into())))
    }

    /// What a table holds of the objects besides their cells.
    fn include(&self) -> Result<Include, Failure> {
        match self.get("includeObject") {
            None | Some("" | "Metadata") => Ok(Include::Metadata),
            Some("Object") => Ok(Include::Object),
            Some("None") => Ok(Include::Nothing),
            Some(other) => Err(Failure::bad_request(&format!(
                "unrecognized includeObject value: \"{other}\""
            ))),
        }
    }

    fn selector(&self) -> Result<Selector, Failure> {
        let labels = self.get("labelSelector").unwrap_or_default();
        let fields = self.get("fieldSelector").unwrap_or_default();
        Selector::parse(labels, fields).map_err(|message| Failure::bad_request(&message))
    }
}
