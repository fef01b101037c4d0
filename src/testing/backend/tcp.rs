//! Raw TCP applications: echo, and a server that speaks first.

use std::io;
use std::net::SocketAddr;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::listener::Listener;

/// A raw TCP application.
#[derive(Debug)]
pub struct TcpBackend {
    /// Its port.
    listener: Listener,
}

impl TcpBackend {
    /// Sends back what it gets; answers EOF with EOF.
    pub fn echo() -> io::Result<Self> {
        Self::greeting(Bytes::new())
    }

    /// Sends `greeting` before the client has said anything, as MySQL and SMTP servers do, then echoes.
    pub fn greeting(greeting: Bytes) -> io::Result<Self> {
        let listener = Listener::start(move |stream, _| {
            let greeting = greeting.clone();
            async move {
                if let Err(error) = talk(stream, &greeting).await {
                    tracing::debug!(%error, "echo connection ended");
                }
            }
        })?;
        Ok(Self { listener })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.listener.address()
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.listener.accepted()
    }

    /// Cuts every connection that exists now.
    pub fn close_connections(&self) {
        self.listener.close_connections();
    }
}

async fn talk(mut stream: TcpStream, greeting: &[u8]) -> io::Result<()> {
    stream.write_all(greeting).await?;
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await
}
