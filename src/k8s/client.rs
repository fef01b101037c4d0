//! One client for everything we ask of the API server: the kubeconfig as kubectl reads it, over a connector of our own.
//!
//! kube's stock connector leaves Nagle's algorithm on, which delays small writes of a port-forward by a round trip, and cuts
//! upgraded connections by a write timeout; so the stack is put together here from kube's own layers.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use http::uri::Scheme;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{ClientBuilder, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config as KubeConfig};
use secrecy::{ExposeSecret, SecretString};
use tokio::runtime::Handle;
use tower::timeout::TimeoutLayer;
use tower::{BoxError, ServiceBuilder, ServiceExt};

use crate::k8s::credentials::{Authenticated, Login, Sender, Source};
use crate::k8s::error::{self, Kind};
use crate::k8s::portforward::{Carriers, SlowReaders};
use crate::k8s::proxy::{self, Kind as ProxyKind};
use crate::k8s::token_file::TokenFile;
use crate::privileges::Account;

/// Dead peers must be noticed well before a user gives up: first probe after this silence, then every [`PROBE`].
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const PROBE: Duration = Duration::from_secs(5);
const PROBES: u32 = 3;

/// How long a call waits for a credential plugin besides the server. A plugin may have to send its user to a browser, and a
/// call that gives up on it makes the next one start another.
const PLUGIN_PATIENCE: Duration = Duration::from_mins(1);

/// The variable that lists kubeconfig files, as kubectl reads it.
const KUBECONFIG: &str = "KUBECONFIG";

/// Settings of the Kubernetes side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The kubeconfig file; without one `KUBECONFIG`, then `~/.kube/config`, then the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// The context; without one the file's current context.
    pub context: Option<String>,
    /// How long the API server may take to answer the headers of any request, connecting included; and for a whole list.
    pub timeout: Duration,
    /// How often a Service is read again where watching is refused.
    pub poll_interval: Duration,
    /// How long a Service is followed, and a port-forward kept, after its last use.
    pub idle_timeout: Duration,
    /// Which forms of port-forward are tried.
    pub carriers: Carriers,
    /// What is borne of clients that do not read.
    pub slow_readers: SlowReaders,
    /// Whose `~` it is, and for whom credential plugins run.
    pub account: Account,
}

/// Why there is no usable connection to a cluster. Each prints as one line that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// Neither a kubeconfig nor a pod's service account was found.
    #[error("no kubeconfig found: set KUBECONFIG, use --kubeconfig, or log in so that {0} exists")]
    NoConfig(String),
    /// A kubeconfig cannot be read or makes no sense.
    #[error("{0}; `kubectl config view` shows what kubectl makes of it")]
    BadConfig(String),
    /// The credentials cannot be had, or the server does not accept them.
    #[error(
        "the API server at {url} does not accept the credentials ({message}); log in again, then check with `kubectl auth whoami`"
    )]
    Unauthorized {
        /// The server's URL.
        url: String,
        /// The server's or the plugin's own words.
        message: String,
    },
    /// The server does not answer.
    #[error("cannot reach the API server at {url} ({message}); check with `kubectl cluster-info`")]
    Unreachable {
        /// The server's URL.
        url: String,
        /// What went wrong.
        message: String,
    },
}

/// A connection to one cluster.
#[derive(Clone)]
pub struct Cluster {
    /// The client; clones share one connection pool.
    pub(super) client: Client,
    /// The server's URL, for messages.
    url: String,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// Reads the kubeconfig and prepares a client; nothing is asked of the server yet.
    ///
    /// # Errors
    /// [`ConnectionError::NoConfig`], [`ConnectionError::BadConfig`], or `Unauthorized` when a credential plugin fails.
    pub async fn load(config: &Config) -> Result<Self, ConnectionError> {
        let (login, context) = load(config).await?;
        let url = login.config.cluster_url.to_string();
        let (timeout, shown) = (config.timeout, url.clone());
        let source = Files {
            settings: Config {
                // Whoever switches to another one means kubectl.
                context,
                ..config.clone()
            },
            server: login.config.cluster_url.clone(),
        };
        // Credential plugins are run by kube while it builds the layers, and block their thread.
        let client = tokio::task::spawn_blocking(move || build(login, source, timeout))
            .await
            .expect("building a client does not panic")
            .map_err(|error| match error::kind(&error) {
                Kind::Unauthorized => ConnectionError::Unauthorized {
                    url: shown,
                    message: error::message(&error),
                },
                _ => ConnectionError::BadConfig(error::message(&error)),
            })?;
        Ok(Self { client, url })
    }

    /// Returns the API server's URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Asks the server for its version: proves that it is there and takes our credentials, and leaves a warm connection.
    ///
    /// # Errors
    /// [`ConnectionError::Unauthorized`] or [`ConnectionError::Unreachable`].
    pub async fn check(&self) -> Result<String, ConnectionError> {
        match self.client.apiserver_version().await {
            Ok(version) => Ok(version.git_version),
            // Some platforms hide /version from ordinary users; being refused still proves a living server.
            Err(error) if error::kind(&error) == Kind::Forbidden => Ok("unknown".into()),
            Err(error) => {
                let (url, message) = (self.url.clone(), error::message(&error));
                Err(match error::kind(&error) {
                    Kind::Unauthorized => ConnectionError::Unauthorized { url, message },
                    _ => ConnectionError::Unreachable { url, message },
                })
            }
        }
    }
}

/// Stands where kube looks for a proxy.
const HIDDEN: &str = "http://proxy.invalid";

/// The files that a kubeconfig consists of.
struct Files {
    /// With the context that was current at the start.
    settings: Config,
    server: Uri,
}

impl Source for Files {
    fn read(&self) -> Result<Login, BoxError> {
        let (login, _) = Handle::current().block_on(load(&self.settings))?;
        match &login.config.cluster_url {
            server if *server == self.server => Ok(login),
            other => Err(format!("it names another server now, {other}").into()),
        }
    }

    fn connect(&self, login: &Login) -> Result<Sender, kube::Error> {
        connect(login, self.settings.timeout)
    }
}

/// Reads the configuration: the login, and the name of the context it is of.
async fn load(config: &Config) -> Result<(Login, Option<String>), ConnectionError> {
    let bad = |error: KubeconfigError| ConnectionError::BadConfig(error::one_line(&error.to_string()));
    let (mut kube, own, context) = match read(config)? {
        Some(mut merged) => {
            let context = config.context.clone().or_else(|| merged.current_context.clone());
            let options = KubeConfigOptions {
                context: context.clone(),
                cluster: None,
                user: None,
            };
            let own = hide_proxy_url(&mut merged, context.as_deref());
            let kube = KubeConfig::from_custom_kubeconfig(merged, &options).await;
            let mut kube = kube.map_err(bad)?;
            kube.proxy_url = None;
            // A credential plugin is told of it, and may have to go that way itself.
            if let Some(cluster) = kube
                .auth_info
                .exec
                .as_mut()
                .and_then(|exec| exec.cluster.as_mut())
            {
                cluster.proxy_url.clone_from(&own);
            }
            (kube, own, context)
        }
        None => (incluster(&config.account)?, None, None),
    };
    let variable = |name: &str| std::env::var(name).ok();
    let proxy = proxy::choose(&kube.cluster_url, own.as_deref(), variable)
        .map_err(|error| ConnectionError::BadConfig(error.to_string()))?;
    if proxy.is_some() {
        name_port(&mut kube.cluster_url);
    }
    let token_file = take_token_file(&mut kube)?;
    tell_plugin(&mut kube, &config.account);
    let login = Login {
        config: kube,
        proxy,
        token_file,
    };
    Ok((login, context))
}

/// Writes the usual port of clear text into a server's URL: proxies would be asked for that of TLS.
fn name_port(server: &mut Uri) {
    let mut parts = server.clone().into_parts();
    if server.scheme() == Some(&Scheme::HTTP)
        && server.port().is_none()
        && let Some(host) = server.host()
        && let Ok(authority) = format!("{host}:80").parse()
    {
        parts.authority = Some(authority);
        if let Ok(named) = Uri::from_parts(parts) {
            *server = named;
        }
    }
}

fn incluster(account: &Account) -> Result<KubeConfig, ConnectionError> {
    KubeConfig::incluster().map_err(|_| {
        let default =
            default_path(account).map_or_else(|| "~/.kube/config".into(), |path| path.display().to_string());
        ConnectionError::NoConfig(default)
    })
}

/// Returns the proxy of a context's cluster, and leaves another in its place: kube reads a URL of its own kind there, and if
/// there is none, in the variables, and makes an error of what it cannot read. What it finds is not used.
fn hide_proxy_url(merged: &mut Kubeconfig, context: Option<&str>) -> Option<String> {
    let context = merged
        .contexts
        .iter()
        .find(|named| Some(&*named.name) == context)?;
    let name = &context.context.as_ref()?.cluster;
    let cluster = merged.clusters.iter_mut().find(|named| named.name == *name)?;
    cluster.cluster.as_mut()?.proxy_url.replace(HIDDEN.into())
}

/// Takes a token file out of the configuration, to be read by ours instead of kube's reader. Beside a token the file wins, and
/// the token is for the time until it can be read (client-go: `AuthInfo.TokenFile`, `bearerAuthRoundTripper`).
fn take_token_file(config: &mut KubeConfig) -> Result<Option<TokenFile>, ConnectionError> {
    let Some(path) = config.auth_info.token_file.take() else {
        return Ok(None);
    };
    if config.auth_info.token.is_some() {
        return Ok(Some(TokenFile::open_beside_token(Path::new(&path))));
    }
    let opened = TokenFile::open(Path::new(&path));
    opened
        .map(Some)
        .map_err(|error| ConnectionError::BadConfig(format!("token file {path}: {error}")))
}

/// Lets a credential plugin find the home folder of the person it runs for, with its caches. What the kubeconfig says goes
/// last, and so wins.
fn tell_plugin(config: &mut KubeConfig, account: &Account) {
    let Some(plugin) = &mut config.auth_info.exec else {
        return;
    };
    let of_account = account.environment.iter().map(|(name, value)| {
        HashMap::from([
            ("name".to_owned(), (*name).to_owned()),
            ("value".to_owned(), value.clone()),
        ])
    });
    let of_kubeconfig = plugin.env.take().unwrap_or_default();
    plugin.env = Some(of_account.chain(of_kubeconfig).collect());
}

/// Reads and merges the kubeconfig files, or finds none. Files of the list that do not exist are passed over as kubectl
/// does; a file that was named by flag must exist.
fn read(config: &Config) -> Result<Option<Kubeconfig>, ConnectionError> {
    let explicit = config.kubeconfig.as_deref();
    let paths = match (explicit, std::env::var_os(KUBECONFIG)) {
        (Some(path), _) => vec![path.to_path_buf()],
        (None, Some(list)) if !list.is_empty() => std::env::split_paths(&list)
            .filter(|path| !path.as_os_str().is_empty())
            .collect(),
        _ => default_path(&config.account).into_iter().collect(),
    };
    let mut merged: Option<Kubeconfig> = None;
    for path in paths {
        let bad = |text: &str| {
            ConnectionError::BadConfig(format!(
                "kubeconfig {}: {}",
                path.display(),
                error::one_line(text)
            ))
        };
        match Kubeconfig::read_from(&path) {
            Ok(mut next) => {
                unset_empty(&mut next);
                let all = merged.unwrap_or_default().merge(next);
                merged = Some(all.map_err(|error| bad(&error.to_string()))?);
            }
            Err(KubeconfigError::ReadConfig(error, _))
                if explicit.is_none() && error.kind() == io::ErrorKind::NotFound => {}
            Err(KubeconfigError::ReadConfig(error, _)) => return Err(bad(&error.to_string())),
            // The parser's own words show the lines around the mistake, and these may hold a token or a password.
            Err(KubeconfigError::Parse(error)) => {
                let place = error.location().map_or_else(String::new, |place| {
                    format!(" at line {}, column {}", place.line(), place.column())
                });
                return Err(bad(&format!("it is not a kubeconfig{place}")));
            }
            Err(error) => return Err(bad(&error.to_string())),
        }
    }
    Ok(merged)
}

/// Unsets what is empty: to client-go that is the same, and kubectl itself writes `current-context: ""`.
fn unset_empty(file: &mut Kubeconfig) {
    fn unset<T, const N: usize>(is_empty: impl Fn(&T) -> bool, values: [&mut Option<T>; N]) {
        for value in values {
            value.take_if(|value| is_empty(value));
        }
    }
    // Paths have been joined to the file's folder by then.
    let is_folder = |path: &String| path.is_empty() || path.ends_with(std::path::is_separator);
    let is_secret_empty = |secret: &SecretString| secret.expose_secret().is_empty();
    unset(String::is_empty, [&mut file.current_context]);
    for cluster in file
        .clusters
        .iter_mut()
        .filter_map(|named| named.cluster.as_mut())
    {
        unset(
            String::is_empty,
            [
                &mut cluster.tls_server_name,
                &mut cluster.certificate_authority_data,
                &mut cluster.proxy_url,
            ],
        );
        unset(is_folder, [&mut cluster.certificate_authority]);
    }
    for user in file
        .auth_infos
        .iter_mut()
        .filter_map(|named| named.auth_info.as_mut())
    {
        unset(
            String::is_empty,
            [
                &mut user.client_certificate_data,
                &mut user.username,
                &mut user.impersonate,
            ],
        );
        unset(
            is_secret_empty,
            [&mut user.client_key_data, &mut user.token, &mut user.password],
        );
        unset(
            is_folder,
            [
                &mut user.token_file,
                &mut user.client_certificate,
                &mut user.client_key,
            ],
        );
    }
    for context in file
        .contexts
        .iter_mut()
        .filter_map(|named| named.context.as_mut())
    {
        unset(String::is_empty, [&mut context.namespace]);
    }
}

fn default_path(account: &Account) -> Option<PathBuf> {
    Some(account.home.as_ref()?.join(".kube").join("config"))
}

/// Puts the client together.
fn build(login: Login, source: impl Source, timeout: Duration) -> Result<Client, kube::Error> {
    let (server, namespace) = (
        login.config.base_uri_layer(),
        login.config.default_namespace.clone(),
    );
    let service = ServiceBuilder::new()
        // A plugin that hangs while it renews the credentials would otherwise hold every call for ever.
        .layer(TimeoutLayer::new(timeout + PLUGIN_PATIENCE))
        .layer(server)
        .service(Authenticated::new(login, source)?);
    Ok(ClientBuilder::new(service, namespace).build())
}

/// Makes what sends requests; the connector depends on the kind of proxy on the way.
fn connect(login: &Login, timeout: Duration) -> Result<Sender, kube::Error> {
    let config = &login.config;
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_keepalive(Some(KEEP_ALIVE));
    tcp.set_keepalive_interval(Some(PROBE));
    tcp.set_keepalive_retries(Some(PROBES));
    tcp.set_connect_timeout(Some(timeout));
    // No TCP_USER_TIMEOUT: on Linux it also ends a connection whose peer is alive and just does not read, as a pod at a
    // breakpoint does.

    let Some(proxy) = login.proxy.clone() else {
        return stack(config, tcp, timeout);
    };
    match proxy.kind {
        ProxyKind::Socks5 => stack(config, proxy.socks5(tcp), timeout),
        ProxyKind::Http => stack(config, proxy.tunnel(tcp), timeout),
        ProxyKind::Https => {
            // As with kubectl, the cluster's authorities vouch for the proxy, too.
            let tls = config.rustls_https_connector_with_connector(tcp)?;
            stack(config, proxy.tunnel(tls), timeout)
        }
    }
}

fn stack<C>(config: &KubeConfig, connector: C, timeout: Duration) -> Result<Sender, kube::Error>
where
    C: tower::Service<Uri> + Clone + Send + Sync + 'static,
    C::Response:
        hyper::rt::Read + hyper::rt::Write + hyper_util::client::legacy::connect::Connection + Send + Unpin,
    C::Future: Send + 'static,
    C::Error: std::error::Error + Send + Sync + 'static,
    C::Error: Into<BoxError>,
{
    let https = config.rustls_https_connector_with_connector(connector)?;
    let http = HttpClient::builder(TokioExecutor::new())
        .pool_timer(hyper_util::rt::TokioTimer::new())
        .build(https);
    let service = ServiceBuilder::new()
        .layer(config.extra_headers_layer()?)
        // Ends with the response's headers, so it bounds lists, watches and upgrades without cutting their streams.
        .layer(TimeoutLayer::new(timeout))
        .service(http.map_err(BoxError::from));
    Ok(Sender::new(service))
}

#[cfg(all(test, unix))]
#[expect(
    clippy::unwrap_used,
    reason = "a failed step fails the test, and the panic says where"
)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use tokio::time::Instant;

    /// Writes a kubeconfig, and returns the configuration that names it.
    fn kubeconfig(folder: &tempfile::TempDir, text: &str) -> Config {
        let path = folder.path().join("kubeconfig");
        fs::write(&path, text).unwrap();
        Config {
            kubeconfig: Some(path),
            ..crate::k8s::scripted::config()
        }
    }

    #[tokio::test]
    async fn what_is_empty_is_not_set() {
        let folder = tempfile::tempdir().unwrap();
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: ''\n\
                    clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1', certificate-authority: '', certificate-authority-data: '', \
                    tls-server-name: '', proxy-url: ''}}]\n\
                    users: [{name: u, user: {tokenFile: '', client-certificate: '', client-key: '', \
                    client-certificate-data: '', client-key-data: '', token: '', username: '', password: ''}}]\n";
        let read = read(&kubeconfig(&folder, text)).unwrap().unwrap();
        assert_eq!(read.current_context, None);
        let cluster = read.clusters[0].cluster.as_ref().unwrap();
        let of_cluster = [
            &cluster.certificate_authority,
            &cluster.certificate_authority_data,
            &cluster.tls_server_name,
            &cluster.proxy_url,
        ];
        let user = read.auth_infos[0].auth_info.as_ref().unwrap();
        let of_user = [
            &user.token_file,
            &user.client_certificate,
            &user.client_key,
            &user.client_certificate_data,
            &user.username,
        ];
        let set: Vec<_> = of_cluster.into_iter().chain(of_user).flatten().collect();
        assert_eq!(set, Vec::<&String>::new());
        assert!(user.client_key_data.is_none() && user.token.is_none() && user.password.is_none());
    }

    #[test]
    fn only_clear_text_without_a_port_is_given_one() {
        for (text, named) in [
            ("http://kube.internal", "http://kube.internal:80/"),
            ("http://[fd12::1]/base", "http://[fd12::1]:80/base"),
            ("http://kube.internal:8080", "http://kube.internal:8080/"),
            ("https://kube.internal", "https://kube.internal/"),
        ] {
            let mut server = text.parse().unwrap();
            name_port(&mut server);
            assert_eq!(server.to_string(), named);
        }
    }

    #[tokio::test]
    async fn a_mistake_in_a_kubeconfig_is_placed_without_what_stands_around_it() {
        let folder = tempfile::tempdir().unwrap();
        for text in [
            "apiVersion: v1\nusers:\n- name: u\n  user:\n    token: SECRET\n   password: SECRET\n",
            "apiVersion: v1\nusers:\n- name: u\n  user:\n    client-certificate: [SECRET]\n    token: SECRET\n",
        ] {
            let error = Cluster::load(&kubeconfig(&folder, text)).await.unwrap_err();
            let text = error.to_string();
            assert!(text.contains(" at line ") && !text.contains("SECRET"), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_plugin_that_hangs_does_not_hold_a_call_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let (plugin, marker) = (folder.path().join("plugin"), folder.path().join("marker"));
        // Its token is old at once, so that each call asks again; it hangs while there is a marker.
        let script = format!(
            "#!/bin/sh\nwhile [ -e {0} ]; do sleep 0.05; done\necho '{1}'\n",
            marker.display(),
            r#"{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"t","expirationTimestamp":"2020-01-01T00:00:00Z"}}"#
        );
        fs::write(&plugin, script).unwrap();
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
        let exec = format!(
            "{{apiVersion: client.authentication.k8s.io/v1, command: '{}', interactiveMode: Never}}",
            plugin.display()
        );
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:1'}}}}]\nusers: [{{name: u, user: {{exec: {exec}}}}}]\n"
        );
        let cluster = Cluster::load(&kubeconfig(&folder, &text)).await.unwrap();
        fs::write(&marker, "").unwrap();
        let (call, begun) = (cluster.check(), Instant::now());
        tokio::pin!(call);
        let ended = loop {
            tokio::select! {
                biased;
                ended = &mut call => break ended,
                () = tokio::time::advance(Duration::from_secs(1)) => {}
            }
            assert!(begun.elapsed() < 10 * PLUGIN_PATIENCE, "the call is held");
        };
        assert!(begun.elapsed() >= PLUGIN_PATIENCE, "{ended:?}");
        assert!(
            matches!(ended, Err(ConnectionError::Unreachable { .. })),
            "{ended:?}"
        );
    }
}
