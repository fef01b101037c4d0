//! Programs in other languages, and the tools of nghttp2, as they are used every day.

use crate::cluster::Namespace;
use crate::command::{Done, run_client};
use crate::hosts::run_with_hosts;
use crate::program::Proxy;
use crate::scene::Scene;

const NODE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cluster/node/client.mjs");
const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cluster/python/client.py");

/// Runs a client that goes through all that it can by itself, and lists that line by line.
async fn whole(proxy: &Proxy, shop: &Namespace, command: &[&str], listed: usize) {
    let (web, grpc) = (shop.host("web"), shop.host("grpc"));
    let port = proxy.address.port();
    let addresses = [format!("{web}:{port}"), format!("{grpc}:{port}")];
    let certificate = proxy.certificate();
    let mut arguments = command[1..].to_vec();
    arguments.extend(addresses.iter().map(String::as_str));
    arguments.push(certificate.to_str().unwrap());
    let done = run_with_hosts(proxy, &[&web, &grpc], command[0], &arguments).await;
    let lines = done.stdout.lines().count() + done.stderr.lines().count();
    assert!(done.success && lines == listed, "{}{}", done.stdout, done.stderr);
}

#[tokio::test]
async fn a_go_program_is_served_by_net_http_and_grpc_go() {
    let scene = Scene::together().await;
    whole(&Proxy::start().await, scene.shop, &["gohttp"], 6).await;
}

#[tokio::test]
async fn a_node_program_is_served_by_http_and_http2() {
    let scene = Scene::together().await;
    whole(&Proxy::start().await, scene.shop, &["node", NODE], 6).await;
}

#[tokio::test]
async fn a_python_program_is_served_by_httpx_and_grpcio() {
    let scene = Scene::together().await;
    whole(&Proxy::start().await, scene.shop, &["python3", PYTHON], 6).await;
}

#[tokio::test]
async fn curl_streams_a_post_and_sees_trailers_in_every_version() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let (host, connect) = (scene.shop.host("web"), format!("::{}", proxy.endpoint()));
    let certificate = proxy.certificate();
    let common = [
        "--silent",
        "--show-error",
        "--fail",
        "--cacert",
        certificate.to_str().unwrap(),
        "--connect-to",
        &connect,
    ];
    let mut body = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut body, &vec![7; 1 << 20]).unwrap();
    let upload = body.path().to_str().unwrap();
    for (flag, scheme) in [
        ("--http1.1", "http"),
        ("--http2", "http"),
        ("--http2-prior-knowledge", "http"),
        ("--http1.1", "https"),
        ("--http2", "https"),
    ] {
        let url = |path: &str| format!("{scheme}://{host}{path}");
        // Of unknown length, so that it goes in pieces.
        let chunked = [
            "--request",
            "POST",
            "--header",
            "Transfer-Encoding: chunked",
            "--upload-file",
        ];
        let done = run_client(
            "curl",
            &[&common[..], &[flag], &chunked, &[upload, &url("/upload?hash=0")]].concat(),
        )
        .await;
        assert!(
            done.success && done.stdout.contains("\"bytes\":1048576"),
            "{flag} {scheme}: {done:?}"
        );
        let show = ["--header", "TE: trailers", "--dump-header", "-"];
        let done = run_client(
            "curl",
            &[&common[..], &[flag], &show, &[&url("/trailers")]].concat(),
        )
        .await;
        assert!(
            done.success && done.stdout.to_ascii_lowercase().contains("x-body-sha256: "),
            "{flag} {scheme}: {done:?}"
        );
    }
}

/// Runs a tool of nghttp2 against `web`.
async fn nghttp2(
    proxy: &Proxy,
    shop: &Namespace,
    tool: &str,
    flags: &[&str],
    scheme: &str,
    path: &str,
) -> Done {
    let host = shop.host("web");
    let url = format!("{scheme}://{host}:{}{path}", proxy.address.port());
    run_with_hosts(proxy, &[&host], tool, &[flags, &[&url]].concat()).await
}

#[tokio::test]
async fn nghttp_gets_posts_and_sees_trailers() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let mut body = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut body, &vec![7; 300_000]).unwrap();
    let data = format!("--data={}", body.path().display());
    for (flags, scheme) in [(&[][..], "http"), (&["--upgrade"], "http"), (&[], "https")] {
        let verbose = [&["--verbose", "--null-out"], flags].concat();
        let done = nghttp2(&proxy, scene.shop, "nghttp", &verbose, scheme, "/trailers").await;
        assert!(
            done.success && done.stdout.contains(":status: 200") && done.stdout.contains("x-body-sha256: "),
            "{scheme} {flags:?}: {done:?}"
        );
        let posting = [
            &[data.as_str(), "--trailer=x-sent-last: yes", "--no-content-length"],
            flags,
        ]
        .concat();
        let done = nghttp2(&proxy, scene.shop, "nghttp", &posting, scheme, "/echo").await;
        assert!(
            done.success
                && done.stdout.contains("\"body_bytes\":300000")
                && done.stdout.contains("[\"X-Sent-Last\",\"yes\"]"),
            "{scheme} {flags:?}: {done:?}"
        );
    }
}

#[tokio::test]
async fn h2load_finds_no_failure_in_thousands_of_requests() {
    let scene = Scene::together().await;
    let proxy = Proxy::start().await;
    let load = ["--requests=3000", "--clients=20", "--max-concurrent-streams=10"];
    for (flags, scheme) in [
        (&[][..], "http"),
        (&["--h1"], "http"),
        (&[], "https"),
        (&["--h1"], "https"),
    ] {
        let done = nghttp2(
            &proxy,
            scene.shop,
            "h2load",
            &[&load, flags].concat(),
            scheme,
            "/bytes/1000",
        )
        .await;
        let whole = "3000 total, 3000 started, 3000 done, 3000 succeeded, 0 failed, 0 errored, 0 timeout";
        assert!(
            done.success && done.stdout.contains(whole) && done.stdout.contains("status codes: 3000 2xx"),
            "{scheme} {flags:?}: {done:?}"
        );
    }
}
