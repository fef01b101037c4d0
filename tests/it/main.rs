//! The whole program on a free port against the in-process cluster.
#![expect(
    clippy::disallowed_methods,
    reason = "the runtime of a test ends with it, and every task too"
)]
#![expect(
    clippy::unwrap_used,
    reason = "a failed step fails the test, and the panic says where"
)]

mod app;
mod backends;
mod client;
mod command;
mod cut;
mod debug_log;
mod early;
mod errors;
mod http;
mod interim;
mod kubeconfig;
mod lifecycle;
mod limits;
mod load;
mod log;
mod lookup;
mod own;
mod program;
mod proxies;
#[cfg(target_os = "linux")]
mod sudo;
mod tls;
mod transport;
mod upgrade;
