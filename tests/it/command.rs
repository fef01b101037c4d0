//! The real binary: what it prints, how it ends, what it leaves behind.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use kube_tunnel::testing::{FakeCluster, Identity};

use crate::app::PATIENCE;
use crate::program::{Lines, Running, kubeconfig, path, program, run, run_command};

#[tokio::test]
async fn mistakes_end_with_one_line_and_the_right_code() {
    let garbage = kubeconfig("clusters: [");
    let empty = kubeconfig("apiVersion: v1\nkind: Config\n");
    let rows: [(&[&str], i32, &str); 9] = [
        (&["-prot=8080"], 2, "unexpected argument"),
        (&["-port=http"], 2, "expected a number from 0 to 65535"),
        (&["serve"], 2, "serve"),
        (
            &["--config", "/nonexistent/config.toml"],
            2,
            "/nonexistent/config.toml",
        ),
        (
            &["-port=0", "--kubeconfig", "/nonexistent/kubeconfig"],
            1,
            "/nonexistent/kubeconfig",
        ),
        (&["-port=0", "--kubeconfig", path(&garbage)], 1, "kubeconfig"),
        (&["-port=0", "--kubeconfig", path(&empty)], 1, "context"),
        (&["-port=0"], 1, "no kubeconfig found"),
        (&["-dns-only"], 1, "DNS server"),
    ];
    for (arguments, code, words) in rows {
        let done = run(arguments).await;
        assert_eq!(done.status, Some(code), "{arguments:?}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{arguments:?}: {}", done.stderr);
        assert!(done.stderr.contains(words), "{arguments:?}: {}", done.stderr);
        assert_eq!(done.stdout, "", "{arguments:?}");
    }
}

#[tokio::test]
async fn an_unreachable_server_and_an_expired_token_are_told_apart() {
    let cluster = FakeCluster::start().await.unwrap();
    let stranger = kubeconfig(
        &cluster
            .kubeconfig_for(&Identity::Token("expired".into()))
            .unwrap(),
    );
    let done = run(&["-port=0", "--kubeconfig", path(&stranger)]).await;
    assert_eq!(done.status, Some(1));
    assert!(
        done.stderr.contains("does not accept the credentials"),
        "{}",
        done.stderr
    );
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);

    let known = kubeconfig(&cluster.kubeconfig());
    cluster.shutdown().await;
    let done = run(&["-port=0", "--kubeconfig", path(&known)]).await;
    assert_eq!(done.status, Some(1));
    assert!(
        done.stderr.contains("cannot reach the API server") && done.stderr.contains("refused"),
        "{}",
        done.stderr
    );
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
}

#[tokio::test]
async fn a_taken_port_ends_the_start_with_the_way_out() {
    let cluster = FakeCluster::start().await.unwrap();
    let file = kubeconfig(&cluster.kubeconfig());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let done = run(&["-port", &port, "--kubeconfig", path(&file)]).await;
    assert_eq!(done.status, Some(1));
    assert!(
        done.stderr.contains("already in use") && done.stderr.contains("-port="),
        "{}",
        done.stderr
    );
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
}

#[tokio::test]
async fn help_version_config_and_cleanup_succeed() {
    for arguments in [&["-help"][..], &["-h"], &["--help"], &["run", "--help"]] {
        let done = run(arguments).await;
        assert_eq!(done.status, Some(0), "{arguments:?}");
        assert!(
            done.stdout.contains("--port") && done.stderr.is_empty(),
            "{arguments:?}"
        );
    }
    assert_eq!(
        run(&["--version"]).await.stdout,
        format!("kube-tunnel {}\n", env!("CARGO_PKG_VERSION"))
    );
    assert!(
        run(&["config", "-port=8080"])
            .await
            .stdout
            .contains("port = 8080 # --port")
    );
    let mut careless = program(&["config"]);
    let done = run_command(careless.env("PROXY_MAX_RETRIES", "many")).await;
    assert_eq!(done.status, Some(0));
    assert!(
        done.stdout.contains("max-retries = 3") && done.stderr.contains("PROXY_MAX_RETRIES"),
        "{}{}",
        done.stdout,
        done.stderr
    );
    let cleanup = run(&["-cleanup"]).await;
    assert!(
        cleanup.status == Some(0) && cleanup.stderr.contains("nothing to undo"),
        "{}",
        cleanup.stderr
    );
}

#[tokio::test]
async fn flags_of_features_to_come_are_accepted_and_say_so() {
    let cluster = FakeCluster::start().await.unwrap();
    let file = kubeconfig(&cluster.kubeconfig());
    let mut command = program(&["-no-dns", "-no-mdns", "-port=0", "--kubeconfig", path(&file)]);
    let mut running = Running(command.stderr(Stdio::piped()).spawn().unwrap());
    let stderr = BufReader::new(running.0.stderr.take().unwrap());
    let reading = tokio::task::spawn_blocking(move || {
        let mut seen = Vec::new();
        for line in stderr.lines().map_while(Result::ok) {
            let listening = line.contains("listening");
            seen.push(line);
            if listening {
                break;
            }
        }
        seen
    });
    let seen = tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
    for flag in ["--no-dns", "--no-mdns"] {
        let count = seen.iter().filter(|line| line.contains(flag)).count();
        assert_eq!(count, 1, "{flag}: {seen:#?}");
    }
    running.signal("-TERM");
    assert_eq!(running.wait().await.code(), Some(0));
}

#[cfg(unix)]
#[tokio::test]
async fn the_demo_shows_commands_that_work_and_ends_at_ctrl_c() {
    use crate::app::client_config;
    use crate::client::{Client, fetch};
    use crate::http::greet;
    use crate::tls::connect_to;
    use kube_tunnel::k8s::Cluster;
    use std::path::Path;

    const WEB: &str = "web.shop.svc.cluster.local";
    const BROKEN: &str = "broken.shop.svc.cluster.local";
    let mut running = Running(
        program(&["demo"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let stdout = BufReader::new(running.0.stdout.take().unwrap());
    let (printed, guide) = tokio::sync::oneshot::channel();
    let reading = tokio::task::spawn_blocking(move || {
        let mut printed = Some(printed);
        let mut text = String::new();
        for line in stdout.lines().map_while(Result::ok) {
            text.push_str(&line);
            text.push('\n');
            // The guide's last line.
            if line.contains("Ctrl-C")
                && let Some(printed) = printed.take()
            {
                printed.send(text.clone()).unwrap();
            }
        }
    });
    let guide = tokio::time::timeout(PATIENCE, guide)
        .await
        .expect("the demo printed no guide")
        .unwrap();
    let after = |words: &str| guide.split(words).nth(1).unwrap();
    let word = |words: &str| after(words).split_whitespace().next().unwrap();
    let port: u16 = word("http://localhost:").trim_end_matches('/').parse().unwrap();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));

    let reply = fetch(address, WEB, "/").await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert_eq!(fetch(address, BROKEN, "/").await.status, 502);
    let events = fetch(address, WEB, "/sse?count=2&interval_ms=1").await.text();
    assert_eq!(events.matches("data:").count(), 2, "{events}");
    let hello = greet(&mut Client::h2c(address).await).await;
    assert!(hello.message.contains("you"), "{hello:?}");

    let trusted = Path::new(word("--cacert "));
    let stream = connect_to(address, trusted, WEB, &["http/1.1"], rustls::DEFAULT_VERSIONS)
        .await
        .unwrap();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    assert_eq!(Client::Http1(sender).get(WEB, "/").await.status, 200);

    let kubeconfig = Path::new(word("--kubeconfig "));
    let kubernetes = Cluster::load(&client_config(kubeconfig)).await.unwrap();
    kubernetes.check().await.unwrap();

    running.signal("-INT");
    assert_eq!(running.wait().await.code(), Some(0));
    tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
    let left = [trusted, kubeconfig].into_iter().find(|path| path.exists());
    assert_eq!(left, None, "left behind");
}

#[cfg(unix)]
#[tokio::test]
async fn a_second_signal_ends_at_once() {
    use tokio::io::AsyncWriteExt;
    let cluster = FakeCluster::start().await.unwrap();
    let any = kube_tunnel::testing::backend::Serve::Http(kube_tunnel::testing::backend::Protocols::Any);
    let _workload = cluster
        .workload("shop", "web")
        .port("http", 80, 8080)
        .serve(any)
        .create()
        .unwrap();
    let file = kubeconfig(&cluster.kubeconfig());
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let port = free.port().to_string();
    let mut command = program(&["-port", &port, "--bind=127.0.0.1", "--kubeconfig", path(&file)]);
    let mut running = Running(command.stderr(Stdio::piped()).spawn().unwrap());
    let stderr = Lines::new(running.0.stderr.take().unwrap());
    let stderr = stderr.until("listening").await;
    // A request that does not end by itself.
    let mut stream = tokio::net::TcpStream::connect(free).await.unwrap();
    stream
        .write_all(b"GET /sse?count=100000 HTTP/1.1\r\nHost: web.shop\r\n\r\n")
        .await
        .unwrap();
    let mut first = [0; 12];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut first)
        .await
        .unwrap();
    running.signal("-INT");
    let _stderr = stderr.until("stopping").await;
    running.signal("-INT");
    assert_eq!(running.wait().await.code(), Some(1));
}
