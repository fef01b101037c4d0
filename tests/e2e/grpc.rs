//! gRPC, as its official clients speak it.

use std::io::Write;

use crate::command::{Done, run_client};
use crate::program::Proxy;
use crate::scene::Scene;

/// Runs its arguments where the file named first takes the place of the system's hosts file.
const WITH_HOSTS: &str = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";

/// The cases of grpc/doc/interop-test-descriptions.md that need neither TLS nor credentials.
const INTEROP: [&str; 14] = [
    "empty_unary",
    "large_unary",
    "client_streaming",
    "server_streaming",
    "ping_pong",
    "empty_stream",
    "custom_metadata",
    "status_code_and_message",
    "special_status_message",
    "unimplemented_method",
    "unimplemented_service",
    "cancel_after_begin",
    "cancel_after_first_response",
    "timeout_on_sleeping_server",
];

async fn grpcurl(proxy: &Proxy, authority: &str, arguments: &[&str]) -> Done {
    let endpoint = proxy.endpoint();
    let common = ["-plaintext", "-max-time", "60", "-authority", authority];
    let (flags, words): (Vec<&str>, Vec<&str>) =
        arguments.iter().partition(|word| word.starts_with(['-', '{']));
    run_client(
        "grpcurl",
        &[&common, &flags[..], &[&endpoint], &words[..]].concat(),
    )
    .await
}

#[tokio::test]
async fn grpcurl_lists_describes_and_calls() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("grpc");
    for _ in 0..3 {
        let list = grpcurl(&proxy, &host, &["list"]).await.succeeded();
        assert!(
            list.contains("grpc.testing.TestService") && list.contains("grpc.health.v1.Health"),
            "{list}"
        );
    }
    let described = grpcurl(&proxy, &host, &["describe", "grpc.testing.TestService.UnaryCall"])
        .await
        .succeeded();
    assert!(described.contains("rpc UnaryCall"), "{described}");
    let health = grpcurl(&proxy, &host, &["grpc.health.v1.Health/Check"])
        .await
        .succeeded();
    assert!(health.contains("SERVING"), "{health}");
}

#[tokio::test]
async fn every_case_of_the_official_interop_client_passes() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("grpc");
    // The client names the host that it connects to, and knows no other way to say one.
    let mut hosts = tempfile::NamedTempFile::new().unwrap();
    writeln!(hosts, "{} {host}", proxy.address.ip()).unwrap();
    let hosts_path = hosts.path().to_str().unwrap();
    for case in INTEROP {
        let (host, port) = (
            format!("--server_host={host}"),
            format!("--server_port={}", proxy.address.port()),
        );
        let case_flag = format!("--test_case={case}");
        let client = ["grpc-interop-client", "--use_tls=false", &host, &port, &case_flag];
        let outside = [
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            WITH_HOSTS,
            "sh",
            hosts_path,
        ];
        let done = run_client("unshare", &[&outside[..], &client[..]].concat()).await;
        assert!(done.success, "{case}: {}{}", done.stdout, done.stderr);
    }
}

#[tokio::test]
async fn the_proxys_own_failures_are_grpc_statuses() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let dev = scene.restricted.kubeconfig_for("dev").await;
    let developers = Proxy::start_as(dev.path()).await;
    for (proxy, service, code) in [
        (&proxy, "missing", "NotFound"),
        (&proxy, "empty", "Unavailable"),
        (&developers, "grpc", "PermissionDenied"),
    ] {
        let done = grpcurl(proxy, &scene.shop.host(service), &["list"]).await;
        assert!(!done.success && done.stderr.contains(code), "{service}: {done:?}");
        assert!(
            done.stderr.contains("kubectl"),
            "{service} does not say what to do: {done:?}"
        );
    }
}
