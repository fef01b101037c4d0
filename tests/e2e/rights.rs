//! Users who may not do everything.

use crate::client::fetch;
use crate::command::eventually;
use crate::program::Proxy;
use crate::scene::Scene;

#[tokio::test]
async fn the_rights_of_a_developer_reach_their_own_namespace_only() {
    let scene = Scene::together().await;
    let kubeconfig = scene.restricted.kubeconfig_for("dev").await;
    let proxy = Proxy::start_as(kubeconfig.path()).await;
    for _ in 0..3 {
        fetch(proxy.address, &scene.restricted.host("web"), "/health")
            .await
            .pod();
    }
    let reply = fetch(proxy.address, &scene.shop.host("web"), "/health").await;
    assert_eq!(reply.status, 403, "{}", reply.text());
    for words in [
        "cannot ",
        "resource \"services\"",
        &scene.shop.name,
        "kubectl auth can-i",
    ] {
        assert!(reply.text().contains(words), "no {words:?} in {}", reply.text());
    }
}

#[tokio::test]
async fn whoever_may_list_services_and_pods_and_open_port_forwards_needs_no_more() {
    let scene = Scene::alone().await;
    let own = scene.restricted;
    let kubeconfig = own.kubeconfig_for("seed").await;
    let proxy = Proxy::start_as(kubeconfig.path()).await;
    let host = own.host("web");
    let pod = fetch(proxy.address, &host, "/health").await.pod();
    // Nobody tells it of the change: it may not watch.
    own.kubectl(&["delete", "pod", &pod, "--grace-period=0", "--force"])
        .await
        .succeeded();
    let answered_by = async || {
        let reply = fetch(proxy.address, &host, "/health").await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        reply.pod()
    };
    // A forced deletion returns before the kubelet has ended the pod, which answers until then.
    eventually("another pod to answer", async || answered_by().await != pod).await;
    for _ in 0..20 {
        assert_ne!(answered_by().await, pod);
    }
}

#[tokio::test]
async fn a_user_without_rights_learns_which_one_is_missing() {
    let scene = Scene::together().await;
    let kubeconfig = scene.restricted.kubeconfig_for("nobody").await;
    let proxy = Proxy::start_as(kubeconfig.path()).await;
    let reply = fetch(proxy.address, &scene.restricted.host("web"), "/health").await;
    assert_eq!(reply.status, 403, "{}", reply.text());
    for words in ["resource \"services\"", "kubectl auth can-i"] {
        assert!(reply.text().contains(words), "no {words:?} in {}", reply.text());
    }
}

#[tokio::test]
async fn a_reader_who_may_not_forward_learns_it() {
    let scene = Scene::together().await;
    let own = scene.restricted;
    let rules = [
        "--verb=get,list,watch",
        "--resource=services,pods,endpointslices.discovery.k8s.io",
    ];
    own.kubectl(&[&["create", "role", "reader"], &rules[..]].concat())
        .await
        .succeeded();
    own.add_account("reader", "reader").await;
    let kubeconfig = own.kubeconfig_for("reader").await;
    let proxy = Proxy::start_as(kubeconfig.path()).await;
    let reply = fetch(proxy.address, &own.host("web"), "/health").await;
    assert_eq!(reply.status, 403, "{}", reply.text());
    for words in ["cannot", "pods/portforward", "kubectl auth can-i --list -n"] {
        assert!(reply.text().contains(words), "no {words:?} in {}", reply.text());
    }
}

#[tokio::test]
async fn a_forged_token_does_not_start() {
    let scene = Scene::together().await;
    let kubeconfig = scene.restricted.kubeconfig_for("dev").await;
    let mut config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(kubeconfig.path()).unwrap()).unwrap();
    config["users"][0]["user"]["token"] = "forged".into();
    std::fs::write(kubeconfig.path(), config.to_string()).unwrap();
    let done = Proxy::fails(&["--kubeconfig", kubeconfig.path().to_str().unwrap()]).await;
    assert!(
        !done.success && done.stderr.contains("does not accept the credentials"),
        "{done:?}"
    );
}

#[tokio::test]
async fn who_logs_in_again_need_not_start_it_again() {
    let scene = Scene::together().await;
    let own = scene.restricted;
    own.add_account("leaving", "dev").await;
    let kubeconfig = own.kubeconfig_for("leaving").await;
    let proxy = Proxy::start_as(kubeconfig.path()).await;
    // Names that nobody has asked for: what is known already needs no credentials.
    let mut names = 0;
    let mut status = async || {
        names += 1;
        let host = own.host(&format!("missing-{names}"));
        fetch(proxy.address, &host, "/").await.status
    };
    assert_eq!(status().await, 404);
    own.kubectl(&["delete", "serviceaccount", "leaving"])
        .await
        .succeeded();
    // The API server believes a token for ten more seconds.
    eventually("the credentials to be refused", async || status().await == 401).await;
    let again = own.kubeconfig_for("dev").await;
    std::fs::copy(again.path(), kubeconfig.path()).unwrap();
    eventually("the new ones to be used", async || status().await == 404).await;
    fetch(proxy.address, &own.host("web"), "/health").await.pod();
}
