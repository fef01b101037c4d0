//! How long what one side did takes to arrive at the other.

use std::time::SystemTime;

use crate::note::note;

/// The present, in nanoseconds since 1970, as the test server tells it.
pub(crate) fn now() -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as f64
}

/// Delays in milliseconds.
#[derive(Debug, Default)]
pub(crate) struct Delays(Vec<f64>);

impl Delays {
    /// Adds one, from two times in nanoseconds.
    pub(crate) fn add(&mut self, from: f64, to: f64) {
        self.0.push((to - from) / 1e6);
    }

    /// Says and returns the median and the worst. The clock of another machine differs: there only what comes on top of the
    /// shortest counts.
    pub(crate) fn report(mut self, what: &str) -> (f64, f64) {
        self.0.sort_by(f64::total_cmp);
        let clock = match std::env::var_os("KUBE_TUNNEL_CLUSTER_STATE") {
            Some(_) => 0.0,
            None => self.0[0],
        };
        let (median, worst) = (self.0[self.0.len() / 2] - clock, self.0[self.0.len() - 1] - clock);
        note(&format!(
            "{what}: median {median:.2} ms, worst {worst:.2} ms of {}",
            self.0.len()
        ));
        (median, worst)
    }
}
