//! The double seen from outside, through kube-rs and plain sockets.

mod api;
mod backends;
mod client;
mod closing;
mod faults;
mod forward;
mod scene;
mod spdy;
mod tunnel;

use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::{FakeCluster, Identity};

/// Longer than anything here takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// A client from a kubeconfig text.
async fn client_from(kubeconfig: &str) -> Client {
    // Another test may have been first.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig).unwrap();
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .unwrap();
    Client::try_from(config).unwrap()
}

async fn admin(cluster: &FakeCluster) -> Client {
    client_from(&cluster.kubeconfig()).await
}

async fn user(cluster: &FakeCluster, name: &str) -> Client {
    let token = format!("token-of-{name}");
    cluster.add_token(name, &token);
    client_from(&cluster.kubeconfig_for(&Identity::Token(token)).unwrap()).await
}

/// Fails a test that would otherwise hang.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("the test's deadline passed")
}
