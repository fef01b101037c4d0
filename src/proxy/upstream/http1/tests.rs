use std::sync::atomic::Ordering;

use super::*;
use crate::proxy::upstream::Wire;
use crate::proxy::upstream::nobody::{self, Way};

struct Scene {
    way: Arc<Way>,
    pool: Arc<Pool>,
    shared: Arc<Shared>,
}

impl Scene {
    /// A pool for so many connections, one of which is idle.
    async fn new(places: usize) -> Self {
        let way = Arc::new(Way::default());
        let shared = nobody::shared(way.clone(), places);
        let scene = Self {
            way,
            pool: Pool::start(nobody::peer(Wire::Http1), places, &shared.drain),
            shared,
        };
        let first = scene.checkout().await;
        scene.put(first).await;
        scene
    }

    async fn checkout(&self) -> Connection {
        let checkout = self.pool.checkout(&self.shared, Fresh::No).await;
        checkout.unwrap_or_else(|error| panic!("{error}")).0
    }

    /// Gives a connection back once it can carry another request.
    async fn put(&self, mut connection: Connection) {
        assert!(connection.ready().await);
        self.pool.put(connection);
    }

    fn opened(&self) -> usize {
        self.way.opened.load(Ordering::Relaxed)
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_requests_for_the_last_place_the_other_gets_what_was_passed_over() {
    let scene = Scene::new(2).await;
    scene.way.bulk.store(1, Ordering::Relaxed);
    let begun = Instant::now();
    let _both = tokio::join!(scene.checkout(), scene.checkout());
    assert_eq!((scene.opened(), begun.elapsed()), (2, Duration::ZERO));
}

#[tokio::test(start_paused = true)]
async fn where_a_new_connection_was_no_better_the_old_ones_do_for_a_while() {
    let scene = Scene::new(100).await;
    scene.way.bulk.store(usize::MAX, Ordering::Relaxed);
    for _ in 0..10 {
        let connection = scene.checkout().await;
        scene.put(connection).await;
    }
    assert_eq!(scene.opened(), 2);
    tokio::time::advance(FUTILE).await;
    let connection = scene.checkout().await;
    scene.put(connection).await;
    assert_eq!(scene.opened(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_let_go_of_when_the_pod_closes_it() {
    let scene = Scene::new(1).await;
    tokio::time::sleep(2 * keeper::SOON).await;
    assert_eq!(scene.pool.open(), 1);
    let begun = Instant::now();
    scene.way.end.come();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    let idle = lock(&scene.pool.state).idle.len();
    assert_eq!((scene.pool.open(), idle, begun.elapsed()), (0, 0, Duration::ZERO));
}
