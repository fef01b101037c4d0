//! What a test finds: the namespaces that all share, and its turn.

use tokio::sync::{OnceCell, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::cluster::Namespace;

/// Tests that only use the cluster hold it together; those that disturb it, or measure, alone.
static TURN: RwLock<()> = RwLock::const_new(());

/// Made by whoever comes first.
static SHARED: OnceCell<[Namespace; 2]> = OnceCell::const_new();

/// The namespaces that all tests share, and which none may change.
pub(crate) struct Scene {
    /// Everything of `base.yaml`.
    pub(crate) shop: &'static Namespace,
    /// Everything of `rbac.yaml`.
    pub(crate) restricted: &'static Namespace,
    _turn: Turn,
}

#[expect(dead_code, reason = "held, not read")]
enum Turn {
    Together(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

impl Scene {
    /// Waits for its turn to run beside others.
    pub(crate) async fn together() -> Self {
        Self::with(Turn::Together(TURN.read().await)).await
    }

    /// Waits for its turn to run while no other test does.
    pub(crate) async fn alone() -> Self {
        Self::with(Turn::Alone(TURN.write().await)).await
    }

    async fn with(turn: Turn) -> Self {
        let [shop, restricted] = SHARED
            .get_or_init(async || {
                assert!(
                    std::env::var_os("KUBECONFIG").is_some(),
                    "KUBECONFIG names no cluster to test on; tests/cluster/e2e starts one"
                );
                let (shop, restricted) = tokio::join!(Namespace::base("shop"), Namespace::restricted());
                [shop, restricted]
            })
            .await;
        Self {
            shop,
            restricted,
            _turn: turn,
        }
    }
}
