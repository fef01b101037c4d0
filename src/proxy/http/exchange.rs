//! One request and its answer: looks the Service up, picks an endpoint, sends, and tries another one where that is safe.

use std::sync::Arc;
use std::time::Duration;

use http::request::Parts;
use http::{Method, Request, StatusCode, Version};
use http_body::Body;
use tokio::time::Instant;
use tokio_util::sync::DropGuard;
use tracing::debug;

use crate::name::ServiceName;
use crate::proxy::Context;
use crate::proxy::body::ClientBody;
use crate::proxy::error::Error;
use crate::proxy::front::Front;
use crate::proxy::http::headers;
use crate::proxy::http::upgrade::Upgrade;
use crate::proxy::replay::{Replay, RequestBody};
use crate::proxy::reply;
use crate::proxy::retry::{Attempt, Attempts, Verdict};
use crate::proxy::route::{Hint, Route, route};
use crate::proxy::upstream::{Answer, Failure, Fresh, Peer, Wire};
use crate::registry::{Endpoint, InFlight, PodRef, Session};
use crate::traffic::{AccessRecord, milliseconds};
use crate::transport::{ConnectError, Target};

/// Where a request is to go, as its host says.
pub(super) struct Destination {
    pub(super) service: ServiceName,
    pub(super) hostname: Option<Arc<str>>,
    pub(super) port: u16,
    /// Whether the client came over TLS.
    pub(super) secure: bool,
    /// Where the client's connection came in.
    pub(super) own_port: u16,
}

/// What a pod answered, and what lives as long as its answer.
pub(super) struct Answered {
    pub(super) answer: Answer,
    /// Ends a request whose body the pod did not ask for; its connection is of no further use.
    pub(super) unasked: Option<DropGuard>,
    pub(super) in_flight: InFlight,
}

/// Sends the request to one endpoint after the other until one answers or nothing is left to try.
///
/// An endpoint that has not failed yet is tried at once; when all have, the policy's pause comes before the next round. A
/// request that may have arrived somewhere is sent again `max_retries` times at most, however many endpoints there are. Where
/// the cluster has ready pods but no way to them, as while a kubelet restarts, a request waits for one as it waits for a pod.
pub(super) async fn exchange(
    context: &Context,
    destination: &Destination,
    request: Request<ClientBody>,
    upgrade: Option<&Upgrade>,
    front: &Arc<Front>,
    record: &mut AccessRecord,
) -> Result<Answered, Error> {
    let grpc = reply::is_grpc(request.headers());
    let extended = upgrade.is_some_and(Upgrade::is_extended);
    let mut pending = Pending::new(request, extended, front, context.limits.replay_bytes, record);
    if context.forwarded_headers {
        headers::add_forwarded(
            &mut pending.head,
            record.client.ip(),
            &record.authority,
            destination.secure,
        );
    }
    let mut attempts = Attempts::new(context.retry);
    let patient_until = record.started + context.ready_timeout;
    let mut failed: Vec<PodRef> = Vec::new();
    let (mut pauses, mut fresh, mut switched) = (0, Fresh::No, None::<Switched>);
    loop {
        let Route {
            mut candidates,
            hint,
            affinity,
        } = locate(context, destination, record.request).await?;
        let is_ours =
            |(endpoint, port): &(Arc<Endpoint>, u16)| endpoint.is_itself && *port == destination.own_port;
        if candidates.iter().any(is_ours) {
            // Another one of a set would send it back.
            return Err(Error::Itself(destination.service.clone()));
        }
        let session = affinity.map(|timeout| Session {
            service: destination.service.clone(),
            client: record.client.ip(),
            timeout,
        });
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
            None => context
                .balancer
                .pick(&candidates, |(endpoint, _)| endpoint, session.as_ref())
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

        record.attempts += 1;
        debug!(
            request = record.request, attempt = record.attempts, endpoint = %target, protocol = wire.as_str(),
            in_flight = endpoint.load.get(), candidates = candidates.len(), session = session.is_some(),
            "endpoint chosen"
        );
        let (in_flight, sent) = (endpoint.load.begin(), Instant::now());
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
            misunderstood,
            waited,
        } = match context.upstream.send(&peer, fresh, request).await {
            Ok(mut answer) => {
                debug!(
                    request = record.request, attempt = record.attempts, endpoint = %target,
                    status = answer.response.status().as_u16(), connection = connection(answer.reused),
                    connection_ms = milliseconds(answer.waited), ms = milliseconds(sent.elapsed()),
                    "pod answered"
                );
                record.reused = Some(answer.reused);
                if pending.is_under_way() {
                    answer.lease.detach();
                }
                let unasked = pending.give_up();
                if choice.undecided {
                    context.upstream.learn(&target, wire);
                }
                let status = answer.response.status();
                if extended && status.is_success() {
                    // To the client that would mean that the other protocol has begun (RFC 8441 section 5).
                    return Err(Error::NotSwitched(target, status));
                }
                headers::check_coding(&answer.response).map_err(|coding| Error::Coding(target, coding))?;
                return Ok(Answered {
                    answer,
                    unasked,
                    in_flight,
                });
            }
            Err(failure) => failure,
        };
        record.reused = Some(reused);
        let replayable = pending.recover().await;
        if pending.is_broken() {
            return Err(Error::ClientGone);
        }
        let (undecided, guessed) = (choice.undecided, choice.undecided && !hint.http2);
        let attempt = Attempt {
            method: pending.method(),
            error: &error,
            untouched,
            reused,
            replayable,
            undecided,
            guessed,
            misunderstood,
        };
        let verdict = attempts.judge(&attempt);
        debug!(
            request = record.request, attempt = record.attempts, endpoint = %target, connection = connection(reused),
            connection_ms = milliseconds(waited), ms = milliseconds(sent.elapsed()), %error, untouched, replayable,
            ?verdict, "attempt failed"
        );
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
            let pause = context.retry.jittered(pauses, fastrand::f64());
            let waits = error.is_way_missing() && Instant::now() + pause <= patient_until;
            if error.is_lasting() || pauses >= context.retry.max_retries && !waits {
                return Err(error);
            }
            debug!(
                request = record.request,
                pause_ms = milliseconds(pause),
                retry = pauses + 1,
                "every endpoint has failed; pausing"
            );
            tokio::time::sleep(pause).await;
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

/// Words where a connection came from as access records do.
fn connection(reused: bool) -> &'static str {
    if reused { "reused" } else { "new" }
}

/// Looks up where the request may go, and waits for a ready pod where one may be expected.
async fn locate(context: &Context, destination: &Destination, request: u64) -> Result<Route, Error> {
    let Destination {
        service,
        hostname,
        port,
        ..
    } = destination;
    let (mut resolving, mut waiting, mut deadline) = (Duration::ZERO, None, None);
    let located = loop {
        let asked = Instant::now();
        let resolved = context.registry.resolve(service).await;
        resolving += asked.elapsed();
        let view = match resolved {
            Ok(view) => view,
            Err(error) => break Err(Error::Lookup(service.clone(), error)),
        };
        let routed = route(&view, *port, hostname.as_deref());
        match &routed {
            Err(error @ Error::NoEndpoint { .. }) if view.is_between_pods() => {
                if waiting.is_none() {
                    debug!(request, %service, reason = %error, "waiting for a ready pod");
                    waiting = Some(Instant::now());
                }
            }
            _ => break routed,
        }
        context.registry.recheck(service);
        let changed = context.registry.changed(&view);
        let deadline = *deadline.get_or_insert_with(|| asked + context.ready_timeout);
        if tokio::time::timeout_at(deadline, changed).await.is_err() {
            break routed;
        }
    };
    let resolve_ms = milliseconds(resolving);
    let ready_wait_ms = waiting.map(|since| milliseconds(since.elapsed()));
    match &located {
        Ok(route) => {
            let candidates = route.candidates.len();
            debug!(request, %service, resolve_ms, ready_wait_ms, candidates, "service resolved");
        }
        Err(error) => debug!(request, %service, resolve_ms, ready_wait_ms, %error, "service not resolved"),
    }
    located
}

/// A request that may have to be sent more than once.
struct Pending {
    /// Its head, without hop-by-hop fields.
    head: Parts,
    /// Its body, if it has one.
    body: Option<Replay>,
    /// Takes the interim responses, if the client may get any.
    front: Option<Arc<Front>>,
}

impl Pending {
    /// `extended`: by extended CONNECT, where what follows the head is no body, but the bytes of another protocol. An Upgrade
    /// of HTTP/1.1 may have a body, which comes before the other protocol (RFC 9110 section 7.8). Up to `replayed` bytes of a
    /// body are kept.
    fn new(
        request: Request<ClientBody>,
        extended: bool,
        front: &Arc<Front>,
        replayed: usize,
        record: &mut AccessRecord,
    ) -> Self {
        let (mut head, body) = request.into_parts();
        headers::strip_hop_by_hop(&mut head.headers);
        let body = Some(body).filter(|body| !extended && !body.is_end_stream());
        let expected = headers::expects_continue(head.version, &head.headers);
        let front = (head.version == Version::HTTP_11).then(|| front.clone());
        Self {
            head,
            body: body.map(|body| Replay::new(body, replayed, expected, record.received.share())),
            front,
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
        let (body, asked) = match &self.body {
            Some(body) => body.body(),
            None => (RequestBody::empty(), None),
        };
        let mut request = Request::from_parts(head, body);
        let front = self.front.clone();
        // Not called for HTTP/2, whose interim responses the HTTP library does not hand out.
        hyper::ext::on_informational(&mut request, move |interim| match (&asked, &front) {
            // Reading the body makes the server's side say so to the client.
            (Some(asked), _) if interim.status() == StatusCode::CONTINUE => asked.cancel(),
            (_, Some(front)) => front.interim(interim.status(), interim.headers()),
            (_, None) => {}
        });
        request
    }

    /// Returns whether the request can be sent again as a whole.
    async fn recover(&self) -> bool {
        match &self.body {
            Some(body) => body.recover().await,
            None => true,
        }
    }

    /// Whether the client broke off before its body was complete.
    fn is_broken(&self) -> bool {
        self.body.as_ref().is_some_and(Replay::is_broken)
    }

    /// Whether its body is still being sent.
    fn is_under_way(&self) -> bool {
        self.body.as_ref().is_some_and(Replay::is_under_way)
    }

    /// Ends the keeping of what was sent: the answer is there. See [`Replay::give_up`].
    fn give_up(&self) -> Option<DropGuard> {
        self.body.as_ref().and_then(Replay::give_up)
    }
}
