//! The cluster under test: namespaces of this run, filled with the manifests of `tests/cluster`, by kubectl.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::SystemTime;

use serde_json::Value;

use crate::command::{Done, eventually, in_time, run, run_with_input};

const BASE: &str = include_str!("../cluster/manifests/base.yaml");
const RBAC: &str = include_str!("../cluster/manifests/rbac.yaml");

/// The image that the manifests name.
const IMAGE: &str = "kube-tunnel-test/server:dev";

/// The label of every namespace of this run.
const LABEL: &str = "kube-tunnel-e2e";

/// This run's part of the names that it makes.
static RUN: LazyLock<String> = LazyLock::new(|| {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos();
    format!("{:08x}", (now as u32) ^ std::process::id())
});

/// Deletes this run's namespaces once this process, however it ends, lets go of the pipe. In a process group of its own
/// it outlives what ends the tests.
static JANITOR: LazyLock<Child> = LazyLock::new(|| {
    let script = format!(
        "read -r _; kubectl delete namespace -l {LABEL}={} --wait=false",
        *RUN
    );
    let mut janitor = Command::new("sh");
    janitor.args(["-c", &script]).process_group(0);
    janitor
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
});

/// A namespace that this run made.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) name: String,
}

impl Namespace {
    /// Makes an empty namespace.
    pub(crate) async fn create(purpose: &str) -> Self {
        let name = format!("kube-tunnel-e2e-{}-{purpose}", *RUN);
        let labels = format!("{{\"{LABEL}\": \"{}\"}}", *RUN);
        let text = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {labels}}}\n");
        // Before there is anything to clean up.
        LazyLock::force(&JANITOR);
        run_with_input("kubectl", &["apply", "-f", "-"], &text)
            .await
            .succeeded();
        let namespace = Self { name };
        // Pods are refused until the controller has made it.
        eventually("the default service account", async || {
            namespace
                .kubectl(&["get", "serviceaccount", "default"])
                .await
                .success
        })
        .await;
        namespace
    }

    /// Makes a namespace with everything of `base.yaml`.
    pub(crate) async fn base(purpose: &str) -> Self {
        let namespace = Self::create(purpose).await;
        namespace.apply(BASE).await;
        namespace.rolled_out("deployment/web").await;
        namespace.rolled_out("statefulset/db").await;
        for service in ["web", "multi", "grpc", "headless", "db"] {
            namespace.ready_endpoints(service, 2).await;
        }
        namespace
    }

    /// Makes a namespace with nothing but the Deployment and the Service `web`.
    pub(crate) async fn web(purpose: &str) -> Self {
        let namespace = Self::create(purpose).await;
        namespace.apply(&part("Deployment", "web")).await;
        namespace.apply(&part("Service", "web")).await;
        namespace.rolled_out("deployment/web").await;
        namespace.ready_endpoints("web", 2).await;
        namespace
    }

    /// Makes the namespace of `rbac.yaml`, under a name of this run.
    pub(crate) async fn restricted() -> Self {
        let namespace = Self::create("restricted").await;
        let text = RBAC.replace("namespace: restricted", &format!("namespace: {}", namespace.name));
        let objects: Vec<_> = text
            .split("\n---\n")
            .filter(|text| !text.contains("kind: Namespace"))
            .collect();
        namespace.apply(&objects.join("\n---\n")).await;
        namespace.rolled_out("deployment/web").await;
        namespace.ready_endpoints("web", 1).await;
        namespace
    }

    /// Returns the host of a Service, or of a pod of one.
    pub(crate) fn host(&self, service: &str) -> String {
        format!("{service}.{}.svc.cluster.local", self.name)
    }

    /// Creates or changes objects.
    pub(crate) async fn apply(&self, text: &str) {
        let text = match std::env::var("KUBE_TUNNEL_TEST_IMAGE") {
            Ok(image) => text.replace(IMAGE, &image),
            Err(_) => text.to_owned(),
        };
        let arguments = ["--namespace", &self.name, "apply", "-f", "-"];
        run_with_input("kubectl", &arguments, &text).await.succeeded();
    }

    /// Runs kubectl in this namespace.
    pub(crate) async fn kubectl(&self, arguments: &[&str]) -> Done {
        let here = ["--namespace", &self.name];
        run("kubectl", &[&here, arguments].concat()).await
    }

    /// Waits until a workload runs as its template says.
    pub(crate) async fn rolled_out(&self, workload: &str) {
        self.kubectl(&["rollout", "status", workload, "--timeout=110s"])
            .await
            .succeeded();
    }

    /// Waits until that many endpoints of a Service are ready.
    pub(crate) async fn ready_endpoints(&self, service: &str, count: usize) {
        let label = format!("kubernetes.io/service-name={service}");
        let path = "jsonpath={.items[*].endpoints[*].conditions.ready}";
        let ready = async || {
            let done = self
                .kubectl(&["get", "endpointslices", "-l", &label, "-o", path])
                .await;
            done.succeeded().matches("true").count() == count
        };
        if !in_time(ready).await {
            let kinds = "pods,endpointslices,events";
            let found = self.kubectl(&["get", kinds, "-o", "wide"]).await.succeeded();
            panic!("not {count} endpoints of {service}:\n{found}");
        }
    }

    /// Lists the pods of an application that are not on their way out.
    pub(crate) async fn pods(&self, app: &str) -> BTreeSet<String> {
        let text = self
            .kubectl(&["get", "pods", "-l", &format!("app={app}"), "-o", "json"])
            .await
            .succeeded();
        let list: Value = serde_json::from_str(&text).unwrap();
        let live = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
        let name = |pod: &Value| pod["metadata"]["name"].as_str().unwrap().to_owned();
        list["items"]
            .as_array()
            .unwrap()
            .iter()
            .filter(live)
            .map(name)
            .collect()
    }

    /// Makes a service account with a role of this namespace.
    pub(crate) async fn add_account(&self, name: &str, role: &str) {
        self.kubectl(&["create", "serviceaccount", name])
            .await
            .succeeded();
        let (role, account) = (
            format!("--role={role}"),
            format!("--serviceaccount={}:{name}", self.name),
        );
        self.kubectl(&["create", "rolebinding", name, &role, &account])
            .await
            .succeeded();
    }

    /// Writes a kubeconfig for one of this namespace's service accounts.
    pub(crate) async fn kubeconfig_for(&self, account: &str) -> tempfile::NamedTempFile {
        let view = ["config", "view", "--raw", "--minify", "--flatten", "-o", "json"];
        let mut config: Value = serde_json::from_str(&run("kubectl", &view).await.succeeded()).unwrap();
        let token = self.kubectl(&["create", "token", account]).await.succeeded();
        config["users"][0]["user"] = serde_json::json!({"token": token.trim()});
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(config.to_string().as_bytes()).unwrap();
        file
    }
}

/// Takes one object out of `base.yaml`.
fn part(kind: &str, name: &str) -> String {
    let kind = format!("\nkind: {kind}\n");
    let names = [
        format!("\nmetadata:\n  name: {name}\n"),
        format!("\nmetadata: {{name: {name}}}\n"),
    ];
    let wanted = |text: &&str| text.contains(&kind) && names.iter().any(|name| text.contains(name));
    BASE.split("\n---\n").find(wanted).unwrap().to_owned()
}
