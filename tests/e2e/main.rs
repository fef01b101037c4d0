//! The real binary against a real cluster: `tests/cluster/e2e`, or `cargo test --test e2e` after `cargo build --release`.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `KUBECONFIG` | a cluster whose nodes have the test server's image; its user may do everything | must be set |
//! | `KUBE_TUNNEL_TEST_IMAGE` | that image | `kube-tunnel-test/server:dev` |
//! | `KUBE_TUNNEL_BIN` | the program | `target/release/kube-tunnel` |
//! | `KUBE_TUNNEL_SOAK_SECONDS` | how long each series of rollouts under load lasts | 20 |
//! | `KUBE_TUNNEL_SOAK_CONNECTIONS` | how many short connections each path has to bear | 4000 |
//! | `KUBE_TUNNEL_CLUSTER_STATE` | says that the cluster is one of `tests/cluster/up`, with components to end and to look at | unset |
//!
//! `kubectl`, `curl`, `node`, `unshare`, `kill` and what `tests/cluster/tools` names come from `PATH`. What is missing is a failure, not a
//! skip; on a cluster of another kind leave out what ends components or looks at them with `-- --skip outage --skip wear`.
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
mod forward;
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
mod runtime;
mod scene;
mod secure;
mod stalled;
mod traffic;
mod trouble;
mod wear;
