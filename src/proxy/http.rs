//! The HTTP side of the proxy: decides who answers a request, and passes the answer on.

mod exchange;
pub(super) mod headers;
mod upgrade;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode, Version};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body as _, Incoming};
use tokio::time::Instant;

use crate::drain::Drain;
use crate::name::{Authority, Host};
use crate::proxy::body::{ClientBody, ResponseBody, grpc_status};
use crate::proxy::connection::{Downstream, Security};
use crate::proxy::cors::Cors;
use crate::proxy::error::Error;
use crate::proxy::http::exchange::{Answered, Destination, exchange};
use crate::proxy::http::upgrade::Upgrade;
use crate::proxy::reply::{self, Form};
use crate::proxy::socket::Reset;
use crate::proxy::{Context, own};
use crate::traffic::{AccessRecord, OpenRecord};

/// How much of an answer that nobody wants is read for its connection's sake, and for how long.
const UNWANTED: usize = 64 << 10;
const UNWANTED_TIME: Duration = Duration::from_secs(1);

/// Answers one request; whatever goes wrong becomes a response.
pub(super) async fn answer(
    context: Arc<Context>,
    downstream: Arc<Downstream>,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let path = request.uri().path().to_owned();
    let (client, protocol) = (downstream.client, downstream.protocol(request.version()));
    let mut record = context.log.open(client, protocol, request.method().clone(), path);
    let version = request.version();
    let form = Form::of(request.headers());
    let cors = Cors::of(&request, &context.cors, &context.naming.zone);
    let authority = headers::authority(&request)
        .and_then(|authority| headers::check_request_coding(request.headers()).map(|()| authority));
    let front = (version <= Version::HTTP_11).then(|| downstream.front.clone());
    let expected = headers::expects_continue(version, request.headers());
    let mut request = request.map(|body| ClientBody::new(body, front.clone(), expected));
    let upgrade = Upgrade::take(&mut request);
    let answered = match authority {
        Ok(authority) => {
            record.authority = authority;
            dispatch(
                &context,
                &downstream,
                request,
                &cors,
                upgrade.as_ref(),
                &mut record,
            )
            .await
        }
        Err(error) => {
            // Whether its body is abandoned shows when it is.
            drop(request);
            Err(error)
        }
    };
    let mut response = match (answered, upgrade) {
        (Ok(By::Pod(answered)), Some(upgrade))
            if answered.answer.response.status() == StatusCode::SWITCHING_PROTOCOLS =>
        {
            downstream.front.upgrade();
            upgrade.agree(*answered, downstream, record, &context.clients)
        }
        (Ok(By::Pod(answered)), _) => match cors.preflight(answered.answer.response.headers()) {
            Some(headers) => in_its_place(*answered, headers, record, &context.clients),
            None => {
                // Where the end of the connection is the end of the body, a break must not look like one.
                let reset = (version == Version::HTTP_10).then(|| downstream.reset.clone());
                pass_on(*answered, reset, form, version, record)
            }
        },
        (Ok(By::Page(page)), _) => {
            let asked = own::Asked {
                downstream: &downstream,
                version,
                grpc: form == Form::Grpc,
            };
            own::show(page, &context, &asked, record)
        }
        (Err(error), _) => reply::fail(form, &error, record),
    };
    if front.is_some_and(|front| front.is_abandoned()) {
        // The HTTP library closes the connection too, but has no time left to say so (RFC 9112 section 9.6).
        response
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(cors.complete(response))
}

/// Who has the answer.
enum By {
    Pod(Box<Answered>),
    Page(own::Page),
}

/// Decides by the host who answers, and gets the answer.
async fn dispatch(
    context: &Context,
    downstream: &Downstream,
    request: Request<ClientBody>,
    cors: &Cors,
    upgrade: Option<&Upgrade>,
    record: &mut AccessRecord,
) -> Result<By, Error> {
    let zone = || context.naming.zone.to_string();
    let own_page = |literal, method: &Method, record: &AccessRecord| {
        own::admit(literal, downstream.local.ip(), cors)?;
        own::find(method, &record.path, zone).map(By::Page)
    };
    let Authority { host, port } = downstream.read_authority(&context.naming, &record.authority)?;
    match host {
        Host::Service { service, hostname } => {
            record.service = Some(service.clone());
            let destination = Destination {
                service,
                hostname,
                port: port.unwrap_or(downstream.default_port()),
                secure: downstream.security != Security::Cleartext,
                own_port: downstream.local.port(),
            };
            let (front, method) = (&downstream.front, request.method().clone());
            match exchange(context, &destination, request, upgrade, front, record).await {
                Err(Error::Itself(_)) => own_page(None, &method, record),
                answered => Ok(By::Pod(Box::new(answered?))),
            }
        }
        Host::Own { literal } => own_page(literal, request.method(), record),
        Host::Unknown => Err(Error::UnknownHost {
            host: record.authority.clone(),
            zone: zone(),
        }),
    }
}

/// Answers a preflight that the pod has no answer to. What the pod said is read to its end, if that is near, so that its
/// connection can be used again.
fn in_its_place(
    answered: Answered,
    headers: HeaderMap,
    mut record: OpenRecord,
    clients: &Drain,
) -> Response<ResponseBody> {
    let said = answered.answer.response.status();
    record.reason = Some(format!("the pod ({said}) has no answer to the preflight"));
    let Answered {
        mut answer,
        in_flight,
        ..
    } = answered;
    answer.lease.detach();
    clients.spawn(async move {
        let rest = Limited::new(answer.response.into_body(), UNWANTED).collect();
        if let Ok(Ok(_)) = tokio::time::timeout(UNWANTED_TIME, rest).await {
            answer.lease.give_back();
        }
        drop(in_flight);
    });
    reply::respond(StatusCode::NO_CONTENT, headers, Bytes::new(), record)
}

/// Passes a pod's response on to the client.
fn pass_on(
    answered: Answered,
    reset: Option<Reset>,
    form: Form,
    version: Version,
    mut record: OpenRecord,
) -> Response<ResponseBody> {
    let Answered {
        answer,
        unasked,
        in_flight,
    } = answered;
    let (mut parts, body) = answer.response.into_parts();
    // A proxy speaks its own version (RFC 9110 section 2.5), and an HTTP/1.0 connection is not kept.
    let kept = parts.version != Version::HTTP_10 && unasked.is_none();
    let lease = if kept { answer.lease } else { answer.lease.retire() };
    let is_http2 = parts.version == Version::HTTP_2;
    parts.version = Version::HTTP_11;
    headers::strip_hop_by_hop(&mut parts.headers);
    if form == Form::Grpc && is_http2 && version == Version::HTTP_11 && !body.is_end_stream() {
        headers::announce_grpc_trailers(&mut parts.headers);
    }
    record.status = Some(parts.status);
    record.grpc_status = grpc_status(&parts.headers);
    record.first_byte = Some(Instant::now());
    Response::from_parts(
        parts,
        ResponseBody::upstream(body, lease, unasked, in_flight, reset, record),
    )
}
