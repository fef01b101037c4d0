//! The real binary against a real cluster: `tests/cluster/e2e`, or `cargo test --test e2e` after `cargo build --release`.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `KUBECONFIG` | a cluster whose nodes have the test server's image; its user may do everything | must be set |
//! | `KUBE_TUNNEL_TEST_IMAGE` | that image | `kube-tunnel-test/server:dev` |
//! | `KUBE_TUNNEL_BIN` | the program | `target/release/kube-tunnel` |
//! | `KUBE_TUNNEL_SOAK_SECONDS` | how long each series of rollouts under load lasts | 20 |
//! | `KUBE_TUNNEL_CLUSTER_STATE` | says that the cluster is one of `tests/cluster/up`, with components to end | unset |
//!
//! `kubectl`, `curl`, `node`, `unshare`, `kill` and what `tests/cluster/tools` names come from `PATH`. What is missing is a failure, not a
//! skip; on a cluster of another kind leave out what ends components with `-- --skip outage`.
#![expect(
    clippy::unwrap_used,
    reason = "a failed step fails the test, and the panic says where"
)]

mod cancel;
mod cases;
mod client;
mod clients;
mod cluster;
mod command;
mod conformance;
mod delay;
mod events;
mod front;
mod grpc;
mod hosts;
mod http;
mod large;
mod lifecycle;
mod load;
mod note;
mod outage;
mod pods;
mod ports;
mod program;
mod protocols;
mod rights;
mod rolling;
mod rpc;
mod scene;
mod secure;
mod stalled;
mod traffic;
mod trouble;
