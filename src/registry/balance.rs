//! Chooses the endpoint of a request: the one with the fewest requests under way, in turn where several have as few.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::registry::Endpoint;

/// Where the next tie begins; shared by all requests of a proxy.
#[derive(Debug, Default)]
pub struct Cursor(AtomicUsize);

/// Picks from `candidates` the endpoint with the least load, starting at the cursor so that ties go round.
///
/// Returns nothing only when there is no candidate.
pub fn pick<'a, T>(
    candidates: &'a [T],
    endpoint: impl Fn(&T) -> &Arc<Endpoint>,
    cursor: &Cursor,
) -> Option<&'a T> {
    let start = cursor
        .0
        .fetch_add(1, Ordering::Relaxed)
        .checked_rem(candidates.len())?;
    let (before, from) = candidates.split_at(start);
    // `min_by_key` keeps the first of equal minima, which the rotation makes a different one each time.
    from.iter()
        .chain(before)
        .min_by_key(|candidate| endpoint(candidate).load.get())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{Load, PodRef};
    use std::collections::BTreeMap;

    fn endpoints(count: usize) -> Vec<Arc<Endpoint>> {
        let endpoint = |number: usize| Endpoint {
            pod: PodRef {
                namespace: "ns".into(),
                name: number.to_string().into(),
                uid: "".into(),
            },
            addresses: Vec::new(),
            hostname: None,
            ready: true,
            terminating: false,
            ports: BTreeMap::new(),
            load: Arc::new(Load::default()),
        };
        (0..count).map(|number| Arc::new(endpoint(number))).collect()
    }

    #[test]
    fn idle_endpoints_take_turns() {
        let endpoints = endpoints(3);
        let cursor = Cursor::default();
        let mut seen: Vec<_> = (0..6)
            .map(|_| pick(&endpoints, |e| e, &cursor).unwrap().pod.name.to_string())
            .collect();
        seen.sort();
        assert_eq!(seen, ["0", "0", "1", "1", "2", "2"]);
    }

    #[test]
    fn a_busy_endpoint_is_passed_over() {
        let endpoints = endpoints(2);
        let cursor = Cursor::default();
        let _busy = endpoints[0].load.begin();
        for _ in 0..4 {
            assert_eq!(&*pick(&endpoints, |e| e, &cursor).unwrap().pod.name, "1");
        }
    }

    #[test]
    fn nothing_is_picked_from_nothing() {
        assert!(pick(&[], |e: &Arc<Endpoint>| e, &Cursor::default()).is_none());
    }

    #[test]
    fn the_load_falls_when_the_guard_goes() {
        let load = Arc::new(Load::default());
        let guard = load.begin();
        assert_eq!(load.get(), 1);
        drop(guard);
        assert_eq!(load.get(), 0);
    }
}
