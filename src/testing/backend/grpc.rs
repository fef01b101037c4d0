//! The gRPC application: `demo.Greeter`, health and reflection, without generated code.

mod schema;

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use http::{Request as HttpRequest, Response as HttpResponse};
use hyper::body::Incoming;
use tonic::body::Body;
use tonic::metadata::{KeyAndValueRef, MetadataMap};
use tonic::server::Grpc as Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower::util::BoxCloneSyncService;
use tower::{ServiceExt, service_fn};

pub use schema::{ChatMessage, CountReply, CountRequest, HelloReply, HelloRequest};

/// A service of a library, with its type hidden.
type Library = BoxCloneSyncService<HttpRequest<Incoming>, HttpResponse<Body>, Infallible>;

/// Answers of one call: messages, then perhaps a final status.
type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The gRPC side of an HTTP backend.
#[derive(Clone, Debug)]
pub(super) struct Grpc {
    /// The name it answers with.
    pod: String,
    /// `grpc.reflection.v1`
    reflection: Library,
    /// `grpc.reflection.v1alpha`, which older grpcurl versions ask first.
    reflection_alpha: Library,
    /// `grpc.health.v1`; always serving.
    health: Library,
}

impl Grpc {
    /// Prepares the services.
    pub(super) fn new(pod: &str) -> Result<Self, tonic_reflection::server::Error> {
        let builder = || {
            tonic_reflection::server::Builder::configure()
                .register_file_descriptor_set(schema::file_descriptors())
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let (_, health) = tonic_health::server::health_reporter();
        Ok(Self {
            pod: pod.to_owned(),
            reflection: BoxCloneSyncService::new(builder().build_v1()?),
            reflection_alpha: BoxCloneSyncService::new(builder().build_v1alpha()?),
            health: BoxCloneSyncService::new(health),
        })
    }

    /// Answers one call.
    pub(super) async fn answer(self, request: HttpRequest<Incoming>) -> HttpResponse<Body> {
        let pod = self.pod;
        let path = request.uri().path();
        let library = match path.trim_start_matches('/').split_once('/') {
            Some(("grpc.reflection.v1.ServerReflection", _)) => Some(self.reflection),
            Some(("grpc.reflection.v1alpha.ServerReflection", _)) => Some(self.reflection_alpha),
            Some(("grpc.health.v1.Health", _)) => Some(self.health),
            _ => None,
        };
        if let Some(library) = library {
            let Ok(response) = library.oneshot(request).await;
            return response;
        }
        match path {
            // A unary reply is a stream of one on the wire; as a stream it can have trailers of ours.
            "/demo.Greeter/Hello" => {
                let service = service_fn(move |call| std::future::ready(hello(&pod, &call)));
                Server::new(ProstCodec::default())
                    .server_streaming(service, request)
                    .await
            }
            "/demo.Greeter/Count" => {
                let service = service_fn(move |call| std::future::ready(Ok::<_, Status>(count(&pod, call))));
                Server::new(ProstCodec::default())
                    .server_streaming(service, request)
                    .await
            }
            "/demo.Greeter/Chat" => {
                let service = service_fn(move |call| std::future::ready(Ok::<_, Status>(chat(&pod, call))));
                Server::new(ProstCodec::default())
                    .streaming(service, request)
                    .await
            }
            _ => Status::unimplemented(format!("no method {path}")).into_http(),
        }
    }
}

/// Greets; a name of the form `fail:5` fails with that code instead.
fn hello(pod: &str, call: &Request<HelloRequest>) -> Result<Response<Replies<HelloReply>>, Status> {
    let name = &call.get_ref().name;
    if let Some(code) = name.strip_prefix("fail:") {
        let code = code.parse().map_or(Code::Unknown, Code::from_i32);
        return Err(Status::with_metadata(
            code,
            format!("{name} asked for"),
            echoed(call.metadata()),
        ));
    }
    let reply = HelloReply {
        message: format!("Hello, {name}!"),
        pod: pod.to_owned(),
    };
    Ok(respond(pod, call.metadata(), stream::iter([Ok(reply)])))
}

/// Counts from 0, with a pause between the messages.
fn count(pod: &str, call: Request<CountRequest>) -> Response<Replies<CountReply>> {
    let metadata = call.metadata().clone();
    let CountRequest { to, interval_ms } = call.into_inner();
    let name = pod.to_owned();
    let replies = stream::iter(0..to).then(move |index| {
        let pod = name.clone();
        async move {
            if index > 0 && interval_ms > 0 {
                tokio::time::sleep(Duration::from_millis(u64::from(interval_ms))).await;
            }
            Ok(CountReply { index, pod })
        }
    });
    respond(pod, &metadata, replies)
}

/// Sends every message back at once.
fn chat(pod: &str, call: Request<Streaming<ChatMessage>>) -> Response<Replies<ChatMessage>> {
    let metadata = call.metadata().clone();
    let name = pod.to_owned();
    let replies = call.into_inner().map(move |message| {
        message.map(|ChatMessage { text, .. }| ChatMessage {
            text,
            pod: name.clone(),
        })
    });
    respond(pod, &metadata, replies)
}

/// Adds the caller's metadata in front and behind.
fn respond<T: Send + 'static>(
    pod: &str,
    metadata: &MetadataMap,
    replies: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> Response<Replies<T>> {
    let echoed = echoed(metadata);
    // tonic turns a final status into trailers, an OK one included.
    let end = Status::with_metadata(Code::Ok, "", echoed.clone());
    let replies: Replies<T> = Box::pin(replies.chain(stream::iter([Err(end)])));
    let mut response = Response::new(replies);
    *response.metadata_mut() = echoed;
    if let Ok(pod) = pod.parse() {
        response.metadata_mut().insert("x-pod", pod);
    }
    response
}

/// The caller's `x-` metadata, and its deadline as `x-seen-grpc-timeout`.
fn echoed(metadata: &MetadataMap) -> MetadataMap {
    let mut echoed = MetadataMap::new();
    for entry in metadata.iter() {
        match entry {
            KeyAndValueRef::Ascii(key, value) if key.as_str().starts_with("x-") => {
                echoed.append(key.clone(), value.clone());
            }
            KeyAndValueRef::Ascii(key, value) if key == "grpc-timeout" => {
                echoed.insert("x-seen-grpc-timeout", value.clone());
            }
            KeyAndValueRef::Binary(key, value) if key.as_str().starts_with("x-") => {
                echoed.append_bin(key.clone(), value.clone());
            }
            _ => {}
        }
    }
    echoed
}
