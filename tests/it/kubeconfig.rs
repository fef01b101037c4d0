//! The kubeconfig as kubectl reads it (contract B4).

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use http::StatusCode;
use k8s_openapi::ByteString;
use kube_tunnel::testing::{FakeCluster, Identity, Workload};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::app::{PATIENCE, TestApp, web};
use crate::client::fetch;
use crate::program::{Lines, Running, path, program};
use crate::transport::submit;

/// How often refused credentials are renewed.
const RENEWAL: Duration = Duration::from_secs(10);

pub(crate) const WEB: &str = "web.shop.svc.cluster.local";

pub(crate) async fn cluster() -> (FakeCluster, Workload) {
    let cluster = FakeCluster::start().await.unwrap();
    let workload = web(&cluster, 1);
    (cluster, workload)
}

/// The credentials of a kubeconfig that a plugin gives.
#[cfg(unix)]
fn asking(plugin: &std::path::Path) -> String {
    format!(
        "exec:\n  apiVersion: client.authentication.k8s.io/v1\n  command: {}\n  interactiveMode: Never",
        plugin.display()
    )
}

/// Replaces the token of a kubeconfig by other credentials.
pub(crate) fn with_user(kubeconfig: &str, user: &str) -> String {
    let lines = kubeconfig.lines().map(|line| match line.find("token:") {
        Some(indent) => {
            let pad = " ".repeat(indent);
            user.lines().map(|line| format!("{pad}{line}\n")).collect()
        }
        None => format!("{line}\n"),
    });
    lines.collect()
}

#[tokio::test]
async fn a_list_of_files_is_merged_and_missing_ones_are_passed_over() {
    let (cluster, _workload) = cluster().await;
    let whole = cluster.kubeconfig();
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    // The first file to set a value wins: the current context is in one file, what it refers to in the other.
    let context = file("context", "apiVersion: v1\nkind: Config\ncurrent-context: fake\n");
    let rest = file(
        "rest",
        &whole.replace("current-context: fake", "current-context: other"),
    );
    // kubectl writes this where there is none.
    let empty = file("empty", "apiVersion: v1\nkind: Config\ncurrent-context: \"\"\n");
    let list = format!("{empty}:{context}:{}/missing:{rest}", folder.path().display());
    let mut command = program(&["-port=0"]);
    let mut running = Running(
        command
            .env("KUBECONFIG", list)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let _log = Lines::new(running.0.stderr.take().unwrap())
        .until("listening")
        .await;
    running.signal("-TERM");
    assert_eq!(running.wait().await.code(), Some(0));
}

#[tokio::test]
async fn the_default_file_is_in_the_home_folder() {
    let (cluster, _workload) = cluster().await;
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join(".kube")).unwrap();
    fs::write(home.path().join(".kube/config"), cluster.kubeconfig()).unwrap();
    let mut command = program(&["-port=0"]);
    let mut running = Running(
        command
            .env("HOME", home.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let _log = Lines::new(running.0.stderr.take().unwrap())
        .until("listening")
        .await;
    running.signal("-TERM");
    assert_eq!(running.wait().await.code(), Some(0));
}

#[cfg(unix)]
#[tokio::test]
async fn an_exec_plugin_gives_the_token_with_its_own_environment() {
    use std::os::unix::fs::PermissionsExt;
    let (cluster, _workload) = cluster().await;
    cluster.add_token("plugin", "plugin-token");
    let folder = tempfile::tempdir().unwrap();
    let plugin = folder.path().join("plugin");
    let credential = r#"{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"'$TOKEN'"}}"#;
    fs::write(&plugin, format!("#!/bin/sh\necho '{credential}'\n")).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    let user = asking(&plugin) + "\n  env:\n  - name: TOKEN\n    value: plugin-token";
    let app = TestApp::with(&with_user(&cluster.kubeconfig(), &user), &[]).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    assert!(
        cluster.calls().iter().all(|call| call.user == "plugin"),
        "{:?}",
        cluster.calls()
    );
}

#[tokio::test]
async fn a_token_is_read_from_a_file() {
    let (cluster, _workload) = cluster().await;
    cluster.add_token("file", "file-token");
    let token = tempfile::NamedTempFile::new().unwrap();
    fs::write(token.path(), "file-token\n").unwrap();
    for beside in ["", "token: an-old-one\n"] {
        let user = format!("{beside}tokenFile: {}", path(&token));
        cluster.clear_calls();
        let app = TestApp::with(&with_user(&cluster.kubeconfig(), &user), &[]).await;
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
        assert!(cluster.calls().iter().any(|call| call.user == "file"));
    }
}

#[cfg(unix)]
#[tokio::test]
async fn credentials_that_are_refused_are_renewed_and_the_request_does_not_notice() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (token, plugin) = (folder.path().join("token"), folder.path().join("plugin"));
    // It does not say when its token expires.
    let credential = r#"{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"'$(cat TOKEN)'"}}"#;
    let script = format!("#!/bin/sh\necho '{credential}'\n").replace("TOKEN", &token.display().to_string());
    fs::write(&plugin, script).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    let users = [asking(&plugin), format!("tokenFile: {}", token.display())];
    for user in users {
        let (cluster, _workload) = cluster().await;
        cluster.add_token("before", "token-before");
        cluster.add_token("after", "token-after");
        fs::write(&token, "token-before").unwrap();
        let app = TestApp::with(&with_user(&cluster.kubeconfig(), &user), &[]).await;
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
        cluster.expire_token("token-before");
        cluster.restart();
        // As long as there are no others, it is told.
        assert_eq!(
            submit(app.address, WEB, "/").await.status,
            StatusCode::UNAUTHORIZED
        );
        fs::write(&token, "token-after").unwrap();
        wait_for_renewal().await;
        let reply = submit(app.address, WEB, "/").await;
        assert_eq!(reply.status, StatusCode::OK, "{user}: {}", reply.text());
        assert!(cluster.calls().iter().any(|call| call.user == "after"));
    }
}

/// Lets the time pass in which refused credentials are not renewed again.
async fn wait_for_renewal() {
    tokio::time::pause();
    tokio::time::advance(RENEWAL).await;
    tokio::time::resume();
}

fn certificate(user: &str) -> Identity {
    Identity::ClientCertificate {
        name: user.into(),
        group: None,
    }
}

#[tokio::test]
async fn who_logs_in_again_need_not_start_it_again() {
    let token = |name: &str| Identity::Token(format!("token-{name}"));
    let ways = [
        [token("before"), token("after")],
        [certificate("before"), certificate("after")],
        [token("before"), certificate("after")],
    ];
    for identities in ways {
        let (cluster, _workload) = cluster().await;
        cluster.add_token("before", "token-before");
        cluster.add_token("after", "token-after");
        let [before, after] = identities
            .clone()
            .map(|identity| cluster.kubeconfig_for(&identity).unwrap());
        let app = TestApp::with(&before, &[]).await;
        let kubeconfig = app.folder.path().join("kubeconfig");
        assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
        cluster.expire_token("token-before");
        cluster.expire_certificates("before");
        cluster.restart();
        // While there are no others, or the file is being written, it is told.
        for text in [&before[..], ""] {
            fs::write(&kubeconfig, text).unwrap();
            wait_for_renewal().await;
            assert_eq!(
                submit(app.address, WEB, "/").await.status,
                StatusCode::UNAUTHORIZED
            );
        }
        // Whoever logs in may switch to another context on the way.
        let elsewhere = after.replace("current-context: fake", "current-context: other");
        fs::write(&kubeconfig, elsewhere).unwrap();
        wait_for_renewal().await;
        let reply = submit(app.address, WEB, "/").await;
        assert_eq!(reply.status, StatusCode::OK, "{identities:?}: {}", reply.text());
        assert!(cluster.calls().iter().any(|call| call.user == "after"));
    }
}

#[tokio::test]
async fn a_certificate_that_is_refused_before_any_request_is_renewed_as_well() {
    let (cluster, _workload) = cluster().await;
    let stranger = FakeCluster::start().await.unwrap();
    let foreign = stranger.kubeconfig_for(&certificate("stranger")).unwrap();
    let user: Vec<_> = (foreign.lines().map(str::trim))
        .filter(|line| line.starts_with("client-"))
        .collect();
    let foreign = with_user(&cluster.kubeconfig(), &user.join("\n"));
    cluster.add_token("before", "token-before");
    let [before, after] = [Identity::Token("token-before".into()), certificate("after")]
        .map(|identity| cluster.kubeconfig_for(&identity).unwrap());
    let app = TestApp::with(&before, &[]).await;
    let kubeconfig = app.folder.path().join("kubeconfig");
    cluster.expire_token("token-before");
    fs::write(&kubeconfig, foreign).unwrap();
    let reply = submit(app.address, WEB, "/").await;
    assert!(!reply.status.is_success(), "{}", reply.text());
    cluster.clear_calls();
    wait_for_renewal().await;
    let reply = submit(app.address, WEB, "/").await;
    assert!(!reply.status.is_success(), "{}", reply.text());
    assert_eq!(cluster.calls().len(), 0, "the handshake does not fail");
    fs::write(&kubeconfig, after).unwrap();
    wait_for_renewal().await;
    let reply = submit(app.address, WEB, "/").await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
}

#[tokio::test]
async fn a_login_of_an_oidc_provider_that_cannot_be_renewed_is_read_anew() {
    // An id token of JWT that ends then, and nothing to refresh it with.
    let login = |cluster: &FakeCluster, user: &str, lifetime: i64| {
        let expiry = jiff::Timestamp::now().as_second() + lifetime;
        let claims = ByteString(format!("{{\"exp\":{expiry}}}").into_bytes());
        let claims = serde_json::to_value(claims).unwrap();
        let token = format!("e30.{}.{user}", claims.as_str().unwrap().trim_end_matches('='));
        cluster.add_token(user, &token);
        let provider = format!("auth-provider:\n  name: oidc\n  config:\n    id-token: {token}");
        with_user(&cluster.kubeconfig(), &provider)
    };
    let (cluster, _workload) = cluster().await;
    // kube does not use one for its last ten seconds.
    let app = TestApp::with(&login(&cluster, "before", 12), &[]).await;
    let mut names = 0;
    let mut status = async || {
        names += 1;
        submit(app.address, &format!("missing-{names}.shop"), "/")
            .await
            .status
    };
    let refused = async {
        while status().await != StatusCode::UNAUTHORIZED {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();
    let again = login(&cluster, "after", 3600);
    fs::write(app.folder.path().join("kubeconfig"), again).unwrap();
    wait_for_renewal().await;
    let reply = submit(app.address, WEB, "/").await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    assert!(cluster.calls().iter().any(|call| call.user == "after"));
}

#[tokio::test]
async fn credentials_for_another_server_are_not_sent_to_this_one() {
    let (cluster, _workload) = cluster().await;
    cluster.add_token("before", "token-before");
    cluster.add_token("after", "token-after");
    let [before, after] = ["token-before", "token-after"]
        .map(|token| cluster.kubeconfig_for(&Identity::Token(token.into())).unwrap());
    let app = TestApp::with(&before, &[]).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    cluster.expire_token("token-before");
    cluster.restart();
    let elsewhere = after.replace("server: https://127.0.0.1:", "server: https://127.0.0.2:");
    assert_ne!(elsewhere, after);
    fs::write(app.folder.path().join("kubeconfig"), elsewhere).unwrap();
    assert_eq!(
        submit(app.address, WEB, "/").await.status,
        StatusCode::UNAUTHORIZED
    );
    assert!(cluster.calls().iter().all(|call| call.user != "after"));
}

#[cfg(unix)]
#[tokio::test]
async fn a_certificate_that_a_plugin_gave_is_renewed() {
    use std::os::unix::fs::PermissionsExt;
    let (cluster, _workload) = cluster().await;
    let folder = tempfile::tempdir().unwrap();
    let (printed, plugin) = (folder.path().join("printed"), folder.path().join("plugin"));
    fs::write(&plugin, format!("#!/bin/sh\ncat {}\n", printed.display())).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    let log_in = |name: &str| {
        let kubeconfig = cluster.kubeconfig_for(&certificate(name)).unwrap();
        let pem = |field: &str| {
            let line = kubeconfig
                .lines()
                .find_map(|line| line.trim().strip_prefix(field));
            let ByteString(bytes) = serde_json::from_value(line.unwrap().into()).unwrap();
            String::from_utf8(bytes).unwrap()
        };
        let credential = serde_json::json!({
            "apiVersion": "client.authentication.k8s.io/v1",
            "kind": "ExecCredential",
            "status": {
                "clientCertificateData": pem("client-certificate-data: "),
                "clientKeyData": pem("client-key-data: "),
            },
        });
        fs::write(&printed, credential.to_string()).unwrap();
    };
    log_in("before");
    let user = asking(&plugin);
    let app = TestApp::with(&with_user(&cluster.kubeconfig(), &user), &[]).await;
    assert_eq!(fetch(app.address, WEB, "/").await.status, StatusCode::OK);
    cluster.expire_certificates("before");
    cluster.restart();
    log_in("after");
    let reply = submit(app.address, WEB, "/").await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    assert!(cluster.calls().iter().any(|call| call.user == "after"));
}

#[cfg(unix)]
#[tokio::test]
async fn a_plugin_whose_credentials_are_refused_is_not_asked_for_each_request() {
    use std::os::unix::fs::PermissionsExt;
    let (cluster, _workload) = cluster().await;
    cluster.add_token("plugin", "plugin-token");
    let folder = tempfile::tempdir().unwrap();
    let (asked, plugin) = (folder.path().join("asked"), folder.path().join("plugin"));
    let credential = r#"{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"plugin-token"}}"#;
    let script = format!("#!/bin/sh\necho >> {}\necho '{credential}'\n", asked.display());
    fs::write(&plugin, script).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    let user = asking(&plugin);
    let app = TestApp::with(&with_user(&cluster.kubeconfig(), &user), &[]).await;
    let times = || fs::read_to_string(&asked).unwrap().lines().count();
    let before = times();
    cluster.expire_token("plugin-token");
    for service in ["one.shop", "two.shop", "three.shop", "four.shop"] {
        assert_eq!(
            fetch(app.address, service, "/").await.status,
            StatusCode::UNAUTHORIZED
        );
    }
    assert_eq!(times(), before + 1);
}

#[tokio::test]
async fn a_plain_http_server_under_a_base_path_is_asked_there() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = vec![0; 4096];
        let length = stream.read(&mut head).await.unwrap();
        let body = r#"{"major":"1","minor":"30","gitVersion":"v1.30.0","gitCommit":"","gitTreeState":"","buildDate":"","goVersion":"","compiler":"","platform":""}"#;
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8_lossy(&head[..length]).into_owned()
    });
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: 'http://{address}/k8s/clusters/c-1'}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n"
    );
    let _app = TestApp::with(&kubeconfig, &[]).await;
    let head = server.await.unwrap();
    assert!(
        head.starts_with("GET /k8s/clusters/c-1/version HTTP/1.1\r\n"),
        "{head}"
    );
    assert!(
        head.to_ascii_lowercase().contains("authorization: bearer t"),
        "{head}"
    );
}

#[tokio::test]
async fn another_context_is_chosen_by_flag() {
    let (cluster, _workload) = cluster().await;
    let stranger = cluster
        .kubeconfig_for(&Identity::Token("unknown".into()))
        .unwrap();
    let good = cluster.kubeconfig();
    // Both say "fake": the good one is renamed and stands beside the current one, which would be refused.
    let rename = |text: &str| text.replace("fake", "good");
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<_> = [("a", stranger), ("b", rename(&good))]
        .map(|(name, text)| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        })
        .into();
    let refused = program(&["-port=0"])
        .env("KUBECONFIG", files.join(":"))
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(1), "the current context was not used");
    let mut command = program(&["-port=0", "--context=good"]);
    let mut running = Running(
        command
            .env("KUBECONFIG", files.join(":"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let _log = Lines::new(running.0.stderr.take().unwrap())
        .until("listening")
        .await;
}
