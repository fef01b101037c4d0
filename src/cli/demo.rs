//! `kube-tunnel demo`: a miniature cluster inside this process, the real proxy in front of it, and commands to paste.

use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context as _, Result};

use crate::cli::run;
use crate::config::setting;
use crate::config::{Config, Layers, Source};
use crate::privileges::Privileges;
use crate::testing::FakeCluster;
use crate::testing::Workload;
use crate::testing::backend::{Protocols, Serve};
use crate::tls::CertificateAuthority;

/// The namespace of the sample services.
const NAMESPACE: &str = "shop";

/// Runs the demo until a signal ends it. Without `--port` it takes a free high port, so that it runs beside anything.
pub(super) fn run(mut config: Config, layers: &Layers, privileges: Privileges) -> Result<ExitCode> {
    if layers.value(&setting::PORT).source == Source::Default {
        config.proxy.port = 0;
    }
    run::block_on(config.worker_threads, async {
        let mut signals = run::Signals::install()?;
        let cluster = FakeCluster::start()
            .await
            .context("cannot start the miniature cluster")?;
        let _workloads = sample_services(&cluster).context("cannot start the sample services")?;
        let folder = tempfile::Builder::new().prefix("kube-tunnel-demo-").tempdir()?;
        let kubeconfig = folder.path().join("kubeconfig");
        fs::write(&kubeconfig, cluster.kubeconfig()).context("cannot write the demo's kubeconfig")?;
        config.k8s.kubeconfig = Some(kubeconfig.clone());
        config.k8s.context = None;
        // The demo leaves nothing behind, its certificate authority included.
        config.state_dir = Some(folder.path().to_owned());

        let Some(app) = run::start(&config, privileges, &mut signals).await? else {
            return Ok(ExitCode::SUCCESS);
        };
        let port = app.addresses().first().context("no address is bound")?.port();
        let zone = &config.proxy.naming.zone;
        let certificate =
            CertificateAuthority::certificate_path(&folder.path().join("tls").join(zone.as_str()));
        let guide = guide(
            port,
            zone.as_str(),
            &kubeconfig.display().to_string(),
            &certificate.display().to_string(),
        );
        // Whether anybody reads the guide makes no difference to the demo.
        let _ = io::stdout().lock().write_all(guide.as_bytes());
        let code = run::until_stopped(app, signals).await;
        cluster.shutdown().await;
        code
    })
}

fn sample_services(cluster: &FakeCluster) -> io::Result<Vec<Workload>> {
    let http = || Serve::Http(Protocols::Any);
    Ok(vec![
        cluster
            .workload(NAMESPACE, "web")
            .port("http", 80, ("http", 8080))
            .serve(http())
            .replicas(2)
            .create()?,
        cluster
            .workload(NAMESPACE, "greeter")
            .port("grpc", 50051, 50051)
            .app_protocol("kubernetes.io/h2c")
            .serve(http())
            .replicas(2)
            .create()?,
        cluster
            .workload(NAMESPACE, "broken")
            .port("http", 80, 8080)
            .create()?,
    ])
}

fn guide(port: u16, zone: &str, kubeconfig: &str, certificate: &str) -> String {
    let host = |service: &str| format!("{service}.{NAMESPACE}.svc.{zone}");
    let (web, greeter, broken) = (host("web"), host("greeter"), host("broken"));
    format!(
        "
kube-tunnel demo: a miniature Kubernetes inside this process, with the real proxy in front of it.

  web      two pods, HTTP      {web}
  greeter  two pods, gRPC      {greeter}
  broken   a pod that refuses  {broken}

Paste into another terminal:

  # HTTP/1.1: ask twice, and both pods answer
  curl -H 'Host: {web}' http://localhost:{port}/

  # HTTP/2 in clear text and HTTPS, on the same port
  curl --http2-prior-knowledge -H 'Host: {web}' http://localhost:{port}/
  curl --cacert {certificate} --connect-to ::localhost:{port} https://{web}/

  # server-sent events arrive as they are written
  curl -N -H 'Host: {web}' 'http://localhost:{port}/sse?count=5&interval_ms=500'

  # a WebSocket that sends back what you type
  websocat -H 'Host: {web}' ws://localhost:{port}/ws

  # a large download through the port-forward
  curl -H 'Host: {web}' http://localhost:{port}/bytes/1073741824 -o /dev/null

  # gRPC: reflection, a call, a stream
  grpcurl -plaintext -authority {greeter} localhost:{port} list
  grpcurl -plaintext -authority {greeter} -d '{{\"name\": \"you\"}}' localhost:{port} demo.Greeter/Hello
  grpcurl -plaintext -authority {greeter} -d '{{\"to\": 5}}' localhost:{port} demo.Greeter/Count

  # what goes wrong says what to do
  curl -H 'Host: {broken}' http://localhost:{port}/
  curl -H 'Host: nosuch.{NAMESPACE}' http://localhost:{port}/

  # the proxy itself, and the miniature cluster as kubectl sees it
  curl http://localhost:{port}/health
  kubectl --kubeconfig {kubeconfig} get pods,services -n {NAMESPACE}

Each request is one line below. Ctrl-C ends everything.

"
    )
}
