//! The credentials of requests, which are renewed when the API server refuses them. kube asks a credential plugin again when
//! its token expires; but a token may be revoked before, and many plugins do not say when theirs expires (client-go asks
//! again after a 401, `exec.go: maybeRefreshCreds`).

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use kube::Config;
use kube::client::{Body, ConfigExt};
use tokio::sync::Mutex as Turns;
use tokio::time::Instant;
use tower::util::{BoxCloneSyncService, MapRequest};
use tower::{BoxError, Layer, Service, ServiceExt};
use tracing::debug;

use crate::k8s::token_file::TokenFile;

/// A plugin whose credentials are refused is asked again at most this often: it may take a second, and cost its user a login.
const PAUSE: Duration = Duration::from_secs(10);

/// Sends requests.
type Sender = BoxCloneSyncService<Request<Body>, Response<Incoming>, BoxError>;

/// Sends requests with credentials. A request that is answered 401 is sent once more if other credentials can be had.
#[derive(Clone)]
pub(super) struct Authenticated(Arc<Shared>);

struct Shared {
    /// Sends without credentials.
    bare: Sender,
    config: Config,
    token_file: Option<TokenFile>,
    current: Mutex<Current>,
    /// When the credentials were last renewed. One call does it, and all others wait for that.
    renewed: Arc<Turns<Option<Instant>>>,
}

/// What sends with the present credentials.
#[derive(Clone)]
struct Current {
    sender: Sender,
    /// Counts the renewals.
    generation: u64,
}

impl Authenticated {
    /// Gets the first credentials. A plugin blocks the thread.
    pub(super) fn new<S>(config: &Config, token_file: Option<TokenFile>, bare: S) -> Result<Self, kube::Error>
    where
        S: Service<Request<Body>, Response = Response<Incoming>, Error = BoxError>
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        // Inside of what kube adds: beside a token the file wins.
        let bare = match token_file.clone() {
            Some(file) => Sender::new(MapRequest::new(bare, move |request| file.authorize(request))),
            None => Sender::new(bare),
        };
        let current = Current {
            sender: sender(config, &bare)?.unwrap_or_else(|| bare.clone()),
            generation: 0,
        };
        Ok(Self(Arc::new(Shared {
            bare,
            config: config.clone(),
            token_file,
            current: Mutex::new(current),
            renewed: Arc::default(),
        })))
    }
}

impl Service<Request<Body>> for Authenticated {
    type Response = Response<Incoming>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Incoming>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move {
            let again = copy(&request);
            let (used, sender) = shared.present();
            let response = sender.oneshot(request).await?;
            let Some(again) = again.filter(|_| response.status() == StatusCode::UNAUTHORIZED) else {
                return Ok(response);
            };
            if !shared.renew(used).await? {
                return Ok(response);
            }
            debug!("the credentials were refused; trying with new ones");
            shared.present().1.oneshot(again).await
        })
    }
}

impl Shared {
    /// Returns what sends with the present credentials, and which these are.
    fn present(&self) -> (u64, Sender) {
        let Current { sender, generation } = self.current().clone();
        // Before it sends: a token that is read anew meanwhile costs one further try.
        let generation = (self.token_file.as_ref()).map_or(generation, TokenFile::generation);
        (generation, sender)
    }

    /// Gets other credentials than those of `generation`. Returns false where there are none. A plugin goes on when the
    /// future is dropped, and what it gives is used.
    async fn renew(self: &Arc<Self>, generation: u64) -> Result<bool, BoxError> {
        if let Some(file) = &self.token_file {
            return Ok(file.renew(generation));
        }
        // kube renews those of an auth provider by itself; made anew, they would begin with a refresh token that has been used.
        if self.config.auth_info.exec.is_none() {
            return Ok(false);
        }
        let mut renewed = self.renewed.clone().lock_owned().await;
        if self.current().generation != generation {
            return Ok(true);
        }
        if renewed.is_some_and(|at| at.elapsed() < PAUSE) {
            return Ok(false);
        }
        let shared = self.clone();
        let asked = tokio::task::spawn_blocking(move || {
            *renewed = Some(Instant::now());
            // A plugin's certificate is part of the connections, which are not made anew.
            let Some(sender) = sender(&shared.config, &shared.bare)? else {
                return Ok(false);
            };
            *shared.current() = Current {
                sender,
                generation: generation + 1,
            };
            Ok::<_, kube::Error>(true)
        });
        Ok(asked.await??)
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes what sends with credentials; nothing where there are none to add to a request.
fn sender(config: &Config, bare: &Sender) -> Result<Option<Sender>, kube::Error> {
    let layer = config.auth_layer()?;
    Ok(layer.map(|layer| Sender::new(layer.layer(bare.clone()))))
}

/// Copies a request, unless its body is a stream.
fn copy(request: &Request<Body>) -> Option<Request<Body>> {
    let mut copied = Request::new(request.body().try_clone()?);
    *copied.method_mut() = request.method().clone();
    *copied.uri_mut() = request.uri().clone();
    *copied.headers_mut() = request.headers().clone();
    *copied.extensions_mut() = request.extensions().clone();
    Some(copied)
}
