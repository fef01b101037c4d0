//! Host names: whatever a client writes as its authority means one thing, in every spelling, or is refused.

use kube_tunnel::name::{Authority, ClusterDomain, Host, Naming};

/// The first byte of the input chooses how names are read; the authority is the rest.
pub fn check(data: &[u8]) {
    let Some((&how, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = str::from_utf8(text) else { return };
    zone(text);
    let zone = ["cluster.local", "k8s.example", "x", "svc.local"][usize::from(how >> 1) % 4];
    let naming = Naming {
        zone: zone.parse().expect("a constant zone is valid"),
        namespace: (how & 1 == 1).then(|| "shop".into()),
    };
    let read = naming.parse(text);
    for other in [text.to_ascii_uppercase(), text.to_ascii_lowercase()] {
        match (&read, naming.parse(&other)) {
            (Ok(read), Ok(other)) => assert_eq!(read, &other, "case matters"),
            (Err(_), Err(_)) => {}
            (read, other) => panic!("case matters: {read:?} and {other:?}"),
        }
    }
    let Ok(authority) = read else { return };
    assert_ne!(authority.port, Some(0));
    // What is accepted is written in the characters of a host and a port, nothing else (RFC 3986 section 3.2.2).
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    assert!(text.chars().all(plain), "{text:?} was accepted");
    let (host, port) = split(text);
    assert_eq!(port.parse().ok(), authority.port);
    match &authority.host {
        Host::Own { .. } => assert!(is_own(host), "{host:?} counts as this machine"),
        Host::Unknown => assert!(!is_own(host), "{host:?} does not count as this machine"),
        Host::Service { service, hostname } => {
            assert!(!is_own(host), "{host:?} does not count as this machine");
            for name in [
                Some(service.namespace()),
                Some(service.name()),
                hostname.as_deref(),
            ] {
                assert!(name.is_none_or(is_label), "{name:?} is no label");
            }
            let prefix = hostname
                .as_ref()
                .map_or_else(String::new, |name| format!("{name}."));
            let printed = format!("{prefix}{}", service.dns_name(&naming.zone));
            let same = Authority {
                port: None,
                ..authority.clone()
            };
            assert_eq!(
                naming.parse(&printed).as_ref(),
                Ok(&same),
                "{printed:?} means something else"
            );
        }
    }
    let rooted = format!("{host}.:{port}");
    if !host.ends_with('.')
        && !host.is_empty()
        && host.parse::<std::net::IpAddr>().is_err()
        && !host.contains(']')
    {
        assert_eq!(
            naming.parse(&rooted).ok(),
            Some(authority),
            "{rooted:?} means something else"
        );
    }
}

/// A zone that is accepted prints as it is read.
fn zone(text: &str) {
    let Ok(zone) = text.parse::<ClusterDomain>() else {
        return;
    };
    assert!(zone.as_str().split('.').all(is_label));
    for spelling in [
        zone.to_string(),
        format!("{zone}."),
        zone.as_str().to_ascii_uppercase(),
    ] {
        assert_eq!(spelling.parse().as_ref(), Ok(&zone));
    }
}

/// Takes the port off, and the colon before it.
fn split(text: &str) -> (&str, &str) {
    match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (text, ""),
    }
}

/// `localhost` and what lies below it (RFC 6761 section 6.3), an IP literal, or nothing.
fn is_own(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    host.is_empty()
        || name == "localhost"
        || name.ends_with(".localhost")
        || host.parse::<std::net::Ipv4Addr>().is_ok()
        || bracketed.is_some_and(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok())
}

/// RFC 1123, in lower case.
fn is_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=63).contains(&text.len())
        && text.chars().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}
