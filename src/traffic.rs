//! What happened to each request: one [`AccessRecord`], filled on the way and emitted when it is dropped, so that no path
//! can forget it. Log, metrics and dashboard all have it from here.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{Method, StatusCode};
use tokio::time::Instant;
use tracing::info;

use crate::name::ServiceName;
use crate::registry::PodRef;
use crate::telemetry::ACCESS;

/// Bytes of a body that have passed so far; shared with whoever passes them.
#[derive(Debug, Clone, Default)]
pub struct ByteCount(Arc<AtomicU64>);

impl ByteCount {
    /// Adds `bytes`.
    pub fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns the sum so far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How the exchange ended for the client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Outcome {
    /// The client left before the response was complete.
    #[default]
    Abandoned,
    /// The response was cut off because the upstream side failed in its middle.
    Broken,
    /// The client has the whole response.
    Complete,
}

/// Numbers the requests of a proxy from 1 on.
#[derive(Debug, Default)]
pub struct Requests(AtomicU64);

impl Requests {
    /// Returns the next number.
    pub fn next(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// One request, from its headers to the end of its response.
#[derive(Debug)]
pub struct AccessRecord {
    /// Its number, which all that is logged about it has.
    pub request: u64,
    /// When the request's headers had been read.
    pub started: Instant,
    /// The client.
    pub client: SocketAddr,
    /// The request's method.
    pub method: Method,
    /// The authority that it was sent to, as the client wrote it.
    pub authority: String,
    /// The path, without the query, which may hold secrets.
    pub path: String,
    /// The protocol on the client's side.
    pub downstream: &'static str,
    /// The protocol on the pod's side.
    pub upstream: Option<&'static str>,
    /// The Service that the host names.
    pub service: Option<ServiceName>,
    /// The pod that answered, or that was tried last.
    pub pod: Option<PodRef>,
    /// The response's status.
    pub status: Option<StatusCode>,
    /// The response's `grpc-status`, from its headers or trailers.
    pub grpc_status: Option<String>,
    /// Bytes of the request's body.
    pub received: ByteCount,
    /// Bytes of the response's body.
    pub sent: ByteCount,
    /// When the response's headers were there.
    pub first_byte: Option<Instant>,
    /// How often the request was sent to a pod, or was tried to be.
    pub attempts: u32,
    /// Whether the connection to the pod was already there.
    pub reused: Option<bool>,
    /// The response flag (Envoy's term): why we answered ourselves or cut the response off.
    pub flag: Option<&'static str>,
    /// The same in words.
    pub reason: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
}

impl AccessRecord {
    /// Opens the record of a request. It is on its way for as long as the request, through many hands, so it stays in one place.
    #[must_use]
    pub fn open(
        request: u64,
        client: SocketAddr,
        downstream: &'static str,
        method: Method,
        path: String,
    ) -> Box<Self> {
        Box::new(Self {
            request,
            started: Instant::now(),
            client,
            method,
            authority: String::new(),
            path,
            downstream,
            upstream: None,
            service: None,
            pod: None,
            status: None,
            grpc_status: None,
            received: ByteCount::default(),
            sent: ByteCount::default(),
            first_byte: None,
            attempts: 0,
            reused: None,
            flag: None,
            reason: None,
            outcome: Outcome::default(),
        })
    }

    /// The flag to show: the one that was set, or the one that the outcome implies.
    fn shown_flag(&self) -> Option<&'static str> {
        self.flag.or(match self.outcome {
            Outcome::Complete => None,
            Outcome::Abandoned => Some("DC"),
            Outcome::Broken => Some("UC"),
        })
    }
}

impl Drop for AccessRecord {
    fn drop(&mut self) {
        info!(
            target: ACCESS,
            method = %self.method,
            authority = self.authority,
            path = self.path,
            status = self.status.map(|status| status.as_u16()),
            grpc_status = self.grpc_status,
            protocol = self.downstream,
            upstream_protocol = self.upstream,
            service = self.service.as_ref().map(ServiceName::name),
            namespace = self.service.as_ref().map(ServiceName::namespace),
            pod = self.pod.as_ref().map(|pod| &*pod.name),
            bytes_received = self.received.get(),
            bytes_sent = self.sent.get(),
            duration_ms = milliseconds(self.started.elapsed()),
            first_byte_ms = self.first_byte.map(|time| milliseconds(time.duration_since(self.started))),
            attempts = self.attempts,
            connection = self.reused.map(|reused| if reused { "reused" } else { "new" }),
            flag = self.shown_flag(),
            reason = self.reason,
            client = %self.client,
            request = self.request,
            "access",
        );
    }
}

/// Returns a span of time as logs show it: in milliseconds, rounded to microseconds, for finer digits are noise.
#[must_use]
pub fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
