//! Runs the whole program inside a test.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use kube_tunnel::app::App;
use kube_tunnel::config::{Config, Layers, Setting, setting};
use kube_tunnel::k8s::{self, Carriers, SlowReaders};
use kube_tunnel::privileges::{Account, Privileges};
use kube_tunnel::testing::backend::{Protocols, Serve};
use kube_tunnel::testing::{FakeCluster, Identity, Workload};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// No condition that a test waits for takes this long unless it never comes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A running proxy in front of a cluster. Dropping it ends the runtime's tasks with the test.
pub(crate) struct TestApp {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<()>,
    /// The kubeconfig and the program's state.
    pub(crate) folder: tempfile::TempDir,
}

impl TestApp {
    /// Starts with the administrator's kubeconfig.
    pub(crate) async fn start(cluster: &FakeCluster) -> Self {
        Self::with(&cluster.kubeconfig(), &[]).await
    }

    /// Starts as another user of the cluster.
    pub(crate) async fn start_as(cluster: &FakeCluster, identity: &Identity) -> Self {
        Self::with(&cluster.kubeconfig_for(identity).unwrap(), &[]).await
    }

    /// Starts with settings.
    pub(crate) async fn with(kubeconfig: &str, flags: &[(&'static Setting, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kubeconfig");
        std::fs::write(&file, kubeconfig).unwrap();
        let state = folder.path().to_str().unwrap().to_owned();
        let flags: Vec<_> = flags
            .iter()
            .copied()
            .chain([(&setting::STATE_DIR, state.as_str())])
            .collect();
        let app = App::bind(&config(file.to_str().unwrap(), &flags), Privileges::own())
            .await
            .unwrap();
        let address = app.addresses()[0];
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(async move {
            let stopped = async move { drop(stopped.await) };
            app.run(stopped, std::future::pending()).await.unwrap();
        });
        Self {
            address,
            stop: Some(stop),
            running,
            folder,
        }
    }

    /// Says that it shall stop.
    pub(crate) fn begin_stop(&mut self) {
        drop(self.stop.take());
    }

    /// Stops and waits for the end.
    pub(crate) async fn stop(mut self) {
        self.begin_stop();
        self.ended().await;
    }

    /// Waits for the end.
    pub(crate) async fn ended(self) {
        tokio::time::timeout(PATIENCE, self.running)
            .await
            .expect("the program did not end")
            .unwrap();
    }
}

/// The configuration of a test: any free port, short times where tests wait for them.
pub(crate) fn config(kubeconfig: &str, flags: &[(&'static Setting, &str)]) -> Config {
    let defaults: [(&'static Setting, &str); 4] = [
        (&setting::PORT, "0"),
        (&setting::KUBECONFIG, kubeconfig),
        (&setting::RETRY_DELAY_MS, "50"),
        (&setting::RESOLVE_TIMEOUT, "5s"),
    ];
    let all: Vec<_> = defaults
        .iter()
        .chain(flags)
        .map(|(setting, text)| (*setting, (*text).to_owned()))
        .collect();
    Config::new(&Layers::load(&all, None, |_| None).unwrap(), &Account::own()).unwrap()
}

/// The settings of a client that is not part of a whole program.
pub(crate) fn client_config(kubeconfig: &Path) -> k8s::Config {
    k8s::Config {
        kubeconfig: Some(kubeconfig.to_owned()),
        context: None,
        timeout: PATIENCE,
        poll_interval: PATIENCE,
        idle_timeout: PATIENCE,
        carriers: Carriers::default(),
        slow_readers: SlowReaders::default(),
        account: Account::default(),
    }
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap_or_else(|_| panic!("never happened: {what}"));
}

/// Waits for what the first request to a Service sets off besides: its two watches, and a session that is kept ready.
pub(crate) async fn settled(cluster: &FakeCluster) {
    eventually("both watches", || {
        cluster.calls().iter().filter(|call| call.verb == "watch").count() == 2
    })
    .await;
    let ready = cluster.forwards().until(|counts| counts.sessions_open == 2);
    tokio::time::timeout(PATIENCE, ready)
        .await
        .expect("no session was made ready");
}

/// Makes the Service `web` of the namespace `shop` with pods that speak both versions of HTTP.
pub(crate) fn web(cluster: &FakeCluster, replicas: usize) -> Workload {
    let any = Serve::Http(Protocols::Any);
    cluster
        .workload("shop", "web")
        .port("http", 80, ("http", 8080))
        .serve(any)
        .replicas(replicas)
        .create()
        .unwrap()
}
