//! One request and its answer: looks the Service up, picks an endpoint, sends, and tries another one where that is safe.

use std::sync::Arc;

use http::request::Parts;
use http::{Method, Request};
use http_body::Body;
use hyper::body::Incoming;
use tokio::time::Instant;
use tracing::debug;

use crate::name::ServiceName;
use crate::proxy::Context;
use crate::proxy::error::Error;
use crate::proxy::http::headers;
use crate::proxy::http::upgrade::Upgrade;
use crate::proxy::replay::{Replay, RequestBody};
use crate::proxy::reply;
use crate::proxy::retry::{Attempt, Attempts, Verdict};
use crate::proxy::route::{Hint, Route, route};
use crate::proxy::upstream::{Answer, Failure, Fresh, Peer, Wire};
use crate::registry::{self, Endpoint, InFlight, PodRef};
use crate::traffic::AccessRecord;
use crate::transport::{ConnectError, Target};

/// Where a request is to go, as its host says.
pub(super) struct Destination {
    pub(super) service: ServiceName,
    pub(super) hostname: Option<Arc<str>>,
    pub(super) port: u16,
    /// Whether the client came over TLS.
    pub(super) secure: bool,
}

/// Sends the request to one endpoint after the other until one answers or nothing is left to try.
///
/// An endpoint that has not failed yet is tried at once; when all have, the policy's pause comes before the next round. A
/// request that may have arrived somewhere is sent again `max_retries` times at most, however many endpoints there are.
pub(super) async fn exchange(
    context: &Context,
    destination: &Destination,
    request: Request<Incoming>,
    upgrade: Option<&Upgrade>,
    record: &mut AccessRecord,
) -> Result<(Answer, InFlight), Error> {
    let grpc = reply::is_grpc(request.headers());
    let mut pending = Pending::new(request, upgrade.is_some(), record);
    if context.forwarded_headers {
        headers::add_forwarded(
            &mut pending.head,
            record.client.ip(),
            &record.authority,
            destination.secure,
        );
    }
    let mut attempts = Attempts::new(context.retry);
    let mut failed: Vec<PodRef> = Vec::new();
    let (mut pauses, mut fresh, mut switched) = (0, Fresh::No, None::<Switched>);
    loop {
        let Route { mut candidates, hint } = locate(context, destination).await?;
        if candidates
            .iter()
            .all(|(endpoint, _)| failed.contains(&endpoint.pod))
        {
            failed.clear();
        }
        candidates.retain(|(endpoint, _)| !failed.contains(&endpoint.pod));
        let last = candidates.len() == 1;
        let (endpoint, port) = match &switched {
            Some(Switched { endpoint, port, .. }) => (endpoint, port),
            None => registry::pick(&candidates, |(endpoint, _)| endpoint, &context.cursor)
                .map(|(endpoint, port)| (endpoint, port))
                .expect("a route has candidates, and not all of them have failed"),
        };
        let (endpoint, port) = (endpoint.clone(), *port);
        let target = Target {
            pod: endpoint.pod.clone(),
            port,
        };
        let choice = choose(upgrade.is_some(), grpc, hint, context.upstream.spoken(&target));
        let wire = switched.as_ref().map_or(choice.wire, |switched| switched.wire);

        let in_flight = endpoint.load.begin();
        record.attempts += 1;
        record.pod = Some(endpoint.pod.clone());
        record.upstream = Some(wire.as_str());
        let request = pending.request(wire, &record.authority, upgrade);
        let peer = Peer {
            target: target.clone(),
            wire,
            server_name: hint
                .tls
                .then(|| destination.service.dns_name(&context.naming.zone).into()),
            alone: hint.tls && upgrade.is_some(),
        };
        let Failure {
            error,
            untouched,
            reused,
        } = match context.upstream.send(&peer, fresh, request).await {
            Ok(answer) => {
                record.reused = Some(answer.reused);
                pending.give_up();
                if choice.undecided {
                    context.upstream.learn(&target, wire);
                }
                return Ok((answer, in_flight));
            }
            Err(failure) => failure,
        };
        record.reused = Some(reused);
        let replayable = pending.recover().await;
        let (undecided, guessed) = (choice.undecided, choice.undecided && !hint.http2);
        let attempt = Attempt {
            method: pending.method(),
            error: &error,
            untouched,
            reused,
            replayable,
            undecided,
            guessed,
        };
        let verdict = attempts.judge(&attempt);
        debug!(%target, ?attempt, ?verdict, "attempt failed");
        // That the other version failed too says less than why the first one did.
        let error = switched.take().map_or(error, |switched| switched.first);
        if matches!(error, Error::Connect(_, ConnectError::PodGone(_))) {
            context.registry.recheck(&destination.service);
        }
        match verdict {
            Verdict::Repeat => continue,
            Verdict::Reconnect => {
                fresh = Fresh::Yes;
                continue;
            }
            Verdict::Switch => {
                switched = Some(Switched {
                    endpoint,
                    port,
                    wire: wire.other(),
                    first: error,
                });
                continue;
            }
            Verdict::GiveUp => return Err(error),
            Verdict::MoveOn => {}
        }
        failed.push(endpoint.pod.clone());
        if last {
            if pauses == context.retry.max_retries {
                return Err(error);
            }
            tokio::time::sleep(context.retry.jittered(pauses, fastrand::f64())).await;
            pauses += 1;
        }
    }
}

/// A request that goes to the same endpoint once more.
struct Switched {
    endpoint: Arc<Endpoint>,
    port: u16,
    /// The version of HTTP that was not tried. Kept, since another request may find out meanwhile what the port speaks.
    wire: Wire,
    /// Why the one that was tried failed.
    first: Error,
}

/// The protocol for one attempt.
struct Choice {
    wire: Wire,
    /// Whether the other one may be tried: nobody knows what the port speaks, and the request allows either.
    undecided: bool,
}

/// Chooses by what the request needs, else by what the port has spoken before, else by what the Service says of it.
fn choose(upgrade: bool, grpc: bool, hint: Hint, spoken: Option<Wire>) -> Choice {
    let (wire, undecided) = match spoken {
        // Leaving HTTP is a matter of HTTP/1.1.
        _ if upgrade => (Wire::Http1, false),
        _ if grpc => (Wire::H2c, false),
        Some(wire) => (wire, false),
        None if hint.http2 => (Wire::H2c, true),
        None => (Wire::Http1, true),
    };
    let wire = if hint.tls { wire.over_tls() } else { wire };
    Choice { wire, undecided }
}

/// Looks up where the request may go, and waits for a ready pod where one may be expected.
async fn locate(context: &Context, destination: &Destination) -> Result<Route, Error> {
    let Destination {
        service,
        hostname,
        port,
        ..
    } = destination;
    let deadline = Instant::now() + context.ready_timeout;
    loop {
        let resolved = context.registry.resolve(service).await;
        let view = resolved.map_err(|error| Error::Lookup(service.clone(), error))?;
        let routed = route(&view, *port, hostname.as_deref());
        if !matches!(routed, Err(Error::NoEndpoint { .. })) || !view.is_between_pods() {
            return routed;
        }
        context.registry.recheck(service);
        if tokio::time::timeout_at(deadline, context.registry.changed(&view))
            .await
            .is_err()
        {
            return routed;
        }
    }
}

/// A request that may have to be sent more than once.
struct Pending {
    /// Its head, without hop-by-hop fields.
    head: Parts,
    /// Its body, if it has one.
    body: Option<Replay>,
}

impl Pending {
    /// `upgrading`: what follows the head is no body, but the bytes of another protocol.
    fn new(request: Request<Incoming>, upgrading: bool, record: &AccessRecord) -> Self {
        let (mut head, body) = request.into_parts();
        headers::strip_hop_by_hop(&mut head.headers);
        let body = Some(body).filter(|body| !upgrading && !body.is_end_stream());
        Self {
            head,
            body: body.map(|body| Replay::new(body, record.received.clone())),
        }
    }

    fn method(&self) -> &Method {
        &self.head.method
    }

    /// Makes the request for the next attempt; after the first only where [`recover`](Self::recover) allowed it.
    fn request(&self, wire: Wire, authority: &str, upgrade: Option<&Upgrade>) -> Request<RequestBody> {
        let mut head = self.head.clone();
        headers::prepare(&mut head, wire, authority, self.body.is_some());
        if let Some(upgrade) = upgrade {
            upgrade.write(&mut head.headers);
        }
        Request::from_parts(
            head,
            self.body.as_ref().map_or_else(RequestBody::empty, Replay::body),
        )
    }

    /// Returns whether the request can be sent again as a whole.
    async fn recover(&self) -> bool {
        match &self.body {
            Some(body) => body.recover().await,
            None => true,
        }
    }

    /// Ends the keeping of what was sent: the answer is there.
    fn give_up(&self) {
        if let Some(body) = &self.body {
            body.give_up();
        }
    }
}
