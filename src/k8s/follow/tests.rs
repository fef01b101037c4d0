use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use k8s_openapi::api::core::v1::Service;

use super::*;
use crate::k8s::Cluster;
use crate::k8s::scripted::{self, Then};

/// Follows a Service; the returned sender asks for a list.
fn following(cluster: &Cluster, timeout: Duration) -> (watch::Sender<()>, Following<Service>) {
    let (sender, recheck) = watch::channel(());
    let pace = Pace {
        poll: Duration::from_hours(1),
        timeout,
    };
    let api = Api::namespaced(cluster.client.clone(), "default");
    (sender, follow(api, Selection::Name("web".into()), pace, recheck))
}

/// More than any test takes.
const LONG: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_list_whose_body_stalls_fails_while_a_watch_starts_and_while_lists_are_polled() {
    let lists = AtomicUsize::new(0);
    let script = move |line: &str| match line.contains("watch=") {
        true => scripted::forbidden(),
        false if lists.fetch_add(1, Ordering::Relaxed) == 1 => scripted::empty_list(),
        false => scripted::stalled(),
    };
    let cluster = scripted::cluster(scripted::config(), script).await;
    let (_sender, mut following) = following(&cluster, Duration::from_millis(100));
    let stalled = |news: Option<Result<_, _>>| {
        let error: kube::Error = news.unwrap().map(|_: Vec<Service>| ()).unwrap_err();
        assert!(error.to_string().contains("did not end it"), "{error}");
    };
    stalled(following.next().await);
    assert!(following.next().await.unwrap().unwrap().is_empty());
    stalled(following.next().await);
}

#[tokio::test]
async fn a_forgotten_version_is_listed_anew_without_a_word() {
    let script = |line: &str| match line.contains("watch=") {
        true => scripted::answer(
            "200 OK",
            "{\"type\":\"ERROR\",\"object\":{\"kind\":\"Status\",\"apiVersion\":\"v1\",\"metadata\":{},\"status\":\"Failure\",\
             \"message\":\"too old resource version\",\"reason\":\"Expired\",\"code\":410}}\n",
        ),
        false => scripted::empty_list(),
    };
    let cluster = scripted::cluster(scripted::config(), script).await;
    let (_sender, mut following) = following(&cluster, LONG);
    for _ in 0..3 {
        following.next().await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_watch_that_was_refused_for_a_while_says_so_when_it_runs_again() {
    let watches = AtomicUsize::new(0);
    let script = move |line: &str| match line.contains("watch=") {
        true if watches.fetch_add(1, Ordering::Relaxed) == 0 => scripted::answer("503 Unavailable", "{}"),
        true => (
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n".into(),
            Then::Stall,
        ),
        false => scripted::empty_list(),
    };
    let cluster = scripted::cluster(scripted::config(), script).await;
    let (_sender, mut following) = following(&cluster, LONG);
    following.next().await.unwrap().unwrap();
    following.next().await.unwrap().unwrap_err();
    following.next().await.unwrap().unwrap();
}

#[tokio::test]
async fn a_watch_that_was_refused_is_tried_again_later() {
    let watches = Arc::new(AtomicUsize::new(0));
    let counted = watches.clone();
    let script = move |line: &str| match line.contains("watch=") {
        true => {
            counted.fetch_add(1, Ordering::Relaxed);
            scripted::forbidden()
        }
        false => scripted::empty_list(),
    };
    let cluster = scripted::cluster(scripted::config(), script).await;
    let (recheck, mut following) = following(&cluster, LONG);
    let mut list = async || {
        recheck.send_replace(());
        following.next().await.unwrap().unwrap();
    };
    for _ in 0..3 {
        list().await;
    }
    assert_eq!(watches.load(Ordering::Relaxed), 1);
    tokio::time::pause();
    tokio::time::advance(REFUSED).await;
    tokio::time::resume();
    for _ in 0..3 {
        list().await;
    }
    assert_eq!(watches.load(Ordering::Relaxed), 2);
}

#[test]
fn waits_grow_to_the_longest_and_begin_anew_after_a_good_time() {
    let mut now = Instant::now();
    let mut backoff = Backoff::new(now);
    let mut waits = Vec::new();
    for _ in 0..8 {
        let next = backoff.after_failure(now);
        waits.push((next - now).as_millis());
        now = next + Duration::from_millis(10);
    }
    assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    now += LONGEST_DELAY;
    assert_eq!(backoff.after_failure(now), now + FIRST_DELAY);
}
