//! Names of Kubernetes objects as they appear in host names and URLs: parsing and printing, nothing else.
//!
//! The forms are those of the Kubernetes DNS specification 1.1.0 (`service.namespace.svc.zone`,
//! `hostname.service.namespace.svc.zone`) and the short forms that a pod's search list makes of them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

/// Longest label and longest name that DNS can carry (RFC 1035 section 2.3.4).
const MAX_LABEL: usize = 63;
const MAX_NAME: usize = 253;

/// Says why a text is not a valid name. Every variant prints as the end of "… is not valid: ".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A label breaks RFC 1123: 1 to 63 of `a-z`, `0-9` and `-`, no `-` at either end.
    #[error("{0:?} is not a DNS label (1 to 63 letters, digits or '-', no '-' at either end)")]
    Label(String),
    /// The whole name is longer than DNS can carry.
    #[error("the name is longer than {MAX_NAME} characters")]
    TooLong,
    /// The name lies in the zone but does not name a Service.
    #[error("{0:?} does not name a Service; the form is service.namespace.svc.{1}")]
    NotAService(String, ClusterDomain),
    /// The port after the colon is not a number from 1 to 65535.
    #[error("{0:?} is not a port number from 1 to 65535")]
    Port(String),
    /// The authority holds characters that no host may have (RFC 3986 section 3.2.2).
    #[error("{0:?} is not a host name")]
    Host(String),
}

/// The cluster's DNS zone, lower case and without a trailing dot; `cluster.local` unless set otherwise.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterDomain(Arc<str>);

impl ClusterDomain {
    /// Returns the zone without a trailing dot.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for ClusterDomain {
    fn default() -> Self {
        Self(Arc::from("cluster.local"))
    }
}

impl FromStr for ClusterDomain {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let lower = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if lower.len() > MAX_NAME {
            return Err(NameError::TooLong);
        }
        for part in lower.split('.') {
            label(part)?;
        }
        Ok(Self(lower.into()))
    }
}

impl fmt::Display for ClusterDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names one Service: its namespace and its name, both valid labels in lower case.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    namespace: Arc<str>,
    name: Arc<str>,
}

impl ServiceName {
    /// Makes a name from its two parts.
    ///
    /// # Errors
    /// [`NameError::Label`] when a part is not an RFC 1123 label.
    pub fn new(namespace: &str, name: &str) -> Result<Self, NameError> {
        Ok(Self {
            namespace: label(namespace)?,
            name: label(name)?,
        })
    }

    /// Returns the namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns the Service's own name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the full DNS name in `zone`, without a trailing dot.
    #[must_use]
    pub fn dns_name(&self, zone: &ClusterDomain) -> String {
        format!("{}.{}.svc.{zone}", self.name, self.namespace)
    }
}

impl fmt::Display for ServiceName {
    /// Prints `namespace/name`, as kubectl does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Refers to a port of a pod by number or by the name a container gave it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortRef {
    /// The port's number.
    Number(u16),
    /// The port's name, to be looked up in the chosen pod.
    Name(String),
}

impl fmt::Display for PortRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// What the host of a request means to the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A Service of the cluster, or one of its endpoints by host name.
    Service {
        /// The Service.
        service: ServiceName,
        /// The endpoint's host name (`db-0` in `db-0.db.default.svc.cluster.local`), if one was named.
        hostname: Option<Arc<str>>,
    },
    /// The proxy itself.
    Own {
        /// The address, if the host is one; else it is `localhost` or empty.
        literal: Option<IpAddr>,
    },
    /// Some other name, which no part of the cluster answers to.
    Unknown,
}

/// An authority taken apart: the host's meaning and the port, if one was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    /// What the host means.
    pub host: Host,
    /// The port after the colon.
    pub port: Option<u16>,
}

/// How host names are read: the zone, and the namespace that completes a bare Service name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Naming {
    /// The cluster's zone.
    pub zone: ClusterDomain,
    /// The namespace of a host that is a single label; without one such hosts are unknown.
    pub namespace: Option<Arc<str>>,
}

impl Naming {
    /// Reads the authority of a request: `host`, `host:port` or `[v6]:port`, any case, with or without a trailing dot.
    ///
    /// # Errors
    /// A [`NameError`] for a malformed host or port, or a host inside the zone that cannot name a Service.
    pub fn parse(&self, authority: &str) -> Result<Authority, NameError> {
        let (host, port) = split_port(authority)?;
        Ok(Authority {
            host: self.parse_host(host)?,
            port,
        })
    }

    fn parse_host(&self, host: &str) -> Result<Host, NameError> {
        if let Some(literal) = host.strip_prefix('[') {
            // Nothing but an IPv6 address stands in brackets (RFC 3986 section 3.2.2).
            let inner = literal.strip_suffix(']').unwrap_or_default();
            return match inner.parse::<Ipv6Addr>() {
                Ok(address) => Ok(Host::Own {
                    literal: Some(address.into()),
                }),
                Err(_) => Err(NameError::Host(host.into())),
            };
        }
        let literal = host.parse::<Ipv4Addr>().ok().map(IpAddr::from);
        if host.is_empty() || literal.is_some() {
            return Ok(Host::Own { literal });
        }
        let lower = host.to_ascii_lowercase();
        let name = lower.strip_suffix('.').unwrap_or(&lower);
        if name.len() > MAX_NAME {
            return Err(NameError::TooLong);
        }
        if !name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
        {
            return Err(NameError::Host(host.into()));
        }
        if name == "localhost" || name.ends_with(".localhost") {
            return Ok(Host::Own { literal: None });
        }
        self.parse_name(name)
    }

    /// Tells the forms apart by the number of labels, once the zone is taken off.
    fn parse_name(&self, name: &str) -> Result<Host, NameError> {
        let not_a_service = || NameError::NotAService(name.into(), self.zone.clone());
        let inside = name.strip_suffix(self.zone.as_str());
        if inside == Some("") {
            return Err(not_a_service());
        }
        let inside = inside.and_then(|rest| rest.strip_suffix('.'));
        let relative = inside.unwrap_or(name);
        let mut labels = relative.rsplit('.');
        // `rsplit` yields at least one part, so the first `next` never takes the fallback.
        let last = labels.next().unwrap_or_default();
        let rest: Vec<&str> = labels.collect();
        match (last, rest.as_slice(), inside.is_some()) {
            ("svc", [namespace, service], _) => service_host(namespace, service, None),
            ("svc", [namespace, service, hostname], _) => service_host(namespace, service, Some(hostname)),
            (_, _, true) => Err(not_a_service()),
            (namespace, [service], false) if namespace != "svc" => service_host(namespace, service, None),
            (service, [], false) => match &self.namespace {
                Some(namespace) => service_host(namespace, service, None),
                None => Ok(Host::Unknown),
            },
            _ => Ok(Host::Unknown),
        }
    }
}

fn service_host(namespace: &str, service: &str, hostname: Option<&str>) -> Result<Host, NameError> {
    Ok(Host::Service {
        service: ServiceName::new(namespace, service)?,
        hostname: hostname.map(label).transpose()?,
    })
}

/// Splits `host:port`; a colon inside `[…]` belongs to the host.
fn split_port(authority: &str) -> Result<(&str, Option<u16>), NameError> {
    let colon = match authority.rfind(']') {
        Some(end) => authority[end..].find(':').map(|at| end + at),
        None => authority.rfind(':'),
    };
    let Some(colon) = colon else {
        return Ok((authority, None));
    };
    let (host, port) = (&authority[..colon], &authority[colon + 1..]);
    if host.contains(':') && !host.starts_with('[') {
        // A bare IPv6 literal is no legal authority (RFC 3986 section 3.2.2).
        return Err(NameError::Host(authority.into()));
    }
    if port.is_empty() {
        return Ok((host, None)); // "host:" is legal and means the default port (RFC 3986 section 3.2.3)
    }
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    match port.parse::<u16>() {
        Ok(number) if digits && number > 0 => Ok((host, Some(number))),
        _ => Err(NameError::Port(port.into())),
    }
}

/// Tells whether a text has the form of an RFC 1123 label in lower case, however long it is.
pub(crate) fn is_label(text: &str) -> bool {
    let charset = text
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    !text.is_empty() && charset && !text.starts_with('-') && !text.ends_with('-')
}

/// Accepts an RFC 1123 label in lower case.
fn label(text: &str) -> Result<Arc<str>, NameError> {
    if text.len() <= MAX_LABEL && is_label(text) {
        Ok(text.into())
    } else {
        Err(NameError::Label(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(authority: &str) -> Result<Authority, NameError> {
        Naming::default().parse(authority)
    }

    fn service(namespace: &str, name: &str) -> Host {
        Host::Service {
            service: ServiceName::new(namespace, name).unwrap(),
            hostname: None,
        }
    }

    #[test]
    fn every_form_of_a_service_host_names_the_same_service() {
        for host in [
            "web.shop.svc.cluster.local",
            "WEB.Shop.SVC.Cluster.Local",
            "web.shop.svc.cluster.local.",
            "web.shop.svc",
            "web.shop",
        ] {
            assert_eq!(parse(host).unwrap().host, service("shop", "web"), "{host}");
        }
    }

    #[test]
    fn a_port_is_taken_from_the_authority() {
        assert_eq!(parse("web.shop.svc.cluster.local:9090").unwrap().port, Some(9090));
        assert_eq!(
            parse("web.shop.svc.cluster.local.:9090").unwrap().port,
            Some(9090)
        );
        assert_eq!(parse("web.shop:").unwrap().port, None);
        assert_eq!(
            parse("[::1]:8080").unwrap(),
            Authority {
                host: Host::Own {
                    literal: Some(Ipv6Addr::LOCALHOST.into())
                },
                port: Some(8080)
            }
        );
    }

    #[test]
    fn a_bare_name_needs_a_namespace() {
        assert_eq!(parse("web").unwrap().host, Host::Unknown);
        let naming = Naming {
            namespace: Some("shop".into()),
            ..Naming::default()
        };
        assert_eq!(naming.parse("web").unwrap().host, service("shop", "web"));
    }

    #[test]
    fn a_pod_of_a_headless_service_is_named_by_its_host_name() {
        let host = parse("db-0.db.shop.svc.cluster.local").unwrap().host;
        let service = ServiceName::new("shop", "db").unwrap();
        assert_eq!(
            host,
            Host::Service {
                service,
                hostname: Some("db-0".into())
            }
        );
    }

    #[test]
    fn own_and_unknown_hosts_are_told_apart() {
        for own in [
            "localhost",
            "LOCALHOST:80",
            "kube.localhost",
            "127.0.0.1",
            "127.0.0.1:8080",
            "[::1]",
            "",
        ] {
            assert!(matches!(parse(own).unwrap().host, Host::Own { .. }), "{own}");
        }
        for unknown in ["www.example.com", "a.b.svc.evil.local", "svc", "a.b.c.d.e"] {
            assert_eq!(parse(unknown).unwrap().host, Host::Unknown, "{unknown}");
        }
    }

    #[test]
    fn malformed_hosts_are_refused_with_the_reason() {
        for bad in [
            "web.svc.cluster.local",
            "cluster.local",
            "svc.cluster.local",
            "-web.shop.svc.cluster.local",
            "we_b.shop.svc.cluster.local",
            "web..svc.cluster.local",
            "a.b.c.d.svc.cluster.local",
            "web/../x.shop.svc.cluster.local",
            "web.shop:0",
            "web.shop:65536",
            "web.shop:+80",
            "web.shop:http",
            "::1",
            "[localhost]",
            "[::1]x",
            "[127.0.0.1]",
            "[::1",
            "[web.shop]:80",
            "a/b.localhost",
            "user@web.shop",
        ] {
            assert!(parse(bad).is_err(), "{bad} was accepted: {:?}", parse(bad));
        }
    }

    #[test]
    fn another_zone_is_exact() {
        let naming = Naming {
            zone: "k8s.example".parse().unwrap(),
            namespace: None,
        };
        assert_eq!(
            naming.parse("web.shop.svc.k8s.example").unwrap().host,
            service("shop", "web")
        );
        assert_eq!(
            naming.parse("web.shop.svc.cluster.local").unwrap().host,
            Host::Unknown
        );
        assert_eq!(
            naming.parse("web.shop.svc.notk8s.example").unwrap().host,
            Host::Unknown
        );
    }

    proptest! {
        #[test]
        fn printing_then_parsing_gives_the_same_name(
            name in "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?",
            namespace in "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?",
            port in 1u16..,
        ) {
            let service = ServiceName::new(&namespace, &name).unwrap();
            let printed = format!("{}:{port}", service.dns_name(&ClusterDomain::default()));
            let expected = Authority { host: Host::Service { service, hostname: None }, port: Some(port) };
            prop_assert_eq!(parse(&printed).unwrap(), expected);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,80}") {
            let _ = parse(&text);
        }
    }
}
