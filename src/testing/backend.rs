//! Sample applications that listen on free ports of 127.0.0.1: what runs inside the pods of the double.

mod grpc;
mod http;
mod listener;
mod pages;
mod tcp;
mod websocket;

use std::io;
use std::net::SocketAddr;

use bytes::Bytes;

pub use self::grpc::{ChatMessage, CountReply, CountRequest, HelloReply, HelloRequest};
pub use self::http::{HttpBackend, Protocols};
pub use self::tcp::TcpBackend;

/// What to run behind a container port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serve {
    /// The HTTP and gRPC application.
    Http(Protocols),
    /// Raw TCP: sends back what it gets.
    Echo,
    /// Raw TCP: sends this first, then echoes.
    Greeting(Bytes),
}

/// A running application. Dropping it closes its port and its connections.
#[derive(Debug)]
pub enum Backend {
    /// HTTP and gRPC.
    Http(HttpBackend),
    /// Raw TCP.
    Tcp(TcpBackend),
}

impl Backend {
    /// Starts an application; `pod` is the name it answers with. Must be called inside a Tokio runtime.
    pub fn start(serve: &Serve, pod: &str) -> io::Result<Self> {
        match serve {
            Serve::Http(protocols) => HttpBackend::start(pod, *protocols).map(Self::Http),
            Serve::Echo => TcpBackend::echo().map(Self::Tcp),
            Serve::Greeting(greeting) => TcpBackend::greeting(greeting.clone()).map(Self::Tcp),
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        match self {
            Self::Http(backend) => backend.address(),
            Self::Tcp(backend) => backend.address(),
        }
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        match self {
            Self::Http(backend) => backend.connections(),
            Self::Tcp(backend) => backend.connections(),
        }
    }

    /// The HTTP application, if it is one.
    #[must_use]
    pub fn http(&self) -> Option<&HttpBackend> {
        match self {
            Self::Http(backend) => Some(backend),
            Self::Tcp(_) => None,
        }
    }
}
