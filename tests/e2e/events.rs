//! Server-sent events: each arrives when it is written.

use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::Duration;

use crate::client::{Client, PROTOCOLS, get};
use crate::command::within;
use crate::delay::{Delays, now};
use crate::program::Proxy;
use crate::scene::Scene;

/// How late an event may be, in milliseconds.
const LATE: f64 = 50.0;

/// Longer than an event is under way.
const LIMIT: Duration = Duration::from_secs(20);

/// Reads a stream of events.
pub(crate) struct Events {
    body: Incoming,
    /// What came of the next event so far.
    text: String,
}

impl Events {
    /// Asks for events.
    pub(crate) async fn open(client: &mut Client, host: &str, path: &str) -> Self {
        let response = within(LIMIT, "the head of the events", client.send(get(host, path)))
            .await
            .unwrap();
        Self {
            body: response.into_body(),
            text: String::new(),
        }
    }

    /// Waits for the next event, or the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let event = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
                self.text = rest.to_owned();
                return Some(event);
            }
            let frame = within(LIMIT, "an event", self.body.frame()).await?;
            let data = frame.unwrap().into_data().unwrap();
            self.text.push_str(std::str::from_utf8(&data).unwrap());
        }
    }
}

#[tokio::test]
async fn an_event_arrives_before_the_next_one_is_written() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        // The second event is an hour away, so the first can only arrive if nothing holds it back.
        let mut events = Events::open(
            &mut client,
            &scene.shop.host("web"),
            "/sse?count=2&interval_ms=3600000",
        )
        .await;
        assert_eq!(events.next().await.unwrap()["seq"], 0, "{protocol:?}");
    }
}

#[tokio::test]
async fn an_event_takes_less_than_fifty_milliseconds() {
    let scene = Scene::alone().await;
    let proxy = Proxy::start().await;
    for protocol in PROTOCOLS {
        let mut client = Client::connect(proxy.address, protocol).await.unwrap();
        let mut events = Events::open(
            &mut client,
            &scene.shop.host("web"),
            "/sse?count=21&interval_ms=100",
        )
        .await;
        let mut delays = Delays::default();
        let mut count = 0;
        while let Some(event) = events.next().await {
            // The first one waits for the connection.
            if count > 0 {
                delays.add(event["sent_unix_ns"].as_f64().unwrap(), now());
            }
            count += 1;
        }
        assert_eq!(count, 21);
        let (median, worst) = delays.report(&format!("events over {protocol:?}"));
        assert!(median < LATE && worst < LATE, "{protocol:?}");
    }
}
