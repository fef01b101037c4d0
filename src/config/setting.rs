//! The definition of every setting. To add one: define it here, list it in [`ALL`], read it in `Config::new`, and
//! regenerate `docs/configuration.md`.

use std::fmt;
use std::time::Duration;

use jiff::SignedDuration;

use crate::k8s::Carriers;

/// What values a setting takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// True or false; as a flag it needs no value.
    Switch,
    /// A whole number within the bounds.
    Number {
        /// The smallest value.
        min: u64,
        /// The largest value.
        max: u64,
    },
    /// A span of time that is not zero.
    Duration,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Anything that its parser takes; the text says what that is.
    Text(&'static str),
}

/// One setting.
#[derive(Debug)]
pub struct Setting {
    /// The flag's name and the file's key.
    pub key: &'static str,
    /// Variables of the environment beside `KUBE_TUNNEL_…`: the names that the seed promised.
    pub aliases: &'static [&'static str],
    /// What values it takes.
    pub kind: Kind,
    /// Its value when nobody sets one.
    pub default: Option<&'static str>,
    /// What it does, in one clause.
    pub help: &'static str,
    /// Why the default is what it is, or what else one should know.
    pub why: &'static str,
    /// Whether a bad value in the environment is reported and passed over instead of stopping the program (contract B2).
    pub lenient: bool,
    /// Whether what it governs is not part of this version yet.
    pub pending: bool,
}

impl Setting {
    const fn new(
        key: &'static str,
        kind: Kind,
        default: Option<&'static str>,
        help: &'static str,
        why: &'static str,
    ) -> Self {
        Self {
            key,
            aliases: &[],
            kind,
            default,
            help,
            why,
            lenient: false,
            pending: false,
        }
    }

    const fn alias(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self.lenient = true;
        self
    }

    const fn pending(mut self) -> Self {
        self.pending = true;
        self
    }

    /// Lists the variables that may hold it, the one that wins first.
    pub fn variables(&self) -> impl Iterator<Item = String> {
        let own = format!("KUBE_TUNNEL_{}", self.key.to_ascii_uppercase().replace('-', "_"));
        std::iter::once(own).chain(self.aliases.iter().map(|alias| (*alias).to_owned()))
    }
}

/// The one port of the proxy.
pub static PORT: Setting = Setting::new(
    "port",
    Kind::Number { min: 0, max: 65535 },
    Some("80"),
    "Port to listen on; 0 takes any free one",
    "80 lets service URLs work as they are written in the cluster. What Kubernetes puts into `KUBE_TUNNEL_PORT` beside a Service \
     `kube-tunnel` (`tcp://…`) is passed over.",
);
/// The addresses of the proxy.
pub static BIND: Setting = Setting::new(
    "bind",
    Kind::Text("`auto`, `loopback`, `all`, or IP addresses with commas"),
    Some("auto"),
    "Addresses to listen on",
    "`auto` is loopback only, and every address inside a pod: whoever can connect acts with your rights in the cluster.",
);
/// The kubeconfig file.
pub static KUBECONFIG: Setting = Setting::new(
    "kubeconfig",
    Kind::Text("path"),
    None,
    "Kubeconfig file",
    "Without it `KUBECONFIG` (a list is merged as kubectl does), then `~/.kube/config`, then the pod's service account.",
);
/// The context.
pub static CONTEXT: Setting = Setting::new(
    "context",
    Kind::Text("name"),
    None,
    "Context of the kubeconfig",
    "Without it the current context, read once at the start.",
);
/// The namespace of bare names.
pub static NAMESPACE: Setting = Setting::new(
    "namespace",
    Kind::Text("DNS label"),
    None,
    "Namespace that completes a host of one label (`http://web/`)",
    "Without it such hosts belong to no Service.",
);
/// The DNS zone.
pub static CLUSTER_DOMAIN: Setting = Setting::new(
    "cluster-domain",
    Kind::Text("DNS name"),
    Some("cluster.local"),
    "DNS zone of the cluster",
    "The default of kubeadm and the clouds.",
);
/// How often a request is retried.
pub static MAX_RETRIES: Setting = Setting::new(
    "max-retries",
    Kind::Number { min: 0, max: 10 },
    Some("3"),
    "How often a failed request is sent again after a pause",
    "0 turns retries off, those on another pod too.",
)
.alias(&["PROXY_MAX_RETRIES"]);
/// The first pause before a retry.
pub static RETRY_DELAY_MS: Setting = Setting::new(
    "retry-delay-ms",
    Kind::Number { min: 50, max: 5000 },
    Some("200"),
    "First pause before a retry, in milliseconds",
    "Each further pause is twice as long, up to 5 s, less a random part of up to a quarter.",
)
.alias(&["PROXY_RETRY_DELAY_MS"]);
/// How long unused things are kept.
pub static IDLE_TIMEOUT: Setting = Setting::new(
    "idle-timeout",
    Kind::Duration,
    Some("10m"),
    "How long a connection to a pod, and what is known of its Service, is kept without use",
    "Never cuts a connection that carries a request.",
);
/// How long shutdown waits.
pub static DRAIN_TIMEOUT: Setting = Setting::new(
    "drain-timeout",
    Kind::Duration,
    Some("30s"),
    "How long running requests may go on after the first SIGINT or SIGTERM",
    "The grace period that Kubernetes gives a pod; a second signal ends at once.",
);
/// How long a client may take for headers.
pub static HEADER_TIMEOUT: Setting = Setting::new(
    "header-timeout",
    Kind::Duration,
    Some("60s"),
    "How long a client may take for its first bytes, for the TLS handshake, and for the headers of a request; and how long it \
     may leave an HTTP/1.1 connection without one",
    "Long enough for a slow link and a thinking user, short enough that silent clients do not pile up. Bodies have no limit.",
);
/// Clients' connections in all.
pub static MAX_CONNECTIONS: Setting = Setting::new(
    "max-connections",
    Kind::Number {
        min: 1,
        max: 1_000_000,
    },
    None,
    "How many connections clients may have in all",
    "Without it three quarters of the files that may be open (`ulimit -Hn`), 65536 at most; the rest is for connections to \
     pods. Further ones wait until one ends.",
);
/// One client's connections.
pub static MAX_CONNECTIONS_PER_CLIENT: Setting = Setting::new(
    "max-connections-per-client",
    Kind::Number {
        min: 1,
        max: 1_000_000,
    },
    None,
    "How many connections one client address may have",
    "Without it all of them from this machine, where browsers and load tests share one address, and a quarter from another. \
     Further ones are closed.",
);
/// Connections to one pod.
pub static MAX_CONNECTIONS_PER_POD: Setting = Setting::new(
    "max-connections-per-pod",
    Kind::Number {
        min: 1,
        max: 1_000_000,
    },
    Some("1000"),
    "How many HTTP/1.1 connections one port of one pod may have, each of which carries one request at a time",
    "Each costs the node memory and file descriptors. Further requests wait in order, each for `ready-timeout` at most. \
     HTTP/2 shares one connection, or up to four where others are in the way of it.",
);
/// The size of a request's header fields.
pub static MAX_HEADER_BYTES: Setting = Setting::new(
    "max-header-bytes",
    Kind::Number {
        min: 8192,
        max: 262_144,
    },
    Some("65536"),
    "How many bytes the header fields of a request may have together",
    "Ample for cookies and tokens; many servers behind stop at 8192 to 32768. More is answered with 431.",
);
/// The number of a request's header fields.
pub static MAX_HEADER_FIELDS: Setting = Setting::new(
    "max-header-fields",
    Kind::Number { min: 32, max: 4096 },
    Some("100"),
    "How many header fields a request over HTTP/1.x may have",
    "As many as Envoy's default; there is room for them without memory of their own for each message, which is a tenth of a small \
     request's cost. More is answered with 431.",
);
/// The size of a response's header fields.
pub static MAX_RESPONSE_HEADER_BYTES: Setting = Setting::new(
    "max-response-header-bytes",
    Kind::Number {
        min: 8192,
        max: 1_048_576,
    },
    Some("262144"),
    "How many bytes the header fields of a pod's response may have together",
    "Four times what a request may have: a pod is trusted more than a client. More is answered with 502. Over HTTP/1.x it \
     bounds what is read of a body at once, too.",
);
/// The number of a response's header fields.
pub static MAX_RESPONSE_HEADER_FIELDS: Setting = Setting::new(
    "max-response-header-fields",
    Kind::Number { min: 32, max: 4096 },
    Some("100"),
    "How many header fields a pod's response over HTTP/1.x may have",
    "As many as a request, and for the same reason. More is answered with 502.",
);
/// What is kept of a request's body.
pub static MAX_REPLAY_BYTES: Setting = Setting::new(
    "max-replay-bytes",
    Kind::Number {
        min: 0,
        max: 16_777_216,
    },
    Some("65536"),
    "How many bytes of a request's body are kept until its response begins, so that it can be sent to another pod",
    "Enough for nearly every call of an API; a larger body is sent only once. It bounds memory by request.",
);
/// How long a client may go on sending.
pub static LINGER_TIMEOUT: Setting = Setting::new(
    "linger-timeout",
    Kind::Duration,
    Some("10s"),
    "How long a client over HTTP/1.x may go on sending a body when its answer is there already",
    "What it sends is thrown away; closing at once would destroy the answer on its way. Ends sooner after a second of \
     silence, or 64 MiB.",
);
/// How long a slow reader may hold up its neighbours.
pub static SLOW_READER_TIMEOUT: Setting = Setting::new(
    "slow-reader-timeout",
    Kind::Duration,
    Some("5s"),
    "How long a client that does not read may hold up connections which share a port-forward with it",
    "Long enough for a pause of a busy client. Port-forwards have no flow control: somebody must give way, and it is the one \
     that does not read. One that is alone is never cut.",
);
/// What may wait for slow readers.
pub static MAX_UNREAD_BYTES: Setting = Setting::new(
    "max-unread-bytes",
    Kind::Number {
        min: 1_048_576,
        max: 1_073_741_824,
    },
    Some("16777216"),
    "How many bytes may wait on one port-forward for clients that do not keep up; a quarter of it for one of them, a \
     sixteenth for one that is alone",
    "More lets neighbours of a slow client go on for longer, and costs memory while it lasts.",
);
/// Concurrent streams.
pub static MAX_STREAMS: Setting = Setting::new(
    "max-streams",
    Kind::Number { min: 1, max: 100_000 },
    Some("1000"),
    "How many requests one HTTP/2 connection may carry at the same time",
    "Clients wait with further ones, or open another connection. One that nobody reads costs about 2 MiB.",
);
/// The threads of the runtime.
pub static WORKER_THREADS: Setting = Setting::new(
    "worker-threads",
    Kind::Number { min: 1, max: 1024 },
    None,
    "How many threads carry requests",
    "Without it half of the processors, one at least: fewer threads gather more for each write, and the rest of a request's way, \
     often on the same machine, needs processors too.",
);
/// Whose word counts for pods' certificates.
pub static BACKEND_TLS: Setting = Setting::new(
    "backend-tls",
    Kind::Text("`skip`, or the path of a PEM file"),
    Some("skip"),
    "Authorities that pods' certificates are checked against, where a Service's port speaks TLS",
    "`skip` checks none: the port-forward has already reached the very pod. A file makes the certificate's name, which \
     must be the Service's, count too.",
);
/// Which forms of port-forward are tried.
pub static PORT_FORWARD: Setting = Setting::new(
    "port-forward",
    Kind::Choice(Carriers::NAMES),
    Some("auto"),
    "How port-forwards get through the API server",
    "`auto` finds out what works: `spdy` first, which is the least work for everybody, then `tunnel` (SPDY inside a WebSocket, \
     for proxies that pass nothing else), then `channel` (one WebSocket for each connection, for the oldest servers).",
);
/// Which web pages may read responses.
pub static CORS_ALLOW_ORIGIN: Setting = Setting::new(
    "cors-allow-origin",
    Kind::Text("`local`, `none`, `*`, or origins with commas"),
    Some("local"),
    "Web pages that may read the responses of backends which say nothing about it themselves",
    "`local` is pages of this machine and of the cluster's zone: every other site that you visit must not read your cluster. \
     `*` allows all of them. Credentials are never allowed.",
);
/// Whether pods are told about the client.
pub static FORWARDED_HEADERS: Setting = Setting::new(
    "forwarded-headers",
    Kind::Switch,
    Some("false"),
    "Add `X-Forwarded-For`, `-Host`, `-Proto` and `Via` to requests",
    "Off, because a pod should see what it would see in the cluster. On, what a client sent in `X-Forwarded-*` and `Forwarded` is dropped.",
);
/// How long a request waits for a lookup.
pub static RESOLVE_TIMEOUT: Setting = Setting::new(
    "resolve-timeout",
    Kind::Duration,
    Some("10s"),
    "How long a request waits for the first answer about its Service",
    "Outlasts a restart of the API server.",
);
/// How long a request waits for a ready pod.
pub static READY_TIMEOUT: Setting = Setting::new(
    "ready-timeout",
    Kind::Duration,
    Some("10s"),
    "How long a request waits while a Service is between pods, or the cluster has no way to them",
    "Covers a restart of a single pod, or of a kubelet. A Service that never had a pod is answered at once.",
);
/// How long the API server may take.
pub static API_TIMEOUT: Setting = Setting::new(
    "api-timeout",
    Kind::Duration,
    Some("5s"),
    "How long the API server may take to answer the headers of a request",
    "Several round trips to the other end of the world. It bounds a whole list, but no stream.",
);
/// How often to poll without watch.
pub static POLL_INTERVAL: Setting = Setting::new(
    "poll-interval",
    Kind::Duration,
    Some("5s"),
    "How often a Service in use is read again where the user may not watch it",
    "A pod that proves gone is looked up at once.",
);
/// Where files live that outlast a run.
pub static STATE_DIR: Setting = Setting::new(
    "state-dir",
    Kind::Text("path"),
    None,
    "Folder of what outlasts a run, the TLS certificate authority above all",
    "Without it `$XDG_STATE_HOME/kube-tunnel` or `~/.local/state/kube-tunnel`. The authority's certificate is `tls/ZONE/server.crt` there.",
);
/// The log's level.
pub static LOG_LEVEL: Setting = Setting::new(
    "log-level",
    Kind::Text(
        "`off`, `error`, `warn`, `info`, `debug`, `trace`, or directives such as `kube_tunnel=debug,hyper=info`",
    ),
    Some("info"),
    "What is logged",
    "Levels in any case; directives as `RUST_LOG` has them, but one that stands alone needs its `=`, or a mistyped level would be one.",
)
.alias(&["LOG_LEVEL"]);
/// The log's form.
pub static LOG_FORMAT: Setting = Setting::new(
    "log-format",
    Kind::Choice(&["text", "json"]),
    Some("text"),
    "Form of a log line",
    "Either goes to stderr.",
);
/// No OS DNS.
pub static NO_DNS: Setting = Setting::new(
    "no-dns",
    Kind::Switch,
    Some("false"),
    "Leave the operating system's DNS alone",
    "",
)
.pending();
/// No mDNS.
pub static NO_MDNS: Setting = Setting::new(
    "no-mdns",
    Kind::Switch,
    Some("false"),
    "Send and answer no multicast DNS",
    "",
)
.pending();
/// DNS without the proxy.
pub static DNS_ONLY: Setting = Setting::new(
    "dns-only",
    Kind::Switch,
    Some("false"),
    "Set DNS up and serve it, without the proxy",
    "Fails in this version, which has no DNS server.",
);
/// Undo OS changes.
pub static CLEANUP: Setting = Setting::new(
    "cleanup",
    Kind::Switch,
    Some("false"),
    "Undo every change that this or an earlier run made to the operating system, and exit",
    "This version makes none.",
);

/// Every setting, in the order of help and reference page.
pub static ALL: &[&Setting] = &[
    &PORT,
    &BIND,
    &KUBECONFIG,
    &CONTEXT,
    &NAMESPACE,
    &CLUSTER_DOMAIN,
    &MAX_RETRIES,
    &RETRY_DELAY_MS,
    &IDLE_TIMEOUT,
    &DRAIN_TIMEOUT,
    &HEADER_TIMEOUT,
    &MAX_CONNECTIONS,
    &MAX_CONNECTIONS_PER_CLIENT,
    &MAX_CONNECTIONS_PER_POD,
    &MAX_HEADER_BYTES,
    &MAX_HEADER_FIELDS,
    &MAX_RESPONSE_HEADER_BYTES,
    &MAX_RESPONSE_HEADER_FIELDS,
    &MAX_REPLAY_BYTES,
    &LINGER_TIMEOUT,
    &SLOW_READER_TIMEOUT,
    &MAX_UNREAD_BYTES,
    &MAX_STREAMS,
    &WORKER_THREADS,
    &PORT_FORWARD,
    &BACKEND_TLS,
    &CORS_ALLOW_ORIGIN,
    &FORWARDED_HEADERS,
    &RESOLVE_TIMEOUT,
    &READY_TIMEOUT,
    &API_TIMEOUT,
    &POLL_INTERVAL,
    &STATE_DIR,
    &LOG_LEVEL,
    &LOG_FORMAT,
    &NO_DNS,
    &NO_MDNS,
    &DNS_ONLY,
    &CLEANUP,
];

impl Kind {
    /// Says what is wrong with a value, as far as the kind alone can tell.
    ///
    /// # Errors
    /// What is expected instead.
    pub fn check(&self, text: &str) -> Result<(), String> {
        match self {
            Self::Switch => switch(text)
                .map(drop)
                .ok_or_else(|| "expected true or false".into()),
            Self::Number { min, max } => match text.parse::<u64>() {
                Ok(number) if (*min..=*max).contains(&number) => Ok(()),
                _ => Err(format!("expected a number from {min} to {max}")),
            },
            Self::Duration => duration(text)
                .map(drop)
                .ok_or_else(|| "expected a duration such as 200ms, 30s or 10m".into()),
            Self::Choice(words) if words.contains(&text) => Ok(()),
            Self::Choice(words) => Err(format!("expected {}", words.join(" or "))),
            Self::Text(_) => Ok(()),
        }
    }

    /// Writes a value as TOML.
    #[must_use]
    pub fn toml(&self, text: &str) -> String {
        match self {
            Self::Number { .. } if !text.is_empty() => text.into(),
            Self::Switch => switch(text).unwrap_or(false).to_string(),
            // A JSON string is a TOML basic string.
            _ => serde_json::Value::from(text).to_string(),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Switch => f.write_str("switch"),
            Self::Number { min, max } => write!(f, "{min} to {max}"),
            Self::Duration => f.write_str("duration"),
            Self::Choice(words) => write!(f, "`{}`", words.join("` or `")),
            Self::Text(what) => f.write_str(what),
        }
    }
}

/// Reads a truth value in any spelling that Go's flag package takes.
pub(super) fn switch(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Reads a span of time above zero.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let duration: SignedDuration = text.parse().ok()?;
    Duration::try_from(duration)
        .ok()
        .filter(|duration| !duration.is_zero())
}
