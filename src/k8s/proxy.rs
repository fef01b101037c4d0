//! The proxy on the way to the API server, chosen as kubectl chooses it: the kubeconfig's own, else that of the variables
//! unless they except the server (client-go: `clientcmd.parseProxyURL`; Go: `golang.org/x/net/http/httpproxy`).
//!
//! kube's own choice is not used: it compares `NO_PROXY` with the proxy instead of the server, has it overrule the
//! kubeconfig, and goes through a proxy even to this machine.

use std::fmt;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use http::uri::{Authority, Uri};
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};

/// What the kubeconfig calls it.
const OWN: &str = "proxy-url";

/// A proxy, and how it is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Proxy {
    pub(super) kind: Kind,
    /// Where it is; `https` if TLS is spoken to the proxy itself.
    url: Uri,
    credentials: Option<Credentials>,
}

/// What is spoken to a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// HTTP's CONNECT.
    Http,
    /// The same within TLS.
    Https,
    /// SOCKS version 5 (RFC 1928). The proxy resolves names, as Go has it for `socks5` and `socks5h` alike.
    Socks5,
}

/// The user and password of a proxy's URL, decoded.
#[derive(Clone, PartialEq, Eq)]
struct Credentials {
    user: String,
    password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials")
    }
}

/// Why a proxy cannot be used. The texts leave the URL out, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum UnusableProxy {
    /// Nobody here speaks that.
    #[error("{setting}: a proxy of scheme {scheme:?} cannot be used, only http, https, socks5 or socks5h")]
    Scheme {
        /// Where the proxy is set.
        setting: &'static str,
        /// The URL's scheme.
        scheme: String,
    },
    /// It is no URL.
    #[error("{0}: the proxy is no URL of the form http://user:password@host:port")]
    Unreadable(&'static str),
}

/// Chooses the proxy to a server. `own` is the kubeconfig's, which counts whatever the variables say.
pub(super) fn choose(
    server: &Uri,
    own: Option<&str>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<Proxy>, UnusableProxy> {
    if let Some(own) = own.filter(|own| !own.is_empty()) {
        return parse(own, OWN).map(Some);
    }
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let either = |name: &str| set(name).or_else(|| set(&name.to_ascii_lowercase()));
    let name = if server.scheme_str() == Some("http") {
        "HTTP_PROXY"
    } else {
        "HTTPS_PROXY"
    };
    match either(name) {
        Some(proxy) if !is_excepted(server, &either("NO_PROXY").unwrap_or_default()) => {
            parse(&proxy, name).map(Some)
        }
        _ => Ok(None),
    }
}

impl Proxy {
    /// Puts CONNECT in front of a connector to the proxy.
    pub(super) fn tunnel<C>(self, connector: C) -> Tunnel<C> {
        let tunnel = Tunnel::new(self.url, connector);
        let Some(Credentials { user, password }) = self.credentials else {
            return tunnel;
        };
        let basic = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
        tunnel.with_auth(HeaderValue::try_from(basic).expect("base64 is made of visible letters"))
    }

    /// Puts SOCKS in front of a connector to the proxy.
    pub(super) fn socks5<C>(self, connector: C) -> SocksV5<C> {
        let socks = SocksV5::new(self.url, connector);
        match self.credentials {
            Some(Credentials { user, password }) => socks.with_auth(user, password),
            None => socks,
        }
    }
}

/// Reads a proxy's URL; without a scheme, as variables often have it, it is an HTTP proxy.
fn parse(text: &str, setting: &'static str) -> Result<Proxy, UnusableProxy> {
    let (scheme, rest) = text.split_once("://").unwrap_or(("http", text));
    let (kind, usual_port) = match scheme.to_ascii_lowercase().as_str() {
        "http" => (Kind::Http, 80),
        "https" => (Kind::Https, 443),
        "socks5" | "socks5h" => (Kind::Socks5, 1080),
        other => {
            let scheme = other.to_owned();
            return Err(UnusableProxy::Scheme { setting, scheme });
        }
    };
    let read = || {
        let authority = rest.split(['/', '?', '#']).next()?;
        let (user_info, place) = match authority.rsplit_once('@') {
            Some((user_info, place)) => (Some(user_info), place),
            None => (None, authority),
        };
        let place: Authority = place.parse().ok()?;
        let port = match place.port_u16() {
            Some(port) => port,
            None if place.as_str() == place.host() => usual_port,
            None => return None,
        };
        let url = Uri::builder()
            .scheme(if kind == Kind::Https { "https" } else { "http" })
            .authority(format!("{}:{port}", place.host()))
            .path_and_query("/");
        Some(Proxy {
            kind,
            url: url.build().ok().filter(|_| !place.host().is_empty())?,
            credentials: match user_info {
                Some(user_info) => Some(credentials(user_info)?),
                None => None,
            },
        })
    };
    read().ok_or(UnusableProxy::Unreadable(setting))
}

fn credentials(user_info: &str) -> Option<Credentials> {
    let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
    let decode = |text: &str| {
        let decoded = percent_encoding::percent_decode_str(text).decode_utf8();
        decoded.map(String::from).ok()
    };
    Some(Credentials {
        user: decode(user)?,
        password: decode(password)?,
    })
}

/// Tells whether a server is reached without the proxy of the variables: this machine always, others by `NO_PROXY`.
fn is_excepted(server: &Uri, no_proxy: &str) -> bool {
    let host = server.host().unwrap_or_default().to_ascii_lowercase();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address = address(host);
    if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return true;
    }
    let usual_port = if server.scheme_str() == Some("http") {
        80
    } else {
        443
    };
    let port = server.port_u16().unwrap_or(usual_port);
    no_proxy
        .split(',')
        .any(|entry| matches(&entry.trim().to_ascii_lowercase(), host, address, port))
}

/// Tells whether an entry of `NO_PROXY` means a server: `*`, a network, or a host with or without a port. A domain means its
/// subdomains too, and only those with a dot in front.
fn matches(entry: &str, host: &str, address: Option<IpAddr>, port: u16) -> bool {
    if entry == "*" {
        return true;
    }
    if let Some((network, bits)) = entry.split_once('/') {
        return contains(network, bits, address).unwrap_or(false);
    }
    let (name, only) = match entry.rsplit_once(':') {
        Some((name, only)) if entry.parse::<IpAddr>().is_err() && !entry.ends_with(']') => (name, Some(only)),
        _ => (entry, None),
    };
    if only.is_some_and(|only| only.parse() != Ok(port)) {
        return false;
    }
    let name = name.trim_start_matches('[').trim_end_matches(']');
    if let Some(named) = self::address(name) {
        return address == Some(named);
    }
    let name = name
        .strip_prefix('*')
        .filter(|rest| rest.starts_with('.'))
        .unwrap_or(name);
    match host.strip_suffix(name) {
        None => false,
        Some(_) if name.is_empty() => false,
        Some("") => !name.starts_with('.'),
        Some(rest) => name.starts_with('.') || rest.ends_with('.'),
    }
}

fn contains(network: &str, bits: &str, address: Option<IpAddr>) -> Option<bool> {
    let bits: u32 = bits.parse().ok()?;
    match (network.parse().ok()?, address?) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let differs = network.to_bits() ^ address.to_bits();
            Some(differs.checked_shr(32_u32.checked_sub(bits)?).unwrap_or(0) == 0)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let differs = network.to_bits() ^ address.to_bits();
            Some(differs.checked_shr(128_u32.checked_sub(bits)?).unwrap_or(0) == 0)
        }
        _ => None,
    }
}

/// Reads an address; one of IPv4 within IPv6 is the same as without.
fn address(host: &str) -> Option<IpAddr> {
    host.parse().ok().map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: &str = "https://api.example.org:6443";

    fn chosen(
        server: &str,
        own: Option<&str>,
        variables: &[(&str, &str)],
    ) -> Result<Option<Proxy>, UnusableProxy> {
        let variable = |name: &str| {
            let set = variables.iter().find(|(set, _)| *set == name);
            set.map(|(_, value)| (*value).to_owned())
        };
        choose(&server.parse().unwrap(), own, variable)
    }

    fn proxy(kind: Kind, url: &str, login: Option<(&str, &str)>) -> Proxy {
        Proxy {
            kind,
            url: url.parse().unwrap(),
            credentials: login.map(|(user, password)| Credentials {
                user: user.into(),
                password: password.into(),
            }),
        }
    }

    #[test]
    fn a_proxy_is_read_with_its_usual_port_and_its_password_decoded() {
        for (text, expected) in [
            ("http://proxy", proxy(Kind::Http, "http://proxy:80/", None)),
            ("proxy:3128", proxy(Kind::Http, "http://proxy:3128/", None)),
            (
                "HTTPS://u:p%40%3a:s@proxy/path",
                proxy(Kind::Https, "https://proxy:443/", Some(("u", "p@::s"))),
            ),
            (
                "socks5://u@proxy",
                proxy(Kind::Socks5, "http://proxy:1080/", Some(("u", ""))),
            ),
            (
                "socks5h://[::1]:9050",
                proxy(Kind::Socks5, "http://[::1]:9050/", None),
            ),
        ] {
            assert_eq!(chosen(SERVER, Some(text), &[]), Ok(Some(expected)), "{text}");
        }
    }

    #[test]
    fn a_proxy_that_cannot_be_used_is_refused_without_its_password() {
        for text in ["ftp://u:secret@proxy", "http://u:secret@", "u:secret@proxy:port"] {
            let refused = chosen(SERVER, Some(text), &[]).unwrap_err().to_string();
            assert!(refused.starts_with("proxy-url: "), "{refused}");
            assert!(!refused.contains("secret"), "{refused}");
        }
        let read = chosen(SERVER, Some("http://u:secret@proxy"), &[]);
        assert!(!format!("{read:?}").contains("secret"), "{read:?}");
    }

    #[test]
    fn the_kubeconfigs_own_counts_before_the_variables_and_theirs_by_the_servers_scheme() {
        let variables = [
            ("HTTPS_PROXY", "secure"),
            ("https_proxy", "lower"),
            ("http_proxy", "plain"),
        ];
        let host = |server, own, variables: &[(&str, &str)]| {
            let proxy = chosen(server, own, variables).unwrap();
            proxy.map(|proxy| proxy.url.host().unwrap().to_owned())
        };
        let all = [&variables[..], &[("NO_PROXY", "*")]].concat();
        assert_eq!(host(SERVER, Some("http://own"), &all).as_deref(), Some("own"));
        assert_eq!(host(SERVER, None, &all), None);
        assert_eq!(host(SERVER, Some(""), &variables).as_deref(), Some("secure"));
        assert_eq!(host(SERVER, None, &variables[1..]).as_deref(), Some("lower"));
        let plain = "http://api.example.org";
        assert_eq!(host(plain, None, &variables).as_deref(), Some("plain"));
        assert_eq!(host(plain, None, &variables[..2]), None);
    }

    #[test]
    fn this_machine_is_reached_without_the_proxy_of_the_variables() {
        let variables = [("HTTPS_PROXY", "http://proxy")];
        for (server, direct) in [
            ("https://localhost:6443", true),
            ("https://127.8.9.1:6443", true),
            ("https://[::1]:6443", true),
            ("https://[::ffff:127.0.0.1]:6443", true),
            ("https://localhost.example.org", false),
            ("https://128.0.0.1", false),
        ] {
            assert_eq!(
                chosen(server, None, &variables).unwrap().is_none(),
                direct,
                "{server}"
            );
        }
    }

    #[test]
    fn no_proxy_excepts_the_server_as_go_has_it() {
        for (entries, server, direct) in [
            ("example.org", SERVER, true),
            (".example.org", SERVER, true),
            ("*.example.org", SERVER, true),
            ("other.org, ,API.example.org", SERVER, true),
            ("api.example.org:6443", SERVER, true),
            ("example.org:443", "https://api.example.org", true),
            ("*", SERVER, true),
            ("", SERVER, false),
            ("api.example.org:443", SERVER, false),
            ("ple.org", SERVER, false),
            (".api.example.org", SERVER, false),
            ("proxy", SERVER, false),
            ("10.0.0.0/8", SERVER, false),
            ("10.0.0.0/8", "https://10.1.2.3:6443", true),
            ("10.0.0.0/8", "https://11.1.2.3:6443", false),
            ("10.0.0.0/33", "https://10.0.0.0:6443", false),
            ("0.0.0.0/0", "https://11.1.2.3:6443", true),
            ("10.1.2.3", "https://10.1.2.3:6443", true),
            ("10.1.2.3:443", "https://10.1.2.3:6443", false),
            ("fd00::/8", "https://[fd12::1]:6443", true),
            ("fd12::1", "https://[fd12::1]:6443", true),
            ("[fd12::1]:6443", "https://[fd12::1]:6443", true),
            ("fd00::/8", "https://[fe80::1]:6443", false),
        ] {
            let variables = [("HTTPS_PROXY", "http://proxy"), ("no_proxy", entries)];
            assert_eq!(
                chosen(server, None, &variables).unwrap().is_none(),
                direct,
                "{entries} for {server}"
            );
        }
    }
}
