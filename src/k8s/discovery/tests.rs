use super::*;
use crate::k8s::scripted::{self, Then};
use crate::registry::{self, Registry};

fn name(name: &str) -> ServiceName {
    ServiceName::new("default", name).unwrap()
}

/// Starts discovery for so many Services, with an API server that answers everything in the same way.
#[expect(
    clippy::disallowed_methods,
    reason = "the runtime of a test ends with it, and every task too"
)]
async fn discovery(limit: usize, script: fn(&str) -> (String, Then)) -> Registry {
    let config = scripted::config();
    let cluster = scripted::cluster(config.clone(), script).await;
    let drain = Drain::new();
    let forward = PortForward::new(&cluster, &config, &drain);
    let (registry, writer, interests) = registry::channel(Duration::from_secs(20));
    let discovery = Discovery {
        limit,
        ..Discovery::new(cluster, &config, writer, &forward)
    };
    tokio::spawn(discovery.run(interests, drain));
    registry
}

#[tokio::test]
async fn a_service_that_is_only_an_error_makes_room_for_another() {
    let registry = discovery(1, |_| scripted::forbidden()).await;
    for service in ["one", "two", "one"] {
        let error = registry.resolve(&name(service)).await.unwrap_err();
        assert_eq!((error.kind, &*error.message), (LookupErrorKind::Forbidden, "no"));
    }
}

#[tokio::test]
async fn when_no_service_can_go_the_next_is_told_that_there_are_too_many() {
    let registry = discovery(1, |_| scripted::stalled()).await;
    let (one, two, three) = (name("one"), name("two"), name("three"));
    tokio::select! {
        biased;
        answer = registry.resolve(&one) => panic!("answered by a server that stalls: {answer:?}"),
        refused = async { (registry.resolve(&two).await, registry.resolve(&three).await) } => {
            for refused in [refused.0, refused.1] {
                let error = refused.unwrap_err();
                assert_eq!(error.kind, LookupErrorKind::Unavailable);
                assert!(error.message.contains("too many different services"), "{error}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_end_in_order_after_their_time() {
    let now = Instant::now();
    let mut refusals = VecDeque::from([
        (name("one"), now + NEGATIVE_TTL),
        (name("two"), now + 2 * NEGATIVE_TTL),
    ]);
    assert_eq!(stale(&mut refusals).await, name("one"));
    assert_eq!(now.elapsed(), NEGATIVE_TTL);
    assert_eq!(stale(&mut refusals).await, name("two"));
}
