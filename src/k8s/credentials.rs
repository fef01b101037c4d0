//! The credentials of requests, which are renewed when the API server refuses them. kube asks a credential plugin again when
//! its token expires; but a token may be revoked before, and many plugins do not say when theirs expires (client-go asks
//! again after a 401, `exec.go: maybeRefreshCreds`). A token or certificate in the kubeconfig is replaced by whoever logs in
//! again, which kubectl would see when it is next called.

use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use kube::Config;
use kube::client::{AuthError, Body, ConfigExt};
use rustls::AlertDescription;
use tokio::sync::Mutex as Turns;
use tokio::time::Instant;
use tower::util::{BoxCloneSyncService, MapRequest};
use tower::{BoxError, Layer, Service, ServiceExt};
use tracing::debug;

use crate::k8s::error::{self, Kind};
use crate::k8s::proxy::Proxy;
use crate::k8s::token_file::TokenFile;

/// Credentials that are refused are renewed at most this often: a plugin may take a second, and cost its user a login.
const PAUSE: Duration = Duration::from_secs(10);

/// Sends requests.
pub(super) type Sender = BoxCloneSyncService<Request<Body>, Response<Incoming>, BoxError>;

/// What a kubeconfig says of one cluster and its user.
#[derive(Clone)]
pub(super) struct Login {
    pub(super) config: Config,
    pub(super) proxy: Option<Proxy>,
    pub(super) token_file: Option<TokenFile>,
}

/// Where logins come from, and how they are used.
pub(super) trait Source: Send + Sync + 'static {
    /// Reads what the kubeconfig says of the same cluster and its user now. Blocks the thread.
    fn read(&self) -> Result<Login, BoxError>;

    /// Makes what sends without credentials in its requests; its connections may have a certificate, for which a plugin is asked.
    /// Blocks the thread.
    fn connect(&self, login: &Login) -> Result<Sender, kube::Error>;
}

/// Sends requests with credentials. A request that is answered 401, or whose certificate is refused, is sent once more if
/// other credentials may be had.
#[derive(Clone)]
pub(super) struct Authenticated(Arc<Shared>);

struct Shared {
    source: Box<dyn Source>,
    current: Mutex<Current>,
    /// When the credentials were last renewed. One call does it, and all others wait for that.
    renewed: Arc<Turns<Option<Instant>>>,
}

/// What sends with the present credentials.
#[derive(Clone)]
struct Current {
    login: Login,
    /// Sends without credentials in its requests.
    bare: Sender,
    sender: Sender,
    /// Counts the renewals.
    renewals: u64,
}

/// Which credentials a request was sent with.
#[derive(Clone, Copy)]
struct Used {
    renewals: u64,
    /// Which token of the token file.
    token: u64,
}

impl Authenticated {
    /// Gets the first credentials. A plugin blocks the thread.
    pub(super) fn new(login: Login, source: impl Source) -> Result<Self, kube::Error> {
        let bare = source.connect(&login)?;
        let current = Current {
            sender: sender(&login, &bare)?.unwrap_or_else(|| bare.clone()),
            bare,
            login,
            renewals: 0,
        };
        Ok(Self(Arc::new(Shared {
            source: Box::new(source),
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
            let answer = sender.oneshot(request).await;
            let is_refused = match &answer {
                Ok(response) => response.status() == StatusCode::UNAUTHORIZED,
                Err(error) => shared.is_refused(error.as_ref()),
            };
            let Some(again) = again.filter(|_| is_refused) else {
                return answer;
            };
            if !shared.renew(used).await? {
                return answer;
            }
            debug!("the credentials were refused; trying with new ones");
            shared.present().1.oneshot(again).await
        })
    }
}

impl Shared {
    /// Returns what sends with the present credentials, and which these are.
    fn present(&self) -> (Used, Sender) {
        let current = self.current();
        let used = Used {
            renewals: current.renewals,
            // Before it sends: a token that is read anew meanwhile costs one further try.
            token: (current.login.token_file.as_ref()).map_or(0, TokenFile::generation),
        };
        (used, current.sender.clone())
    }

    /// Tells whether a request has failed by its credentials: the server does not take the certificate, or kube has no token that
    /// it could send. A plugin that fails has just been asked.
    fn is_refused(&self, error: &(dyn Error + 'static)) -> bool {
        let has_provider = || self.current().login.config.auth_info.auth_provider.is_some();
        let is_spent = |error: &AuthError| matches!(error, AuthError::UnrefreshableTokenResponse);
        is_certificate_refused(error)
            || error::auth_cause(error).is_some_and(|error| is_spent(error) || has_provider())
    }

    /// Gets other credentials than those that were used. Returns false where there are none. What has begun goes on when the
    /// future is dropped, and what it brings is used.
    async fn renew(self: &Arc<Self>, used: Used) -> Result<bool, BoxError> {
        if self.is_renewed(used) {
            return Ok(true);
        }
        let mut renewed = self.renewed.clone().lock_owned().await;
        if self.is_renewed(used) {
            return Ok(true);
        }
        if renewed.is_some_and(|at| at.elapsed() < PAUSE) {
            return Ok(false);
        }
        let shared = self.clone();
        let renewing = tokio::task::spawn_blocking(move || {
            *renewed = Some(Instant::now());
            let current = shared.current().clone();
            let next = match shared.next(&current) {
                Err(error) if error::kind(&error) != Kind::Unauthorized => {
                    // A certificate may be being written.
                    debug!(%error, "the credentials cannot be used");
                    None
                }
                next => next?,
            };
            let is_renewed = next.is_some();
            if let Some(next) = next {
                *shared.current() = next;
            }
            Ok::<_, kube::Error>(is_renewed)
        });
        Ok(renewing.await??)
    }

    /// Tells whether there are others already, or a token file holds another token.
    fn is_renewed(&self, used: Used) -> bool {
        let current = self.current();
        let file = current.login.token_file.as_ref();
        current.renewals != used.renewals || file.is_some_and(|file| file.renew(used.token))
    }

    /// Gets the credentials that follow, from a plugin or the kubeconfig. Blocks the thread.
    fn next(&self, current: &Current) -> Result<Option<Current>, kube::Error> {
        let login = self.source.read().unwrap_or_else(|error| {
            // It may be being written.
            debug!(%error, "the kubeconfig cannot be read again");
            current.login.clone()
        });
        let (before, now) = (&current.login.config.auth_info, &login.config.auth_info);
        if let (Some(before), Some(now)) = (&before.auth_provider, &now.auth_provider)
            && before.config == now.config
        {
            // kube renews those of an auth provider by itself; made anew, they would begin with a refresh token that has been used.
            return Ok(None);
        }
        let mut bare = current.bare.clone();
        let is_plugin = before.exec.is_some() && now.exec.is_some();
        let of_plugin = if is_plugin { sender(&login, &bare)? } else { None };
        let sender = if let Some(sender) = of_plugin {
            sender
        } else {
            // A certificate is part of the connections. Those that are in use go on.
            bare = self.source.connect(&login)?;
            // A plugin has said already that there is nothing else.
            let added = if is_plugin { None } else { sender(&login, &bare)? };
            added.unwrap_or_else(|| bare.clone())
        };
        Ok(Some(Current {
            login,
            bare,
            sender,
            renewals: current.renewals + 1,
        }))
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes what sends with credentials; nothing where there are none to add to a request.
fn sender(login: &Login, bare: &Sender) -> Result<Option<Sender>, kube::Error> {
    // Inside of what kube adds: beside a token the file wins.
    let bare = match login.token_file.clone() {
        Some(file) => Sender::new(MapRequest::new(bare.clone(), move |request| {
            file.authorize(request)
        })),
        None => bare.clone(),
    };
    let layer = login.config.auth_layer()?;
    Ok(match layer {
        Some(layer) => Some(Sender::new(layer.layer(bare))),
        None => login.token_file.is_some().then_some(bare),
    })
}

/// Tells whether the server has refused our certificate, or wants one.
fn is_certificate_refused(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(rustls::Error::AlertReceived(alert)) = error.downcast_ref() {
            // RFC 8446 section 6.2. A signature that does not fit is a decrypt error there.
            return matches!(
                alert,
                AlertDescription::AccessDenied
                    | AlertDescription::BadCertificate
                    | AlertDescription::CertificateExpired
                    | AlertDescription::CertificateRequired
                    | AlertDescription::CertificateRevoked
                    | AlertDescription::CertificateUnknown
                    | AlertDescription::DecryptError
                    | AlertDescription::UnknownCA
                    | AlertDescription::UnsupportedCertificate
            );
        }
        // The source of an I/O error is that of what it holds.
        let held = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match held {
            Some(held) => Some(held),
            None => error.source(),
        };
    }
    false
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_refused_by_alerts_that_mean_it_however_they_are_wrapped() {
        let refused = |alert| {
            let held = io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert));
            let wrapped = io::Error::other(io::Error::other(held));
            is_certificate_refused(&wrapped)
        };
        assert!(refused(AlertDescription::CertificateExpired));
        assert!(refused(AlertDescription::UnknownCA));
        assert!(!refused(AlertDescription::InternalError));
        assert!(!is_certificate_refused(&io::Error::other("reset")));
    }
}
