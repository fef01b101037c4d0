use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::{Method, Request};

use super::*;
use crate::proxy::upstream::nobody::Way;

/// How a request fails over a stream of `way`, on which something else happens once it was sent.
async fn fail(way: Arc<Way>, meanwhile: impl Future<Output = ()>) -> Failure {
    let shared = nobody::shared(way, 1);
    let upstream = Upstream {
        shared,
        pools: Arc::default(),
        spoken: Arc::default(),
    };
    let mut request = Request::new(RequestBody::empty());
    *request.method_mut() = Method::POST;
    let peer = nobody::peer(Wire::Http1);
    let sending = upstream.send(&peer, Fresh::No, request);
    tokio::join!(sending, meanwhile).0.unwrap_err()
}

#[tokio::test]
async fn a_request_is_untouched_whose_connection_took_nothing_of_it() {
    let way = Arc::new(Way::default());
    way.broken.store(true, Ordering::Relaxed);
    let failure = fail(way, async {}).await;
    assert!(failure.untouched, "{failure:?}");
}

#[tokio::test]
async fn a_request_is_not_untouched_whose_connection_ended_later() {
    let way = Arc::new(Way::default());
    let (end, taken) = (way.end.clone(), way.taken.clone());
    let ended = async {
        while taken.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
        end.come();
    };
    let failure = fail(way, ended).await;
    assert!(!failure.untouched, "{failure:?}");
}
