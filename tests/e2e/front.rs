//! Every way to speak HTTP to the one port.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use http::{Request, Version};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, copy};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::client::{Client, Reply, empty};
use crate::program::Proxy;

/// What the client speaks to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Front {
    Http1,
    H2c,
    /// HTTP/2 after `Upgrade: h2c`.
    Upgraded,
    Http1Tls,
    H2,
}

/// All of them.
pub(crate) const FRONTS: [Front; 5] = [
    Front::Http1,
    Front::H2c,
    Front::Upgraded,
    Front::Http1Tls,
    Front::H2,
];

/// A stream of bytes to the proxy.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// What the preface of an HTTP/2 client consists of (RFC 9113 section 3.4).
const PREFACE: usize = 24;
const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;

impl Front {
    /// Names it as people do.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1.1",
            Self::H2c => "h2c, prior knowledge",
            Self::Upgraded => "h2c, `Upgrade`",
            Self::Http1Tls => "HTTP/1.1 over TLS",
            Self::H2 => "h2 over TLS",
        }
    }

    /// Whether requests end up on HTTP/2.
    pub(crate) fn is_http2(self) -> bool {
        !matches!(self, Self::Http1 | Self::Http1Tls)
    }

    /// Opens a stream, through TLS that is verified where this one speaks it.
    pub(crate) async fn stream(self, proxy: &Proxy, host: &str) -> Result<Box<dyn Io>> {
        let stream = TcpStream::connect(proxy.address).await?;
        let protocol: &[u8] = match self {
            Self::Http1Tls => b"http/1.1",
            Self::H2 => b"h2",
            _ => return Ok(Box::new(stream)),
        };
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(proxy.certificate())?)?;
        let mut config =
            ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        let name = host.split(':').next().unwrap_or_default().to_owned();
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(ServerName::try_from(name)?, stream).await?;
        let agreed = stream.get_ref().1.alpn_protocol();
        ensure!(agreed == Some(protocol), "ALPN chose {agreed:?}");
        Ok(Box::new(stream))
    }

    /// Opens a connection. Returns the answer to the GET that it took for that, if it took one.
    pub(crate) async fn connect(self, proxy: &Proxy, host: &str) -> Result<(Client, Option<Reply>)> {
        let stream = self.stream(proxy, host).await?;
        Ok(match self {
            Self::Http1 | Self::Http1Tls => (Client::http1(stream).await?, None),
            Self::H2c => (Client::http2(stream, "http").await?, None),
            Self::H2 => (Client::http2(stream, "https").await?, None),
            Self::Upgraded => {
                let (client, reply) = upgrade(stream, host).await?;
                (client, Some(reply))
            }
        })
    }
}

/// Asks for HTTP/2 with a GET of `/hello`, which becomes stream 1 (RFC 7540 section 3.2).
async fn upgrade(mut stream: Box<dyn Io>, host: &str) -> Result<(Client, Reply)> {
    let ask = format!(
        "GET /hello HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \
         AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
    );
    stream.write_all(ask.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    ensure!(
        head.starts_with(b"HTTP/1.1 101 "),
        "{}",
        String::from_utf8_lossy(&head)
    );
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let mut client = Client::http2(theirs, "http").await?;
    client.adopt(async { drop(carry(ours, stream).await) });
    // The library opens stream 1 with the request below, whose frame never leaves: the proxy has had it already. It uses
    // nothing that the compression of later ones would build on: no authority, and a path, which is never indexed.
    let request = Request::get("/hello").version(Version::HTTP_11).body(empty())?;
    let reply = client.exchange(request).await?;
    Ok((client, reply))
}

/// Copies both ways, without the first HEADERS frame that the client sends.
async fn carry(client: DuplexStream, proxy: Box<dyn Io>) -> Result<()> {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_proxy, mut to_proxy) = tokio::io::split(proxy);
    let sending = async {
        let mut preface = [0; PREFACE];
        from_client.read_exact(&mut preface).await?;
        to_proxy.write_all(&preface).await?;
        let mut opened = false;
        while !opened {
            let mut head = [0; FRAME_HEAD];
            from_client.read_exact(&mut head).await?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length.try_into()?];
            from_client.read_exact(&mut payload).await?;
            opened = head[3] == HEADERS;
            if !opened {
                to_proxy.write_all(&head).await?;
                to_proxy.write_all(&payload).await?;
            }
        }
        copy(&mut from_client, &mut to_proxy).await?;
        to_proxy.shutdown().await.context("cannot end the stream")
    };
    let receiving = async { anyhow::Ok(copy(&mut from_proxy, &mut to_client).await?) };
    tokio::try_join!(sending, receiving)?;
    Ok(())
}
