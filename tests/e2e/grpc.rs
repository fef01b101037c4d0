//! gRPC, as its official clients speak it.

use crate::command::{Done, run_client};
use crate::hosts::run_with_hosts;
use crate::program::Proxy;
use crate::scene::Scene;

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
async fn grpcurl_verifies_the_exported_certificate() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("grpc");
    let certificate = proxy.certificate();
    let trust = [
        "-cacert",
        certificate.to_str().unwrap(),
        "-max-time",
        "60",
        "-authority",
        &host,
    ];
    let words = [&proxy.endpoint(), "grpc.health.v1.Health/Check"];
    let done = run_client("grpcurl", &[&trust[..], &words].concat()).await;
    assert!(done.success && done.stdout.contains("SERVING"), "{done:?}");
    let done = run_client("grpcurl", &[&trust[2..], &words].concat()).await;
    assert!(!done.success, "trusted without the certificate: {done:?}");
}

#[tokio::test]
async fn every_case_of_the_official_interop_client_passes() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let host = scene.shop.host("grpc");
    for case in INTEROP {
        // The client names the host that it connects to, and knows no other way to say one.
        let (server, port) = (
            format!("--server_host={host}"),
            format!("--server_port={}", proxy.address.port()),
        );
        let case_flag = format!("--test_case={case}");
        let arguments = ["--use_tls=false", &server, &port, &case_flag];
        let done = run_with_hosts(&proxy, &[&host], "grpc-interop-client", &arguments).await;
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
