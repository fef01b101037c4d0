//! Accepts connections to the API server: TCP, TLS, HTTP/1.1.

use std::convert::Infallible;
use std::sync::Arc;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::api::{self, Connection};
use super::cluster::Cluster;
use super::delay::Delayed;

/// A client's connection.
pub(super) type ClientStream = TokioIo<TlsStream<Delayed>>;

/// Serves until the cluster stops.
pub(super) async fn accept(cluster: Arc<Cluster>, listener: TcpListener, tls: TlsAcceptor) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = cluster.stop.cancelled() => return,
        };
        let Ok((tcp, _)) = accepted else {
            // Out of file descriptors, most likely: give other tasks the chance to close some.
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            continue;
        };
        if cluster.faults.api_down() {
            continue;
        }
        let tls = tls.clone();
        let token = cluster.connection_token();
        let served = cluster.clone();
        cluster.tasks.spawn(async move {
            let ended = token.clone();
            tokio::select! {
                () = serve(served, tcp, tls, token) => {}
                () = ended.cancelled() => {}
            }
        });
    }
}

async fn serve(
    cluster: Arc<Cluster>,
    tcp: TcpStream,
    tls: TlsAcceptor,
    token: tokio_util::sync::CancellationToken,
) {
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let delayed = Delayed::new(cluster.clone(), tcp, token.clone());
    let stream = match tls.accept(delayed).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%error, "TLS handshake failed");
            return;
        }
    };
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(|leaf| leaf.to_vec());
    let connection = Arc::new(Connection {
        cluster,
        certificate,
        token,
    });
    let service = service_fn(move |request| {
        let connection = connection.clone();
        async move { Ok::<_, Infallible>(api::answer(connection, request).await) }
    });
    let http = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(ClientStream::new(stream), service);
    if let Err(error) = http.with_upgrades().await {
        tracing::debug!(%error, "API connection failed");
    }
}
