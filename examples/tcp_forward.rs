//! Forwards local ports to ports of one pod, as raw bytes: `kubectl port-forward` with this library's transport.
//!
//! `cargo run --release --example tcp_forward -- NAMESPACE POD PORT...` prints the local address of each port and serves until
//! its standard input ends. The cluster is that of `KUBECONFIG`; `PORT_FORWARD` chooses the form (`auto`, `spdy`, `tunnel`, `channel`).
#![expect(clippy::print_stdout, reason = "an example talks to its user")]

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use kube_tunnel::drain::Drain;
use kube_tunnel::k8s::{Carriers, Cluster, Config, PortForward, SlowReaders};
use kube_tunnel::privileges::Account;
use kube_tunnel::proxy::relay;
use kube_tunnel::registry::PodRef;
use kube_tunnel::runtime;
use kube_tunnel::transport::{Connect, Target};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

// As in the program.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    runtime::build(None)?.block_on(forward())
}

async fn forward() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut argument = |name: &'static str| arguments.next().context(name);
    let (namespace, pod) = (argument("NAMESPACE")?, argument("POD")?);
    let ports: Vec<u16> = arguments
        .map(|port| port.parse().context("PORT"))
        .collect::<Result<_>>()?;
    anyhow::ensure!(!ports.is_empty(), "PORT");
    let carriers = std::env::var("PORT_FORWARD").unwrap_or_else(|_| "auto".into());
    let config = Config {
        kubeconfig: None,
        context: None,
        timeout: Duration::from_secs(10),
        poll_interval: Duration::from_secs(5),
        idle_timeout: Duration::from_mins(10),
        carriers: carriers.parse::<Carriers>()?,
        slow_readers: SlowReaders::default(),
        account: Account::default(),
    };
    let (cluster, drain) = (Cluster::load(&config).await?, Drain::new());
    let forward = Arc::new(PortForward::new(&cluster, &config, &drain));
    let pod = PodRef {
        namespace: namespace.into(),
        name: pod.into(),
        uid: "".into(),
    };
    for port in ports {
        let target = Target {
            pod: pod.clone(),
            port,
        };
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        println!("{}", listener.local_addr()?);
        let carriage = Arc::new((forward.clone(), target));
        drain.spawn(serve(listener, carriage, drain.clone()));
    }
    let mut input = tokio::io::stdin();
    let mut byte = [0];
    while matches!(input.read(&mut byte).await, Ok(1..)) {}
    Ok(())
}

/// Carries every connection to the pod, until the program ends.
async fn serve(listener: TcpListener, carriage: Arc<(Arc<PortForward>, Target)>, drain: Drain) {
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => return println!("cannot accept connections: {error}"),
        };
        let carriage = carriage.clone();
        drain.spawn(async move {
            let (forward, target) = &*carriage;
            let carried = match forward.connect(target).await {
                Ok(pod) => relay(client, pod)
                    .await
                    .map(drop)
                    .map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = carried {
                println!("a connection failed: {error}");
            }
        });
    }
}
