//! The HTTP side of the proxy: decides who answers a request, and passes the answer on.

mod exchange;
pub(super) mod headers;
mod upgrade;

use std::convert::Infallible;
use std::sync::Arc;

use http::{Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::name::{Authority, Host};
use crate::proxy::body::{ResponseBody, grpc_status};
use crate::proxy::connection::{Downstream, Security};
use crate::proxy::cors::Cors;
use crate::proxy::error::Error;
use crate::proxy::http::exchange::{Destination, exchange};
use crate::proxy::http::upgrade::Upgrade;
use crate::proxy::reply::{self, Form};
use crate::proxy::upstream::Answer;
use crate::proxy::{Context, own};
use crate::registry::InFlight;
use crate::traffic::AccessRecord;

/// Answers one request; whatever goes wrong becomes a response.
pub(super) async fn answer(
    context: Arc<Context>,
    downstream: Arc<Downstream>,
    mut request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let path = request.uri().path().to_owned();
    let (client, protocol) = (downstream.client, downstream.protocol(request.version()));
    let mut record = AccessRecord::new(
        context.requests.next(),
        client,
        protocol,
        request.method().clone(),
        path,
    );
    let version = request.version();
    let form = Form::of(request.headers());
    let cors = Cors::of(&request, &context.cors, &context.naming.zone);
    let authority = headers::authority(&request);
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
        Err(error) => Err(error),
    };
    let response = match (answered, upgrade) {
        (Ok(Answered::Pod(answer, in_flight)), Some(upgrade))
            if answer.response.status() == StatusCode::SWITCHING_PROTOCOLS =>
        {
            upgrade.agree(answer.response, in_flight, record, &context.clients)
        }
        (Ok(Answered::Pod(answer, in_flight)), _) => pass_on(answer, in_flight, record),
        (Ok(Answered::Page(page)), _) => {
            let asked = own::Asked {
                downstream: &downstream,
                version,
                grpc: form == Form::Grpc,
            };
            own::show(page, &context, &asked, record)
        }
        (Err(error), _) => reply::fail(form, &error, record),
    };
    Ok(cors.complete(response))
}

/// Who has the answer.
enum Answered {
    Pod(Answer, InFlight),
    Page(own::Page),
}

/// Decides by the host who answers, and gets the answer.
async fn dispatch(
    context: &Context,
    downstream: &Downstream,
    request: Request<Incoming>,
    cors: &Cors,
    upgrade: Option<&Upgrade>,
    record: &mut AccessRecord,
) -> Result<Answered, Error> {
    let zone = || context.naming.zone.to_string();
    let Authority { host, port } = context.naming.parse(&record.authority)?;
    match host {
        Host::Service { service, hostname } => {
            record.service = Some(service.clone());
            let destination = Destination {
                service,
                hostname,
                port: port.unwrap_or(downstream.default_port()),
                secure: downstream.security != Security::Cleartext,
            };
            let (answer, in_flight) = exchange(context, &destination, request, upgrade, record).await?;
            Ok(Answered::Pod(answer, in_flight))
        }
        Host::Own { literal } => {
            own::admit(literal, downstream.local.ip(), cors)?;
            own::find(request.method(), &record.path, zone).map(Answered::Page)
        }
        Host::Unknown => Err(Error::UnknownHost {
            host: record.authority.clone(),
            zone: zone(),
        }),
    }
}

/// Passes a pod's response on to the client.
fn pass_on(answer: Answer, in_flight: InFlight, mut record: AccessRecord) -> Response<ResponseBody> {
    let (mut parts, body) = answer.response.into_parts();
    // A proxy speaks its own version (RFC 9110 section 2.5), and an HTTP/1.0 connection is not kept.
    let lease = Some(answer.lease).filter(|_| parts.version != Version::HTTP_10);
    parts.version = Version::HTTP_11;
    headers::strip_hop_by_hop(&mut parts.headers);
    record.status = Some(parts.status);
    record.grpc_status = grpc_status(&parts.headers);
    record.first_byte = Some(Instant::now());
    Response::from_parts(parts, ResponseBody::upstream(body, lease, in_flight, record))
}
