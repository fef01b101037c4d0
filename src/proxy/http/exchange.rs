//! One request and its answer: looks the Service up, picks an endpoint, sends, and tries another one where that is safe.

use std::sync::Arc;

use http::request::Parts;
use http::{Method, Request};
use hyper::body::Incoming;
use tracing::debug;

use crate::name::ServiceName;
use crate::proxy::Context;
use crate::proxy::body::RequestBody;
use crate::proxy::error::Error;
use crate::proxy::http::headers;
use crate::proxy::reply;
use crate::proxy::route::{Hint, Route, route};
use crate::proxy::upstream::{Answer, Failure, Wire};
use crate::registry::{self, InFlight, PodRef};
use crate::traffic::AccessRecord;
use crate::transport::{ConnectError, Target};

/// Where a request is to go, as its host says.
pub(super) struct Destination {
    pub(super) service: ServiceName,
    pub(super) hostname: Option<Arc<str>>,
    pub(super) port: u16,
}

/// Sends the request to one endpoint after the other until one answers or nothing is left to try.
///
/// An endpoint that has not failed yet is tried at once; when all have, the policy's pause comes before the next round.
pub(super) async fn exchange(
    context: &Context,
    destination: &Destination,
    request: Request<Incoming>,
    record: &mut AccessRecord,
) -> Result<(Answer, InFlight), Error> {
    let grpc = reply::is_grpc(request.headers());
    let mut pending = Pending::new(request, record);
    let mut failed: Vec<PodRef> = Vec::new();
    let mut pauses = 0;
    loop {
        let Route { mut candidates, hint } = locate(context, destination).await?;
        if candidates
            .iter()
            .all(|(endpoint, _)| failed.contains(&endpoint.pod))
        {
            failed.clear();
        }
        candidates.retain(|(endpoint, _)| !failed.contains(&endpoint.pod));
        let (endpoint, port) = registry::pick(&candidates, |(endpoint, _)| endpoint, &context.cursor)
            .expect("a route has candidates, and not all of them have failed");
        let target = Target {
            pod: endpoint.pod.clone(),
            port: *port,
        };
        let wire = if grpc || hint == Hint::H2c {
            Wire::H2c
        } else {
            Wire::Http1
        };

        let in_flight = endpoint.load.begin();
        record.attempts += 1;
        record.pod = Some(endpoint.pod.clone());
        record.upstream = Some(wire.as_str());
        let request = pending.request(wire, &record.authority);
        let Failure {
            error,
            unsent,
            reused,
        } = match context.upstream.send(&target, wire, request).await {
            Ok(answer) => {
                record.reused = Some(answer.reused);
                return Ok((answer, in_flight));
            }
            Err(failure) => failure,
        };
        record.reused = Some(reused);
        let untouched = unsent.is_some();
        let replayable = pending.recover(unsent);
        let permitted = context.retry.permits(pending.method(), &error, replayable);
        debug!(%target, %error, attempt = record.attempts, reused, untouched, replayable, "attempt failed");
        if reused && (untouched || permitted) {
            // An idle connection had died meanwhile. That says nothing about the endpoint, and costs no pause.
            continue;
        }
        if !permitted {
            return Err(error);
        }
        if matches!(error, Error::Connect(_, ConnectError::PodGone(_))) {
            context.registry.recheck(&destination.service);
        }
        failed.push(endpoint.pod.clone());
        if candidates.len() == 1 {
            if pauses == context.retry.max_retries {
                return Err(error);
            }
            tokio::time::sleep(context.retry.jittered(pauses, fastrand::f64())).await;
            pauses += 1;
        }
    }
}

async fn locate(context: &Context, destination: &Destination) -> Result<Route, Error> {
    let Destination {
        service,
        hostname,
        port,
    } = destination;
    let view = context
        .registry
        .resolve(service)
        .await
        .map_err(|error| Error::Lookup(service.clone(), error))?;
    route(&view, *port, hostname.as_deref())
}

/// A request that may have to be sent more than once.
struct Pending {
    /// Its head, without hop-by-hop fields.
    head: Parts,
    body: Left,
}

/// What is left of a request's body.
enum Left {
    /// There never was any, so the request can be sent as often as needed.
    Bodiless,
    /// All of it.
    Whole(RequestBody),
    /// It has been given out, and some of it may be gone.
    Gone,
}

impl Pending {
    fn new(request: Request<Incoming>, record: &AccessRecord) -> Self {
        let (mut head, body) = request.into_parts();
        headers::strip_hop_by_hop(&mut head.headers);
        let body = RequestBody::new(body, record.received.clone());
        let body = if body.is_empty() {
            Left::Bodiless
        } else {
            Left::Whole(body)
        };
        Self { head, body }
    }

    fn method(&self) -> &Method {
        &self.head.method
    }

    /// Makes the request for the next attempt. To be called only while the body is not gone.
    fn request(&mut self, wire: Wire, authority: &str) -> Request<RequestBody> {
        let mut head = self.head.clone();
        headers::prepare(&mut head, wire, authority);
        let body = match std::mem::replace(&mut self.body, Left::Gone) {
            Left::Whole(body) => body,
            Left::Bodiless => {
                self.body = Left::Bodiless;
                RequestBody::empty()
            }
            Left::Gone => unreachable!("a request is sent again only while its body can be"),
        };
        Request::from_parts(head, body)
    }

    /// Takes back what was not sent. Returns whether the request can be sent again.
    fn recover(&mut self, unsent: Option<Request<RequestBody>>) -> bool {
        if let (Left::Gone, Some(request)) = (&self.body, unsent) {
            self.body = Left::Whole(request.into_body());
        }
        !matches!(self.body, Left::Gone)
    }
}
