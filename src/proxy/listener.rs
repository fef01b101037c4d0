//! The listening sockets of the one port, and the loop that accepts clients.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tracing::{debug, warn};

use crate::drain::Drain;
use crate::proxy::admission::{Admission, Admitted};
use crate::proxy::notice::Notice;

/// The pause after a failed accept: long enough that a lack of file descriptors does not become a busy loop. Each further one
/// is twice as long, up to the second figure, which is soon enough to go on when descriptors are free again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// When a silent client is first asked whether it is still there, and how often from then on.
const KEEP_ALIVE: Duration = Duration::from_mins(1);
const PROBE: Duration = Duration::from_secs(15);

/// How often another free port is tried when port 0 is asked for on several addresses.
const FREE_PORT_TRIES: u32 = 16;

/// Which addresses to listen on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Bind {
    /// 127.0.0.1, and ::1 where the machine has IPv6.
    #[default]
    Loopback,
    /// Every address of the machine, for a proxy in a pod.
    All,
    /// Exactly these.
    Addresses(Vec<IpAddr>),
}

impl Bind {
    /// The addresses in the order of binding; the flag says whether the machine may lack one.
    fn addresses(&self) -> Vec<(IpAddr, bool)> {
        match self {
            Self::Loopback => vec![
                (Ipv4Addr::LOCALHOST.into(), false),
                (Ipv6Addr::LOCALHOST.into(), true),
            ],
            Self::All => vec![
                (Ipv4Addr::UNSPECIFIED.into(), false),
                (Ipv6Addr::UNSPECIFIED.into(), true),
            ],
            Self::Addresses(addresses) => addresses.iter().map(|address| (*address, false)).collect(),
        }
    }
}

impl FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "loopback" => Ok(Self::Loopback),
            "all" => Ok(Self::All),
            list => {
                let parse = |part: &str| {
                    part.trim()
                        .parse()
                        .map_err(|_| format!("{part:?} is not an IP address"))
                };
                list.split(',')
                    .map(parse)
                    .collect::<Result<_, _>>()
                    .map(Self::Addresses)
            }
        }
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loopback => f.write_str("loopback"),
            Self::All => f.write_str("all"),
            Self::Addresses(addresses) => {
                let list: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                f.write_str(&list.join(","))
            }
        }
    }
}

/// A port that cannot be listened on. Prints as one line with the ways out.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another program has the port.
    #[error("{0} is already in use; choose another port (-port=8080), or find its user with: ss -ltnp 'sport = :{port}'", port = .0.port())]
    Taken(SocketAddr),
    /// Ports below `net.ipv4.ip_unprivileged_port_start` need a privilege.
    #[cfg_attr(
        target_os = "linux",
        error(
            "no permission to listen on {0}; choose a port from 1024 up (-port=8080), or allow this one with any of: \
             setcap cap_net_bind_service=+ep <this program>; sysctl net.ipv4.ip_unprivileged_port_start={port}; sudo",
            port = .0.port()
        )
    )]
    #[cfg_attr(
        not(target_os = "linux"),
        error("no permission to listen on {0}; choose a port from 1024 up (-port=8080)")
    )]
    Forbidden(SocketAddr),
    /// Anything else.
    #[error("cannot listen on {0}: {1}")]
    Other(SocketAddr, io::Error),
}

/// Bound sockets, all on one port.
#[derive(Debug)]
pub struct Listener {
    sockets: Vec<TcpListener>,
}

impl Listener {
    /// Binds `port` on every address; port 0 takes one that is free on all of them. To be called inside a Tokio runtime.
    ///
    /// # Errors
    /// A [`BindError`] for the first address that cannot be had.
    pub fn bind(bind: &Bind, port: u16) -> Result<Self, BindError> {
        let mut tries = 0;
        loop {
            match Self::bind_all(bind, port) {
                // Port 0 was free on the first address and taken on another.
                Err(BindError::Taken(_)) if port == 0 && tries < FREE_PORT_TRIES => tries += 1,
                done => return done,
            }
        }
    }

    fn bind_all(bind: &Bind, mut port: u16) -> Result<Self, BindError> {
        let mut sockets = Vec::new();
        for (address, may_lack) in bind.addresses() {
            let address = SocketAddr::new(address, port);
            match bind_one(address) {
                Ok(socket) => {
                    port = socket
                        .local_addr()
                        .map_err(|error| BindError::Other(address, error))?
                        .port();
                    sockets.push(socket);
                }
                Err(error) if may_lack && lacks_address(&error) => {}
                Err(error) => return Err(bind_error(address, error)),
            }
        }
        Ok(Self { sockets })
    }

    /// Returns the bound addresses.
    #[must_use]
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets
            .iter()
            .filter_map(|socket| socket.local_addr().ok())
            .collect()
    }

    /// Accepts until `drain` starts, and serves each client as a task of it. The sockets are closed at return.
    pub(super) async fn run<S, F>(self, drain: &Drain, admission: &Admission, serve: S)
    where
        S: Fn(TcpStream, SocketAddr, Admitted) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        let failing = Notice::default();
        let loops: FuturesUnordered<_> = self
            .sockets
            .iter()
            .map(|socket| accept(socket, drain, admission, &failing, &serve))
            .collect();
        tokio::select! {
            () = drain.started() => {}
            () = loops.collect() => {}
        }
    }
}

async fn accept<S, F>(socket: &TcpListener, drain: &Drain, admission: &Admission, failing: &Notice, serve: &S)
where
    S: Fn(TcpStream, SocketAddr, Admitted) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut pause = ACCEPT_PAUSE;
    loop {
        match socket.accept().await {
            Ok((stream, client)) => {
                pause = ACCEPT_PAUSE;
                // Not before: a place that waits for a client is one less for the other sockets.
                let place = admission.place().await;
                let Some(admitted) = admission.admit(place, client.ip()) else {
                    continue;
                };
                if !INHERITED {
                    set_options(&SockRef::from(&stream));
                }
                drain.spawn(serve(stream, client, admitted));
            }
            Err(error) if is_of_one_connection(&error) => {
                debug!(%error, "a client left before it was accepted")
            }
            Err(error) => {
                if failing.due().is_some() {
                    warn!(
                        %error,
                        "cannot accept connections, further ones wait; raise the limit of open files (ulimit -n) or lower --max-connections"
                    );
                }
                tokio::time::sleep(pause).await;
                pause = (2 * pause).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Whether a client's socket has the options of the listening one. Linux copies them with the rest of the socket
/// (`inet_csk_clone_lock`), which saves four calls for each connection; POSIX does not say.
const INHERITED: bool = cfg!(target_os = "linux");

/// Sets what clients' sockets are to have; a refusal changes nothing else.
fn set_options(socket: &SockRef<'_>) {
    // Small frames of HTTP/2 and gRPC must not wait for Nagle's algorithm.
    let _ = socket.set_tcp_nodelay(true);
    // A client that vanished must not hold a stream for ever.
    let probes = TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(PROBE);
    let _ = socket.set_tcp_keepalive(&probes);
}

/// Whether a failed accept is about the connection that was to be accepted, and says nothing of the next one (accept(2)).
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// Binds without tokio's default dual stack on `[::]`, so that the IPv4 socket of the same port is no conflict.
fn bind_one(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    #[cfg(not(windows))]
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    if INHERITED {
        set_options(&SockRef::from(&socket));
    }
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Connections that may wait for accept; the kernel caps it at `net.core.somaxconn`, 4096 on current Linux.
const BACKLOG: i32 = 4096;

/// Whether the machine has no such address, as without IPv6.
fn lacks_address(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(EAFNOSUPPORT)
}

/// "Address family not supported by protocol", for which `io::ErrorKind` has no stable name.
const EAFNOSUPPORT: i32 = if cfg!(target_os = "linux") {
    97
} else if cfg!(windows) {
    10047
} else {
    47
};

fn bind_error(address: SocketAddr, error: io::Error) -> BindError {
    match error.kind() {
        io::ErrorKind::AddrInUse => BindError::Taken(address),
        io::ErrorKind::PermissionDenied => BindError::Forbidden(address),
        _ => BindError::Other(address, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn port_zero_is_one_free_port_on_all_addresses() {
        let listener = Listener::bind(&Bind::Loopback, 0).unwrap();
        let ports: Vec<_> = listener.addresses().iter().map(SocketAddr::port).collect();
        assert!(
            ports[0] > 0 && ports.iter().all(|port| *port == ports[0]),
            "{ports:?}"
        );
    }

    #[tokio::test]
    async fn a_taken_port_fails_with_the_way_out() {
        let first = Listener::bind(&Bind::Loopback, 0).unwrap();
        let port = first.addresses()[0].port();
        let error = Listener::bind(&Bind::Loopback, port).unwrap_err();
        assert!(matches!(error, BindError::Taken(_)));
        let text = error.to_string();
        assert!(
            text.contains("already in use") && text.contains("-port="),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_clients_socket_waits_for_nothing_and_notices_a_client_that_vanished() {
        let listener = Listener::bind(&Bind::Addresses(vec![Ipv4Addr::LOCALHOST.into()]), 0).unwrap();
        let address = listener.addresses()[0];
        let (drain, (seen, looked)) = (Drain::new(), tokio::sync::oneshot::channel());
        let seen = std::sync::Mutex::new(Some(seen));
        let admission = Admission::new(1, None);
        let serving = listener.run(&drain, &admission, |stream, _, _| {
            let socket = SockRef::from(&stream);
            let options = (
                socket.tcp_nodelay().unwrap(),
                socket.keepalive().unwrap(),
                socket.tcp_keepalive_time().unwrap(),
                socket.tcp_keepalive_interval().unwrap(),
            );
            seen.lock().unwrap().take().unwrap().send(options).unwrap();
            async {}
        });
        let client = async {
            let _client = TcpStream::connect(address).await.unwrap();
            looked.await.unwrap()
        };
        let options = tokio::select! {
            () = serving => unreachable!("it was not drained"),
            options = client => options,
        };
        assert_eq!(options, (true, true, KEEP_ALIVE, PROBE));
    }

    #[test]
    fn bind_prints_as_it_is_read() {
        for text in ["loopback", "all", "127.0.0.2", "127.0.0.2,::1"] {
            assert_eq!(text.parse::<Bind>().unwrap().to_string(), text);
        }
        assert!("localhost".parse::<Bind>().is_err());
    }
}
