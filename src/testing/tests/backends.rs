//! The sample applications, spoken to directly.

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::rt::Executor;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_util::task::TaskTracker;
use tonic::Code;
use tonic_prost::ProstCodec;

use super::within;
use crate::testing::backend::{
    ChatMessage, CountReply, CountRequest, HelloReply, HelloRequest, HttpBackend, Protocols,
};

#[derive(Clone)]
struct Spawner(TaskTracker);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Spawner {
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

async fn get(backend: &HttpBackend, request: Request<Full<Bytes>>) -> Response<Incoming> {
    let stream = TcpStream::connect(backend.address()).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    TaskTracker::new().spawn(connection.with_upgrades());
    within(sender.send_request(request)).await.unwrap()
}

fn request(path: &str) -> Request<Full<Bytes>> {
    Request::get(path)
        .header("host", "web.shop")
        .header("te", "trailers")
        .body(Full::default())
        .unwrap()
}

async fn json(response: Response<Incoming>) -> Value {
    serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
}

#[tokio::test]
async fn a_request_is_described_as_it_arrived() {
    let backend = HttpBackend::start("web-1", Protocols::Any).unwrap();
    let mut asked = request("/a%2Fb/../c?x=1");
    *asked.body_mut() = Full::from("hello");
    asked.headers_mut().append("x-two", "1".parse().unwrap());
    asked.headers_mut().append("x-two", "2".parse().unwrap());
    let seen = json(get(&backend, asked).await).await;
    assert_eq!(
        (seen["pod"].as_str(), seen["proto"].as_str()),
        (Some("web-1"), Some("HTTP/1.1"))
    );
    assert_eq!(seen["target"], "/a%2Fb/../c?x=1");
    assert_eq!(
        (seen["host"].as_str(), seen["body"].as_str()),
        (Some("web.shop"), Some("hello"))
    );
    let twos: Vec<_> = seen["headers"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|h| h[0] == "x-two")
        .collect();
    assert_eq!((twos[0][1].as_str(), twos[1][1].as_str()), (Some("1"), Some("2")));
    assert_eq!(backend.requests(), ["GET /a%2Fb/../c?x=1"]);
    assert_eq!(backend.connections(), 1);
}

#[tokio::test]
async fn a_large_body_is_counted_and_not_described() {
    let backend = HttpBackend::start("web-1", Protocols::Any).unwrap();
    for (size, described) in [(65_536, true), (65_537, false), (1 << 20, false)] {
        let mut asked = request("/");
        *asked.body_mut() = Full::from(vec![b'x'; size]);
        let seen = json(get(&backend, asked).await).await;
        assert_eq!(seen["body_bytes"], size);
        assert_eq!(seen["body"].is_string(), described, "{size}");
    }
}

#[tokio::test]
async fn downloads_have_the_size_asked_for() {
    let backend = HttpBackend::start("web-1", Protocols::Http1).unwrap();
    for (path, announced) in [("/bytes/200000", true), ("/bytes/200000?chunked=1", false)] {
        let response = get(&backend, request(path)).await;
        assert_eq!(response.headers().contains_key("content-length"), announced);
        let body = within(response.into_body().collect()).await.unwrap().to_bytes();
        assert_eq!(body.len(), 200_000);
        assert_eq!(body[65_536], 0);
    }
}

#[tokio::test]
async fn trailers_events_cookies_and_statuses_are_served() {
    let backend = HttpBackend::start("web-1", Protocols::Any).unwrap();
    let body = get(&backend, request("/trailers"))
        .await
        .into_body()
        .collect()
        .await
        .unwrap();
    assert!(body.trailers().unwrap().contains_key("x-checksum"));
    let events = get(&backend, request("/sse?count=2&interval_ms=1"))
        .await
        .into_body()
        .collect()
        .await
        .unwrap();
    let events = String::from_utf8(events.to_bytes().to_vec()).unwrap();
    assert!(
        events.starts_with("data: {\"seq\":0,\"sent_unix_ns\":") && events.contains("\"seq\":1"),
        "{events}"
    );
    assert_eq!(
        get(&backend, request("/cookies"))
            .await
            .headers()
            .get_all("set-cookie")
            .iter()
            .count(),
        2
    );
    assert_eq!(get(&backend, request("/status/418")).await.status(), 418);
}

/// A WebSocket that has echoed something.
async fn web_socket(backend: &HttpBackend) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(backend.address()).await.unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async("ws://web.shop/ws", stream)
        .await
        .unwrap();
    socket.send(Message::text("hello")).await.unwrap();
    assert_eq!(
        within(socket.next()).await.unwrap().unwrap(),
        Message::text("hello")
    );
    socket
}

#[tokio::test]
async fn web_sockets_echo() {
    let backend = HttpBackend::start("web-1", Protocols::Any).unwrap();
    web_socket(&backend).await;
}

#[tokio::test]
async fn a_web_socket_counts_as_open_and_is_cut_like_any_connection() {
    let backend = HttpBackend::start("web-1", Protocols::Any).unwrap();
    let is_over = |last: Option<tungstenite::Result<Message>>| !matches!(last, Some(Ok(_)));
    let mut first = web_socket(&backend).await;
    assert_eq!(backend.open_connections(), 1);
    backend.close_connections();
    assert!(is_over(within(first.next()).await));
    let until_counted = async {
        while backend.open_connections() > 0 {
            tokio::task::yield_now().await;
        }
    };
    within(until_counted).await;

    let mut second = web_socket(&backend).await;
    drop(backend);
    assert!(is_over(within(second.next()).await));
}

/// A gRPC client on one h2c connection.
async fn grpc(
    backend: &HttpBackend,
) -> tonic::client::Grpc<
    impl tonic::client::GrpcService<tonic::body::Body, ResponseBody = Incoming, Error: std::fmt::Debug>,
> {
    let stream = TcpStream::connect(backend.address()).await.unwrap();
    let tasks = TaskTracker::new();
    let (sender, connection) = http2::handshake(Spawner(tasks.clone()), TokioIo::new(stream))
        .await
        .unwrap();
    tasks.spawn(connection);
    let service = tower::service_fn(move |request: Request<tonic::body::Body>| {
        let mut sender = sender.clone();
        async move { sender.send_request(request).await }
    });
    let mut client =
        tonic::client::Grpc::with_origin(service, Uri::from_static("http://greeter.shop.svc.cluster.local"));
    client.ready().await.unwrap();
    client
}

#[tokio::test]
async fn unary_calls_echo_metadata_in_front_and_behind() {
    let backend = HttpBackend::start("greeter-1", Protocols::Http2).unwrap();
    let mut client = grpc(&backend).await;
    let mut call = tonic::Request::new(HelloRequest {
        name: "Ada".to_owned(),
    });
    call.metadata_mut().insert("x-trace", "7".parse().unwrap());
    let codec = ProstCodec::<HelloRequest, HelloReply>::default();
    let path = "/demo.Greeter/Hello".parse().unwrap();
    let reply = within(client.server_streaming(call, path, codec)).await.unwrap();
    assert_eq!(reply.metadata().get("x-trace").unwrap(), "7");
    let mut messages = reply.into_inner();
    let hello = messages.message().await.unwrap().unwrap();
    assert_eq!(
        (hello.message.as_str(), hello.pod.as_str()),
        ("Hello, Ada!", "greeter-1")
    );
    assert_eq!(messages.message().await.unwrap(), None);
    let trailers = messages.trailers().await.unwrap().unwrap();
    assert_eq!(trailers.get("x-trace").unwrap(), "7");
}

#[tokio::test]
async fn unary_calls_fail_with_the_code_asked_for() {
    let backend = HttpBackend::start("greeter-1", Protocols::Any).unwrap();
    let mut client = grpc(&backend).await;
    let call = tonic::Request::new(HelloRequest {
        name: "fail:5".to_owned(),
    });
    let codec = ProstCodec::<HelloRequest, HelloReply>::default();
    let status = client
        .unary(call, "/demo.Greeter/Hello".parse().unwrap(), codec)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

#[tokio::test]
async fn streams_go_one_way_and_both_ways() {
    let backend = HttpBackend::start("greeter-1", Protocols::Any).unwrap();
    let mut client = grpc(&backend).await;
    let codec = ProstCodec::<CountRequest, CountReply>::default();
    let call = tonic::Request::new(CountRequest {
        to: 3,
        interval_ms: 1,
    });
    let counted = client
        .server_streaming(call, "/demo.Greeter/Count".parse().unwrap(), codec)
        .await
        .unwrap();
    let counted: Vec<_> = within(counted.into_inner().map(|reply| reply.unwrap().index).collect()).await;
    assert_eq!(counted, [0, 1, 2]);

    client.ready().await.unwrap();
    let (lines, spoken) = tokio::sync::mpsc::channel(1);
    let spoken = tokio_stream::wrappers::ReceiverStream::new(spoken);
    let codec = ProstCodec::<ChatMessage, ChatMessage>::default();
    let path = "/demo.Greeter/Chat".parse().unwrap();
    let mut heard = client
        .streaming(tonic::Request::new(spoken), path, codec)
        .await
        .unwrap()
        .into_inner();
    for text in ["one", "two"] {
        lines
            .send(ChatMessage {
                text: text.to_owned(),
                pod: String::new(),
            })
            .await
            .unwrap();
        assert_eq!(within(heard.message()).await.unwrap().unwrap().text, text);
    }
}

#[tokio::test]
async fn a_cancelled_stream_is_no_longer_in_flight() {
    let backend = HttpBackend::start("greeter-1", Protocols::Any).unwrap();
    let mut client = grpc(&backend).await;
    let codec = ProstCodec::<CountRequest, CountReply>::default();
    let call = tonic::Request::new(CountRequest {
        to: 2,
        interval_ms: 600_000,
    });
    let counted = client
        .server_streaming(call, "/demo.Greeter/Count".parse().unwrap(), codec)
        .await
        .unwrap();
    assert_eq!(backend.in_flight(), 1);
    drop(counted);
    within(async {
        while backend.in_flight() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn unknown_methods_are_unimplemented() {
    let backend = HttpBackend::start("greeter-1", Protocols::Any).unwrap();
    let mut client = grpc(&backend).await;
    let codec = ProstCodec::<HelloRequest, HelloReply>::default();
    let call = tonic::Request::new(HelloRequest::default());
    let status = client
        .unary(call, "/demo.Nobody/Home".parse().unwrap(), codec)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
}

#[tokio::test]
async fn reflection_lists_and_describes_the_services() {
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

    let backend = HttpBackend::start("greeter-1", Protocols::Any).unwrap();
    let mut client = grpc(&backend).await;
    let ask = |request| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(request),
    };
    let asked = tokio_stream::iter([
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("demo.Greeter".to_owned())),
    ]);
    let codec = ProstCodec::<ServerReflectionRequest, ServerReflectionResponse>::default();
    let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        .parse()
        .unwrap();
    let answers = client
        .streaming(tonic::Request::new(asked), path, codec)
        .await
        .unwrap()
        .into_inner();
    let answers: Vec<_> = within(
        answers
            .map(|answer| answer.unwrap().message_response.unwrap())
            .collect(),
    )
    .await;
    let MessageResponse::ListServicesResponse(list) = &answers[0] else {
        panic!("{answers:?}")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in [
        "demo.Greeter",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(matches!(&answers[1], MessageResponse::FileDescriptorResponse(_)));
}
